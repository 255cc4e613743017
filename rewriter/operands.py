"""Queries, keys and values followed up to where views, copies and numbers end."""

from __future__ import annotations

import torch
from torch import fx

from rewriter.axes import Layout, Placed, backward
from rewriter.facts import Operand, Reading
from rewriter.nodes import is_parameter, storage, value_of, written
from rewriter.walk import step_at


def strip(reading: Reading) -> None:
    """Walk up queries, keys and values through views, copies and numbers."""
    narrow = value_of(reading.value.node).dtype
    for side in reading.operands:
        while (found := _stripped(side, narrow)) is not None:
            side.placed, side.scale = found.placed, found.scale


def _stripped(side: Operand, narrow: torch.dtype) -> Operand | None:
    step, dtype = step_at(side.node), value_of(side.node).dtype
    # A view in the shape of another tensor would make that one a part of the match.
    if step is None or (step.kind != "scale" and _tensors_into(side.node) > 1):
        return None
    below = value_of(step.source)
    if below.device != value_of(side.node).device or is_parameter(step.source):
        return None
    # Queries and keys may be widened for their product; the operator computes in float32 anyway.
    if below.dtype != dtype and not (below.dtype == narrow and side.role != "value"):
        return None
    if step.kind == "same":
        return Operand(side.role, Placed(step.source, side.placed.layout), side.scale)
    if step.kind == "scale" and side.role != "value":
        return Operand(side.role, Placed(step.source, side.placed.layout), side.scale * step.number)
    if step.kind == "view":
        assert step.view is not None
        axes = backward(step.source, step.view, side.placed.layout)
        return Operand(side.role, Placed(step.source, axes), side.scale) if axes is not None else None
    return None


def is_changed(node: fx.Node) -> bool:
    """Is this tensor changed in place anywhere?"""
    own = storage(node)
    return any(storage(target) == own for each in node.graph.nodes for target in written(each))


def _tensors_into(node: fx.Node) -> int:
    return sum(isinstance(source.meta.get("val"), torch.Tensor) for source in node.all_input_nodes)


def unexpanded(node: fx.Node, axes: Layout) -> tuple[fx.Node, Layout]:
    """A tensor before it was expanded and brought into shape."""
    while True:
        step = step_at(node)
        before = backward(step.source, step.view, axes) if step is not None and step.view is not None else None
        if step is None or before is None:
            return node, axes
        node, axes = step.source, before
