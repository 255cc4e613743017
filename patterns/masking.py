"""Masks and biases in the scores (added, filled in, chosen by `where`), and how boolean masks are put together."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from rewriter.pattern import Pattern, Step, argument, constant, is_call, is_number, unsliced, value_of

_ATEN = torch.ops.aten

_HIDDEN = -9.9e3
"""What an additive mask adds to hide a score, or less."""


def element(node: fx.Node) -> tuple[Step, ...] | Step | None:
    """scores + mask (either order), scores - mask, scores.masked_fill(drop, fill), where(keep, scores, fill)."""
    if is_call(node, _ATEN.add, _ATEN.add_):
        return _added(node, argument(node, "alpha", 1), both=True)
    if is_call(node, _ATEN.sub, _ATEN.sub_):
        alpha = argument(node, "alpha", 1)
        return _added(node, -alpha if is_number(alpha) else None, both=False)
    if is_call(node, _ATEN.masked_fill, _ATEN.masked_fill_):
        scores, mask, fill = node.args[:3]
        number = constant(fill)
        if isinstance(scores, fx.Node) and isinstance(mask, fx.Node) and number is not None:
            return Step("drop", scores, mask, number)
    if is_call(node, _ATEN.where) and len(node.args) == 3:
        condition, chosen, other = node.args
        assert isinstance(condition, fx.Node)
        steps: list[Step] = []
        if isinstance(chosen, fx.Node) and (number := constant(other)) is not None:
            steps.append(Step("keep", chosen, condition, number))
        if isinstance(other, fx.Node) and (number := constant(chosen)) is not None:
            steps.append(Step("drop", other, condition, number))
        return tuple(steps)
    return None


def _added(node: fx.Node, alpha: Any, *, both: bool) -> tuple[Step, ...] | Step | None:
    left, right = node.args[:2]
    if not isinstance(left, fx.Node) or not value_of(node).dtype.is_floating_point or not is_number(alpha):
        return None
    if not isinstance(right, fx.Node):
        # The same number for all keys: it matters to weights that are not normalised.
        number = constant(right)
        return Step("shift", left, number=alpha * number) if number is not None else None
    if both and alpha == 1:
        return Step("add", left, right), Step("add", right, left)
    return Step("add", left, right, alpha)


def factors(node: fx.Node) -> list[tuple[fx.Node, bool]] | None:
    """A conjunction, a negation, a cast or a broadcast taken apart; an additive mask as the bool mask it encodes."""
    if is_call(node, _ATEN.__and__, _ATEN.bitwise_and, _ATEN.logical_and):
        return [(source, True) for source in node.all_input_nodes]
    if is_call(node, _ATEN.bitwise_not, _ATEN.logical_not):
        return [(source, False) for source in node.all_input_nodes]
    if unsliced(node) is not node:
        return [(unsliced(node), True)]
    if is_call(node, _ATEN.expand, _ATEN.clone, _ATEN.contiguous, _ATEN.alias) or _keeps_bool(node):
        return [(source, True) for source in node.all_input_nodes[:1]]
    if is_call(node, _ATEN.where) and len(node.args) == 3:
        condition, chosen, other = node.args
        assert isinstance(condition, fx.Node)
        if constant(chosen) == 0.0 and _hides(constant(other)):
            return [(condition, True)]
        if constant(other) == 0.0 and _hides(constant(chosen)):
            return [(condition, False)]
    if is_call(node, _ATEN.masked_fill) and constant(node.args[0]) == 0.0 and _hides(constant(node.args[2])):
        assert isinstance(node.args[1], fx.Node)
        return [(node.args[1], False)]
    return None


def _hides(number: float | None) -> bool:
    return number is not None and (number <= _HIDDEN or math.isinf(number))


def _keeps_bool(node: fx.Node) -> bool:
    if not is_call(node, _ATEN.to, _ATEN._to_copy):
        return False
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return value_of(source).dtype == value_of(node).dtype or value_of(node).dtype == torch.bool


PATTERN = Pattern(
    name="masking",
    element=element,
    factors=factors,
    examples=(
        lambda q, k, v, mask: torch.softmax(q @ k.mT + torch.where(mask, 0.0, -1e30).to(q.dtype), -1) @ v,
        lambda q, k, v, mask: torch.softmax(torch.where(mask, 0.0, -1e30).to(q.dtype) + q @ k.mT, -1) @ v,
        lambda q, k, v, mask: torch.softmax(torch.where(mask, q @ k.mT, -1e30), -1) @ v,
        lambda q, k, v, mask: torch.softmax((q @ k.mT).masked_fill(~mask, torch.finfo(q.dtype).min), -1) @ v,
    ),
)
