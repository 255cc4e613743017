"""The cache: several processes, and files and folders that cannot be used."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from rewriter import cache
from rewriter.cache import cache_dir, recall, remember

FILE = "measured.sqlite3"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("REWRITER_CACHE", str(tmp_path))
    return tmp_path


def started(code: str, folder: Path) -> subprocess.Popen[str]:
    """Another process on the same cache, without the seconds that torch takes to load."""
    before = (
        "import importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('cache', {cache.__file__!r})\n"
        "cache = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(cache)\n"
        "remember, recall = cache.remember, cache.recall\n"
    )
    environment = {**os.environ, "REWRITER_CACHE": str(folder)}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([sys.executable, "-c", before + code], env=environment, text=True, **pipes)


def test_what_is_remembered_comes_back(folder: Path) -> None:
    assert recall("times", "a") is None
    for value in ({"x": [1.5, None, "µ"]}, 3, []):
        remember("times", "a", value)
        assert recall("times", "a") == value
    assert recall("errors", "a") is None
    with sqlite3.connect(folder / FILE) as database:
        assert database.execute("pragma journal_mode").fetchone() == ("wal",)


def test_two_processes_write_at_once(folder: Path) -> None:
    code = "for n in range(100): remember('{0}', str(n), n)"
    both = [started(code.format(name), folder) for name in ("one", "two")]
    for each in both:
        each.communicate(timeout=60)
        assert each.returncode == 0
    assert [[recall(name, str(n)) for n in range(100)] for name in ("one", "two")] == [list(range(100))] * 2


MODEL = """
import torch
from torch import nn

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 48)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.linear(x).chunk(3, -1))
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        weights = (q @ k.transpose(-2, -1)).masked_fill(hidden, float("-inf")).softmax(-1)
        return x + (weights @ v).transpose(1, 2).flatten(2)

def attention():
    torch.manual_seed(0)
    return nn.Sequential(Attention(), Attention()), torch.randn(1, 700, 16)

def batches():
    torch.manual_seed(1)
    return [torch.randn(1, 700, 16) for _ in range(12)]
