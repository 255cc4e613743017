"""Where the library keeps what it has computed: generated code, measurements, converted checkpoints."""

from __future__ import annotations

import json
import os
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def cache_dir(*parts: str) -> Path:
    """A folder below the cache, made if it is not there: `$REWRITER_CACHE`, else the platform's cache folder."""
    folder = _root().joinpath(*parts)
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


def remember(kind: str, place: str, value: Any) -> None:
    """Keep a value, plain as JSON is, for later processes."""
    with _database() as database:
        database.execute("replace into remembered values (?, ?, ?)", (kind, place, json.dumps(value)))


def recall(kind: str, place: str) -> Any:
    """What was remembered, or None."""
    with _database() as database:
        row = database.execute("select value from remembered where kind = ? and place = ?", (kind, place)).fetchone()
    return None if row is None else json.loads(row[0])


@contextmanager
def _database() -> Iterator[sqlite3.Connection]:
    # Others may be writing: SQLite waits for them.
    database = sqlite3.connect(cache_dir() / "measured.sqlite3", timeout=30)
    try:
        database.execute("create table if not exists remembered (kind, place, value, primary key (kind, place))")
        with database:
            yield database
    finally:
        database.close()
