"""Templates and fragments become source files in the cache, and those become modules."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import jinja2

from rewriter.cache import cache_dir


def rendered(template: str, **facts: Any) -> str:
    """The text of a template of `rewriter.kernels.templates`. A fact that it wants and is not given raises."""
    return _environment().get_template(template).render(**facts)


@cache
def _environment() -> jinja2.Environment:
    import rewriter.kernels as package

    folders = [str(Path(root) / "templates") for root in package.__path__]
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )


def stored(text: str, folder: str, suffix: str) -> Path:
    """The file of the cache that holds this text; its name is made from the content."""
    path = cache_dir("source", folder) / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}{suffix}"
    if not path.exists():
        # Another process may write the same file: it appears whole or not at all.
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=suffix)
        with os.fdopen(handle, "w") as file:
            file.write(text)
        Path(name).replace(path)
    return path


def loaded(text: str, folder: str) -> ModuleType:
    """Python source as a module, from its file in the cache, where tracebacks and Triton find it."""
    return _imported(stored(text, folder, ".py"), interpreted())


@cache
def _imported(path: Path, interpreted: bool) -> ModuleType:
    # Whether Triton compiles or interprets is decided when a kernel is decorated.
    spec = importlib.util.spec_from_file_location(f"rewriter_generated_{path.stem}_{interpreted:d}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def interpreted() -> bool:
    """Does Triton run its interpreter here?"""
    import triton

    return bool(triton.knobs.runtime.interpret)
