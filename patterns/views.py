"""Views: what moves, folds, cuts and broadcasts axes without computing anything."""

from __future__ import annotations

import torch
from torch import fx

from rewriter.axes import View, shape_of
from rewriter.nodes import argument, is_call, value_of
from rewriter.pattern import Pattern, Step

_ATEN = torch.ops.aten
_RESHAPES = (
    _ATEN.view, _ATEN.reshape, _ATEN._unsafe_view, _ATEN.flatten, _ATEN.unflatten, _ATEN.squeeze, _ATEN.unsqueeze,
    _ATEN.view_as, _ATEN.reshape_as,
)  # fmt: skip
_EXPANDS = (_ATEN.expand, _ATEN.expand_as, _ATEN.broadcast_to)


def element(node: fx.Node) -> Step | None:
    """A view and what it does to the axes."""
    source = node.args[0] if node.op == "call_function" and node.args else None
    if not isinstance(source, fx.Node) or not isinstance(source.meta.get("val"), torch.Tensor):
        return None
    order = _order(node, value_of(source).dim())
    if order is not None:
        return Step("view", source, view=View(order=order))
    if is_call(node, *_EXPANDS):
        return Step("view", source, view=View(expands=True))
    # A slice of one element, or `view` to another type, computes something else.
    keeps = is_call(node, *_RESHAPES) or (is_call(node, _ATEN.select) and shape_of(source)[int(node.args[1])] == 1)  # type: ignore[arg-type]
    if keeps and value_of(node).dtype == value_of(source).dtype:
        return Step("view", source, view=View())
    return None


def _order(node: fx.Node, rank: int) -> tuple[int, ...] | None:
    """Axis i of the view is axis order[i] of its source."""
    axes = list(range(rank))
    if is_call(node, _ATEN.permute):
        return tuple(int(axis) % rank for axis in argument(node, "dims"))
    if is_call(node, _ATEN.transpose, _ATEN.swapaxes, _ATEN.swapdims):
        first, second = (int(axis) % rank for axis in node.args[1:3])  # type: ignore[arg-type]
    elif rank >= 2 and is_call(node, _ATEN.t, _ATEN.mT, _ATEN.numpy_T, _ATEN.adjoint):
        if is_call(node, _ATEN.numpy_T) and rank > 2:
            return tuple(reversed(axes))
        first, second = rank - 2, rank - 1
    elif is_call(node, _ATEN.movedim, _ATEN.moveaxis):
        given = [each if isinstance(each, (list, tuple)) else [each] for each in node.args[1:3]]
        sources, targets = ([int(axis) % rank for axis in each] for each in given)  # type: ignore[arg-type]
        rest = [axis for axis in axes if axis not in sources]
        return tuple(sources[targets.index(place)] if place in targets else rest.pop(0) for place in axes)
    else:
        return None
    axes[first], axes[second] = axes[second], axes[first]
    return tuple(axes)


PATTERN = Pattern(
    name="views",
    element=element,
    examples=(
        lambda q, k, v, mask: (
            (
                (q.transpose(1, 2).reshape(q.shape[0], -1, q.shape[1] * q.shape[3]))
                .view(q.shape[0], q.shape[2], q.shape[1], q.shape[3])
                .permute(0, 2, 1, 3)
                @ k.permute(0, 1, 3, 2)
            )
            .masked_fill(~mask, -1e30)
            .softmax(-1)
            @ v
        ),
        lambda q, k, v, mask: (
            (q.swapaxes(1, 2).movedim(2, 1) @ k.movedim(-1, -2)).unsqueeze(0).masked_fill(~mask, -1e30).softmax(-1)
            @ v[None]
        ).squeeze(0),
    ),
)
