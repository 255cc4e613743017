"""What is known of one attention while it is read: operands, axes by their roles, what the scores go through."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Literal

import torch
from torch import fx

from rewriter.axes import Atom, Axis, Layout, Placed, forward, refined
from rewriter.site import Refusal
from rewriter.walk import steps_at

HIDDEN = -9.9e3
"""A score is hidden when it becomes this or less. The largest fill in use, -1e4, is -9984 in bfloat16."""


@dataclass
class Operand:
    """Queries, keys or values as they enter the match: the tensor and its axes, to be multiplied by `scale`."""

    role: Literal["query", "key", "value"]
    placed: Placed
    scale: float = 1.0

    @property
    def node(self) -> fx.Node:
        """The tensor."""
        return self.placed.node


@dataclass(frozen=True)
class Op:
    """What happens to the scores: "scale" by a number, "shift" by one, "cap", "floor" (no less than `number`), or with
    a tensor: "add" (times `number`), "mul", "div", "keep" (bool, True is visible) and "drop" (bool, True is hidden),
    where hidden scores become `number`, which may be the one element of a `buffer`.
    """

    kind: Literal["scale", "shift", "add", "mul", "div", "keep", "drop", "cap", "floor"]
    number: float = 1.0
    tensor: Placed | None = None
    buffer: fx.Node | None = None


@dataclass(frozen=True)
class Roles:
    """The axes of (B, H, Sq, Skv, D, Dv) in atoms. H is `heads` for keys and values, with `groups` for queries."""

    batch: Axis
    heads: Axis
    groups: Axis
    rows: Axis
    columns: Axis
    width: Axis
    value_width: Axis

    @property
    def query_heads(self) -> Axis:
        """The heads of queries, scores and output."""
        return self.heads + self.groups

    @property
    def scores(self) -> tuple[Axis, Axis, Axis, Axis]:
        """(B, H, Sq, Skv)."""
        return self.batch, self.query_heads, self.rows, self.columns

    @property
    def output(self) -> tuple[Axis, Axis, Axis, Axis]:
        """(B, H, Sq, Dv)."""
        return self.batch, self.query_heads, self.rows, self.value_width

    @property
    def named(self) -> dict[Atom, str]:
        """A name for each atom, by which the axes of two attentions can be compared."""
        return {
            atom: f"{each.name}{place}:{atom.size}"
            for each in fields(self)
            for place, atom in enumerate(getattr(self, each.name))
        }

    def divided(self) -> Roles:
        """The roles in atoms as they are divided now: taking a mask apart may cut an axis."""
        return Roles(**{each.name: refined(getattr(self, each.name)) for each in fields(self)})


@dataclass
class Reading:
    """All that was read of one attention."""

    query: Operand
    key: Operand
    value: Operand
    output: Placed
    rows: Axis
    columns: Axis
    width: Axis
    value_width: Axis
    frame: Layout
    """The axes of the scores where they are normalised."""
    ops: list[Op] = field(default_factory=list)
    normaliser: str = "softmax"
    sink: fx.Node | None = None
    sink_axes: Layout = ()
    zero_sink: bool = False
    causal: bool = False
    opaque: bool = False
    """Is what hides scores not read, so that it may be anything?"""
    softmax_dtype: torch.dtype | None = None
    dropout_p: float = 0.0
    edits: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    """What the proof has to decide: taken for no change, and an edit otherwise."""
    product: fx.Node | None = None
    weights: fx.Node | None = None
    inner: fx.Node | None = None
    """A softmax that is a part of the weights, and was read by itself before."""
    spelling: str = "eager"

    @property
    def operands(self) -> tuple[Operand, Operand, Operand]:
        """Query, key, value."""
        return self.query, self.key, self.value

    @property
    def scale(self) -> float:
        """The product of all numbers that the scores are multiplied by."""
        numbers = [op.number for op in self.ops if op.kind == "scale"]
        return math.prod(numbers) * self.query.scale * self.key.scale

    @property
    def softcap(self) -> float | None:
        """c where the scores are c * tanh(scale * q k^T / c)."""
        above = self.ops[self.below_cap :]
        return math.prod(op.number for op in above if op.kind == "scale") if self.is_capped else None

    @property
    def is_capped(self) -> bool:
        """Do the scores go through a tanh?"""
        return any(op.kind == "cap" for op in self.ops)

    @property
    def below_cap(self) -> int:
        """How many ops stand before the last tanh."""
        return max((i for i, op in enumerate(self.ops) if op.kind == "cap"), default=0)

    def fill(self, op: Op) -> float:
        """What scores hidden by this op are in the end."""
        after = self.ops[self.ops.index(op) + 1 :]
        return op.number * math.prod(each.number for each in after if each.kind == "scale")

    @property
    def factors(self) -> list[Op]:
        """The tensors that the scores are multiplied by, which the operator meets in its queries or keys."""
        return [op for op in self.ops if op.kind in ("mul", "div")]

    @property
    def tensors(self) -> list[Placed]:
        """What enters beside queries, keys and values."""
        placed = [op.tensor for op in self.ops if op.tensor is not None]
        return placed + ([Placed(self.sink, self.sink_axes)] if self.sink is not None else [])

    @property
    def buffers(self) -> list[fx.Node]:
        """What holds the numbers that hidden scores become."""
        return [op.buffer for op in self.ops if op.buffer is not None]

    def roles(self) -> Roles:
        """Which atoms are batch, heads, rows, ..., as they are divided now."""
        return _roles(self)


def _roles(reading: Reading) -> Roles:
    query, key, value = (set(side.placed.atoms) for side in reading.operands)
    rows, columns = refined(reading.rows), refined(reading.columns)
    # Axes of size 1 count: the heads of a batch of one are no batch.
    axes = [refined(axis) for axis in reading.frame if not set(refined(axis)) & {*rows, *columns}]
    for alone in (columns, rows):  # the axis of one key or one query, where it has one, stands last
        if not alone and axes and not axes[-1]:
            axes = axes[:-1]
    folded = [refined(axis) for axis in reading.frame if set(refined(axis)) & set(rows)]
    outer = [atom for axis in axes + folded for atom in axis if atom not in rows and atom not in columns]
    groups = tuple(atom for atom in outer if atom in query and atom not in key and atom not in value)
    shared = [atom for atom in outer if atom not in groups]
    heads = _heads(reading, axes, groups, shared)
    batch = tuple(atom for atom in shared if atom not in heads)
    return Roles(batch, heads, groups, rows, columns, refined(reading.width), refined(reading.value_width))


def _heads(reading: Reading, axes: list[Axis], groups: Axis, shared: list[Atom]) -> Axis:
    if groups:
        place = next((i for i, axis in enumerate(axes) if groups[0] in axis), None)
        if place is None or len(axes) < 2:
            return ()
        first = axes[place].index(groups[0])
        beside = (*axes[place][:first][-1:], *(atom for atom in axes[place][first:] if atom not in groups))
        before = beside or (axes[place - 1][-1:] if place > 1 else ())
        return tuple(atom for atom in before if atom in shared)
    merged = _merged_with_width(reading)
    if merged & set(shared):
        return tuple(atom for atom in shared if atom in merged)
    if len(axes) > 1:
        return tuple(atom for atom in axes[-1] if atom in shared)
    return tuple(shared[-1:]) if len(shared) > 1 else ()


def _merged_with_width(reading: Reading) -> set[Atom]:
    """The atoms that a view below the output puts on one axis with the columns of the values: the heads."""
    node, layout = reading.output.node, reading.output.layout
    width = set(refined(reading.value_width))
    for _ in range(8):
        for axis in layout:
            if set(refined(axis)) & width and set(refined(axis)) - width:
                return set(refined(axis)) - width
        user = next(iter(node.users), None)
        steps = steps_at(user) if user is not None and user.op == "call_function" else ()
        step = next((s for s in steps if s.source is node), None) if not isinstance(steps, Refusal) else None
        if user is None or step is None or step.kind not in ("view", "same"):
            break
        moved = forward(user, step.view, layout) if step.view is not None else layout
        if moved is None:
            break
        node, layout = user, moved
    return set()
