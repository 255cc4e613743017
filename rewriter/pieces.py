"""What an axis is made of, when tokens are followed through a graph.

A piece is a part of an origin, which is an axis where it came into being. Views cut pieces and put them together again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import fx

from rewriter.axes import Atom, Size, refined, reshaped, shape_of


@dataclass(eq=False)
class Origin:
    """An axis where it came into being. "grid": the space of a feature map. "input": any axis of what may be an image
    that the model is called with. "joined": tokens, the `body`, with others in front of them and behind. `within`: the
    part of another axis that this one is a resampling of.
    """

    size: Size
    kind: Literal["plain", "input", "grid", "joined"] = "plain"
    body: tuple[Piece, ...] = ()
    front: Size = 0
    back: Size = 0
    within: Piece | None = None


@dataclass(frozen=True)
class Piece:
    """Places of an origin: `size` of them, each `stride` after the one before."""

    of: Origin
    size: Size
    stride: Size = 1

    @property
    def whole(self) -> bool:
        """Are these all of its places?"""
        return self.size == self.of.size

    @property
    def known(self) -> int:
        """How much is known: 2 of space and of what has a place in it, 1 of what may be. Who divides two axes of an
        image into patches or windows, and attends to what both have in common, says that they are space.
        """
        return {"plain": 0, "input": 1 if self.whole else 2, "grid": 2, "joined": 2}[self.of.kind]

    @property
    def shape(self) -> tuple[object, ...]:
        """What two pieces at the same place of two maps have in common."""
        if self.of.kind == "joined":
            return self.size, self.stride, self.of.front, self.of.back, *(piece.shape for piece in self.of.body)
        return (self.size,)


Axis = tuple[Piece, ...]
Layout = tuple[Axis, ...]
Known: TypeAlias = dict[fx.Node, Layout]


def new(size: Size, kind: Literal["plain", "input", "grid"] = "plain") -> Axis:
    """An axis that comes into being here."""
    return (Piece(Origin(size, kind), size),) if size != 1 else ()


def given_at(node: fx.Node, known: Known) -> Layout:
    """The layout of a node; where nothing is known, its sizes."""
    return known[node] if node in known else tuple(new(size) for size in shape_of(node))


def rank(axis: Axis) -> int:
    """How much is known of an axis."""
    return max((piece.known for piece in axis), default=0)


def is_grid(axis: Axis) -> bool:
    """Is this one axis of a map, or a part of one?"""
    return len(axis) == 1 and axis[0].of.kind == "grid"


def total(sizes: Iterable[Size]) -> Size:
    """Their sum."""
    added: Size = 0
    for size in sizes:
        added = added + size
    return plain(added)


def plain(size: Size) -> Size:
    """An int where it is one."""
    return size if isinstance(size, int) or not size.is_Integer else int(size)


def merged(pieces: Iterable[Piece]) -> Axis:
    """Neighbours that were one piece are one again; windows that were pooled, side by side, are a smaller map."""
    axis: list[Piece] = []
    for piece in pieces:
        last, within = axis[-1] if axis else None, piece.of.within
        if last is not None and last.of is piece.of and last.stride == piece.stride * piece.size:
            axis[-1] = Piece(piece.of, last.size * piece.size, piece.stride)
        elif last is not None and within == Piece(last.of, last.stride) and piece.whole:
            axis[-1:] = _resampling(Piece(last.of, last.size * last.stride), last.size * piece.size)
        else:
            axis.append(piece)
    return tuple(axis)


def _resampling(part: Piece, size: Size) -> Axis:
    """Fewer or more places of a part. What only moved inside it has lost its place in the whole."""
    return (Piece(Origin(size, "grid", within=None if part.whole or part.size == size else part), size),)


def as_shape(given: Layout, shape: Sequence[Size]) -> Layout:
    """What stays on both sides stays; the middle is cut as it has to be."""
    first, last = 0, 0
    least = min(len(given), len(shape))
    while first < least and length_of(given[first]) == shape[first]:
        first += 1
    while last < least - first and length_of(given[-1 - last]) == shape[-1 - last]:
        last += 1
    middle = given[first : len(given) - last]
    pieces = merged(piece for axis in middle for piece in axis)
    atoms = {Atom(piece.size): piece for piece in pieces}
    new_shape = shape[first : len(shape) - last]
    cut = reshaped((tuple(atoms),), new_shape)
    if cut is None:
        changed: Layout = tuple(new(size) for size in new_shape)
    else:
        parts: dict[Atom, Piece] = {}
        for atom, piece in atoms.items():
            _divide(atom, piece, parts)
        changed = tuple(merged(parts[atom] for atom in refined(axis)) for axis in cut)
    return (*given[:first], *changed, *given[len(given) - last :])


def _divide(atom: Atom, piece: Piece, parts: dict[Atom, Piece]) -> None:
    """What became of a piece, as its atom was divided."""
    if not atom.parts:
        parts[atom] = piece
        return
    outer, inner = atom.parts
    _divide(outer, Piece(piece.of, outer.size, piece.stride * inner.size), parts)
    _divide(inner, Piece(piece.of, inner.size, piece.stride), parts)


def length_of(axis: Axis) -> Size:
    """How many places it has."""
    length: Size = 1
    for piece in axis:
        length = length * piece.size
    return length


def agreed(size: Size, given: Sequence[Axis]) -> Axis:
    """The axis of a result from those of the operands that are as long."""
    best: Axis | None = None
    for axis in given:
        if not rank(axis) or length_of(axis) != size:
            continue
        if best is not None and [piece.shape for piece in best] != [piece.shape for piece in axis]:
            return new(size)
        if best is None or rank(axis) > rank(best):
            best = axis
    return best if best is not None else new(size)


def sized(axis: Axis, size: Size, *, image: bool = False) -> Axis:
    """Another number of places along the same axis."""
    alone = axis[0].of.kind if len(axis) == 1 else "plain"
    if alone == "grid" or (image and alone == "input"):
        return _resampling(axis[0], size) if size != 1 else ()
    return new(size, "input") if alone == "input" else new(size)


def among_others(axis: Axis, front: Size, back: Size, size: Size) -> Axis:
    """These tokens with others in front of them and behind."""
    if front == 0 and back == 0:
        return axis
    if len(axis) == 1 and axis[0].of.kind == "joined" and axis[0].whole:
        inner = axis[0].of
        axis, front, back = inner.body, plain(front + inner.front), plain(inner.back + back)
    return (Piece(Origin(size, "joined", axis, front, back), size),)


def cut(given: Layout, place: int, start: Size | None, length: Size) -> Layout:
    """`length` places of one axis, from `start`."""
    axis = given[place]
    if length == length_of(axis):
        return given
    part = sized(axis, length)
    if len(axis) == 1 and axis[0].of.kind == "joined" and axis[0].whole and start is not None:
        joined = axis[0].of
        body = length_of(joined.body)
        front, back = plain(joined.front - start), plain(start + length - joined.front - body)
        if isinstance(front, int) and isinstance(back, int) and front >= 0 and back >= 0:
            part = among_others(joined.body, front, back, length)
    return (*given[:place], part, *given[place + 1 :])


def without(given: Layout, place: int) -> Layout:
    """The layout where one place of an axis was selected."""
    return tuple(axis for i, axis in enumerate(given) if i != place % len(given))
