"""What a term is that is added to the scores, and more than a mask: its kind, from its dataflow and its values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

from rewriter.axes import Placed, backward, broadcast
from rewriter.facts import HIDDEN, Roles
from rewriter.masks import Plane
from rewriter.nodes import PRODUCTS, argument, depends_on_data, is_bias, is_call, value_of
from rewriter.pattern import Step, ask
from rewriter.samples import FAILURES, Part, Sizes, draws, evaluate, fixed_values, part_of, size_assignments
from rewriter.site import ages

KINDS = ("none", "alibi", "relative", "table", "decomposed", "dense")
"""From the one of which most is known to the one of which nothing is: a sum of two is the later one."""

_ATEN = torch.ops.aten
_ROUNDING = 2.0
"""How many units in the last place of the largest value slopes times distances may be off."""


@dataclass(frozen=True)
class Term:
    """A part of what is added to the scores: a tensor that is added, or a bool one: what is kept of it, or dropped."""

    placed: Placed
    kind: Literal["add", "keep", "drop"] = "add"


def terms(placed: Placed, factor: float = 1.0) -> list[Term]:
    """The terms of a sum that is added `factor` times, below views of it, and what is filled into it."""
    node, layout = placed.node, placed.layout
    if is_call(node, _ATEN.add, _ATEN.add_) and argument(node, "alpha", 1) == 1:
        addends = [each for each in node.args[:2] if isinstance(each, fx.Node)]
        axes = [broadcast(each, layout) for each in addends]
        parts = [Placed(each, own) for each, own in zip(addends, axes, strict=True) if own is not None]
        return [term for part in parts for term in terms(part, factor)] if len(parts) == 2 else [Term(placed)]
    steps = ask("element", node)
    for step in [steps] if isinstance(steps, Step) else steps if isinstance(steps, Sequence) else ():
        inner: list[Term] = []
        if step.kind in ("same", "view"):
            source, view = step.source, step.view
            before = backward(source, view, layout) if view is not None else broadcast(source, layout)
            inner = terms(Placed(step.source, before), factor) if before is not None else []
        elif step.kind in ("keep", "drop") and factor > 0 and step.number * factor <= HIDDEN and step.buffer is None:
            assert step.tensor is not None
            before, others = broadcast(step.source, layout), broadcast(step.tensor, layout)
            if before is not None and others is not None:
                kind: Literal["keep", "drop"] = "keep" if step.kind == "keep" else "drop"
                inner = [*terms(Placed(step.source, before), factor), Term(Placed(step.tensor, others), kind)]
        if len(inner) > 1:
            return inner
    return [Term(placed)]


@dataclass(frozen=True)
class Bias:
    """A term that is more than a mask. `observed`: is it of this kind for what buffers hold now?"""

    kind: str
    observed: bool = False


def read_bias(placed: Placed, roles: Roles) -> Bias | None:
    """What a term is; None where nothing but what the model is called with goes into it, as into a mask."""
    part = part_of(placed.node)
    kind = _kind(part, placed, roles)
    return Bias(kind, part is not None and bool(part.buffers)) if kind is not None else None


def _kind(part: Part | None, placed: Placed, roles: Roles) -> str | None:
    if part is None:
        return "dense" if is_bias(placed.node) else None
    opaque = [leaf for leaf in part.data if leaf.op not in ("placeholder", "get_attr")]
    if not part.data:
        return _of_positions(part, Plane(placed, roles))
    if not opaque and not part.weights:
        return _of_tokens(part, Plane(placed, roles))
    return "decomposed" if opaque and all(_with_a_table(leaf) for leaf in opaque) else "dense"


def _with_a_table(leaf: fx.Node) -> bool:
    """A product of something that depends on the data with something that does not."""
    inputs = [source for source in leaf.all_input_nodes if isinstance(source.meta.get("val"), Tensor)]
    return is_call(leaf, *PRODUCTS) and sorted(map(depends_on_data, inputs)) == [False, True]


def _of_positions(part: Part, plane: Plane) -> str | None:
    """For weights and constants at two sizes and two draws: it is a function of the distance if it always is."""
    kinds: list[str | None] = []
    for alternatives in size_assignments(part, plane.few)[:2]:
        tried = (_kinds_at(part, plane, sizes) for sizes in alternatives)
        found = next((each for each in tried if each is not None), None)
        if found is None:
            return "table"
        kinds += found
    known = [kind for kind in kinds if kind is not None]
    return max(known, key=KINDS.index) if len(known) == len(kinds) else None


def _of_tokens(part: Part, plane: Plane) -> str | None:
    """Positions that are counted by what says which keys are tokens: where all are, positions as any others."""
    if any(value_of(leaf).dtype.is_floating_point for leaf in part.data):
        return None
    for alternatives in size_assignments(part, plane.few)[:2]:
        if not any(_kinds_at(part, plane, sizes, ("ones",)) == ["alibi"] for sizes in alternatives):
            return None
    return "alibi"


def _kinds_at(
    part: Part, plane: Plane, sizes: Sizes, drawn: Sequence[str] = ("normal", "normal")
) -> list[str | None] | None:
    kinds = []
    try:
        fixed = fixed_values(part, sizes)
        for given in draws(part, sizes, drawn):
            value = plane.number(evaluate(part, sizes, given, fixed)[plane.placed.node], sizes)
            kinds.append(_of_values(value.float(), _ROUNDING * torch.finfo(value.dtype).eps))
    except FAILURES:
        return None
    return kinds


def _of_values(value: Tensor, rounding: float) -> str | None:
    """(B, H, Sq, Skv). What is hidden besides may be anything; what does nothing but hide is a mask."""
    if not bool((value[value > HIDDEN] != 0).any()):
        return None
    if bool((value != value[:1]).any()):
        return "table"
    value = value[0]
    hidden, (q_len, kv_len) = value <= HIDDEN, value.shape[-2:]
    if q_len == 1 or kv_len == 1:
        return "table"
    shown = value.masked_fill(hidden, 0.0)
    allowed = rounding * max(float(shown.abs().max()), 1e-6) + 1e-6
    age = ages(q_len, kv_len, value.device).float()
    for distance in (age, age.abs()):
        if _is_linear(value, distance, hidden, allowed):
            return "alibi"
    same = (value[:, 1:, 1:] - value[:, :-1, :-1]).abs() <= 1e-6
    return "relative" if bool((same | hidden[:, 1:, 1:] | hidden[:, :-1, :-1]).all()) else "table"


def _is_linear(value: Tensor, distance: Tensor, hidden: Tensor, allowed: float) -> bool:
    """slope * distance, plus a number of the head's own or, as a softmax does not see it, of the query's."""
    weight = (~hidden).float()
    count = weight.sum(-1, keepdim=True).clamp(min=1)

    def centred(term: Tensor) -> Tensor:
        return (term - (term * weight).sum(-1, keepdim=True) / count) * weight

    x, y = centred(distance.expand_as(value)), centred(value.masked_fill(hidden, 0.0))
    slope = (x * y).sum((-2, -1), keepdim=True) / (x * x).sum((-2, -1), keepdim=True).clamp(min=1e-9)
    return bool(((slope * x - y).abs() <= allowed).all()) and bool(((slope * x).abs() > allowed).any())
