"""The two products: queries with keys, and weights with values, as `matmul` or `bmm`."""

from __future__ import annotations

import torch
from torch import fx

from rewriter.pattern import Answer, Operand, Pattern, Reading, argument, is_call, is_parameter, value_of
from rewriter.site import Refusal

_ATEN = torch.ops.aten


def product(node: fx.Node, reading: Reading) -> Answer:
    """scores = q k^T. The right factor is the keys with their last two axes swapped."""
    if not is_call(node, _ATEN.matmul, _ATEN.bmm):
        return None
    left, right = node.args[:2]
    assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
    if is_parameter(left) or is_parameter(right):
        return None
    if value_of(left).dim() not in (3, 4) or value_of(left).dim() != value_of(right).dim():
        return Refusal(f"queries of rank {value_of(left).dim()} and keys of rank {value_of(right).dim()}")
    reading.query, reading.key = Operand("query", left), Operand("key", right, transposed=True)
    return node


def weight(node: fx.Node, weights: fx.Node, reading: Reading) -> Answer:
    """out = weights v, with the weights on the left."""
    if not is_call(node, _ATEN.matmul, _ATEN.bmm):
        return None
    left, right = node.args[:2]
    if left is not weights or not isinstance(right, fx.Node) or right is weights:
        return Refusal("the weights are not the left factor of the product with the values")
    if is_parameter(right):
        return Refusal("the weights are multiplied by a parameter, not by values that depend on the input")
    if value_of(right).dim() != value_of(weights).dim():
        return Refusal(f"weights of rank {value_of(weights).dim()} and values of rank {value_of(right).dim()}")
    reading.value = Operand("value", right)
    return node


def transposed(node: fx.Node, operand: Operand) -> Answer:
    """k^T written as a swap of the last two axes."""
    if not operand.transposed:
        return None
    rank = value_of(node).dim()
    if is_call(node, _ATEN.transpose):
        swapped = sorted(argument(node, name) % rank for name in ("dim0", "dim1")) == [rank - 2, rank - 1]
    elif is_call(node, _ATEN.permute):
        swapped = [axis % rank for axis in argument(node, "dims")] == [*range(rank - 2), rank - 1, rank - 2]
    else:
        swapped = is_call(node, _ATEN.mT)
    source = node.args[0] if swapped else None
    if not isinstance(source, fx.Node):
        return None
    operand.transposed = False
    return source


PATTERN = Pattern(
    name="contraction",
    product=product,
    weight=weight,
    operand=transposed,
    examples=(
        lambda q, k, v, mask: torch.softmax(torch.matmul(q, k.transpose(2, 3)).masked_fill(~mask, -1e30), -1).matmul(v),
        lambda q, k, v, mask: torch.softmax((q @ k.permute(0, 1, 3, 2)).masked_fill(~mask, -1e30), -1) @ v,
        lambda q, k, v, mask: torch.bmm(
            torch.softmax(torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)), -1), v.flatten(0, 1)
        ).view(*q.shape[:3], v.shape[-1]),
    ),
)
