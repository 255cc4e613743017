"""A number or a tensor times the scores, or a number times the queries or the keys before the product."""

from __future__ import annotations

import math

import torch
from torch import fx

from rewriter.nodes import constant, is_call, value_of
from rewriter.pattern import Pattern, Step

_ATEN = torch.ops.aten


def element(node: fx.Node) -> Step | tuple[Step, ...] | None:
    """times a number, divided by one; times or divided by a tensor, where either factor may be what is scaled."""
    if is_call(node, _ATEN.neg):
        return Step("scale", node.all_input_nodes[0], number=-1.0)
    is_quotient = is_call(node, _ATEN.div, _ATEN.div_, _ATEN.true_divide)
    if not (is_quotient or is_call(node, _ATEN.mul, _ATEN.mul_)) or len(node.args) != 2 or node.kwargs:
        return None
    left, right = node.args
    if not is_quotient and constant(left) is not None:
        left, right = right, left
    number = constant(right)
    if isinstance(left, fx.Node) and number and math.isfinite(number) and value_of(left).dtype.is_floating_point:
        return Step("scale", left, number=1 / number if is_quotient else number)
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node) or number is not None:
        return None
    if is_quotient:
        return Step("div", left, right)
    return Step("mul", left, right), Step("mul", right, left)


PATTERN = Pattern(
    name="scale",
    element=element,
    examples=(
        lambda q, k, v, mask: torch.softmax((q @ k.mT / math.sqrt(7)).masked_fill(~mask, -1e30), -1) @ v,
        lambda q, k, v, mask: torch.softmax((q * 0.3 @ k.mT).masked_fill(~mask, -1e30), -1) @ v,
        lambda q, k, v, mask: torch.softmax(((q * 0.6) @ (k / 1.5).mT).masked_fill(~mask, -1e30), -1) @ v,
        lambda q, k, v, mask: (
            ((q @ k.mT) * torch.linspace(0.1, 0.9, q.shape[1], dtype=q.dtype)[:, None, None])
            .masked_fill(~mask, -1e30)
            .softmax(-1)
            @ v
        ),
    ),
)
