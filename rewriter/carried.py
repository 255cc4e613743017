"""The axes of the scores on their way from the product of queries and keys to the normaliser."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from rewriter.axes import Atom, Axis, Layout, Placed, broadcast, expanded, forward, shape_of
from rewriter.facts import HIDDEN, Op
from rewriter.nodes import constant
from rewriter.operands import is_changed, unexpanded
from rewriter.pattern import Contraction, Step
from rewriter.site import Refusal
from rewriter.walk import Product, Way, described


class Carried:
    """Axes on their way, and what happened to them that the operator cannot say."""

    what: str
    layout: Layout

    def __init__(self) -> None:
        self.edits: list[str] = []
        self.mixed: list[Axis] = []
        self.joined: Axis | None = None
        """The keys of these scores, where others stand beside them."""

    def take(self, way: Way) -> Refusal | None:
        """Take every step; a sentence where one cannot be taken."""
        return next((reason for node, step in way if (reason := self._take(node, step)) is not None), None)

    def _take(self, node: fx.Node, step: Step) -> Refusal | None:
        if step.kind == "view":
            assert step.view is not None
            moved = forward(node, step.view, self.layout)
            if moved is None:
                return Refusal(f"the axes of the {self.what} cannot be followed through {described(node)}")
            self.layout = moved
        elif step.kind == "edit":
            self._edit(node, step)
        elif step.kind != "same":
            return Refusal(f"the reading of the {self.what} stopped at {described(node)}")
        return None

    def _edit(self, node: fx.Node, step: Step) -> None:
        self.edits.append(step.name)
        if step.axis is not None:
            axis = step.axis % len(self.layout)
            if step.name == "joined_scores":
                self.joined = self.layout[axis]
            else:
                self.mixed.append(self.layout[axis])
            if shape_of(node)[axis] != shape_of(step.source)[axis]:
                self.layout = (*self.layout[:axis], (Atom(shape_of(node)[axis]),), *self.layout[axis + 1 :])


class Scores(Carried):
    """The axes of the scores on their way to the normaliser, and what they go through."""

    what = "scores"

    def __init__(self, up: Product) -> None:
        super().__init__()
        contraction = up.contraction
        labels = _labelled(contraction)
        self.product = up.node
        self.left = Placed(contraction.left, layout_of(contraction.left, contraction.left_labels, labels))
        self.right = Placed(contraction.right, layout_of(contraction.right, contraction.right_labels, labels))
        self.layout = layout_of(up.node, contraction.out_labels, labels)
        self.width = tuple(
            atom
            for label in dict.fromkeys((*contraction.left_labels, *contraction.right_labels))
            if label not in contraction.out_labels
            for atom in labels[label]
        )
        self.ops = [Op("scale", contraction.alpha)] if contraction.alpha != 1 else []
        self.edits += [contraction.edit] if contraction.edit else []
        self.sink: fx.Node | None = None
        self.sink_axes: Layout = ()
        self.zero_sink = False
        sides = contraction.left_labels, contraction.right_labels
        self.lone = [_has_lone_axis(own, other, labels) for own, other in (sides, sides[::-1])]
        """Has the left, or the right, an axis of its own in the scores that is 1 long: that of a single query?"""
        self.addend = contraction.addend
        self.beta = contraction.beta

    def follow(self, way: Way) -> Refusal | None:
        """Take every step; a sentence where one cannot be taken."""
        if self.addend is not None:
            step = Step("add", self.product, self.addend, self.beta)
            way = ((self.product, step), *way)
        return self.take(way)

    def _take(self, node: fx.Node, step: Step) -> Refusal | None:
        if (self.sink is not None or self.zero_sink) and (step.kind not in ("same", "add") or step.factor != 1):
            return Refusal(f"the scores and their sink are changed together at {described(node)}")
        if step.kind in ("scale", "shift"):
            self.ops.append(Op(step.kind, step.number))
        elif step.kind == "cap":
            self.ops.append(Op("cap"))
        elif step.kind == "floor":
            self._floor(step)
        elif step.kind == "guard":
            self._edit(node, step)
        elif step.kind == "sink":
            return self._add_sink(node, step)
        elif step.kind in ("add", "mul", "div", "keep", "drop"):
            return self._combine(node, step)
        else:
            return super()._take(node, step)
        return None

    def _floor(self, step: Step) -> None:
        """Only what is hidden becomes less than the lowest number of its type: so it is a fill that is changed."""
        scale, ops = 1.0, list(self.ops)
        for place in reversed(range(len(ops))):
            op = ops[place]
            if op.kind == "scale":
                scale *= op.number
            elif op.kind in ("mul", "div", "cap") or scale <= 0 or op.buffer is not None:
                self.edits.append("clamped")
                return
            elif op.kind in ("keep", "drop"):
                ops[place] = replace(op, number=max(op.number, step.number / scale))
        self.ops = [*ops, Op("floor", step.number)] if any(op.kind == "add" for op in ops) else ops

    def _add_sink(self, node: fx.Node, step: Step) -> Refusal | None:
        assert step.axis is not None
        if self.sink is not None or self.zero_sink:
            return Refusal("two sinks")
        self.zero_sink = step.tensor is None
        if step.tensor is not None:
            axes = broadcast(step.tensor, self.layout)
            if axes is None:
                return Refusal("a sink that is larger than the scores")
            self.sink, self.sink_axes = unexpanded(step.tensor, axes)
        return None

    def _combine(self, node: fx.Node, step: Step) -> Refusal | None:
        assert step.tensor is not None
        if len(shape_of(node)) < len(self.layout):
            return Refusal(f"the axes of the scores cannot be followed through {described(node)}")
        # A mask may be larger than the scores: there is one product for several of its heads.
        frame = expanded(shape_of(node), self.layout)
        axes = broadcast(step.tensor, frame)
        if axes is None:
            return Refusal(f"the mask is larger than the scores at {described(node)}")
        if self.sink is not None or self.zero_sink:
            # Beside a sink only what is the same for the sink and all keys is understood, and that changes nothing.
            if shape_of(step.tensor)[-1:] == [1]:
                return None
            return Refusal(f"a mask over the scores and their sink at {described(node)}")
        self.layout = frame
        kind = step.kind
        if step.factor != 1:
            self.ops.append(Op("scale", step.factor))
        if kind == "add" and constant(step.tensor) == 0 and not is_changed(step.tensor):
            return None
        assert kind in ("add", "mul", "div", "keep", "drop")
        if step.buffer is not None and step.number > HIDDEN:
            return Refusal(f"a buffer holds what hidden scores become, and it does not hide them, at {described(node)}")
        self.ops.append(Op(kind, step.number, Placed(step.tensor, axes), step.buffer))
        return None


def _has_lone_axis(own: tuple[object, ...], other: tuple[object, ...], labels: dict[object, Axis]) -> bool:
    return any(label not in other and not labels[label] for label in own)


def _labelled(contraction: Contraction) -> dict[object, Axis]:
    """The atoms of each label."""
    labels: dict[object, Axis] = {}
    for node, names in ((contraction.left, contraction.left_labels), (contraction.right, contraction.right_labels)):
        for label, size in zip(names, shape_of(node), strict=True):
            if size != 1 and not labels.get(label):
                labels[label] = (Atom(size),)
            labels.setdefault(label, ())
    return labels


def layout_of(node: fx.Node, names: tuple[object, ...], labels: dict[object, Axis]) -> Layout:
    return tuple(() if size == 1 else labels[label] for label, size in zip(names, shape_of(node), strict=True))
