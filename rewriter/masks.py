"""What a mask in the graph means: its positional factors as a `Mask`, and what it is beyond them.

The part of the graph that makes the mask is run with real tensors (`rewriter.samples`), at several sizes and for
several values of the data that it depends on. A mask is of a kind if it is so in all of these: structure & padding
where every draw is the same matrix with some columns hidden, structure & documents where every draw is a partition,
and so on.
Symbolic sizes are evaluated at several values, one of them beyond every constant in the mask, so that a window that is
wider than the captured input is not taken for a causal mask.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import sympy
import torch
from torch import Tensor, fx

from rewriter.axes import Atom, Axis, Layout, Placed, backward, broadcast
from rewriter.canonical import SizeOf, gathered, run
from rewriter.facts import HIDDEN, Roles
from rewriter.nodes import DATA_OF, depends_on_data, is_call, value_of
from rewriter.samples import (
    BINARY,
    FAILURES,
    FIRST,
    GENERAL,
    Part,
    Sizes,
    draws,
    evaluate,
    fixed_values,
    number,
    part_of,
    size_assignments,
    sources,
    symbols_of,
)
from rewriter.site import Dense, Mask, Padding
from rewriter.structure import classify, windows
from rewriter.structure_of_data import agrees, chunked, documents, is_padded, is_still, prefixed
from rewriter.walk import step_at

_SOFTLY_HIDDEN = -50.0
"""What tells windows apart is often only this much: a fact, and not enough to leave the tensor out."""
_MOST_SAMPLED = 1 << 24
"""How many entries of masks are drawn at one size."""

_ATEN = torch.ops.aten
Test = Literal["true", "false", "nonzero", "zero", "above"]


@dataclass(frozen=True)
class Tokens(Placed):
    """A tensor that says which keys are tokens: where it is True, False, not 0, 0, or hides nothing when it is added
    `factor` times. Where it has axes of queries or heads, a token is what any of them sees.
    """

    test: Test = field(default="true")
    factor: float = 1.0


@dataclass(frozen=True)
class MaskReading:
    """`mask` as facts; `padding` is where such a factor stands. `observed` names what holds for the values that were
    seen and has to be asked again in every call: "mask" and "fill" (`buffers` hold what they held), "binary" (`flags`
    are 0 or 1).
    """

    mask: Mask
    padding: Tokens | None = None
    blind: bool = False
    """Does the positional part hide every key from some query?"""
    observed: tuple[str, ...] = ()
    buffers: tuple[fx.Node, ...] = ()
    flags: tuple[fx.Node, ...] = ()


_DENSE = MaskReading(Dense())


def read_mask(placed: Placed, roles: Roles, keep: bool = True, factor: float = 1.0) -> MaskReading:
    """Take a mask apart. `keep` is the polarity of a bool mask: does True mean visible? `factor` is what a mask that is
    added is multiplied by on its way into the scores.
    """
    dtype = value_of(placed.node).dtype
    part = part_of(placed.node) if dtype == torch.bool or dtype.is_floating_point else None
    if part is None or part.weights or any(_is_opaque(leaf) for leaf in part.data):
        return _DENSE
    layouts = layouts_above(placed)
    roles = roles.divided()
    if any({*roles.rows} & own and {*roles.columns} & own for own in (_atoms(layouts.get(leaf)) for leaf in part.data)):
        return _DENSE  # given as it is
    view = Plane(placed, roles, keep, factor)
    found = _read(part, view, layouts, GENERAL if part.data else ("zeros",))
    flags: tuple[fx.Node, ...] = ()
    if found is None and part.data and any(value_of(leaf).dtype != torch.bool for leaf in part.data):
        found = _read(part, view, layouts, BINARY)
        flags = tuple(leaf for leaf in part.data if value_of(leaf).dtype != torch.bool)
    if found is None:
        return _DENSE
    observed = (("mask",) if part.buffers else ()) + (("binary",) if flags else ())
    return replace(found, observed=observed, buffers=part.buffers, flags=flags)


def placed_again(reading: MaskReading, placed: Placed) -> MaskReading:
    """The reading of the same tensor in another attention, where its axes have other atoms."""
    tokens = reading.padding
    if tokens is None:
        return reading
    layout = layouts_above(placed).get(tokens.node)
    return replace(reading, padding=replace(tokens, axes=layout)) if layout is not None else _DENSE


def tokens_at(emit: Any, tokens: Tokens, value: Any, roles: Roles, size: SizeOf, full: Sequence[bool]) -> Any:
    """bool (B, Skv), True on tokens. `full` says whether axes that the tensor lacks are as long as they could be."""
    roles = roles.divided()
    if tokens.test == "above":
        value = emit(_ATEN.mul.Tensor, value, tokens.factor) if tokens.factor != 1 else value
        value = emit(_ATEN.gt.Scalar, value, HIDDEN)
    elif tokens.test != "true":
        operators = {"false": _ATEN.logical_not.default, "nonzero": _ATEN.ne.Scalar, "zero": _ATEN.eq.Scalar}
        value = emit(operators[tokens.test], value, *(() if tokens.test == "false" else (0,)))
    if set(tokens.atoms) <= {*roles.batch, *roles.columns}:
        return gathered(emit, value, tokens.layout, (roles.batch, roles.columns), size, full)
    whole = gathered(emit, value, tokens.layout, roles.scores, size, (full[0], False, False, full[1]))
    return emit(_ATEN.any.dims, whole, [1, 2])


# --- axes above a mask -----------------------------------------------------------------------------------------------


def layouts_above(placed: Placed) -> dict[fx.Node, Layout]:
    """The axes of what a mask is made from, as far as elementwise operators and views reach."""
    found: dict[fx.Node, Layout] = {placed.node: placed.layout}
    todo = [placed.node]
    while todo:
        node = todo.pop(0)
        for source, layout in _above(node, found[node]):
            if layout is not None and source not in found:
                found[source] = layout
                todo.append(source)
    return found


def _above(node: fx.Node, layout: Layout) -> list[tuple[fx.Node, Layout | None]]:
    tensors = [source for source in sources(node) if isinstance(source.meta.get("val"), Tensor)]
    if torch.Tag.pointwise in getattr(node.target, "tags", ()) or is_call(node, *_KEEP_SHAPE):
        return [(source, broadcast(source, layout)) for source in tensors]
    step = step_at(node)
    if step is not None and step.view is not None:
        return [(step.source, backward(step.source, step.view, layout))]
    if is_call(node, _ATEN.slice) and [*value_of(node).shape] == [*value_of(tensors[0]).shape]:
        return [(tensors[0], layout)]
    return []


_KEEP_SHAPE = (
    _ATEN.to, _ATEN._to_copy, _ATEN.clone, _ATEN.contiguous, _ATEN.alias, _ATEN.expand, _ATEN.expand_as, _ATEN.detach,
    _ATEN.__and__, _ATEN.__or__, _ATEN.where, _ATEN.masked_fill, _ATEN.type_as, DATA_OF,
)  # fmt: skip


def _atoms(layout: Layout | None) -> set[Atom]:
    return {atom for axis in layout or () for atom in axis}


def _is_opaque(leaf: fx.Node) -> bool:
    """A number that a model computed from its input is no mask."""
    return leaf.op not in ("placeholder", "get_attr")


# --- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plane:
    """How the values of what is added to the scores are looked at: as (B, H, Sq, Skv), with the axes of batch and heads
    that it has.
    """

    placed: Placed
    roles: Roles
    keep: bool = True
    factor: float = 1.0

    @property
    def groups(self) -> tuple[Axis, Axis, Axis, Axis]:
        """Atoms by role; of batch and heads those that the mask has."""
        own, (batch, heads, rows, columns) = set(self.placed.atoms), self.roles.divided().scores
        batch, heads = (tuple(atom for atom in axis if atom in own) for axis in (batch, heads))
        return batch, heads, rows, columns

    @property
    def few(self) -> set[sympy.Symbol]:
        """The symbols of batch sizes."""
        roles = self.roles.divided()
        return symbols_of(roles.batch) - symbols_of(roles.rows + roles.columns + roles.query_heads)

    def number(self, value: Tensor, sizes: Sizes) -> Tensor:
        """The mask in four axes."""
        full = (False, False, True, True)
        result = gathered(run, value, self.placed.layout, self.groups, lambda atom: number(atom, sizes), full)
        assert isinstance(result, Tensor)
        return result.expand(-1, -1, *(math.prod(number(a, sizes) for a in axis) for axis in self.groups[2:]))

    def visible(self, value: Tensor, sizes: Sizes) -> tuple[Tensor | None, bool]:
        """bool (B, H, Sq, Skv), and whether what is hidden is hidden for certain. None where it is more than a mask."""
        value = self.number(value, sizes)
        if value.dtype == torch.bool:
            return (value if self.keep else ~value), True
        added = value.to(torch.promote_types(value.dtype, torch.float32)) * self.factor
        seen, hidden = added == 0, added <= _SOFTLY_HIDDEN
        return (seen, bool((seen | (added <= HIDDEN)).all())) if bool((seen | hidden).all()) else (None, False)


@dataclass
class _Sample:
    """What was drawn at one size: bool (B, H, Sq, Skv) for each draw, and the values that it was made from."""

    sizes: Sizes
    seen: list[Tensor]
    values: list[dict[fx.Node, Any]]


def _read(part: Part, view: Plane, layouts: dict[fx.Node, Layout], kinds: Sequence[str]) -> MaskReading | None:
    samples: list[_Sample] = []
    certain = True
    candidates = _token_candidates(view, layouts) if part.data else []
    wanted = [each.node for each in candidates]
    for alternatives in size_assignments(part, view.few):
        tried = (_sampled(part, view, sizes, kinds, wanted) for sizes in alternatives)
        drawn = next((each for each in tried if each is not None), None)
        if drawn is None:
            return None
        samples.append(drawn[0])
        certain = certain and drawn[1]
    if not part.data:
        return _constant(samples, certain)
    found = _of_data(samples) if certain else None
    if found is None or not found.mask.has(Padding):
        return found
    return replace(found, padding=_tokens(samples, candidates, view))


def _sampled(
    part: Part, view: Plane, sizes: Sizes, kinds: Sequence[str], wanted: Sequence[fx.Node]
) -> tuple[_Sample, bool] | None:
    """Draws that the mask fails on are left out, as no call can be like them. None where it is no mask."""
    try:
        fixed = fixed_values(part, sizes)
    except FAILURES:
        return None
    sample, certain, entries = _Sample(sizes, [], []), True, 0
    for given in draws(part, sizes, kinds):
        if entries > _MOST_SAMPLED and len(sample.seen) >= FIRST:
            break
        try:
            values = evaluate(part, sizes, given, fixed)
            seen, sure = view.visible(values[view.placed.node], sizes)
        except FAILURES:
            continue
        if seen is None:
            return None
        entries += seen.numel()
        certain = certain and sure
        sample.seen.append(seen)
        sample.values.append({node: values[node] for node in wanted if node in values})
    return (sample, certain) if sample.seen else None


def _constant(samples: list[_Sample], certain: bool) -> MaskReading | None:
    """A mask of positions alone: classified at the largest sizes, where every window shows, it must agree at others."""
    found: Mask | None = None
    blind = False
    for sample in samples:
        seen = sample.seen[0].flatten(0, 1)
        if not bool((seen == seen[:1]).all()):
            rolled = windows(seen) if len(samples) == 1 else None
            return MaskReading(rolled) if rolled is not None else None
        if not certain:
            return None
        mask = classify(seen[0])
        found = mask if found is None else found
        if mask is None or found is None or not agrees(found, seen[0]):
            return None
        blind = blind or not bool(seen[0].any(-1).all())
    return MaskReading(found, blind=blind) if found is not None else None


def _of_data(samples: list[_Sample]) -> MaskReading | None:
    """A structure and what the data hides of it."""
    found: Mask | None = None
    blind = False
    chosen: Mask | None = None
    for sample in samples:
        if any(seen.shape[1] > 1 and not bool((seen == seen[:, :1]).all()) for seen in sample.seen):
            return None
        seen = [each[:, 0] for each in sample.seen]
        if all(torch.equal(each, seen[0]) for each in seen):
            return None  # What the data does to it was not seen.
        whole = torch.stack([each.any(0) for each in seen]).any(0)
        structure = classify(whole) if found is None else found.positional
        mask = structure & Padding() if structure is not None and is_padded(seen, structure) else None
        if mask is None and chosen is None:
            options = (prefixed(seen), *chunked(seen), *documents(seen, structure))
            mask = chosen = next((each for each in options if each is not None), None)
        elif mask is None and chosen is not None:
            mask = chosen if is_still(chosen, seen) else None
        found = found or mask
        if mask is None or found is None or (mask != found and chosen is None):
            return None
        blind = blind or not bool(whole.any(-1).all())
    return MaskReading(found, blind=blind) if found is not None else None


# --- padding ---------------------------------------------------------------------------------------------------------


def _token_candidates(view: Plane, layouts: dict[fx.Node, Layout]) -> list[Tokens]:
    """Tensors over the keys, and perhaps the batch, that the mask is made from, the nearest first."""
    roles = view.roles.divided()
    found = []
    for node, layout in layouts.items():
        own = _atoms(layout)
        if own & {*roles.columns} and own <= {*roles.columns, *roles.batch} and depends_on_data(node):
            found.append(Tokens(node, layout))
    return sorted(found, key=lambda each: value_of(each.node).dtype != torch.bool)


def _tokens(samples: list[_Sample], candidates: list[Tokens], view: Plane) -> Tokens:
    """Where the padding stands: a tensor that in all draws hides what the mask hides, or the mask itself."""
    for candidate in candidates:
        tests: tuple[Test, ...] = ("true", "false") if _is_bool(candidate.node) else ("nonzero", "zero", "above")
        for test in tests:
            tokens = replace(candidate, test=test, factor=view.factor)
            if all(_hides(sample, tokens, view) for sample in samples):
                return tokens
    if _is_bool(view.placed.node):
        return Tokens(view.placed.node, view.placed.layout, "true" if view.keep else "false")
    return Tokens(view.placed.node, view.placed.layout, "above", view.factor)


def _is_bool(node: fx.Node) -> bool:
    return value_of(node).dtype == torch.bool


def _hides(sample: _Sample, tokens: Tokens, view: Plane) -> bool:
    whole = torch.stack([each.any(0)[0] for each in sample.seen]).any(0)
    own = set(view.placed.atoms)
    roles = view.roles.divided()
    roles = replace(roles, batch=tuple(atom for atom in roles.batch if atom in own))
    for seen, values in zip(sample.seen, sample.values, strict=True):
        if tokens.node not in values:
            return False
        size = _sizes(sample.sizes)
        try:
            shown = tokens_at(run, tokens, values[tokens.node], roles, size, (False, True))
        except (RuntimeError, ValueError):
            return False
        if not torch.equal(seen[:, 0], (whole & shown[:, None, :]).expand_as(seen[:, 0])):
            return False
    return True


def _sizes(sizes: Sizes) -> SizeOf:
    return lambda atom: number(atom, sizes)
