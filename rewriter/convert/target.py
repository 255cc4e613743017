"""What a TARGET of the command line means: a checkpoint folder, or a function that returns a model."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.convert.checkpoint import cause, example_inputs, load_model
from rewriter.errors import CheckpointError, OptionError, RewriterError

Example = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode, inputs that it accepts, and the checkpoint folder it came from, if it came from one."""

    model: nn.Module
    example: Example
    folder: Path | None = None
    notes: tuple[str, ...] = ()


def load_target(
    target: str,
    *,
    length: int | None = None,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    seed: int = 0,
) -> Loaded:
    """The model that TARGET names, on `device` (None: the GPU where there is one).

    Raises CheckpointError, or OptionError for a length that the model or a device that the machine does not have.
    """
    place = usable_device(device)
    if is_function(target):
        made = call(target)
        if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[0], nn.Module):
            raise CheckpointError(f"{target} must return a pair: a torch.nn.Module and example inputs for it")
        args, kwargs = as_example(made[1], target)
        return Loaded(made[0].eval().to(place, dtype), (moved(args, place), moved(kwargs, place)))
    folder = Path(target).expanduser()
    model, notes = load_model(folder, dtype)
    inputs = moved(example_inputs(model, length, seed), place)
    return Loaded(model.to(place), ((), inputs), folder, tuple(notes))


def usable_device(name: str | None) -> torch.device:
    """The device of this name. Raises OptionError where the machine has none."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except Exception as error:
        raise OptionError(f"there is no device {name!r} here ({cause(error)}): use cpu or cuda") from error
    return device


def moved(value: Any, device: torch.device) -> Any:
    """Every tensor in nested tuples, lists and mappings, on the device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: moved(item, device) for key, item in value.items()}
    return type(value)(moved(item, device) for item in value) if type(value) in (tuple, list) else value


def is_function(text: str) -> bool:
    """Is this spelled `package.module:function`?"""
    return re.fullmatch(r"[^\W\d][\w.]*:[^\W\d][\w.]*", text) is not None and not Path(text).exists()


def lookup(text: str) -> Any:
    """What `package.module:name` names, looked for in the current folder too. Raises CheckpointError."""
    module, _, name = text.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:
        raise CheckpointError(f"the module {module} cannot be imported: {cause(error)}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise CheckpointError(f"the module {module} has no {name}: use a name that it defines")
        found = getattr(found, part)
    return found


def call(text: str) -> Any:
    """What `package.module:function` returns. Raises CheckpointError with what it raised."""
    function = lookup(text)
    if not callable(function):
        raise CheckpointError(f"{text} is not a function: name one that takes no arguments")
    try:
        return function()
    except RewriterError:
        raise
    except Exception as error:
        raise CheckpointError(f"{text} raised {type(error).__name__}: {cause(error)}") from error


def as_example(inputs: Any, origin: str) -> Example:
    """(args, kwargs) from a tensor, a tuple of args, a dict of kwargs, or a pair of those. Raises CheckpointError."""
    match inputs:
        case Tensor():
            return (inputs,), {}
        case Mapping():
            return (), dict(inputs)
        case (tuple() | list() as args, Mapping() as kwargs):
            return tuple(args), dict(kwargs)
        case tuple() | list() if inputs:
            return tuple(inputs), {}
    raise CheckpointError(
        f"the example inputs of {origin} are a {type(inputs).__name__}: "
        "return a tensor, a tuple of arguments, a dict of keyword arguments, or (arguments, keyword arguments)"
    )
