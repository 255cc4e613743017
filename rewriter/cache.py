"""Where the library keeps what it has computed: generated code, measurements, converted checkpoints.

A cache that cannot be used costs time and nothing else: what it lacks is computed again, and the log says why.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sqlite3
import sys
import tempfile
from contextlib import closing, suppress
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

_NAME = "measured.sqlite3"
_TABLE = "remembered (kind, place, value, primary key (kind, place))"
_OURS = 0x72777231
"""The application id in the header of the file, by which SQLite's tools know its owner."""


def cache_dir(*parts: str) -> Path:
    """A folder below the cache, made if it is not there: `$REWRITER_CACHE`, else the platform's cache folder. Where
    that cannot be written, a folder that this process deletes at its end.
    """
    folder = _usable(_root()).joinpath(*parts)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _root() -> Path:
    if chosen := os.environ.get("REWRITER_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "rewriter"
    if local := os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME"):
        return Path(local) / "rewriter"
    return Path.home() / ".cache" / "rewriter"


@cache
def _usable(root: Path) -> Path:
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            return root
    except OSError as error:
        kept = tempfile.TemporaryDirectory(prefix="rewriter-")
        _KEPT.append(kept)
        log.warning(f"The cache {root} cannot be written ({error.strerror}): what is measured is forgotten at the end.")
        with suppress(OSError):
            shutil.copy(root / _NAME, kept.name)  # What it knows already can be used.
        return Path(kept.name)


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


def remember(kind: str, place: str, value: Any) -> None:
    """Keep a value, plain as JSON is, for later processes. It is kept whole or, where the disk is full, not at all."""
    try:
        text = json.dumps(value)
        _run("replace into remembered values (?, ?, ?)", kind, place, f"{_digest(text)} {text}")
    except sqlite3.OperationalError as error:
        log.warning(f"A measurement could not be kept in {cache_dir() / _NAME} ({error}): it will be taken again.")


def recall(kind: str, place: str) -> Any:
    """What was remembered, or None."""
    try:
        row = _run("select value from remembered where kind = ? and place = ?", kind, place)
    except sqlite3.OperationalError as error:
        log.warning(f"{cache_dir() / _NAME} could not be read ({error}): what it holds is measured again.")
        return None
    if row is None:
        return None
    known, _, text = str(row[0]).partition(" ")
    if known != _digest(text):
        log.warning(f"{cache_dir() / _NAME} holds a damaged {kind!r}: it is measured again.")
        return None
    return json.loads(text)


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:16]


def _run(statement: str, *values: str) -> Any:
    """The first row that it gives, from a file that is moved aside and begun anew if it is not ours or damaged."""
    path = cache_dir() / _NAME
    known = _identity(path)
    try:
        return _run_in(path, statement, values)
    except sqlite3.OperationalError:
        raise  # a full disk, or others that do not end writing
    except sqlite3.DatabaseError as error:
        if _identity(path) == known:  # else another process has done it, and this is the new one
            _move_aside(path, str(error))
        return _run_in(path, statement, values)


def _identity(path: Path) -> tuple[int, int] | None:
    """Of the file that has this name now."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _run_in(path: Path, statement: str, values: tuple[str, ...]) -> Any:
    # Others may be writing: SQLite waits for them.
    with closing(sqlite3.connect(path, timeout=30)) as database:
        (owner,) = database.execute("pragma application_id").fetchone()
        if owner != _OURS:
            tables = [sql for (sql,) in database.execute("select sql from sqlite_master where type = 'table'")]
            if owner or any(_TABLE not in sql for sql in tables):
                raise sqlite3.DatabaseError("it is another program's")
            database.execute("pragma journal_mode = wal")
            database.execute(f"pragma application_id = {_OURS}")
        with database:
            database.execute(f"create table if not exists {_TABLE}")
            return database.execute(statement, values).fetchone()


def _move_aside(path: Path, reason: str) -> None:
    """With its journals, which go first: those of the file that comes next have the same names."""
    number = 1
    while (aside := path.with_name(f"{path.name}.unusable-{number}")).exists():
        number += 1
    for end in ("-wal", "-shm", "-journal", ""):
        with suppress(FileNotFoundError):  # moved by another process just now, or there is none
            path.with_name(path.name + end).rename(aside.with_name(aside.name + end))
    log.warning(f"The cache file {path} cannot be used ({reason}): it is {aside.name} now, and a new one begins.")
