"""The models to measure: a file or a folder of Python that declares them."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from torch import nn

from rewriter.errors import OptionError, brief


class Entry(Protocol):
    """One model.

    name     unique
    library  what it is listed under
    build    the model, and the positional and keyword arguments of one call
    sites    how many attentions that call executes, known from the model's configuration
    grad     (optional) call it with gradients enabled
    """

    @property
    def name(self) -> str: ...
    @property
    def library(self) -> str: ...
    @property
    def sites(self) -> int: ...
    def build(self) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]: ...


def load(path: Path) -> list[Entry]:
    """All that `entries()` yields in a file, or in a folder's `__init__.py` or else its `entries.py`.

    A folder is imported as a package under its own name, so that its files can import each other. Raises OptionError.
    """
    path = path.resolve()
    try:
        module = _package(path) if path.is_dir() else _module(path.stem, path)
        found: list[Entry] = list(module.entries())
    except OptionError:
        raise
    except Exception as error:
        raise OptionError(f"{path} declares no models: {brief(error)}") from error
    names = [entry.name for entry in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not found:
        raise OptionError(
            f"{path}: two entries are called {twice[0]}" if twice else f"{path}: entries() yields nothing"
        )
    return found


def spread(entries: Sequence[Entry], limit: int | None) -> list[Entry]:
    """At most so many, evenly over the list."""
    if limit is None or limit >= len(entries):
        return list(entries)
    return [entries[i * len(entries) // limit] for i in range(limit)]


def _module(name: str, file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or not file.is_file():
        raise OptionError(f"{file} is neither a Python file nor a folder")
    return _executed(spec)


def _package(folder: Path) -> ModuleType:
    name, places = folder.name, [str(folder)]
    loaded = sys.modules.get(name)
    if loaded is None:
        init = folder / "__init__.py"
        spec = importlib.util.spec_from_file_location(name, init, submodule_search_locations=places)
        if spec is None or not init.is_file():
            spec = ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = places
        loaded = _executed(spec)
    elif list(getattr(loaded, "__path__", [])) != places:
        raise OptionError(f"{folder} has the name of another package that is in use; rename it")
    return loaded if callable(getattr(loaded, "entries", None)) else importlib.import_module(f"{name}.entries")


def _executed(spec: ModuleSpec) -> ModuleType:
    module = importlib.util.module_from_spec(spec)
    if spec.submodule_search_locations is not None:
        sys.modules[spec.name] = module
    if spec.loader is not None:
        spec.loader.exec_module(module)
    return module
