"""What the canonical operator cannot say: such a site is recognised, and left as it is."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from rewriter.axes import Atom, Layout, Placed, backward, refined, shape_of
from rewriter.facts import HIDDEN, Op, Operand, Reading
from rewriter.nodes import above, is_call
from rewriter.walk import step_at


def outside(reading: Reading) -> Iterator[str]:
    """What the canonical operator cannot say."""
    if _over_channels(reading):
        yield "over_channels"
    before, after = reading.ops[: reading.below_cap], reading.ops[reading.below_cap :]
    if any(op.kind in ("cap", "add", "shift", "keep", "drop") for op in before):
        yield "bias_below_softcap"
    if reading.is_capped and any(op.kind in ("mul", "div") for op in after):
        yield "softcap_by_tensor"
    if any(op.kind in ("keep", "drop") and reading.fill(op) > HIDDEN for op in reading.ops):
        yield "soft_mask"
    rows, columns = set(refined(reading.rows)), set(refined(reading.columns))
    key = set(reading.key.placed.atoms)
    for op in reading.factors:
        assert op.tensor is not None
        if set(op.tensor.atoms) & columns and set(op.tensor.atoms) - key:
            yield "scaled_by_position"
    if reading.sink is not None and set(Placed(reading.sink, reading.sink_axes).atoms) & (rows | columns):
        yield "sink_by_position"
    if any(made_from(placed.node, reading.product) for placed in reading.tensors):
        yield "depends_on_scores"


def drop_shifts(reading: Reading) -> None:
    """What is the same for all keys of a query does not change a softmax: the maximum that is subtracted."""
    if reading.normaliser != "softmax" or reading.zero_sink or reading.sink is not None:
        return
    columns = set(refined(reading.columns))

    def matters(op: Op) -> bool:
        if op.tensor is None:
            return op.kind != "shift"
        # What comes from outside stays an input, whether it matters or not.
        differs = bool(columns & set(op.tensor.atoms))
        return op.kind != "add" or differs or not made_from(op.tensor.node, reading.product)

    reading.ops = [op for i, op in enumerate(reading.ops) if i < reading.below_cap or matters(op)]


def made_from(node: fx.Node, source: fx.Node | None) -> bool:
    """Is `source` among what this node was computed from?"""
    assert source is not None
    # Nothing above the source in the graph can be made from it.
    return any(each is source for each in above(node, lambda each: not each < source, sources=_values))


def _values(node: fx.Node) -> list[fx.Node]:
    """What a node has its values from."""
    kept = 1 if is_call(node, *_SHAPED) else 0 if is_call(node, *_FILLED) else None
    return node.all_input_nodes[:kept]


def _over_channels(reading: Reading) -> bool:
    """Do the scores compare channels, the axis that a projection made, instead of tokens?"""
    return all(
        set(refined(own)) and set(refined(own)) <= set(_projected(side))
        for own, side in ((reading.rows, reading.query), (reading.columns, reading.key))
    )


def _projected(side: Operand) -> Iterator[Atom]:
    """The atoms on the axis that the projection of an operand made."""
    node, layout = side.node, side.placed.layout
    for _ in range(16):
        if is_call(node, _ATEN.linear, _ATEN.addmm, _ATEN.mm):
            yield from refined(layout[-1])
            return
        if is_call(node, *_CONVOLUTIONS):
            yield from refined(layout[1])
            return
        found = _before(node, layout)
        if found is None:
            return
        node, layout = found


def _before(node: fx.Node, layout: Layout) -> tuple[fx.Node, Layout] | None:
    """Up through views, parts of a split and whatever keeps the shape."""
    if not node.all_input_nodes or node.op != "call_function":
        return None
    source = node.all_input_nodes[0]
    step = step_at(node)
    if step is not None and step.view is not None:
        axes = backward(step.source, step.view, layout)
        return (step.source, axes) if axes is not None else None
    if is_call(node, _ATEN.select):
        axis = int(node.args[1]) % (len(layout) + 1)  # type: ignore[arg-type]
        return source, (*layout[:axis], (Atom(shape_of(source)[axis]),), *layout[axis:])
    if not isinstance(source.meta.get("val"), torch.Tensor):  # an item of a list
        if is_call(source, _ATEN.unbind):
            whole = source.all_input_nodes[0]
            axis = int(source.args[1] if len(source.args) > 1 else 0) % (len(layout) + 1)  # type: ignore[arg-type]
            return whole, (*layout[:axis], (Atom(shape_of(whole)[axis]),), *layout[axis:])
        if is_call(source, _ATEN.chunk, _ATEN.split, _ATEN.split_with_sizes):
            return _part(source.all_input_nodes[0], node, layout)
        return None
    return _part(source, node, layout)


def _part(source: fx.Node, node: fx.Node, layout: Layout) -> tuple[fx.Node, Layout] | None:
    """A source of the same rank. The atoms stay those of the part: whose they are is all that is asked for."""
    before, after = shape_of(source), shape_of(node)
    if len(before) != len(after) or sum(b != a for b, a in zip(before, after, strict=True)) > 1:
        return None
    return source, layout


_ATEN = torch.ops.aten
_SHAPED = _ATEN.view_as, _ATEN.reshape_as, _ATEN.expand_as, _ATEN.type_as
_FILLED = _ATEN.sym_size, _ATEN.zeros_like, _ATEN.ones_like, _ATEN.new_zeros, _ATEN.new_ones
"""What asks other tensors, or all tensors, for their shapes and types alone."""
_CONVOLUTIONS = (_ATEN.convolution, _ATEN.conv1d, _ATEN.conv2d, _ATEN.conv3d)