"""


def test_two_searches_at_once(folder: Path, root: Path) -> None:
    """Each ends with a plan of its own, and a third has nothing left to measure."""
    (folder / "at_once.py").write_text(MODEL)
    environment = {**os.environ, "REWRITER_CACHE": str(folder), "PYTHONPATH": f"{root}{os.pathsep}{folder}"}

    def tuning(out: str) -> subprocess.Popen[str]:
        options = ["--calibration", "at_once:batches", "--device", "cpu", "--max-drop", "5%", "--out", out, "--json"]
        command = [sys.executable, "-m", "rewriter", "tune", "at_once:attention", *options]
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, env=environment, cwd=folder, text=True, **pipes)

    def ended(child: subprocess.Popen[str]) -> Any:
        out, said = child.communicate(timeout=300)
        assert child.returncode == 0 and "Traceback" not in said, said
        return json.loads(out)["plan"]

    both = [tuning("one.json"), tuning("other.json")]
    plans = [ended(child) for child in both]
    assert all(plan["guard"]["held"] and plan["search"]["evaluations"] > 0 for plan in plans)
    assert [json.loads((folder / name).read_text())["decisions"] for name in ("one.json", "other.json")] == [
        plan["decisions"] for plan in plans
    ]
    third = ended(tuning("third.json"))
    assert third["guard"]["held"] and third["search"]["evaluations"] == 0
    with sqlite3.connect(folder / FILE) as database:
        assert database.execute("pragma integrity_check").fetchone() == ("ok",)


@pytest.mark.skipif(os.name == "nt", reason="there is no kill -9")
def test_a_killed_process_loses_nothing_that_it_had_finished(folder: Path) -> None:
    writing = "n = 0\nwhile True:\n    remember('k', str(n), 'x' * 5000)\n    print(n, flush=True)\n    n += 1"
    with started(writing, folder) as child:
        assert child.stdout is not None
        while child.stdout.readline() != "20\n":
            assert child.poll() is None
        child.send_signal(signal.SIGKILL)
        done = int([20, *(line for line in child.stdout if line.endswith("\n"))][-1])
    assert all(recall("k", str(n)) == "x" * 5000 for n in range(done + 1))
    with sqlite3.connect(folder / FILE) as database:
        assert database.execute("pragma integrity_check").fetchone() == ("ok",)


def damaged(path: Path) -> None:
    path.write_bytes(b"this is no database at all" * 100)


def truncated(path: Path) -> None:
    for n in range(200):
        remember("k", str(n), "x" * 500)
    with sqlite3.connect(path) as database:
        database.execute("pragma wal_checkpoint(truncate)")
    database.close()
    path.write_bytes(path.read_bytes()[:8192] + bytes(20000))


def foreign(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("create table bookmarks (title)")
        database.execute("insert into bookmarks values ('dear')")
    database.close()


def of_other_columns(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("create table remembered (what, value)")
    database.close()


@pytest.mark.parametrize("make", [damaged, truncated, foreign, of_other_columns])
def test_a_file_that_cannot_be_used_is_moved_aside_and_kept(
    folder: Path, make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    make(folder / FILE)
    before = (folder / FILE).read_bytes()
    assert recall("k", "150") is None
    assert re.search(r"cannot be used .* it is measured.sqlite3.unusable-1 now", caplog.text)
    remember("k", "150", 7)
    assert recall("k", "150") == 7
    assert (folder / f"{FILE}.unusable-1").read_bytes() == before
    damaged(folder / FILE)
    remember("k", "150", 8)
    assert "unusable-2" in caplog.text
    assert recall("k", "150") == 8


@pytest.mark.parametrize("begun", [True, False], ids=["a new one has begun", "none is there yet"])
def test_what_another_process_moved_aside_is_not_moved_again(
    folder: Path, begun: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged(folder / FILE)
    real, calls = cache._run_in, list[str]()

    def first_they(path: Path, statement: str, values: tuple[str, ...]) -> Any:
        calls.append(statement)
        try:
            return real(path, statement, values)
        except sqlite3.DatabaseError:
            path.rename(folder / "aside")
            if begun:
                real(path, "replace into remembered values (?, ?, ?)", ("k", "theirs", cache._digest("1") + " 1"))
            raise

    monkeypatch.setattr(cache, "_run_in", first_they)
    remember("k", "ours", 2)
    assert len(calls) == 2 and recall("k", "ours") == 2 and recall("k", "theirs") == (1 if begun else None)
    assert not [each for each in folder.iterdir() if "unusable" in each.name]


def test_a_cache_of_an_earlier_version_is_ours(folder: Path) -> None:
    with sqlite3.connect(folder / FILE) as database:
        database.execute("create table remembered (kind, place, value, primary key (kind, place))")
        database.execute("insert into remembered values ('k', 'p', '5')")
    database.close()
    assert recall("k", "p") is None, "its values had no digest"
    remember("k", "p", 6)
    assert recall("k", "p") == 6 and [path.name for path in folder.glob("*unusable*")] == []


def test_a_folder_that_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("REWRITER_CACHE", str(tmp_path / "file" / "cache"))
    remember("k", "p", 5)
    assert caplog.text.count("what is measured is forgotten at the end") == 1
    assert recall("k", "p") == 5
    assert cache_dir("native").is_dir()


def test_a_folder_that_can_only_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What it holds is known, and nothing is written to it."""
    monkeypatch.setenv("REWRITER_CACHE", str(tmp_path / "made"))
    remember("k", "p", 5)
    (tmp_path / "made").rename(tmp_path / "fixed")
    before = {path: path.read_bytes() for path in (tmp_path / "fixed").iterdir()}
    monkeypatch.setenv("REWRITER_CACHE", str(tmp_path / "fixed"))

    def refused(*args: Any, dir: Any = None, **rest: Any) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    assert recall("k", "p") == 5
    assert "Read-only file system" in caplog.text
    remember("k", "q", 6)
    assert recall("k", "q") == 6
    assert {path: path.read_bytes() for path in (tmp_path / "fixed").iterdir()} == before


@pytest.mark.skipif(sys.platform == "win32", reason="there are no limits to the size of files")
def test_a_full_disk_while_writing(folder: Path) -> None:
    """The limit of a process stands for it: the system refuses the write in the middle."""
    remember("k", "before", 5)
    child = started(
        "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))\n"
        "for n in range(5): remember('k', str(n), 'x' * 30_000)\n"
        "print(recall('k', 'before'))\n",
        folder,
    )
    said, _ = child.communicate(timeout=60)
    assert child.returncode == 0
    assert said.endswith("5\n")
    assert "could not be kept" in said
    kept = [recall("k", str(n)) for n in range(5)]
    assert set(kept) <= {None, "x" * 30_000}
    assert None in kept
    remember("k", "0", 1)
    assert (recall("k", "0"), recall("k", "before")) == (1, 5)


@pytest.mark.parametrize("value", ['{"x": 1', "{}", "0123456789abcdef {}", ""])
def test_a_damaged_value_is_measured_again(value: str, caplog: pytest.LogCaptureFixture) -> None:
    remember("site", "here", {"candidates": []})
    with closing(sqlite3.connect(cache_dir() / "measured.sqlite3")) as database, database:
        database.execute("update remembered set value = ?", [value])
    with caplog.at_level("WARNING"):
        assert recall("site", "here") is None
    assert "damaged" in caplog.text
    remember("site", "here", [1])
    assert recall("site", "here") == [1]
