"""A number times the scores, or times the queries or the keys before the product."""

from __future__ import annotations

import math

import torch
from torch import fx

from rewriter.pattern import Answer, Operand, Pattern, Reading, constant, is_call

_ATEN = torch.ops.aten


def _factor(node: fx.Node) -> tuple[fx.Node, float] | None:
    """(source, number) where node = source * number."""
    if not is_call(node, _ATEN.mul, _ATEN.div) or len(node.args) != 2 or node.kwargs:
        return None
    left, right = node.args
    if is_call(node, _ATEN.mul) and constant(left) is not None:
        left, right = right, left
    number = constant(right)
    if not isinstance(left, fx.Node) or not number:
        return None
    return left, 1 / number if is_call(node, _ATEN.div) else number


def score(node: fx.Node, reading: Reading) -> Answer:
    """On the scores. A mask that is added below this scale is scaled with them: it takes note of `reading.scale`."""
    found = _factor(node)
    if found is None:
        return None
    reading.scale *= found[1]
    return found[0]


def operand(node: fx.Node, side: Operand) -> Answer:
    """On the queries or the keys."""
    found = _factor(node) if side.role != "value" else None
    if found is None:
        return None
    side.scale *= found[1]
    return found[0]


PATTERN = Pattern(
    name="scale",
    score=score,
    operand=operand,
    examples=(
        lambda q, k, v, mask: torch.softmax((q @ k.mT / math.sqrt(7)).masked_fill(~mask, -1e30), -1) @ v,
        lambda q, k, v, mask: torch.softmax((q * 0.3 @ k.mT).masked_fill(~mask, -1e30), -1) @ v,
        lambda q, k, v, mask: torch.softmax(((q * 0.6) @ (k / 1.5).mT).masked_fill(~mask, -1e30), -1) @ v,
    ),
)
