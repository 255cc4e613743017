"""How the tokens of an attention lie: a grid, a window of one, some tokens in front; told by where they come from.

One pass over the graph says of each axis what it is made of (`pieces`), from where it came into being through each
operator (`token_rules`). The number of tokens is never interpreted.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import fx

from rewriter.axes import Atom, Size, shape_of
from rewriter.biases import terms
from rewriter.facts import Reading
from rewriter.nodes import depends_on_data, is_call
from rewriter.pieces import Axis, Known, Layout, as_shape, merged, new, rank
from rewriter.site import AttentionSite
from rewriter.token_rules import convolved, fill, item, rule_of


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
        if layout is not None and any(rank(axis) for axis in layout):
            known[node] = layout
        if is_call(node, torch.ops.aten.copy_):
            fill(node, known)
    return known


def _layout(node: fx.Node, known: Known, ends: dict[fx.Node, Reading]) -> Layout | None:
    if node.op == "placeholder":
        return _of_input(node)
    if node.op != "call_function":
        return None
    if node in ends:
        return _of_attention(ends[node], known)
    if node.target is operator.getitem:
        return item(node, known)
    rule = rule_of(node.target)
    if rule is not convolved and not any(source in known for source in node.all_input_nodes):
        return None
    return rule(node, known) if isinstance(node.meta.get("val"), torch.Tensor) else None


def _of_input(node: fx.Node) -> Layout | None:
    value = node.meta.get("val")
    image = isinstance(value, torch.Tensor) and value.dim() in (4, 5) and value.dtype.is_floating_point
    return tuple(new(size, "input") for size in shape_of(node)) if image and depends_on_data(node) else None


def _of_attention(reading: Reading, known: Known) -> Layout | None:
    """The output has the rows, and the batch, of the queries."""
    held = _atoms(reading, known)
    if not held:
        return None
    layout = reading.output.layout
    return tuple(merged(piece for atom in axis for piece in held.get(atom) or new(atom.size)) for axis in layout)


# --- what it says of a site ------------------------------------------------------------------------------------------


def _atoms(reading: Reading, known: Known) -> dict[Atom, Axis]:
    """What the atoms of the queries are pieces of."""
    layout, given = reading.query.placed.layout, known.get(reading.query.node)
    held: dict[Atom, Axis] = {}
    if given is None or len(given) != len(layout):
        return held
    for axis, pieces in zip(layout, given, strict=True):
        parts = (pieces,) if len(axis) == 1 else as_shape((pieces,), [atom.size for atom in axis])
        held.update(zip(axis, parts, strict=True))
    return held


def _from_rows(reading: Reading, known: Known) -> str | None:
    held, rows = _atoms(reading, known), reading.roles().rows
    if not rows or any(atom not in held for atom in rows):
        return None
    pieces = merged(piece for atom in rows for piece in held[atom])
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
