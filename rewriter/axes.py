"""Which axis of which tensor means what: layouts of atoms, carried through views in both directions.

A layout writes each axis of a tensor as a product of atoms, the outermost first: a folded (B * H, S, D) is
((b, h), (s,), (d,)). An axis of size 1 that is broadcast has no atoms. A view that cuts an axis refines its atom, and
with it every layout that holds it, so that two spellings of one computation end in the same atoms.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import sympy
import torch
from torch import fx

Size: TypeAlias = int | sympy.Expr


@dataclass(eq=False)
class Atom:
    """An indivisible part of an axis, until a view divides it into `parts`."""

    size: Size
    parts: tuple[Atom, ...] = ()

    def split(self, outer: Size, inner: Size) -> tuple[Atom, Atom]:
        """Divide it for all who hold it."""
        self.parts = (Atom(outer), Atom(inner))
        return self.parts


Axis = tuple[Atom, ...]
Layout = tuple[Axis, ...]


@dataclass(frozen=True)
class View:
    """What one view does to the axes of its source: axis i is the source's axis `order[i]`; or it `expands` axes of
    size 1; or it repeats axes, `repeats[i]` times, element by element where `interleaved`; or else it reshapes.
    """

    order: tuple[int, ...] | None = None
    expands: bool = False
    repeats: tuple[int, ...] = ()
    interleaved: bool = False


@dataclass(frozen=True)
class Placed:
    """A tensor of the graph whose axes are known. (A layout read earlier is refined by later splits.)"""

    node: fx.Node
    axes: Layout = field(compare=False)

    @property
    def layout(self) -> Layout:
        """The axes in atoms as they are divided now."""
        return tuple(refined(axis) for axis in self.axes)

    @property
    def atoms(self) -> Axis:
        """All atoms, in order."""
        return tuple(atom for axis in self.layout for atom in axis)


def refined(axis: Axis) -> Axis:
    """The atoms of an axis with divided ones replaced by their parts."""
    return tuple(part for atom in axis for part in (refined(atom.parts) if atom.parts else (atom,)))


def size_of(size: Any) -> Size:
    """A size as a number or an expression, without a guard on it."""
    if isinstance(size, torch.SymInt):
        expression = size.node.expr
        return int(expression) if expression.is_Integer else expression
    return int(size)


def shape_of(node: fx.Node) -> list[Size]:
    """The shape of a node's value."""
    return [size_of(size) for size in node.meta["val"].shape]


def as_captured(size: Size, nodes: Iterable[fx.Node]) -> int:
    """A size as a number: a symbolic one as it was when the graph was captured, which the shapes of `nodes` know."""
    if isinstance(size, int):
        return size
    for node in nodes:
        for length in node.meta["val"].shape:
            if isinstance(length, torch.SymInt):
                known = length.node.shape_env
                assert known is not None
                return int(size.subs(known.backed_var_to_val))
    raise ValueError(f"the length {size} is symbolic, and no input knows it")


def fresh_axes(shape: Iterable[Size]) -> Layout:
    """A layout with an atom of its own for every axis longer than 1."""
    return tuple((Atom(size),) if size != 1 else () for size in shape)


def fresh(node: fx.Node) -> Layout:
    """A layout for a tensor that nothing is known of."""
    return fresh_axes(shape_of(node))


def expanded(shape: Sequence[Size], layout: Layout) -> Layout:
    """The layout after axes of size 1 were expanded, and others put before them, to this shape."""
    given = ((),) * (len(shape) - len(layout)) + layout
    return tuple(refined(axis) or own for axis, own in zip(given, fresh_axes(shape), strict=True))


def broadcast(node: fx.Node, frame: Layout) -> Layout | None:
    """The layout of a tensor that is broadcast against one with layout `frame`; None where it is the larger one."""
    shape = shape_of(node)
    if len(shape) > len(frame):
        if any(size != 1 for size in shape[: len(shape) - len(frame)]):
            return None
        return ((),) * (len(shape) - len(frame)) + (broadcast_axes(shape[len(shape) - len(frame) :], frame) or ())
    return broadcast_axes(shape, frame[len(frame) - len(shape) :])


def broadcast_axes(shape: Sequence[Size], frame: Layout) -> Layout | None:
    """Axis by axis: nothing where the size is 1, else what the frame has there."""
    axes = [() if size == 1 else refined(axis) for size, axis in zip(shape, frame, strict=True)]
    grows = any(size != 1 and not axis for size, axis in zip(shape, axes, strict=True))
    return None if grows else tuple(axes)


def divide(whole: Size, part: Size) -> Size | None:
    """whole / part where that is whole."""
    if isinstance(whole, int) and isinstance(part, int):
        return whole // part if part and whole % part == 0 else None
    quotient = sympy.cancel(sympy.sympify(whole) / part)
    if quotient.as_numer_denom()[1] != 1:
        return None
    return int(quotient) if quotient.is_Integer else quotient


def reshaped(layout: Layout, shape: Sequence[Size]) -> Layout | None:
    """The layout after a reshape to this shape; None where the sizes do not tell how the axes were cut."""
    rest = [atom for axis in layout for atom in refined(axis)][::-1]
    axes: list[Axis] = []
    for size in shape:
        taken: list[Atom] = []
        missing: Size = size
        while missing != 1:
            if not rest:
                return None
            atom = rest.pop()
            left = divide(missing, atom.size)
            if left is None:
                inner = divide(atom.size, missing)
                if inner is None:
                    return None
                atom, remainder = atom.split(missing, inner)
                rest.append(remainder)
                left = 1
            taken.append(atom)
            missing = left
        axes.append(tuple(taken))
    return None if rest else tuple(axes)


def forward(node: fx.Node, view: View, layout: Layout) -> Layout | None:
    """The layout of a view from that of its source."""
    if view.order is not None:
        return tuple(refined(layout[axis]) for axis in view.order)
    if view.repeats:
        return None
    return expanded(shape_of(node), layout) if view.expands else reshaped(layout, shape_of(node))


def backward(source_node: fx.Node, view: View, layout: Layout) -> Layout | None:
    """The layout of the source of a view from that of the view. What was repeated or expanded, the source lacks."""
    source = shape_of(source_node)
    if view.order is not None:
        axes: list[Axis] = [()] * len(layout)
        for place, origin in enumerate(view.order):
            axes[origin] = refined(layout[place])
        return tuple(axes)
    if view.expands:
        aligned = layout[len(layout) - len(source) :]
        return tuple(() if size == 1 else refined(axis) for size, axis in zip(source, aligned, strict=True))
    if not view.repeats:
        return reshaped(layout, source)
    kept: list[Axis] = []
    new = len(layout) - len(source)
    for axis, count, size in zip(layout[new:], view.repeats[new:], source, strict=True):
        if count == 1 or not axis:
            kept.append(refined(axis))
            continue
        parts = reshaped((axis,), (size, count) if view.interleaved else (count, size))
        if parts is None:
            return None
        kept.append(parts[0] if view.interleaved else parts[1])
    return tuple(kept)
