"""What the canonical operator cannot say: such a site is recognised, and left as it is."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import fx

from rewriter.axes import Atom, Layout, Placed, backward, fresh, refined, shape_of
from rewriter.facts import HIDDEN, Op, Operand, Reading
from rewriter.nodes import above, depends_on_data, is_call, values_of
from rewriter.pattern import Contraction, ask
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
    return any(each is source for each in above(node, lambda each: not each < source, sources=values_of))


def _over_channels(reading: Reading) -> bool:
    """Do the scores compare channels, the axis that a linear layer made, instead of tokens?"""
    made = [list(itertools.islice(_projected(side), 2)) for side in (reading.query, reading.key)]
    sides = [
        bool(own) and set(refined(own)) <= (each[0] if each else set())
        for own, each in zip((reading.rows, reading.columns), made, strict=True)
    ]
    # Fewer keys made by a layer over the tokens are keys: their width is the channels, and comes from a layer as well.
    return all(sides) or (any(sides) and not set(refined(reading.width)) & set().union(*itertools.chain(*made)))


def _projected(side: Operand) -> Iterator[set[Atom]]:
    """The atoms on the axis that the projection of an operand made, that of the projection above it, and so on."""
    node, layout = side.node, side.placed.layout
    for _ in range(24):
        layer = _layer(node, layout)
        if layer is not None:
            yield layer[2]
        found = layer[:2] if layer is not None else _before(node, layout)
        if found is None:
            return
        node, layout = found


def _layer(node: fx.Node, layout: Layout) -> tuple[fx.Node, Layout, set[Atom]] | None:
    """What a linear layer is of, its axes, and the atoms that it made."""
    if is_call(node, *_CONVOLUTIONS):
        source = node.all_input_nodes[0]
        # Where a map keeps its size, its places stay what they are.
        sizes = zip(layout, fresh(source), shape_of(node), shape_of(source), strict=True)
        kept = [own if after == before else new for own, new, after, before in sizes]
        return source, (kept[0], *fresh(source)[1:2], *kept[2:]), set(refined(layout[1]))
    if is_call(node, _ATEN.linear, _ATEN.addmm):
        source = node.all_input_nodes[0 if is_call(node, _ATEN.linear) else 1]
        return source, (*layout[:-1], *fresh(source)[-1:]), set(refined(layout[-1]))
    contraction: Contraction | None = ask("contraction", node)
    if contraction is None or depends_on_data(contraction.left) == depends_on_data(contraction.right):
        return None
    source, names = contraction.left, contraction.left_labels
    if depends_on_data(contraction.right):
        source, names = contraction.right, contraction.right_labels
    if names[-1] in contraction.out_labels:  # over another axis than the last it is a mixture of tokens
        return None
    placed = dict(zip(contraction.out_labels, layout, strict=True))
    axes = tuple(placed.get(name) or own for name, own in zip(names, fresh(source), strict=True))
    return source, axes, {atom for name, axis in placed.items() if name not in names for atom in refined(axis)}


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
_CONVOLUTIONS = (_ATEN.convolution, _ATEN.conv1d, _ATEN.conv2d, _ATEN.conv3d)
