"""Which of several calls is the fastest on this machine: measured once for a place, and remembered in the cache."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from rewriter.cache import recall, remember
from rewriter.target import Target


def fastest(what: str, place: Any, calls: Mapping[str, Callable[[], object]], device: torch.device) -> str | None:
    """The name of the fastest, timed in alternation; None where none fits the device. `place`, with the names and the
    target, is what the times are remembered by.
    """
    from rewriter.tune.measure import alternate, medians

    key = json.dumps([place, *calls, Target.current(device).to_json()])
    taken: dict[str, float] | None = recall(what, key)
    if taken is None:
        fitting = {name: call for name, call in calls.items() if device.type != "cuda" or _fits(call)}
        times = medians(alternate(list(fitting.values()), repeats=3, budget=2.0))
        taken = dict(zip(fitting, times, strict=True))
        remember(what, key, taken)
    return min(taken, key=taken.__getitem__, default=None)


def up_to(length: int) -> int:
    """The next power of two. A cache grows with every call: lengths up to it have one answer."""
    return 1 << (length - 1).bit_length()


def as_called(
    run: Callable[..., Tensor], given: tuple[Tensor | None, ...], named: Mapping[str, Tensor] = MappingProxyType({})
) -> Callable[[], object]:
    """A call as a model makes it: with the gradients that are wanted."""
    leaves = [each if each is None else each.detach().requires_grad_(each.requires_grad) for each in given]
    more = {name: each.detach().requires_grad_(each.requires_grad) for name, each in named.items()}
    every = (*leaves, *more.values())
    wanted = [each for each in every if each is not None and each.requires_grad and torch.is_grad_enabled()]

    def call() -> object:
        out = run(*leaves, **more)
        return torch.autograd.grad(out, wanted, out, allow_unused=True) if wanted else out

    return call


def _fits(call: Callable[[], object]) -> bool:
    try:
        call()
    except Exception as error:
        if not _too_large(error):
            raise
        return False
    return True


def _too_large(error: Exception) -> bool:
    """Does a config ask for more than the device has?"""
    from triton.runtime.errors import OutOfResources

    return isinstance(error, OutOfResources | torch.OutOfMemoryError)
