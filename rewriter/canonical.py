"""Tensors brought from the axes that a model gave them to (B, H, S, D), and back.

`emit(operator, *args)` applies an operator to values or adds its call to a graph, so that what the proof runs is what
is placed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from rewriter.axes import Atom, Axis, Layout, Placed, refined

_ATEN = torch.ops.aten

Emit = Callable[..., Any]
SizeOf = Callable[[Atom], Any]
"""The length of an atom in this call: a number or, in a graph, the node that holds it."""


def run(operator: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The `Emit` that computes."""
    return operator(*args, **kwargs)


def sizes_from(emit: Emit, tensors: Iterable[tuple[Placed, Any]], replaced: Mapping[int, int] | None = None) -> SizeOf:
    """Lengths as these tensors have them; `replaced` says which captured numbers are others here."""
    given = list(tensors)
    known: dict[Atom, Any] = {}

    def find(atom: Atom) -> Any:
        shared = None
        for placed, value in given:
            for place, axis in enumerate(placed.layout):
                if axis == (atom,):
                    return extent(emit, value, place)
                others = [each for each in axis if each is not atom]
                if len(others) < len(axis) and all(isinstance(each.size, int) for each in others):
                    shared = shared or (value, place, others)
        if isinstance(atom.size, int):
            return (replaced or {}).get(atom.size, atom.size)
        if shared is None:
            raise ValueError("an axis whose length is symbolic, and stands nowhere by itself")
        value, place, others = shared
        return emit(operator.floordiv, extent(emit, value, place), times(emit, [size(each) for each in others]))

    def size(atom: Atom) -> Any:
        if atom not in known:
            known[atom] = find(atom)
        return known[atom]

    return size


def extent(emit: Emit, value: Any, axis: int) -> Any:
    """The length of an axis of a value."""
    if not isinstance(value, fx.Node):
        return value.shape[axis]
    length = value.meta["val"].shape[axis]
    return emit(_ATEN.sym_size.int, value, axis) if isinstance(length, torch.SymInt) else length


def times(emit: Emit, numbers: Iterable[Any]) -> Any:
    """The product of sizes."""
    fixed, result = 1, None
    for number in numbers:
        if isinstance(number, int):
            fixed *= number
        else:
            result = number if result is None else emit(operator.mul, result, number)
    return fixed if result is None else result if fixed == 1 else emit(operator.mul, result, fixed)


def gathered(emit: Emit, value: Any, layout: Layout, groups: Sequence[Axis], size: SizeOf, full: Sequence[bool]) -> Any:
    """The value with one axis for each group of atoms. A group that it lacks altogether becomes an axis of size 1, or,
    where `full` says so, as long as the group.
    """
    layout = tuple(refined(axis) for axis in layout)
    own = [atom for axis in layout for atom in axis]
    wanted = [atom for group in groups for atom in group]
    if any(len(axis) != 1 for axis in layout):
        value = emit(_ATEN.reshape.default, value, [size(atom) for atom in own])
    order = [own.index(atom) for atom in wanted if atom in own]
    if len(order) < len(own):
        raise ValueError("an axis without a role")
    if order != sorted(order):
        value = emit(_ATEN.permute.default, value, order)
    for place, (group, whole) in enumerate(zip(groups, full, strict=True)):
        lacking = [atom for atom in group if atom not in own]
        if not group or (len(lacking) == len(group) and not whole):
            value = emit(_ATEN.unsqueeze.default, value, place)
        elif lacking:
            for offset, atom in enumerate(group):
                value = emit(_ATEN.unsqueeze.default, value, place + offset) if atom in lacking else value
            rank = len(value.meta["val"].shape) if isinstance(value, fx.Node) else value.dim()
            wide: list[Any] = [-1] * rank
            for offset, atom in enumerate(group):
                wide[place + offset] = size(atom) if atom in lacking else -1
            value = emit(_ATEN.expand.default, value, wide)
            value = _merged(emit, value, place, len(group))
        else:
            value = _merged(emit, value, place, len(group))
    return value


def _merged(emit: Emit, value: Any, place: int, count: int) -> Any:
    return emit(_ATEN.flatten.using_ints, value, place, place + count - 1) if count > 1 else value


def scattered(emit: Emit, value: Any, groups: Sequence[Axis], layout: Layout, size: SizeOf) -> Any:
    """The inverse: a value with an axis for each group, as the model has it."""
    layout = tuple(refined(axis) for axis in layout)
    own = [atom for group in groups for atom in group]
    wanted = [atom for axis in layout for atom in axis]
    if any(len(group) != 1 for group in groups):
        value = emit(_ATEN.reshape.default, value, [size(atom) for atom in own])
    order = [own.index(atom) for atom in wanted]
    if order != sorted(order):
        value = emit(_ATEN.permute.default, value, order)
    if any(len(axis) != 1 for axis in layout):
        value = emit(_ATEN.reshape.default, value, [times(emit, [size(atom) for atom in axis]) for axis in layout])
    return value
