"""How the tokens of an attention lie: a grid, a window of one, some tokens in front; told by where they come from.

One pass over the graph says of each axis what it is made of. A piece is a part of an origin, which is an axis where it
came into being: what a convolution slides over is a grid, and so is a mesh of positions. Views cut pieces and put them
together again, most operators keep them, and what is not known to keep them ends the knowledge. The number of tokens is
never interpreted.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import fx

from rewriter.axes import Atom, Size, refined, reshaped, shape_of, size_of
from rewriter.biases import terms
from rewriter.facts import Reading
from rewriter.pattern import argument, depends_on_data, is_call, is_parameter
from rewriter.site import AttentionSite
from rewriter.walk import step_at


@dataclass(eq=False)
class Origin:
    """An axis where it came into being. "grid": the space of a feature map. "input": any axis of what may be an image
    that the model is called with. "joined": tokens, the `body`, with others in front of them and behind.
    """

    size: Size
    kind: Literal["plain", "input", "grid", "joined"] = "plain"
    body: tuple[Piece, ...] = ()
    front: Size = 0
    back: Size = 0


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


class Found(Protocol):
    """A match, as far as this module looks at it."""

    site: AttentionSite
    reading: Reading


def place_tokens(graph: fx.Graph, matches: Iterable[Found]) -> None:
    """Write into the site of each match how the tokens of its queries lie, where that is known."""
    found = list(matches)
    if not found:
        return
    ends: dict[fx.Node, Reading] = {}
    for match in found:
        ends.setdefault(match.reading.output.node, match.reading)
    known = layouts(graph, ends)
    for match in found:
        tokens = _from_rows(match.reading, known) or (_from_bias(match) if match.site.bias == "decomposed" else None)
        if tokens is not None:
            match.site = replace(match.site, tokens=tokens)


def layouts(graph: fx.Graph, ends: dict[fx.Node, Reading]) -> Known:
    """The layouts of all nodes of which more is known than sizes. `ends` are the outputs of attentions."""
    known: Known = {}
    for node in graph.nodes:
        layout = _layout(node, known, ends)
        if layout is not None and any(_rank(axis) for axis in layout):
            known[node] = layout
        if is_call(node, _ATEN.copy_):
            _fill(node, known)
    return known


def _layout(node: fx.Node, known: Known, ends: dict[fx.Node, Reading]) -> Layout | None:
    if node.op == "placeholder":
        return _of_input(node)
    if node.op != "call_function":
        return None
    if node in ends:
        return _of_attention(ends[node], known)
    if node.target is operator.getitem:
        return _item(node, known)
    rule = _rule(node.target)
    if rule is not _convolved and not any(source in known for source in node.all_input_nodes):
        return None
    return rule(node, known) if isinstance(node.meta.get("val"), torch.Tensor) else None


# --- where layouts begin ---------------------------------------------------------------------------------------------


def _of_input(node: fx.Node) -> Layout | None:
    value = node.meta.get("val")
    image = isinstance(value, torch.Tensor) and value.dim() in (4, 5) and value.dtype.is_floating_point
    return tuple(_new(size, "input") for size in shape_of(node)) if image and depends_on_data(node) else None


def _of_attention(reading: Reading, known: Known) -> Layout | None:
    """The output has the rows, and the batch, of the queries."""
    held = _atoms(reading, known)
    if not held:
        return None
    layout = reading.output.layout
    return tuple(_merged(piece for atom in axis for piece in held.get(atom) or _new(atom.size)) for axis in layout)


def _convolved(node: fx.Node, known: Known) -> Layout | None:
    source, weight = node.args[:2]
    assert isinstance(source, fx.Node) and isinstance(weight, fx.Node)
    before, after, kernel = shape_of(source), shape_of(node), shape_of(weight)[2:]
    if len(before) != len(kernel) + 2:
        return None
    given = _given(source, known)
    axes: list[Axis] = [given[0], _new(after[1])]
    for axis, size, old, width in zip(given[2:], after[2:], before[2:], kernel, strict=True):
        if size == old and (_rank(axis) > 1 or len(kernel) == 1 or (width == 1 and not _rank(axis))):
            axes.append(axis)
        else:
            axes.append(_new(size, "grid" if len(kernel) > 1 or _is_grid(axis) else "plain"))
    return tuple(axes)


def _fill(node: fx.Node, known: Known) -> None:
    """A tensor that is made empty, and written into: it is what all that is written agrees on."""
    base, source = node.args[:2]
    assert isinstance(base, fx.Node)
    layout = _given(source, known) if isinstance(source, fx.Node) else ()
    same = []
    while base.op == "call_function" and _rule(base.target) in (_sliced, _selected, _narrowed, _viewed, _copied):
        part, base = base, base.args[0]
        assert isinstance(base, fx.Node)
        if _rule(part.target) is _copied:
            same.append(part)
        elif _rule(part.target) is _sliced and len(layout) == len(shape_of(part)):
            sizes = zip(layout, shape_of(part), shape_of(base), strict=True)
            layout = tuple(axis if size == whole else _new(whole) for axis, size, whole in sizes)
        else:
            layout = ()
    if is_call(base, *_EMPTY):
        layout = layout if len(layout) == len(shape_of(base)) else tuple(_new(size) for size in shape_of(base))
        for each in (base, *same):
            known[each] = _common(known[each], layout) if each in known else layout


def _common(first: Layout, second: Layout) -> Layout:
    """What is known by both."""
    both = zip(first, second, strict=True)
    return tuple(a if [p.shape for p in a] == [p.shape for p in b] and _rank(b) else _new(_length(a)) for a, b in both)


# --- how they go on --------------------------------------------------------------------------------------------------

_Rule = Callable[[fx.Node, Known], Layout | None]


def _same(node: fx.Node, known: Known) -> Layout | None:
    return known.get(node.args[0])  # type: ignore[arg-type]


def _copied(node: fx.Node, known: Known) -> Layout | None:
    """Where nothing is known of what is written over, it is what is written."""
    target, source = node.args[:2]
    if target in known or source not in known:
        return _same(node, known)
    return known[source] if shape_of(source) == shape_of(node) else None  # type: ignore[index, arg-type]


def _elementwise(node: fx.Node, known: Known) -> Layout | None:
    """What is known of one operand holds; where two are known to lie differently, nothing is."""
    shape, sources = shape_of(node), [source for source in node.all_input_nodes if source in known]
    if len(sources) == 1 and len(known[sources[0]]) == len(shape) and shape_of(sources[0]) == shape:
        return known[sources[0]]
    every = [((),) * (len(shape) - len(known[each])) + known[each] for each in sources]
    return tuple(_agreed(size, axes) for size, *axes in zip(shape, *every, strict=True))


def _rolled(node: fx.Node, known: Known) -> Layout | None:
    """Rolled or flipped, a map is a map; what several axes were folded into is none."""
    given, dims = known.get(node.args[0]), argument(node, "dims")  # type: ignore[arg-type]
    if given is None or not dims:
        return None
    moved = {int(axis) % len(given) for axis in ([dims] if isinstance(dims, int) else dims)}
    return tuple(
        _sized(axis, _length(axis)) if i in moved and not (_is_grid(axis) and axis[0].whole) else axis
        for i, axis in enumerate(given)
    )


def _viewed(node: fx.Node, known: Known) -> Layout | None:
    step = step_at(node)
    if step is None or step.view is None or step.source not in known:
        return None
    given, view = known[step.source], step.view
    if view.order is not None:
        return tuple(given[axis] for axis in view.order)
    if view.repeats:
        return None
    return _expanded(node, given) if view.expands else _reshaped(given, shape_of(node))


def _expanded(node: fx.Node, given: Layout) -> Layout | None:
    shape = shape_of(node)
    padded = ((),) * (len(shape) - len(given)) + given
    return tuple(axis or _new(size) for size, axis in zip(shape, padded, strict=True))


def _repeated(node: fx.Node, known: Known) -> Layout | None:
    given = known.get(node.args[0])  # type: ignore[arg-type]
    if given is None:
        return None
    before, after = shape_of(node.args[0]), shape_of(node)  # type: ignore[arg-type]
    new = len(after) - len(before)
    old = zip(after[new:], before, given, strict=True)
    return (*(_new(size) for size in after[:new]), *(axis if size == own else _new(size) for size, own, axis in old))


def _interleaved(node: fx.Node, known: Known) -> Layout | None:
    given, dim = known.get(node.args[0]), argument(node, "dim")  # type: ignore[arg-type]
    if given is None or dim is None or len(given) != len(shape_of(node)):
        return None
    place = int(dim) % len(given)
    return (*given[:place], _new(shape_of(node)[place]), *given[place + 1 :])


def _stacked(node: fx.Node, known: Known) -> Layout | None:
    sources: Any = node.args[0]
    shape, place = shape_of(node), int(argument(node, "dim", 0)) % len(shape_of(node))
    sizes = (*shape[:place], *shape[place + 1 :])
    every = [known[each] for each in sources if each in known]
    others = [_agreed(size, [axes[i] for axes in every]) for i, size in enumerate(sizes)]
    return (*others[:place], _new(shape[place]), *others[place:])


def _linear(node: fx.Node, known: Known) -> Layout | None:
    given = known.get(node.args[0])  # type: ignore[arg-type]
    return (*given[:-1], _new(shape_of(node)[-1])) if given is not None else None


def _product(node: fx.Node, known: Known) -> Layout | None:
    """A linear layer, spelled as a product with a matrix of weights."""
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    return _linear(node, known) if len(shape_of(weight)) == 2 and is_parameter(weight) else None


def _added_product(node: fx.Node, known: Known) -> Layout | None:
    given = known.get(node.args[1])  # type: ignore[arg-type]
    weight = node.args[2]
    if given is None or not isinstance(weight, fx.Node) or not is_parameter(weight):
        return None
    return given[0], _new(shape_of(node)[-1])


def _resized(node: fx.Node, known: Known) -> Layout | None:
    """A map with more or fewer places along some axes is a new map."""
    return _of_sizes(node, known, image=False)


def _resampled(node: fx.Node, known: Known) -> Layout | None:
    """The same, by an operator that is for images."""
    return _of_sizes(node, known, image=True)


def _of_sizes(node: fx.Node, known: Known, *, image: bool) -> Layout | None:
    given, shape = known.get(node.args[0]), shape_of(node)  # type: ignore[arg-type]
    if given is None or len(given) != len(shape):
        return None
    before = shape_of(node.args[0])  # type: ignore[arg-type]
    sizes = enumerate(zip(given, shape, before, strict=True))
    return tuple(
        axis if size == old else _sized(axis, size, image=image and place > 1) for place, (axis, size, old) in sizes
    )


def _sliced(node: fx.Node, known: Known) -> Layout | None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if source not in known:
        return None
    axis = int(argument(node, "dim")) % len(known[source])
    if argument(node, "step") != 1:
        return _resized(node, known)
    whole, length = shape_of(source)[axis], shape_of(node)[axis]
    start, end = _number(argument(node, "start")), argument(node, "end")
    if end is None or end == sys.maxsize:
        start = whole - length
    elif isinstance(start, int) and start < 0:
        start = whole + start
    return _cut(known[source], axis, start, length)


def _number(given: Any) -> Size:
    """Where a slice starts."""
    return size_of(given.meta["val"] if isinstance(given, fx.Node) else given or 0)


def _narrowed(node: fx.Node, known: Known) -> Layout | None:
    source, start = node.args[0], argument(node, "start")
    if not isinstance(source, fx.Node) or source not in known or not isinstance(start, int) or start < 0:
        return None
    axis = int(argument(node, "dim")) % len(known[source])
    return _cut(known[source], axis, start, shape_of(node)[axis])


def _selected(node: fx.Node, known: Known) -> Layout | None:
    given = known.get(node.args[0])  # type: ignore[arg-type]
    return _without(given, int(argument(node, "dim"))) if given is not None else None


def _unfolded(node: fx.Node, known: Known) -> Layout | None:
    """Patches that lie side by side: `x.unfold(axis, size, size)`."""
    given = known.get(node.args[0])  # type: ignore[arg-type]
    if given is None:
        return None
    shape, axis, (size, step) = shape_of(node), int(argument(node, "dimension")) % len(given), node.args[2:4]
    outer, inner = _sized(given[axis], shape[axis]), _new(shape[-1])
    if size == step and _length(given[axis]) == shape[axis] * shape[-1]:
        outer, inner = _reshaped((given[axis],), (shape[axis], shape[-1]))
    return (*given[:axis], outer, *given[axis + 1 :], inner)


def _columns(node: fx.Node, known: Known) -> Layout | None:
    """`F.unfold`: the places that its window takes stand on the last axis."""
    given = known.get(node.args[0])  # type: ignore[arg-type]
    if given is None or len(given) != 4:
        return None
    before = shape_of(node.args[0])[2:]  # type: ignore[arg-type]
    windows = [argument(node, name) for name in ("kernel_size", "dilation", "padding", "stride")]
    each = zip(before, *windows, strict=True)
    spans = [(old + 2 * pad - dilation * (size - 1) - 1) // stride + 1 for old, size, dilation, pad, stride in each]
    shape = shape_of(node)
    places = tuple(piece for span in spans for piece in _new(span, "grid"))
    return given[0], _new(shape[1]), places


def _folded(node: fx.Node, known: Known) -> Layout | None:
    """`F.fold`: windows put back into a map."""
    given, shape = known.get(node.args[0]), shape_of(node)  # type: ignore[arg-type]
    return (given[0], _new(shape[1]), *(_new(size, "grid") for size in shape[2:])) if given is not None else None


def _joined(node: fx.Node, known: Known) -> Layout | None:
    sources: Any = node.args[0]
    shape, place = shape_of(node), int(argument(node, "dim", 0)) % len(shape_of(node))
    given = [known.get(each) for each in sources]
    if any(len(shape_of(each)) != len(shape) for each in sources):
        return None
    others = [_agreed(size, [axes[i] for axes in given if axes is not None]) for i, size in enumerate(shape)]
    parts = [axes[place] if axes is not None else () for axes in given]
    lengths = [shape_of(each)[place] for each in sources]
    tokens = [i for i, part in enumerate(parts) if _rank(part) > 1]
    whole = _new(shape[place])
    if len(tokens) == 1:
        front, back = _total(lengths[: tokens[0]]), _total(lengths[tokens[0] + 1 :])
        whole = _with(parts[tokens[0]], front, back, shape[place])
    elif len(tokens) == len(sources) and all(map(_is_grid, parts)):
        whole = _new(shape[place], "grid")
    return (*others[:place], whole, *others[place + 1 :])


def _item(node: fx.Node, known: Known) -> Layout | None:
    """One of the tensors that a call returns."""
    source, index = node.args
    if not isinstance(source, fx.Node) or not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    whole = source.args[0] if source.args else None
    target = getattr(source.target, "overloadpacket", None)
    if target is _ATEN.meshgrid:
        return tuple(_new(size, "grid") for size in shape_of(node))
    if not isinstance(whole, fx.Node) or whole not in known or not isinstance(index, int):
        return None
    given = known[whole]
    if target in _FIRST_OF:
        same = index == 0 and shape_of(node) == shape_of(whole)
        return given if same else None
    if target is _ATEN.unbind:
        return _without(given, int(argument(source, "dim", 0)))
    if target in _SPLITS:
        axis = int(argument(source, "dim", 0)) % len(given)
        pieces = source.meta.get("val")
        if isinstance(pieces, (list, tuple)):
            index %= len(pieces)
            start = _total(size_of(piece.shape[axis]) for piece in pieces[:index])
            return _cut(given, axis, start, shape_of(node)[axis])
    return None


def _unknown(node: fx.Node, known: Known) -> Layout | None:
    return None


# --- axes ------------------------------------------------------------------------------------------------------------


def _new(size: Size, kind: Literal["plain", "input", "grid"] = "plain") -> Axis:
    return (Piece(Origin(size, kind), size),) if size != 1 else ()


def _given(node: fx.Node, known: Known) -> Layout:
    return known[node] if node in known else tuple(_new(size) for size in shape_of(node))


def _rank(axis: Axis) -> int:
    return max((piece.known for piece in axis), default=0)


def _is_grid(axis: Axis) -> bool:
    return len(axis) == 1 and axis[0].of.kind == "grid"


def _total(sizes: Iterable[Size]) -> Size:
    total: Size = 0
    for size in sizes:
        total = total + size
    return _plain(total)


def _plain(size: Size) -> Size:
    return size if isinstance(size, int) or not size.is_Integer else int(size)


def _merged(pieces: Iterable[Piece]) -> Axis:
    """Neighbours that were one piece are one again."""
    axis: list[Piece] = []
    for piece in pieces:
        last = axis[-1] if axis else None
        if last is not None and last.of is piece.of and last.stride == piece.stride * piece.size:
            axis[-1] = Piece(piece.of, last.size * piece.size, piece.stride)
        else:
            axis.append(piece)
    return tuple(axis)


def _reshaped(given: Layout, shape: Sequence[Size]) -> Layout:
    """What stays on both sides stays; the middle is cut as it has to be."""
    first, last = 0, 0
    least = min(len(given), len(shape))
    while first < least and _length(given[first]) == shape[first]:
        first += 1
    while last < least - first and _length(given[-1 - last]) == shape[-1 - last]:
        last += 1
    middle = given[first : len(given) - last]
    pieces = _merged(piece for axis in middle for piece in axis)
    atoms = {Atom(piece.size): piece for piece in pieces}
    new_shape = shape[first : len(shape) - last]
    cut = reshaped((tuple(atoms),), new_shape)
    if cut is None:
        changed: Layout = tuple(_new(size) for size in new_shape)
    else:
        parts: dict[Atom, Piece] = {}
        for atom, piece in atoms.items():
            _divide(atom, piece, parts)
        changed = tuple(_merged(parts[atom] for atom in refined(axis)) for axis in cut)
    return (*given[:first], *changed, *given[len(given) - last :])


def _divide(atom: Atom, piece: Piece, parts: dict[Atom, Piece]) -> None:
    """What became of a piece, as its atom was divided."""
    if not atom.parts:
        parts[atom] = piece
        return
    outer, inner = atom.parts
    _divide(outer, Piece(piece.of, outer.size, piece.stride * inner.size), parts)
    _divide(inner, Piece(piece.of, inner.size, piece.stride), parts)


def _length(axis: Axis) -> Size:
    length: Size = 1
    for piece in axis:
        length = length * piece.size
    return length


def _agreed(size: Size, given: Sequence[Axis]) -> Axis:
    """The axis of a result from those of the operands that are as long."""
    best: Axis | None = None
    for axis in given:
        if not _rank(axis) or _length(axis) != size:
            continue
        if best is not None and [piece.shape for piece in best] != [piece.shape for piece in axis]:
            return _new(size)
        if best is None or _rank(axis) > _rank(best):
            best = axis
    return best if best is not None else _new(size)


def _sized(axis: Axis, size: Size, *, image: bool = False) -> Axis:
    """Another number of places along the same axis."""
    alone = axis[0].of.kind if len(axis) == 1 else "plain"
    if alone == "grid" or (image and alone == "input"):
        return _new(size, "grid")
    return _new(size, "input") if alone == "input" else _new(size)


def _with(axis: Axis, front: Size, back: Size, size: Size) -> Axis:
    """These tokens with others in front of them and behind."""
    if front == 0 and back == 0:
        return axis
    if len(axis) == 1 and axis[0].of.kind == "joined" and axis[0].whole:
        inner = axis[0].of
        axis, front, back = inner.body, _plain(front + inner.front), _plain(inner.back + back)
    return (Piece(Origin(size, "joined", axis, front, back), size),)


def _cut(given: Layout, place: int, start: Size | None, length: Size) -> Layout:
    """`length` places of one axis, from `start`."""
    axis = given[place]
    if length == _length(axis):
        return given
    part = _sized(axis, length)
    if len(axis) == 1 and axis[0].of.kind == "joined" and axis[0].whole and start is not None:
        joined = axis[0].of
        body = _length(joined.body)
        front, back = _plain(joined.front - start), _plain(start + length - joined.front - body)
        if isinstance(front, int) and isinstance(back, int) and front >= 0 and back >= 0:
            part = _with(joined.body, front, back, length)
    return (*given[:place], part, *given[place + 1 :])


def _without(given: Layout, place: int) -> Layout:
    return tuple(axis for i, axis in enumerate(given) if i != place % len(given))


# --- what it says of a site ------------------------------------------------------------------------------------------


def _atoms(reading: Reading, known: Known) -> dict[Atom, Axis]:
    """What the atoms of the queries are pieces of."""
    layout, given = reading.query.placed.layout, known.get(reading.query.node)
    held: dict[Atom, Axis] = {}
    if given is None or len(given) != len(layout):
        return held
    for axis, pieces in zip(layout, given, strict=True):
        parts = (pieces,) if len(axis) == 1 else _reshaped((pieces,), [atom.size for atom in axis])
        held.update(zip(axis, parts, strict=True))
    return held


def _from_rows(reading: Reading, known: Known) -> str | None:
    held, rows = _atoms(reading, known), reading.roles().rows
    if not rows or any(atom not in held for atom in rows):
        return None
    pieces = _merged(piece for atom in rows for piece in held[atom])
    front: Size = 0
    back: Size = 0
    if len(pieces) == 1 and pieces[0].of.kind == "joined" and pieces[0].whole:
        joined = pieces[0].of
        pieces, front, back = joined.body, joined.front, joined.back
    if not _spans(pieces):
        return None
    return _written([piece.size for piece in pieces], front, back)


def _spans(pieces: Axis) -> bool:
    """Are these axes of space, each once? One of three may be of frames, over which no kernel went."""
    if len(pieces) not in (2, 3) or len({piece.of for piece in pieces}) != len(pieces):
        return False
    space = [piece for piece in pieces if piece.known == 2 and piece.of.kind != "joined"]
    return len(space) >= 2 and all(piece in space or piece.of.kind == "input" for piece in pieces)


def _from_bias(match: Found) -> str | None:
    """A bias that is a sum of terms for the axes of the keys, each of one axis, says what the axes are."""
    reading = match.reading
    added = [op.tensor for op in reading.ops if op.kind == "add" and op.tensor is not None]
    parts = [term.placed for placed in added for term in terms(placed)]
    roles = reading.roles()
    along = [set(placed.atoms) & set(roles.columns) for placed in parts]
    alone = {atom for atoms in along if len(atoms) == 1 for atom in atoms}
    if not 2 <= len(roles.rows) <= 3 or len(roles.rows) != len(roles.columns) or alone != set(roles.columns):
        return None
    return _written([atom.size for atom in roles.rows], 0, 0)


def _written(sizes: Sequence[Size], front: Size, back: Size) -> str:
    def said(size: Size) -> str:
        return str(size) if isinstance(size, int) else "?"

    grid = "x".join(map(said, sizes))
    if back != 0:
        return f"{grid}+{said(front)}+{said(back)}"
    return f"{grid}+{said(front)}" if front != 0 else grid


# --- operators -------------------------------------------------------------------------------------------------------

_ATEN = torch.ops.aten
_VIEWS = (
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as",
    "permute", "transpose", "swapaxes", "swapdims", "t", "mT", "numpy_T", "adjoint", "movedim", "moveaxis", "expand",
    "expand_as", "broadcast_to",
)  # fmt: skip
_KEEPS = (
    "to", "_to_copy", "clone", "contiguous", "alias", "detach", "detach_", "lift_fresh_copy", "type_as", "dropout",
    "dropout_", "feature_dropout", "alpha_dropout", "softmax", "_softmax", "log_softmax",
    "layer_norm", "group_norm", "instance_norm", "rms_norm", "batch_norm", "hardswish", "hardswish_",
    "prelu", "float_power", "requires_grad_",
)  # fmt: skip
_EMPTY = (_ATEN.empty, _ATEN.empty_like, _ATEN.new_empty, _ATEN.zeros, _ATEN.zeros_like, _ATEN.new_zeros)
_RESIZES = ("pad", "constant_pad_nd", "reflection_pad2d", "replication_pad2d", "reflection_pad3d", "replication_pad3d")
_RESAMPLES = (
    "max_pool2d", "max_pool3d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
    "upsample_nearest2d", "_upsample_nearest_exact2d", "upsample_bilinear2d",
    "_upsample_bilinear2d_aa", "upsample_bicubic2d", "_upsample_bicubic2d_aa", "upsample_nearest3d",
    "upsample_trilinear3d", "pixel_shuffle", "pixel_unshuffle",
)  # fmt: skip
_CONVOLVES = ("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose2d", "conv_transpose3d")
_FIRST_OF = {
    _ATEN.native_layer_norm, _ATEN.native_group_norm, _ATEN.native_batch_norm, _ATEN.native_dropout,
    _ATEN._fused_rms_norm, _ATEN._native_batch_norm_legit,
}  # fmt: skip
_SPLITS = {_ATEN.split, _ATEN.split_with_sizes, _ATEN.chunk, _ATEN.tensor_split}
_NAMED: dict[str, _Rule] = {
    **dict.fromkeys(_VIEWS, _viewed), **dict.fromkeys(_KEEPS, _same), **dict.fromkeys(_RESIZES, _resized),
    **dict.fromkeys(_RESAMPLES, _resampled), **dict.fromkeys(_CONVOLVES, _convolved), "linear": _linear,
    "matmul": _product, "mm": _product, "addmm": _added_product, "slice": _sliced, "narrow": _narrowed,
    "select": _selected, "cat": _joined, "concat": _joined, "concatenate": _joined, "stack": _stacked,
    "repeat_interleave": _interleaved, "unfold": _unfolded,
    "copy_": _copied, "im2col": _columns, "col2im": _folded, "repeat": _repeated, "roll": _rolled, "flip": _rolled,
}  # fmt: skip


@cache
def _rule(target: Any) -> _Rule:
    """What is done at calls of this operator."""
    packet = getattr(target, "overloadpacket", None)
    if packet is None or getattr(target, "namespace", "") != "aten":
        return _unknown
    named = _NAMED.get(packet.__name__)
    return named or (_elementwise if torch.Tag.pointwise in target.tags else _unknown)
