"""What is done to finished weights: divided by a sum of their own, cleaned of NaN, or to scores: clamped, or taken
without their signs (Lv et al. 2024, arXiv:2411.07176, which gives them back to the weights).
"""

from __future__ import annotations

import torch
from torch import fx

from rewriter.nodes import argument, constant, is_call, value_of
from rewriter.pattern import Pattern, Step

_ATEN = torch.ops.aten


def element(node: fx.Node) -> Step | tuple[Step, ...] | None:
    """`nan_to_num` is a guard for rows that see nothing; the others are edits. A clamp may do nothing to scores."""
    if is_call(node, _ATEN.nan_to_num):
        return Step("guard", node.all_input_nodes[0], name="nan_to_num")
    if is_call(node, _ATEN.div) and len(node.args) == 2:
        weights, total = node.args
        while is_call(total, _ATEN.clamp, _ATEN.clamp_min, _ATEN.add, _ATEN.expand, _ATEN.expand_as):
            assert isinstance(total, fx.Node)
            total = total.args[0]
        if isinstance(weights, fx.Node) and is_call(total, _ATEN.sum) and not is_call(weights, _ATEN.exp):
            return Step("edit", weights, name="renormalised")
    if (lowest := _lowest(node)) is not None:
        return lowest
    if is_call(node, _ATEN.clamp, _ATEN.clamp_min, _ATEN.clamp_max, _ATEN.hardtanh):
        return Step("edit", node.all_input_nodes[0], name="clamped")
    if is_call(node, _ATEN.pow, _ATEN.square):
        return Step("edit", node.all_input_nodes[0], name="squared")
    if is_call(node, _ATEN.abs):
        return Step("edit", node.all_input_nodes[0], name="unsigned")
    if is_call(node, _ATEN.tril, _ATEN.triu):
        return Step("edit", node.all_input_nodes[0], name="triangular")
    if is_call(node, _ATEN.minimum, _ATEN.maximum) and len(node.all_input_nodes) == 2:
        return tuple(Step("edit", source, name="bounded") for source in node.all_input_nodes)
    return None


def _lowest(node: fx.Node) -> Step | None:
    """The larger of scores and a number that no finite score is below: what keeps a mask from making them -inf."""
    if is_call(node, _ATEN.clamp, _ATEN.clamp_min) and argument(node, "max") is None:
        source, bound = node.all_input_nodes[0], constant(argument(node, "min"))
    elif is_call(node, _ATEN.maximum, _ATEN.max.other):
        left, right = node.all_input_nodes if len(node.all_input_nodes) == 2 else (node, node)
        source, bound = (left, constant(right)) if constant(left) is None else (right, constant(left))
    else:
        return None
    dtype = value_of(source).dtype
    if bound is None or not dtype.is_floating_point or not bound <= torch.finfo(dtype).min:
        return None
    return Step("floor", source, number=bound)


PATTERN = Pattern(
    name="reweighting",
    element=element,
    examples=(
        lambda q, k, v, mask: (q @ k.mT).clamp(-2.0, 2.0).masked_fill(~mask, -1e30).softmax(-1) @ v,
        lambda q, k, v, mask: (q @ k.mT).masked_fill(~mask, -1e30).softmax(-1).square() @ v,
        lambda q, k, v, mask: (q @ k.mT).abs().masked_fill(~mask, -1e30).softmax(-1) @ v,
        lambda q, k, v, mask: (
            torch.max((q @ k.mT).masked_fill(~mask, float("-inf")), torch.full([], torch.finfo(q.dtype).min)).softmax(
                -1
            )
            @ v
        ),
    ),
)
