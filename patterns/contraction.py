"""Products of two tensors of any rank, batch axes broadcast: `matmul`, `bmm`, `mm`, `baddbmm`, `addmm`, `inner`,
`linear`."""

from __future__ import annotations

import torch
from torch import fx

from rewriter.nodes import argument, constant, depends_on_data, is_call, value_of
from rewriter.pattern import Contraction, Pattern

_ATEN = torch.ops.aten


def contraction(node: fx.Node) -> Contraction | None:
    """Labels count the axes of the output from the left; the axis that is summed is "sum"."""
    if is_call(node, _ATEN.matmul, _ATEN.bmm, _ATEN.mm):
        return _product(*node.args[:2])
    if is_call(node, _ATEN.linear, _ATEN.inner) and len(node.args) == 2:
        return _inner(*node.args)
    if is_call(node, _ATEN.baddbmm, _ATEN.addmm):
        added, left, right = node.args[:3]
        assert isinstance(right, fx.Node)
        if is_call(node, _ATEN.addmm) and not depends_on_data(right):  # a linear layer with its bias
            return None
        found = _product(left, right)
        alpha, beta = constant(argument(node, "alpha")), constant(argument(node, "beta"))
        if found is None or alpha is None or beta is None or not isinstance(added, fx.Node):
            return None
        addend = added if beta else None
        return Contraction(
            found.left, found.right, found.left_labels, found.right_labels, found.out_labels, alpha, addend, beta
        )
    return None


def _inner(left: object, right: object) -> Contraction | None:
    """The last axes are summed. A weight that no data went into makes a linear layer, however it was computed."""
    assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
    if not depends_on_data(right):
        return None
    own = tuple(f"left{axis}" for axis in range(value_of(left).dim() - 1))
    other = tuple(f"right{axis}" for axis in range(value_of(right).dim() - 1))
    return Contraction(left, right, (*own, "sum"), (*other, "sum"), (*own, *other))


def _product(left: object, right: object) -> Contraction | None:
    """A tensor of one axis has the axis that is summed alone."""
    assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
    own, other = value_of(left).dim(), value_of(right).dim()
    if own + other < 3:
        return None
    batch = tuple(range(max(own, other) - 2))
    row, column = ("row",) if own > 1 else (), ("column",) if other > 1 else ()
    return Contraction(
        left,
        right,
        (*batch[len(batch) - (own - 2) :], *row, "sum") if own > 1 else ("sum",),
        (*batch[len(batch) - (other - 2) :], "sum", *column) if other > 1 else ("sum",),
        (*batch, *row, *column),
    )


PATTERN = Pattern(
    name="contraction",
    contraction=contraction,
    examples=(
        lambda q, k, v, mask: torch.softmax(torch.matmul(q, k.transpose(2, 3)).masked_fill(~mask, -1e30), -1).matmul(v),
        lambda q, k, v, mask: torch.softmax((q @ k.permute(0, 1, 3, 2)).masked_fill(~mask, -1e30), -1) @ v,
        lambda q, k, v, mask: torch.bmm(
            torch.softmax(torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)), -1), v.flatten(0, 1)
        ).view(*q.shape[:3], v.shape[-1]),
        lambda q, k, v, mask: (k @ q.mT).masked_fill(~mask.mT, -1e30).softmax(-2).mT @ v,
        lambda q, k, v, mask: torch.bmm(
            torch.baddbmm(
                torch.zeros((), dtype=q.dtype), q.flatten(0, 1), k.flatten(0, 1).mT, beta=0, alpha=0.3
            ).softmax(-1),
            v.flatten(0, 1),
        ).unflatten(0, q.shape[:2]),
    ),
)
