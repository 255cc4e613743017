"""What a command shows: tables as wide as the terminal, transient progress bars, strict JSON, and nothing else."""

from __future__ import annotations

import json
import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from rewriter import debug

Document = dict[str, Any]
JSON = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Advance = Callable[[str, int, int | None], None]


def stdout() -> Console:
    """Where results go: as wide as the terminal, or 100 columns where there is none."""
    return Console(width=None if sys.stdout.isatty() else 100)


@contextmanager
def progress() -> Iterator[Advance]:
    """Transient bars on stderr, one a stage; nothing where stderr is not a terminal."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    bars = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    tasks: dict[str, TaskID] = {}

    def advance(stage: str, done: int, total: int | None = None) -> None:
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=total)
        for name, task in tasks.items():
            bars.update(task, visible=name == stage)
        bars.update(tasks[stage], completed=done, total=total)

    with bars:
        yield advance


def as_text(document: Document) -> str:
    """Strict JSON: a number that is not finite becomes null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(document), indent=2, allow_nan=False)


@contextmanager
def calm() -> Iterator[None]:
    """No warnings and no log lines of torch inside, unless debugging: what matters is in the report."""
    if debug.level() > 0:
        yield
        return
    log = logging.getLogger("torch")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
