"""The facts of what was read: heads and sizes, the mask and the biases, and what the operator cannot say."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import fx

from rewriter.axes import Axis, as_captured
from rewriter.biases import KINDS as BIASES
from rewriter.biases import Bias, Term, read_bias, terms
from rewriter.capture import source_line
from rewriter.facts import HIDDEN, Op, Reading
from rewriter.masks import MaskReading, Tokens, placed_again, read_mask
from rewriter.nodes import depends_on_data, fixed, is_parameter, value_of
from rewriter.raising import Match
from rewriter.site import AttentionSite, Causal, Dense, Full, Mask, Refusal


class Describer:
    """Describes what one graph holds. Masks and biases are shared by layers: each is read once."""

    def __init__(self, observe: bool) -> None:
        self.observe = observe
        self.masks: dict[tuple[fx.Node, str], list[MaskReading | Bias]] = {}

    def match(self, reading: Reading, path: str) -> Match | Refusal:
        """The site with its facts, not proved yet."""
        query, key, value = (value_of(side.node) for side in reading.operands)
        if not all(side.dtype.is_floating_point for side in (query, key, value)):
            return Refusal(f"queries, keys and values of types {query.dtype}, {key.dtype} and {value.dtype}")
        dtype = torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)
        if any(is_parameter(side.node) for side in (reading.key, reading.value)):
            return Refusal("the keys or values are parameters, which makes this a linear layer")
        # Keys and values are of the same things. Weights over what no data went into are those of a router; places that
        # no data went into are averaged by weights over a map.
        if depends_on_data(reading.key.node) != depends_on_data(reading.value.node):
            fixed_side, other = ("keys", "values") if depends_on_data(reading.value.node) else ("values", "keys")
            return Refusal(f"the {fixed_side} are the same for all inputs, and the {other} are not")
        roles = reading.roles()
        _fix(roles.query_heads + roles.width + roles.value_width, reading)
        heads, kv_heads = _count(roles.query_heads), _count(roles.heads)
        width, value_width = _count(roles.width), _count(roles.value_width)
        if heads is None or kv_heads is None or width is None or value_width is None:
            return Refusal("the number of heads or the head size is symbolic")
        mask = self._mask(reading)
        if isinstance(mask, Refusal):
            return mask
        adds = {op.kind for op in reading.ops} & {"add", "shift", "keep", "drop"}
        only_mask = mask.exact and mask.mask == mask.mask.positional and mask.bias == "none" and "shift" not in adds
        edits = list(reading.edits)
        if {query.dtype, key.dtype, value.dtype} != {dtype}:
            edits.append("types_differ")
        if mask.levels and "by_logarithm" in reading.doubts:
            edits.append("by_logarithm")  # rounding takes the logarithm of their count from such a number
        site = AttentionSite(
            path=path,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=width,
            v_head_dim=value_width,
            dtype=str(dtype).removeprefix("torch."),
            scale=reading.scale,
            mask=mask.mask,
            batch=_count(roles.batch),
            q_len=_count(roles.rows),
            kv_len=_count(roles.columns),
            device=query.device.type,
            softmax_dtype=str(reading.softmax_dtype).removeprefix("torch.") if reading.softmax_dtype else None,
            dropout_p=reading.dropout_p,
            bias=mask.bias,
            softcap=reading.softcap,
            normaliser=reading.normaliser,
            sink="learned" if reading.sink is not None else "zero" if reading.zero_sink else None,
            factor=_factor(reading),
            edits=tuple(edits),
            observed=mask.facts,
            spelling=reading.spelling,
            source=source_line(reading.output.node),
        )
        return Match(
            site=site,
            reading=reading,
            padding=mask.padding,
            structured=(only_mask and not site.observed) or not adds,
            spare=only_mask and bool(site.observed),
            watched_buffers=mask.nodes("buffers"),
            watched_flags=mask.nodes("flags"),
        )

    def _mask(self, reading: Reading) -> _Masks | Refusal:
        """The intersection of all masks, and what else is added."""
        structure = _call_structure(reading)
        if isinstance(structure, Refusal):
            return structure
        result = _Masks(structure)
        masks = [op for op in reading.ops if op.kind in ("add", "keep", "drop")]
        blinds = 0
        hiding, finite = list[MaskReading](), False
        for op in masks:
            level = op.number != float("-inf")
            for found in self._terms(reading, op):
                if isinstance(found, Bias):
                    result.bias = max(result.bias, found.kind, key=BIASES.index)
                    result.observed_bias = result.observed_bias or found.observed
                    continue
                found = self._watched(found, op.buffer)
                # One tensor says which keys are tokens.
                exact = _hides_exactly(reading, op, found) and not (result.padding and found.padding)
                result.mask = result.mask & (found.mask if exact else Dense())
                result.exact = result.exact and exact
                result.padding = found.padding if exact and found.padding else result.padding
                result.observed += [found] if exact and found.observed else []
                hiding.append(found)
                finite = finite or level
            blinds += len(masks) > 1 and level
        result.exact = result.exact and not blinds
        always_sees = len(hiding) == 1 and not hiding[0].blind and hiding[0].mask == hiding[0].mask.positional
        result.levels = finite and not always_sees
        return result

    def _watched(self, found: MaskReading, fill: fx.Node | None) -> MaskReading:
        """The reading where a buffer holds what hides."""
        if fill is None:
            return found
        if not self.observe:
            return MaskReading(Dense())
        return dataclasses.replace(found, observed=(*found.observed, "fill"), buffers=(*found.buffers, fill))

    def _terms(self, reading: Reading, op: Op) -> list[MaskReading | Bias]:
        """What an operator does to the scores: as a mask, or term by term as masks and kinds of biases."""
        assert op.tensor is not None
        roles, number = reading.roles(), reading.fill(op)
        names = roles.named
        axes = [[names.get(atom) for atom in axis] for axis in op.tensor.layout]
        place = op.tensor.node, f"{op.kind} {number} {axes}"
        factor = number if op.kind == "add" else 1.0
        parts = [Term(op.tensor)]
        if place not in self.masks:
            found: list[MaskReading | Bias] = [read_mask(op.tensor, roles, op.kind != "drop", factor)]
            if found == [MaskReading(Dense())] and op.kind == "add":
                parts = terms(op.tensor, factor)
                if len(parts) > 1:
                    found = [read_mask(part.placed, roles, part.kind != "drop", factor) for part in parts]
                found = [
                    (part.kind == "add" and each == MaskReading(Dense()) and read_bias(part.placed, roles)) or each
                    for part, each in zip(parts, found, strict=True)
                ]
            self.masks[place] = [
                MaskReading(Dense()) if isinstance(each, MaskReading) and each.observed and not self.observe else each
                for each in found
            ]
        known = self.masks[place]
        parts = parts if len(parts) == len(known) else terms(op.tensor, factor)
        return [
            each if isinstance(each, Bias) else placed_again(each, part.placed)
            for part, each in zip(parts, known, strict=True)
        ]


@dataclass
class _Masks:
    """What stands above the scores. `exact`: does the mask do to them what its facts say?"""

    mask: Mask
    padding: Tokens | None = None
    bias: str = "none"
    exact: bool = True
    levels: bool = False
    """May a finite number take the place of all scores of a query?"""
    observed: list[MaskReading] = field(default_factory=list)
    observed_bias: bool = False

    @property
    def facts(self) -> tuple[str, ...]:
        """What was observed, by name. A bias is always passed as a tensor, so it needs no sentinel."""
        masks = {fact for found in self.observed for fact in found.observed}
        return tuple(sorted(masks | ({"bias"} if self.observed_bias else set())))

    def nodes(self, kind: Literal["buffers", "flags"]) -> tuple[fx.Node, ...]:
        """What has to be looked at in every call."""
        return tuple(dict.fromkeys(node for found in self.observed for node in getattr(found, kind)))


def _count(axis: Axis) -> int | None:
    sizes = [atom.size for atom in axis]
    numbers = [size for size in sizes if isinstance(size, int)]
    return math.prod(numbers) if len(numbers) == len(sizes) else None


def _fix(axis: Axis, reading: Reading) -> None:
    """Give these atoms a number for a length, where dynamo can guard it."""
    for atom in axis:
        for side in reading.operands:
            for size, own in zip(value_of(side.node).shape, side.placed.layout, strict=True):
                if own == (atom,) and not isinstance(atom.size, int) and (number := fixed(size)) is not None:
                    atom.size = number


def _factor(reading: Reading) -> str | None:
    """Over what a tensor that multiplies the scores differs the most."""
    roles = reading.roles()
    atoms = {atom for op in reading.factors if op.tensor is not None for atom in op.tensor.atoms}
    if not reading.factors:
        return None
    for name, axis in (("key", roles.columns), ("query", roles.rows), ("head", roles.query_heads)):
        if atoms & set(axis):
            return name
    return "batch" if atoms else "scalar"


def _hides_exactly(reading: Reading, op: Op, found: MaskReading) -> bool:
    """Does the term do to the scores what the mask says? A query that sees no key gives 0 there; a finite number in
    place of its scores gives an even mixture of the values. A scale above an additive mask may bring it back into view.
    """
    number = reading.fill(op)
    if op.kind == "add":
        return not found.blind
    return number <= HIDDEN and not (found.blind and number != float("-inf"))


def _call_structure(reading: Reading) -> Mask | Refusal:
    """`is_causal` of a call aligns the first query with the first key."""
    if not reading.causal:
        return Dense() if reading.opaque else Full()
    roles = reading.roles()
    rows, columns = _count(roles.rows), _count(roles.columns)
    if rows is not None and columns is not None:
        return Causal(rows - columns)
    if [atom.size for atom in roles.rows] != [atom.size for atom in roles.columns]:
        nodes = [side.node for side in reading.operands]
        lengths = [math.prod(as_captured(atom.size, nodes) for atom in axis) for axis in (roles.rows, roles.columns)]
        return Refusal(f"a causal call whose lengths ({lengths[0]} and {lengths[1]}) differ by a symbolic number")
    return Causal(0)
