"""A product as a broadcast multiplication and a sum over one axis."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from rewriter.axes import shape_of
from rewriter.nodes import argument, fixed, is_call, value_of
from rewriter.pattern import Contraction, Pattern

_ATEN = torch.ops.aten


def contraction(node: fx.Node) -> Contraction | None:
    """(a * b).sum(axis), or its mean, where both are longer than 1 along the axis, and each has an axis that the other
    lacks.
    """
    if is_call(node, _ATEN.linalg_vecdot):
        rank = value_of(node).dim() + 1
        return _summed(node.args[0], node.args[1], rank, int(argument(node, "dim")) % rank, keeps=False)
    if not is_call(node, _ATEN.sum, _ATEN.mean):
        return None
    product, axes = node.args[0], argument(node, "dim")
    if not is_call(product, _ATEN.mul) or not isinstance(axes, (list, tuple)) or len(axes) != 1:
        return None
    assert isinstance(product, fx.Node)
    if len(product.users) > 1:
        return None
    rank = value_of(product).dim()
    left, right = product.args[:2]
    axis = int(axes[0]) % rank
    count = fixed(value_of(product).shape[axis]) if is_call(node, _ATEN.mean) else 1
    found = _summed(left, right, rank, axis, keeps=bool(argument(node, "keepdim")))
    return replace(found, alpha=1 / count) if found is not None and count else None


def _summed(left: Any, right: Any, rank: int, axis: int, *, keeps: bool) -> Contraction | None:
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    names = tuple(range(rank))
    labels = [names[rank - value_of(side).dim() :] for side in (left, right)]
    sizes = [dict(zip(own, shape_of(side), strict=True)) for own, side in zip(labels, (left, right), strict=True)]
    if any(own.get(axis, 1) == 1 for own in sizes):
        return None
    wider = [any(sizes[i].get(n, 1) != 1 and sizes[1 - i].get(n, 1) == 1 for n in names) for i in (0, 1)]
    if not any(wider):
        return None
    out: tuple[Any, ...] = tuple(name for name in names if name != axis)
    if keeps:
        out = tuple("one" if name == axis else name for name in names)
    return Contraction(left, right, labels[0], labels[1], out)


PATTERN = Pattern(
    name="multiply_sum",
    contraction=contraction,
    examples=(
        lambda q, k, v, mask: (
            (q[:, :, :, None] * k[:, :, None]).sum(-1).masked_fill(~mask, -1e30).softmax(-1)[..., None] * v[:, :, None]
        ).sum(-2),
        lambda q, k, v, mask: (
            (k[:, :, None] * q[:, :, :, None]).sum(-1, keepdim=True).masked_fill(~mask[..., None], -1e30).softmax(-2)
            * v[:, :, None]
        ).sum(3),
        lambda q, k, v, mask: (
            (q[:, :, :, None] * k[:, :, None]).mean(-1).masked_fill(~mask, -1e30).softmax(-1)[..., None] * v[:, :, None]
        ).sum(-2),
    ),
)
