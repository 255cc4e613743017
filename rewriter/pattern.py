"""What a file in `patterns/` declares: one element of how attention is spelled in graphs.

The walk (`rewriter.walk`) starts at a normaliser, goes up to the product of queries and keys and down to the product
with the values, and asks the patterns what each node is. A pattern answers with a description, with a `Refusal` (this
is mine, and it cannot be taken), or with None (not mine).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, fx

from rewriter.axes import View
from rewriter.site import Refusal
from rewriter.variant import modules_of


@dataclass(frozen=True)
class Contraction:
    """out[...] = alpha * sum left[...] * right[...] (+ addend), with a label for each axis of each tensor.

    With an `edit` it is another function of the two along the axis that is summed. A label that the output lacks is
    summed over. An axis of size 1 whose label is longer elsewhere is broadcast.
    """

    left: fx.Node
    right: fx.Node
    left_labels: tuple[Any, ...]
    right_labels: tuple[Any, ...]
    out_labels: tuple[Any, ...]
    alpha: float = 1.0
    addend: fx.Node | None = None
    beta: float = 1.0
    edit: str = ""


Kind = Literal[
    "same",
    "view",
    "scale",
    "shift",
    "add",
    "mul",
    "div",
    "keep",
    "drop",
    "cap",
    "floor",
    "sink",
    "slice",
    "dropout",
    "guard",
    "edit",
]


@dataclass(frozen=True)
class Step:
    """One element, as a node makes it from `source`.

    same      no change of the mathematics: a copy, a cast
    view      the axes move: `view`
    scale     times `number`
    shift     plus `number`
    add       `factor` times it, plus `number` times `tensor`
    mul, div  times `tensor`, or divided by it
    keep      where the bool `tensor` is False, `number` instead
    drop      where the bool `tensor` is True, `number` instead
    cap       tanh
    floor     no less than `number`, which is the lowest of the type: no finite score is below it
    sink      one more column along `axis`: `tensor`, or zeros where that is None
    slice     a part of `axis`; one place of it, so that the axis is gone, where `number` is 0
    dropout   with probability `number`
    guard     no change where no row is without a key: `name`
    edit      understood, and outside of the canonical operator: `name`. It may mix along `axis`

    The number of keep and drop may be the one element of a `buffer`, which can change.
    """

    kind: Kind
    source: fx.Node
    tensor: fx.Node | None = None
    number: float = 1.0
    factor: float = 1.0
    view: View | None = None
    axis: int | None = None
    name: str = ""
    buffer: fx.Node | None = None


@dataclass(frozen=True)
class Normaliser:
    """weights = normalise(`factor` times the scores) along `axis`. With `zero_sink` the sum has one more term, exp(0).
    `hidden` are scores whose exponentials were made 0: nodes, and steps of the kinds keep and drop. An `edit` says what
    the canonical operator does not do in this way, a `doubt` what it may not do. `inner` is a softmax that is a part of
    this one.
    """

    scores: fx.Node
    axis: int
    kind: Literal["softmax", "sigmoid", "relu"] = "softmax"
    dtype: torch.dtype | None = None
    zero_sink: bool = False
    hidden: tuple[tuple[fx.Node, Step], ...] = ()
    edit: str = ""
    inner: fx.Node | None = None
    factor: float = 1.0
    doubt: str = ""


@dataclass(frozen=True)
class Call:
    """An attention that is one node already: operands in (..., S, D), its mask and its numbers. An `edit` says what it
    does to the scores that is not read.
    """

    query: fx.Node
    key: fx.Node
    value: fx.Node
    scale: float
    mask: fx.Node | None = None
    causal: bool = False
    dropout_p: float = 0.0
    spelling: str = "eager"
    grouped: bool = False
    edit: str = ""


@dataclass(frozen=True)
class Sampler:
    """out[n, :, i, j] = map[n] at grid[n, i, j], as `rewriter.sampling` reads a map (N, D, height, width)."""

    map: fx.Node
    grid: fx.Node


@dataclass(frozen=True)
class Join:
    """Tensors side by side along `axis`, which is a new one where they are `stacked`."""

    parts: tuple[fx.Node, ...]
    axis: int
    stacked: bool


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """One element of the grammar. Every role is optional, and None means "not mine".

    call         an attention that is one node already
    normaliser   the node whose values are attention weights
    element      a node as a step from the tensor below it: of scores, of weights, or of queries, keys and values.
                 Several steps are alternatives
    contraction  a product of two tensors, summed over shared axes
    sampler      a map that is read at places between its pixels
    join         several tensors as one
    examples     functions (query, key, value, mask) -> out that use this spelling; `mask` is bool, True is visible
    """

    name: str
    call: Callable[[fx.Node], Call | Refusal | None] | None = None
    normaliser: Callable[[fx.Node], Normaliser | None] | None = None
    element: Callable[[fx.Node], Step | Sequence[Step] | Refusal | None] | None = None
    contraction: Callable[[fx.Node], Contraction | None] | None = None
    sampler: Callable[[fx.Node], Sampler | Refusal | None] | None = None
    join: Callable[[fx.Node], Join | None] | None = None
    examples: Sequence[Callable[..., Tensor]] = ()


def ask(role: str, node: fx.Node) -> Any:
    """The first answer to a role's question about this node, or None."""
    for pattern in _asked(role):
        answer = pattern(node)
        if answer is not None:
            return answer
    return None


@cache
def _asked(role: str) -> tuple[Callable[[fx.Node], Any], ...]:
    return tuple(getattr(each, role) for each in patterns().values() if getattr(each, role) is not None)


@cache
def patterns() -> dict[str, Pattern]:
    """All patterns by name: the files of `rewriter.patterns`."""
    import rewriter.patterns as package

    found = [module.PATTERN for module in modules_of(package)]
    return {pattern.name: pattern for pattern in found}
