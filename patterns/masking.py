"""Masks in the scores (added, filled in, chosen by `where`), and how boolean masks are put together."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from rewriter.pattern import (
    Answer,
    MaskTerm,
    Pattern,
    Reading,
    argument,
    comes_from_product,
    constant,
    is_call,
    unsliced,
    value_of,
)
from rewriter.site import Refusal

_ATEN = torch.ops.aten

_HIDDEN = -1e4
"""A score is hidden when it becomes this or less: the largest finite fill in use (older models in float16)."""


def score(node: fx.Node, reading: Reading) -> Answer:
    """scores + mask (either order), scores.masked_fill(drop, fill), where(keep, scores, fill)."""
    if is_call(node, _ATEN.add) and len(node.args) == 2 and argument(node, "alpha", 1) == 1:
        return _added(node, reading)
    if is_call(node, _ATEN.masked_fill, _ATEN.masked_fill_):
        return _hidden(node, reading, "drop", node.args[0], node.args[1], node.args[2])
    if is_call(node, _ATEN.where) and len(node.args) == 3:
        keep, chosen, other = node.args
        if isinstance(chosen, fx.Node) and comes_from_product(chosen):
            return _hidden(node, reading, "keep", chosen, keep, other)
        if isinstance(other, fx.Node) and comes_from_product(other):
            return _hidden(node, reading, "drop", other, keep, chosen)
    return None


def _added(node: fx.Node, reading: Reading) -> Answer:
    left, right = node.args
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    scores, mask = (left, right) if comes_from_product(left) else (right, left)
    if not comes_from_product(scores):
        return None
    if comes_from_product(mask):
        return Refusal("two products are added to make the scores")
    if value_of(scores).shape != value_of(node).shape:
        return Refusal("the added mask is larger than the scores")
    reading.terms.append(MaskTerm("add", mask, factor=reading.scale))
    return scores


def _hidden(node: fx.Node, reading: Reading, kind: Any, scores: Any, mask: Any, fill: Any) -> Answer:
    if not isinstance(mask, fx.Node) or not isinstance(scores, fx.Node):
        return None
    number = constant(fill)
    if number is None or number > _HIDDEN or number * reading.scale > _HIDDEN / 32:
        return Refusal(f"hidden scores become {number if number is not None else fill}, which does not hide them")
    if value_of(scores).shape != value_of(node).shape:
        return Refusal("the mask is larger than the scores")
    reading.terms.append(MaskTerm(kind, mask, fill=number * reading.scale))
    return scores


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
    score=score,
    factors=factors,
    examples=(
        lambda q, k, v, mask: torch.softmax(q @ k.mT + torch.where(mask, 0.0, -1e30).to(q.dtype), -1) @ v,
        lambda q, k, v, mask: torch.softmax(torch.where(mask, 0.0, -1e30).to(q.dtype) + q @ k.mT, -1) @ v,
        lambda q, k, v, mask: torch.softmax(torch.where(mask, q @ k.mT, -1e30), -1) @ v,
        lambda q, k, v, mask: torch.softmax((q @ k.mT).masked_fill(~mask, torch.finfo(q.dtype).min), -1) @ v,
    ),
)
