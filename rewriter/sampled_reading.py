"""Attention to places in maps, read from a graph by what it computes.

The reading begins at a product of two tensors, summed, of which one holds samples of maps: of one, or of several side
by side. The axes are carried from there up to maps, places and weights, as far as views go, and down through the views
that follow, so that nothing is copied on the way to the operator and back.
"""

from __future__ import annotations

import math
import operator
from dataclasses import replace

import torch
from torch import Tensor, fx

from rewriter.axes import Atom, Axis, Layout, Placed, backward, forward, refined, shape_of
from rewriter.capture import source_line
from rewriter.nodes import argument, is_call, is_parameter, value_of
from rewriter.pattern import Contraction, Join, Normaliser, Sampler, ask
from rewriter.sampled import Level, SampledMatch
from rewriter.site import AttentionSite, Full, Refusal
from rewriter.walk import step_at

_ATEN = torch.ops.aten
_LONGEST = 16
"""Views in a row."""


def up(placed: Placed) -> Placed:
    """Through views and copies. A layout of no axes is not carried."""
    for _ in range(_LONGEST):
        step = step_at(placed.node)
        if step is None or step.kind not in ("view", "same") or is_parameter(step.source):
            break
        if not _moves_only(placed.node, step.source):
            break
        axes: Layout | None = placed.layout
        if step.view is not None and placed.axes:
            axes = backward(step.source, step.view, placed.layout)
        if axes is None or any(sum(not isinstance(atom.size, int) for atom in refined(axis)) > 1 for axis in axes):
            break  # Of two lengths in one axis that are both unknown, neither could be told.
        placed = Placed(step.source, axes)
    return placed


def down(placed: Placed) -> Placed:
    """Through the views and copies that follow, while nothing else sees what is passed."""
    for _ in range(_LONGEST):
        user = next(iter(placed.node.users), None)
        if user is None or len(placed.node.users) > 1 or user.op != "call_function":
            break
        step = step_at(user)
        if step is None or step.source is not placed.node or step.kind not in ("view", "same"):
            break
        if not _moves_only(user, placed.node):
            break
        if step.view is not None and (step.view.expands or step.view.repeats):
            break
        axes = forward(user, step.view, placed.layout) if step.view is not None else placed.layout
        if axes is None:
            break
        placed = Placed(user, axes)
    return placed


def _moves_only(node: fx.Node, source: fx.Node) -> bool:
    """Is the type kept, and no other tensor looked at?"""
    tensors = [each for each in node.all_input_nodes if isinstance(each.meta.get("val"), Tensor)]
    return value_of(source).dtype == value_of(node).dtype and len(tensors) == 1


def read_samples(node: fx.Node) -> SampledMatch | Refusal | None:
    """The attention to places whose sum is this node, its path left open; None where no maps are sampled."""
    contraction: Contraction | None = ask("contraction", node)
    if contraction is None:
        return None
    sides = [(contraction.left, contraction.left_labels), (contraction.right, contraction.right_labels)]
    for (samples, own), (weights, others) in (sides, sides[::-1]):
        if _above_are_samples(samples):
            if contraction.alpha != 1 or contraction.addend is not None or contraction.edit:
                return Refusal("a sum of samples with something more in it")
            atoms = _labelled(contraction)
            placed = [_placed(side, labels, atoms) for side, labels in ((samples, own), (weights, others))]
            out = Placed(node, tuple(_axis(label, atoms) for label in contraction.out_labels))
            summed = tuple(atom for label, atom in atoms.items() if label not in contraction.out_labels)
            return _read(placed[0], placed[1], out, summed)
    return None


def _above_are_samples(node: fx.Node) -> bool:
    top = up(Placed(node, ())).node
    join: Join | None = ask("join", top)
    return any(ask("sampler", up(Placed(each, ())).node) is not None for each in (join.parts if join else (top,)))


def _labelled(contraction: Contraction) -> dict[object, Atom]:
    """An atom for each label that is longer than 1 somewhere."""
    sides = (contraction.left, contraction.left_labels), (contraction.right, contraction.right_labels)
    atoms: dict[object, Atom] = {}
    for side, labels in sides:
        for label, size in zip(labels, shape_of(side), strict=True):
            if size != 1:
                atoms.setdefault(label, Atom(size))
    return atoms


def _axis(label: object, atoms: dict[object, Atom]) -> Axis:
    return (atoms[label],) if label in atoms else ()


def _placed(node: fx.Node, labels: tuple[object, ...], atoms: dict[object, Atom]) -> Placed:
    pairs = zip(labels, shape_of(node), strict=True)
    return Placed(node, tuple(_axis(label, atoms) if size != 1 else () for label, size in pairs))


