"""One model of the zoo, and what its builders share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
"""A model in the mode it is to run in, and the arguments of one call."""

LAYERS = 2
"""Of each stack, where nothing else is said."""


@dataclass(frozen=True)
class Entry:
    """A model with tiny random weights, and how many attentions one call of it executes.

    sites  known from its configuration: layers times attentions a layer
    masks  exactly the kinds of mask to be found, as `str(site.mask)`, where they are certain
    fast   part of the subset that `make test` runs
    grad   called with gradients enabled, as training does
    """

    name: str
    library: str
    build: Callable[[], Built]
    sites: int
    masks: frozenset[str] | None = None
    fast: bool = False
    grad: bool = False


class Recipes:
    """A decorator that makes an entry of each function it stands above, in their order."""

    def __init__(self, library: str) -> None:
        self.library = library
        self.found: list[Entry] = []

    def __call__(self, name: str, sites: int, **facts: Any) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
        def add(function: Callable[[], Any]) -> Callable[[], Any]:
            self.found.append(Entry(f"{self.library}/{name}", self.library, seeded(function), sites, **facts))
            return function

        return add

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.found)


def seeded(function: Callable[[], Any]) -> Callable[[], Built]:
    """`function` gives (model, tensor, ..., maybe a dict of keyword arguments); the same weights and inputs each time.

    Normalisations and gates that start at zero would hide what comes before them, so weights that are constant are
    moved a little.
    """

    def build() -> Built:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model, *call = function()
            kwargs = call.pop() if call and isinstance(call[-1], dict) else {}
            with torch.no_grad():
                for weight in model.parameters():
                    if weight.is_floating_point() and weight.numel() and bool((weight == weight.flatten()[0]).all()):
                        weight += 0.05 * torch.randn_like(weight)
        return model, tuple(call), kwargs

    return build


def tokens(batch: int = 2, length: int = 11, vocabulary: int = 64) -> Tensor:
    """Random token ids, none of the special ones at the start of the vocabulary."""
    return torch.randint(5, vocabulary, (batch, length))


def image(size: int = 32, batch: int = 2, channels: int = 3) -> Tensor:
    """Random pixels."""
    return torch.randn(batch, channels, size, size)
