"""Masks and biases in the scores (added, filled in, chosen by `where`)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import fx

from rewriter.nodes import argument, buffered, constant, is_call, is_number, value_of
from rewriter.pattern import Pattern, Step

_ATEN = torch.ops.aten


def element(node: fx.Node) -> tuple[Step, ...] | Step | None:
    """scores + mask (either order), scores - mask, scores.masked_fill(drop, fill), where(keep, scores, fill),
    scores[drop] = fill.
    """
    if is_call(node, _ATEN.add, _ATEN.add_):
        return _added(node, argument(node, "alpha", 1))
    if is_call(node, _ATEN.sub, _ATEN.sub_):
        alpha = argument(node, "alpha", 1)
        return _added(node, -alpha if is_number(alpha) else None)
    if is_call(node, _ATEN.masked_fill, _ATEN.masked_fill_):
        scores, mask, fill = node.args[:3]
        if isinstance(scores, fx.Node) and isinstance(mask, fx.Node):
            return _filled("drop", scores, mask, fill)
    if is_call(node, _ATEN.index_put, _ATEN.index_put_):
        scores = node.args[0]
        assert isinstance(scores, fx.Node)
        found = None if argument(node, "accumulate") else _put(node)
        return Step("edit", scores, name="written_at_places") if found is None else found
    if is_call(node, _ATEN.where) and len(node.args) == 3:
        condition, chosen, other = node.args
        assert isinstance(condition, fx.Node)
        steps = _filled("keep", chosen, condition, other), _filled("drop", other, condition, chosen)
        return tuple(step for step in steps if step is not None)
    return None


def _put(node: fx.Node) -> Step | None:
    """scores[drop] = fill, where `drop` covers the last axes: those before it are left out as None."""
    scores, indices, fill = node.args[:3]
    assert isinstance(indices, (list, tuple))
    *before, drop = indices
    if not isinstance(scores, fx.Node) or not isinstance(drop, fx.Node) or any(each is not None for each in before):
        return None
    covered = len(before) + value_of(drop).ndim
    if value_of(drop).dtype != torch.bool or covered != value_of(scores).ndim:
        return None
    return _filled("drop", scores, drop, fill)


def _filled(kind: Literal["keep", "drop"], scores: Any, mask: fx.Node, fill: Any) -> Step | None:
    number = constant(fill)
    buffer, number = (buffered(fill) or (None, None)) if number is None else (None, number)
    if not isinstance(scores, fx.Node) or number is None:
        return None
    return Step(kind, scores, mask, number, buffer=buffer)


def _added(node: fx.Node, alpha: Any) -> tuple[Step, ...] | Step | None:
    left, right = node.args[:2]
    if not isinstance(left, fx.Node) or not value_of(node).dtype.is_floating_point or not is_number(alpha):
        return None
    if not isinstance(right, fx.Node):
        # The same number for all keys: it matters to weights that are not normalised.
        number = constant(right)
        return Step("shift", left, number=alpha * number) if number is not None else None
    return Step("add", left, right, alpha), Step("add", right, left, factor=alpha)


PATTERN = Pattern(
    name="masking",
    element=element,
    examples=(
        lambda q, k, v, mask: torch.softmax(q @ k.mT + torch.where(mask, 0.0, -1e30).to(q.dtype), -1) @ v,
        lambda q, k, v, mask: torch.softmax(torch.where(mask, 0.0, -1e30).to(q.dtype) + q @ k.mT, -1) @ v,
        lambda q, k, v, mask: (
            torch.softmax(torch.add(torch.where(mask, 0.0, -1e30).to(q.dtype), q @ k.mT, alpha=0.3), -1) @ v
        ),
        lambda q, k, v, mask: torch.softmax(torch.where(mask, q @ k.mT, -1e30), -1) @ v,
        lambda q, k, v, mask: torch.softmax((q @ k.mT).masked_fill(~mask, torch.finfo(q.dtype).min), -1) @ v,
    ),
)
