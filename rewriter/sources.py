"""What computes a result: the sources of this library and of all variants. What others computed is not believed."""

from __future__ import annotations

import hashlib
import importlib.metadata
import sys
import uuid
from functools import cache, partial
from pathlib import Path
from typing import Any

from rewriter.variant import Variant, variants

_PROCESS = uuid.uuid4().hex
"""In place of sources that cannot be read, such as those typed at a prompt: they are the same in this process only."""


def version() -> str:
    """Of this library, with a digest of its sources and of the modules that variants from elsewhere are defined in."""
    try:
        number = importlib.metadata.version("rewriter")
    except importlib.metadata.PackageNotFoundError:
        number = "unknown"
    others = sorted({name for variant in variants().values() for name in _modules(variant)})
    return f"{number} {_digest([_own(), *map(_of_module, others)])}"


@cache
def _own() -> str:
    folder = Path(__file__).parent
    # Whether rglob goes through the links to patterns and kernels differs between versions of Python.
    parts = [folder, (folder / "patterns").resolve(), (folder / "kernels").resolve()]
    files = {path for part in parts for path in part.rglob("*") if path.suffix in (".py", ".jinja")}
    return _digest([_read(path) for path in sorted(files)])


def _modules(variant: Variant) -> set[str]:
    functions = (variant.reference, variant.applies, variant.configs, variant.build, variant.formula)
    names = {_plain(function).__module__ for function in functions if function is not None}
    return {name for name in names if name.partition(".")[0] != __name__.partition(".")[0]}


def _plain(function: Any) -> Any:
    while isinstance(function, partial):
        function = function.func
    return function if hasattr(function, "__module__") else type(function)


def _of_module(name: str) -> str:
    file = getattr(sys.modules.get(name), "__file__", None)
    return _read(Path(file)) if file else _PROCESS


def _read(path: Path) -> str:
    try:
        return _digest([path.read_bytes().hex()])
    except OSError:
        return _PROCESS


def _digest(parts: list[str]) -> str:
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]
