"""What a walk means: the axes are carried from the product of queries and keys to the product with the values."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Literal

import torch
from torch import fx

from rewriter.axes import Atom, Axis, Placed, broadcast, fresh, fresh_axes, refined, shape_of
from rewriter.beyond import drop_shifts, made_from, outside
from rewriter.carried import Carried, Scores, layout_of
from rewriter.facts import Op, Operand, Reading
from rewriter.masks import read_mask
from rewriter.nodes import value_of
from rewriter.operands import strip
from rewriter.pattern import Call, Normaliser, Step
from rewriter.site import Dense, Refusal
from rewriter.twins import are_twins
from rewriter.walk import Product, Way


def read_call(node: fx.Node, call: Call) -> Reading | Refusal:
    """An attention that is one call."""
    query, key, value = fresh(call.query), fresh(call.key), fresh(call.value)
    batch = shape_of(node)[:-2]
    shared = fresh_axes(batch)
    ratio: Axis = ()
    if call.grouped and len(batch) >= 1 and shape_of(call.key)[-3] != shape_of(call.query)[-3]:
        groups = broadcast_groups(shape_of(call.query)[-3], shape_of(call.key)[-3])
        if groups is None:
            return Refusal("the query heads cannot share the key heads")
        ratio = groups
        shared = (*shared[:-1], groups)
    width, columns = query[-1] or (Atom(1),), key[-2]
    placed = []
    for source, given, inner in (
        (call.query, query, (query[-2], width)),
        (call.key, key, (columns, width)),
        (call.value, value, (columns, value[-1])),
    ):
        outer = shared[len(shared) - (len(given) - 2) :]
        if ratio and source is not call.query:
            outer = (*outer[:-1], ratio[:1] if shape_of(source)[-3] != 1 else ())
        axes = [() if size == 1 else axis for size, axis in zip(shape_of(source)[:-2], outer, strict=True)]
        placed.append(Placed(source, (*axes, *inner)))
    rows = query[-2]
    reading = Reading(
        query=Operand("query", placed[0]),
        key=Operand("key", placed[1]),
        value=Operand("value", placed[2]),
        output=Placed(node, (*shared, rows, value[-1])),
        rows=rows,
        columns=columns,
        width=width,
        value_width=value[-1],
        frame=(*shared, rows, columns),
        ops=[Op("scale", call.scale)],
        causal=call.causal,
        dropout_p=call.dropout_p,
        spelling=call.spelling,
        edits=[call.edit] if call.edit else [],
        opaque=bool(call.edit),
        product=node,
        weights=node,
    )
    if call.mask is not None:
        axes_of_mask = broadcast(call.mask, reading.frame)
        if axes_of_mask is None:
            return Refusal("the mask is larger than the scores")
        kind: Literal["keep", "add"] = "keep" if value_of(call.mask).dtype == torch.bool else "add"
        number = float("-inf") if kind == "keep" else 1.0
        reading.ops.append(Op(kind, number, Placed(call.mask, axes_of_mask)))
    strip(reading)
    return reading


def broadcast_groups(heads: object, kv_heads: object) -> Axis | None:
    """(kv heads, queries to each) of grouped heads."""
    if not isinstance(heads, int) or not isinstance(kv_heads, int) or heads % kv_heads:
        return None
    return (Atom(kv_heads), Atom(heads // kv_heads)) if kv_heads > 1 else ((Atom(heads)),)


def read_ways(node: fx.Node, normaliser: Normaliser, up: Product, down: Product) -> Reading | Refusal:
    """An attention that is spelled out: from the product `up` through the normaliser `node` to the product `down`."""
    scores = Scores(up)
    above = () if normaliser.factor == 1 else ((node, Step("scale", normaliser.scores, number=normaliser.factor)),)
    for reason in (scores.follow(up.way), scores.take((*above, *normaliser.hidden))):
        if reason is not None:  # a refusal is falsy
            return reason
    weights = _Weights(scores, node, normaliser)
    reason = weights.follow(down.way, down.node)
    return reason if reason is not None else weights.meet(down)


class _Weights(Carried):
    """The axes of the weights on their way from the normaliser to the values."""

    what = "weights"

    def __init__(self, scores: Scores, node: fx.Node, normaliser: Normaliser) -> None:
        super().__init__()
        self.scores, self.node, self.normaliser = scores, node, normaliser
        self.mixed, self.joined = list(scores.mixed), scores.joined
        self.layout = self.frame = scores.layout
        self.over = None if normaliser.kind != "softmax" else scores.layout[normaliser.axis % len(scores.layout)]
        self.edits += [*scores.edits, *([normaliser.edit] if normaliser.edit else [])]
        self.doubts = [normaliser.doubt] if normaliser.doubt else []
        self.ops = list(scores.ops)
        self.dropout_p = 0.0

    def follow(self, way: Way, end: fx.Node) -> Refusal | None:
        """Take every step on the way to the product at `end`; a sentence where one cannot be taken."""
        nodes = [self.node, *(node for node, _ in way), end]
        for node, below in itertools.pairwise(nodes):
            # A guard looks at the weights too, on the same way.
            if any(user is not below and not made_from(below, user) for user in node.users):
                self.edits.append("weights_used")
        return self.take(way)

    def _take(self, node: fx.Node, step: Step) -> Refusal | None:
        if step.kind == "dropout":
            if step.number and self.dropout_p:
                self.edits.append("dropped_twice")
            self.dropout_p = self.dropout_p or step.number
        elif step.kind in ("keep", "drop"):
            self._guard(node, step)
        elif step.kind == "slice":
            if self.scores.sink is None and not self.scores.zero_sink:
                self._part(node, step)
        elif step.kind == "guard":
            self.doubts.append(step.name)
        elif step.kind in ("scale", "mul", "div", "add", "shift"):
            self.edits.append("weights_scaled" if step.kind in ("scale", "mul", "div") else "weights_shifted")
        else:
            return super()._take(node, step)
        return None

    def _part(self, node: fx.Node, step: Step) -> None:
        """Some of the weights, of one head, say: what follows is not the whole attention."""
        assert step.axis is not None
        self.edits.append("weights_parted")
        new = () if step.number == 0 else ((Atom(shape_of(node)[step.axis]),),)
        self.layout = (*self.layout[: step.axis], *new, *self.layout[step.axis + 1 :])

    def _guard(self, node: fx.Node, step: Step) -> None:
        """Weights that are set to 0. For rows that see nothing, that is what the operator does by itself."""
        if step.number != 0 or step.buffer is not None:
            self.edits.append("weights_masked")
            return
        assert step.tensor is not None
        same = [i for i, op in enumerate(self.ops) if op.tensor and are_twins(op.tensor.node, step.tensor)]
        if same and self.ops[same[-1]].kind == step.kind:
            self.ops[same[-1]] = replace(self.ops[same[-1]], number=float("-inf"), buffer=None)
        else:
            self.doubts.append("weights_masked")

    def meet(self, down: Product) -> Reading | Refusal:
        """The product with the values."""
        contraction = down.contraction
        last = down.way[-1][0] if down.way else self.node
        mine, others, value = (
            (contraction.left_labels, contraction.right_labels, contraction.right)
            if contraction.left is last
            else (contraction.right_labels, contraction.left_labels, contraction.left)
        )
        if value is last:
            return Refusal("the weights are multiplied by themselves")
        if contraction.addend is not None or contraction.alpha != 1:
            self.edits.append("output_shifted")
        labels: dict[object, Axis] = {}
        for label, axis in zip(mine, self.layout, strict=True):
            labels[label] = labels.get(label) or axis
        for label, size in zip(others, shape_of(value), strict=True):
            if not labels.get(label):
                (labels[label],) = fresh_axes([size])
        summed = [label for label in mine if label not in contraction.out_labels]
        columns = refined(tuple(atom for label in summed for atom in labels[label]))
        over = refined(self.over) if self.over is not None else columns
        if self.joined is not None:
            columns = over = refined(self.joined)
        if set(columns) != set(over) or (not columns and not summed):
            return Refusal("the values are summed over other axes than the weights are normalised over")
        if any(label not in others for label in summed):
            return Refusal("the weights are summed without values")
        placed = Placed(value, tuple(() if s == 1 else labels[n] for n, s in zip(others, shape_of(value), strict=True)))
        ours = {label for label, axis in zip(mine, self.layout, strict=True) if axis}
        own = [label for label in others if labels[label] and label not in ours]
        if not own and all(label in mine for label in others):
            return Refusal("the weights are summed with a factor for each, and not with values")
        if any(label not in contraction.out_labels for label in own):
            return Refusal("the values are summed over an axis of their own")
        width = refined(tuple(atom for label in own for atom in labels[label]))
        if self.normaliser.kind != "softmax" and not width:
            return Refusal("the scores are summed over heads, which makes them an index and no attention")
        output = Placed(down.node, layout_of(down.node, contraction.out_labels, labels))
        return self._reading(placed, output, columns, width)

    def _reading(self, value: Placed, output: Placed, columns: Axis, value_width: Axis) -> Reading | Refusal:
        scores = self.scores
        left, right = scores.left, scores.right
        in_left, in_right = (set(columns) & set(side.atoms) for side in (left, right))
        if columns and bool(in_left) == bool(in_right):
            return Refusal("the weights are normalised over an axis that queries and keys share")
        query, key = (right, left) if in_left else (left, right)
        if columns and set(columns) - set(key.atoms):
            return Refusal("the weights are normalised over an axis that is not of the keys alone")
        own = [
            axis for axis in self.frame
            if set(refined(axis)) & (set(query.atoms) - set(key.atoms) - set(value.atoms)) - set(columns)
        ]  # fmt: skip
        mixed = {atom for axis in self.mixed for atom in refined(axis)}
        # Beside heads that a layer mixes, an axis of one is that of the queries.
        mixes_last = bool(own) and bool(mixed & set(refined(own[-1]))) and () in self.frame
        one_row = len(self.frame) > 3 and (scores.lone[query is right] or mixes_last)
        mine = set(query.atoms) - set(key.atoms) - set(value.atoms)
        rows = tuple(atom for atom in refined(own[-1]) if atom in mine) if own and not one_row else ()
        if not rows:  # one query, which a mask makes into several
            known = {*query.atoms, *key.atoms, *value.atoms}
            alone = [axis for axis in self.frame if axis and not set(refined(axis)) & known]
            rows = refined(alone[-1]) if alone else ()
        reading = Reading(
            query=Operand("query", query),
            key=Operand("key", key),
            value=Operand("value", value),
            output=output,
            rows=rows,
            columns=columns,
            width=scores.width,
            value_width=value_width,
            frame=self.frame,
            ops=self.ops,
            normaliser=self.normaliser.kind,
            sink=scores.sink,
            sink_axes=scores.sink_axes,
            zero_sink=scores.zero_sink or self.normaliser.zero_sink,
            softmax_dtype=self.normaliser.dtype,
            dropout_p=self.dropout_p,
            edits=list(dict.fromkeys(self.edits)),
            doubts=self.doubts,
            product=scores.product,
            weights=self.node,
            inner=self.normaliser.inner,
        )
        if rows and len(own) > 1 and not one_row:
            alone = [tuple(atom for atom in refined(axis) if atom in mine) for axis in own]
            reading.rows = _rows_of_masks(reading, alone) or rows
        if mixed & {*reading.rows, *columns}:
            return Refusal("a linear layer over the queries or keys of the scores")
        strip(reading)
        drop_shifts(reading)
        reading.edits = list(dict.fromkeys([*reading.edits, *outside(reading)]))
        return reading


def _rows_of_masks(reading: Reading, own: list[Axis]) -> Axis:
    """The axis of the queries, of several that keys and values lack, where masks tell it. They stand last by default,
    and before the heads in layouts with tokens first. What hides keys differs from query to query; a bias may as well
    differ from head to head.
    """
    columns = set(refined(reading.columns))
    masks = [op for op in reading.ops if op.kind in ("keep", "drop", "add") and op.tensor is not None]

    def tells(axis: Axis) -> bool:
        rows, others = set(refined(axis)), {atom for each in own if each is not axis for atom in refined(each)}
        roles = replace(reading, rows=refined(axis)).roles()
        return any(
            columns & set(tensor.atoms)
            and rows & set(tensor.atoms)
            and not others & set(tensor.atoms)
            and (value_of(tensor.node).dtype == torch.bool or read_mask(tensor, roles, factor=number).mask != Dense())
            for tensor, number in ((op.tensor, op.number) for op in masks)
            if tensor is not None
        )

    found = next((axis for axis in own[:-1] if tells(axis)), ())
    return refined(found) if found and not tells(own[-1]) else ()