def _read(samples: Placed, weights: Placed, out: Placed, summed: Axis) -> SampledMatch | Refusal:
    """The axes by their roles: points are what is summed."""
    parted = _parts(up(samples), summed)
    if isinstance(parted, Refusal):
        return parted
    parts, points = parted
    levels: list[Level] = []
    for part, own in parts:
        sampler: Sampler | Refusal | None = ask("sampler", part.node)
        if not isinstance(sampler, Sampler):
            none = Refusal("of the tensors that are summed, some are no samples of maps")
            return none if sampler is None else sampler
        front, channels, rows, columns = part.layout
        height, width, xy = (((Atom(size),) if size != 1 else ()) for size in (*shape_of(sampler.map)[2:], 2))
        source, place = _pixels(up(Placed(sampler.map, (front, channels, height, width))), channels)
        grid = up(Placed(sampler.grid, (front, rows, columns, xy)))
        levels.append(Level(source, grid, height, width, own, xy, place))
    product, weights, out = out.node, up(weights), down(out)
    # The last part stands for all: what a part has to itself is its points.
    front, channels, rows, columns = (refined(axis) for axis in part.layout)
    inner, every = refined(own), set(refined(points))
    queries = tuple(atom for atom in rows + columns if atom not in inner)
    softmax: Normaliser | None = ask("normaliser", weights.node)
    if softmax is None or softmax.kind != "softmax" or set(weights.layout[softmax.axis]) != every:
        return Refusal("the samples of maps are weighted by something else than a softmax over all of them")
    if set(weights.atoms) - {*front, *queries, *every}:
        return Refusal("the weights of the samples of maps differ where the samples do not, or by channel")
    if set(inner) - {*rows, *columns} or every & {*front, *channels, *queries}:
        return Refusal("samples are summed over something else than the places in the maps")
    heads = front[-1:] if _count(front[-1:]) is not None else ()
    batch = front[: len(front) - len(heads)]
    site = _site(levels, weights, batch, heads, queries, channels)
    if isinstance(site, Refusal):
        return site
    site = replace(site, source=source_line(product))
    return SampledMatch(site, levels, weights, out, batch, heads, queries, points, channels)


def _parts(top: Placed, summed: Axis) -> tuple[list[tuple[Placed, Axis]], Axis] | Refusal:
    """The samples of each map with their points, and the points of all in the order of the levels."""
    join: Join | None = ask("join", top.node)
    if join is None:
        return [(top, summed)], summed
    own, every = top.layout[join.axis], refined(summed)
    if set(own) - set(every) or not (join.stacked or set(own) == set(every)):
        return Refusal("samples are joined along another axis than the one that is summed")
    before, after = top.layout[: join.axis], top.layout[join.axis + 1 :]
    if join.stacked:
        inner = tuple(atom for atom in every if atom not in own)
        return [(up(Placed(each, before + after)), inner) for each in join.parts], own + inner
    counts = [shape_of(each)[join.axis] for each in join.parts]
    axes: list[Axis] = [(Atom(count),) if count != 1 else () for count in counts]
    placed = [Placed(each, (*before, axis, *after)) for each, axis in zip(join.parts, axes, strict=True)]
    return [(up(each), axis) for each, axis in zip(placed, axes, strict=True)], own


def _pixels(found: Placed, channels: Axis) -> tuple[Placed, tuple[int, int] | None]:
    """A map that was split off where its channels lay apart, as a part of a tensor in which they do not: views and a
    split commute.
    """
    split = found.node.args[0] if is_call(found.node, operator.getitem) else None
    if _beside(found, channels) or not isinstance(split, fx.Node) or not is_call(split, _ATEN.split_with_sizes):
        return found, None
    source, counts = split.args[:2]
    assert isinstance(source, fx.Node) and isinstance(counts, (list, tuple))
    axis, number = int(argument(split, "dim")) % len(found.axes), int(found.node.args[1])  # type: ignore[arg-type]
    own, whole = found.layout[axis], Atom(shape_of(source)[axis])
    if not all(isinstance(n, int) for n in (*counts, *(atom.size for atom in own))):
        return found, None
    top = up(Placed(source, (*found.layout[:axis], (whole,), *found.layout[axis + 1 :])))
    if (whole,) not in top.layout or not _beside(top, channels):
        return found, None
    place = top.layout.index((whole,))
    layout = (*top.layout[:place], own, *top.layout[place + 1 :])
    return Placed(top.node, layout), (place, sum(counts[:number]))


def _beside(placed: Placed, channels: Axis) -> bool:
    """Are the channels the innermost of the last axis?"""
    own = refined(channels)
    return not own or placed.layout[-1][-len(own) :] == own


def _site(
    levels: list[Level], weights: Placed, batch: Axis, heads: Axis, queries: Axis, channels: Axis
) -> AttentionSite | Refusal:
    types = {value_of(each.node).dtype for level in levels for each in (level.map, level.grid, weights)}
    points, width = [_count(each.points) for each in levels], _count(channels)
    if len(types) > 1:
        return Refusal(f"maps, places and weights of types {', '.join(sorted(map(str, types)))}")
    if None in points or width is None:
        return Refusal("the number of places or of channels is symbolic")
    areas = [_count(each.height + each.width) for each in levels]
    pixels = [area for area in areas if area is not None]
    value = value_of(weights.node)
    return AttentionSite(
        path="",
        heads=_count(heads) or 1,
        kv_heads=_count(heads) or 1,
        head_dim=width,
        v_head_dim=width,
        dtype=str(value.dtype).removeprefix("torch."),
        scale=1.0,
        mask=Full(),
        batch=_count(batch),
        q_len=_count(queries),
        kv_len=sum(pixels) if len(pixels) == len(areas) else None,
        device=value.device.type,
        samples="+".join(map(str, points)),
    )


def _count(axis: Axis) -> int | None:
    sizes = [atom.size for atom in refined(axis)]
    return (
        math.prod(size for size in sizes if isinstance(size, int)) if all(isinstance(n, int) for n in sizes) else None
    )
