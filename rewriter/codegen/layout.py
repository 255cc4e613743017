"""Masks over the coordinates of tokens, one rule for each axis of their grid, and the kernels that make use of them.

A key is seen iff every axis sees it: an `AxisRule`. Tokens in front of the grid and behind it see all and are seen by
all. Rules that are `Reaching` see places outside of the grid, too: keys in front of all others, that are zero, stand
for these, and a query sees as many of them as it sees such places.

A kernel gets the tokens in the order of boxes (`rewriter/codegen/grid.py`), the residues of a dilated axis apart from
each other, and those without a place behind them, so that its blocks are boxes and what the mask hides is not visited.
The sides of the boxes are those with the fewest pairs of boxes to visit, counted axis by axis.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from rewriter.codegen.formula import IndexFunction
from rewriter.codegen.grid import coordinates, from_tiles, to_tiles, whole
from rewriter.errors import OptionError
from rewriter.site import AttentionSite, Causal, Dense, Full, Refusal
from rewriter.variant import Config

BOX = 64
"""Tokens in a box: the smaller blocks of most kernels."""
ENDLESS = 1 << 30
"""The length of a sequence that grows with its cache."""


@dataclass(frozen=True)
class Place:
    """Where tokens stand on an axis: at `step` of those whose coordinate leaves `residue` when divided by the dilation.
    Integers, tensors of them, or symbols.
    """

    residue: Any
    step: Any
    dilation: int = 1

    @property
    def at(self) -> Any:
        """The coordinate."""
        return self.step if self.dilation == 1 else self.step * self.dilation + self.residue


class AxisRule(Protocol):
    """What is seen along one axis. Frozen, and printed with all that it holds: kernels are remembered by that."""

    def __hash__(self) -> int: ...

    @property
    def dilation(self) -> int:
        """Coordinates that leave the same residue are put together."""
        ...

    def sees(self, query: Place, key: Place, size: int) -> Any:
        """Does a query see a key, on an axis of `size`?"""
        ...


@runtime_checkable
class Reaching(AxisRule, Protocol):
    """A rule that sees places outside of its axis, too. All rules of a grid are, or none is."""

    def reach(self, query: Place, size: int) -> tuple[Any, int]:
        """How many places of the axis a query sees, and how many with those outside of it."""
        ...


Rules = tuple[AxisRule, ...]
RulesOf = Callable[[AttentionSite, Config], Rules]


@dataclass(frozen=True)
class Layout:
    """How tokens lie: rows of a grid, between `front` tokens that have no place in it and `back` others."""

    sides: tuple[int, ...]
    front: int = 0
    back: int = 0

    @property
    def free(self) -> int:
        """Tokens that have no place."""
        return self.front + self.back

    @property
    def length(self) -> int:
        """All tokens."""
        return self.free + math.prod(self.sides)

    @property
    def endless(self) -> bool:
        """Is this a sequence of any length?"""
        return self.sides == (ENDLESS,)

    def __str__(self) -> str:
        around = f"+{self.front}+{self.back}" if self.back else f"+{self.front}" if self.front else ""
        return "x".join(map(str, self.sides)) + around


def layout_of(site: AttentionSite) -> Layout | Refusal:
    """The grid of a site, or the sequence of a causal one; a refusal where nothing says how tokens lie."""
    found = re.fullmatch(r"(\d+(?:x\d+)*)(?:\+(\d+))?(?:\+(\d+))?", site.tokens or "")
    layout = Layout(tuple(map(int, found[1].split("x"))), int(found[2] or 0), int(found[3] or 0)) if found else None
    reason = ""
    if site.dropout_p > 0:
        reason = f"dropout of {site.dropout_p} would have other random numbers, and fewer keys to drop"
    elif site.mask.has(Dense):
        reason = "the mask is a tensor of which nothing is known, so what it means on a grid is not known either"
    elif site.mask.positional == Causal() and (layout is None or len(layout.sides) == 1):
        return Layout((ENDLESS,))
    elif site.mask.positional != Full():
        reason = f"a grid has no order in which {site.mask} could be meant"
    elif layout is None:
        reason = f"it is not known how the tokens lie ({site.tokens or 'no grid was found'})"
    elif (site.q_len or layout.length) != layout.length or (site.kv_len or layout.length) != layout.length:
        reason = f"{site.q_len} queries over {site.kv_len} keys are not the {layout.length} tokens of {layout}"
    elif min(layout.sides) < 1 or not 1 <= len(layout.sides) <= 3:
        reason = f"a grid of {layout} tokens has not one to three axes"
    return Refusal(reason, site.path, site.source) if reason or layout is None else layout


def plane_of(site: AttentionSite) -> Layout:
    """The grid of a site whose lengths do not matter: those of a site are those of one of its calls."""
    layout = layout_of(replace(site, q_len=None, kv_len=None))
    assert not isinstance(layout, Refusal), str(layout)
    return layout


def numbers(config: Config, name: str, rank: int, default: int = 0) -> list[int]:
    """A setting of each axis: "7x7", or one for all."""
    words = str(config.get(name, default)).split("x")
    if len(words) not in (1, rank) or not all(word.isdecimal() for word in words):
        raise OptionError(f"{name} is {config.get(name)}; the tokens have {rank} axes")
    return [int(word) for word in words * (rank if len(words) == 1 else 1)]


# --- the order of boxes ----------------------------------------------------------------------------------------------


def folded(layout: Layout, rules: Rules, box: Sequence[int]) -> list[int]:
    """The sides with the residues of each axis apart, each filled up to whole boxes."""
    return whole(layout.sides, box, [rule.dilation for rule in rules])


def to_boxes(x: Tensor, layout: Layout, rules: Rules, box: Sequence[int]) -> Tensor:
    """(B, H, tokens, D) as they lie -> (B, H, more tokens, D) box by box; zeros, or False, where a box is not full."""
    front, rows, back = x.split([layout.front, math.prod(layout.sides), layout.back], 2)
    rows = to_tiles(rows, layout.sides, box, [rule.dilation for rule in rules])
    return torch.cat([rows, front, back], 2) if layout.free else rows


def from_boxes(x: Tensor, layout: Layout, rules: Rules, box: Sequence[int]) -> Tensor:
    """The inverse of `to_boxes`."""
    count = math.prod(folded(layout, rules, box))
    rows = from_tiles(x[:, :, :count], layout.sides, box, [rule.dilation for rule in rules])
    front, back = x[:, :, count:].split([layout.front, layout.back], 2)
    return torch.cat([front, rows, back], 2) if layout.free else rows


@cache
def seeing(layout: Layout, rules: Rules, box: tuple[int, ...] | None = None) -> IndexFunction:
    """The mask as a function of indices: of tokens as they lie, or in the order of these boxes."""
    sides = folded(layout, rules, box) if box else layout.sides
    count, zeros = math.prod(sides), zeros_of(layout, rules)

    def placed(t: Any) -> list[Place]:
        found = coordinates(t if box else t - layout.front, sides, box or (1,) * len(rules))
        places = []
        for x, rule, size in zip(found, rules, sides, strict=True):
            steps, n = size // rule.dilation, rule.dilation
            if n == 1:
                places.append(Place(0, x))
            else:
                places.append(Place(x // steps, x % steps, n) if box else Place(x % n, x // n, n))
        return places

    def free(t: Any) -> Any:
        if box:
            return t >= count
        behind = t >= layout.front + count
        return (t < layout.front) | behind if layout.back else t < layout.front

    def sees(i: Any, j: Any) -> Any:
        seen = None
        for query, key, rule, size in zip(placed(i), placed(j), rules, layout.sides, strict=True):
            one = rule.sees(query, key, size)
            one = one & (key.at < size) if box else one
            seen = one if seen is None else seen & one
        assert seen is not None
        if not layout.free:
            return seen
        # What is seen by all is a token, and what fills a box is none.
        return seen | free(j) | (free(i) & _inside(placed(j), layout)) if box else seen | free(i) | free(j)

    def sees_zeros(i: Any, j: Any) -> Any:
        query, seen, every = i - zeros, 1, 1
        for place, rule, size in zip(placed(query), rules, layout.sides, strict=True):
            assert isinstance(rule, Reaching)
            inside, reached = rule.reach(place, size)
            seen, every = seen * inside, every * reached
        outside = (j < zeros) & (j < every - seen)
        outside = outside & ~free(query) if layout.free else outside
        return outside | ((j >= zeros) & sees(query, j - zeros))

    return _named(sees_zeros if zeros else sees, f"{layout} {rules} {box}")


def _named(function: IndexFunction, name: str) -> IndexFunction:
    # A compiled graph names the function, and must not take it for another.
    function.__name__, function.__qualname__ = "on_grid", name
    return function


@cache
def zeros_of(layout: Layout, rules: Rules) -> int:
    """Keys that are zero, in whole boxes: enough for the query that sees most places outside of the grid."""
    least, every = 1, 1
    for rule, size in zip(rules, layout.sides, strict=True):
        if layout.endless or not isinstance(rule, Reaching):
            return 0
        x = torch.arange(size)
        inside, reached = rule.reach(Place(x % rule.dilation, x // rule.dilation, rule.dilation), size)
        least, every = least * int(inside.min()), every * reached
    return -(-(every - least) // BOX) * BOX


def _inside(places: Sequence[Place], layout: Layout) -> Any:
    seen = places[0].at < layout.sides[0]
    for place, size in zip(places[1:], layout.sides[1:], strict=True):
        seen = seen & (place.at < size)
    return seen


# --- how much is visited ---------------------------------------------------------------------------------------------


@cache
def pairs(rule: AxisRule, size: int, side: int) -> int:
    """Of an axis cut into pieces of `side`: how many pairs of pieces have a query that sees a key."""
    steps = -(-size // rule.dilation)
    filled = -(-steps // side) * side
    x = torch.arange(rule.dilation * filled)
    places = Place(x // filled, x % filled, rule.dilation)
    query, key = (Place(places.residue.view(s), places.step.view(s), rule.dilation) for s in ((-1, 1), (1, -1)))
    seen = torch.as_tensor(rule.sees(query, key, size)) & (query.at < size) & (key.at < size)
    count = len(x) // side
    return int(seen.expand(len(x), len(x)).view(count, side, count, side).any(3).any(1).sum())


@cache
def box_of(layout: Layout, rules: Rules) -> tuple[int, ...]:
    """The sides, powers of two, of the boxes with the fewest visits."""
    powers = [1 << n for n in range(BOX.bit_length())]
    shapes = [box for box in itertools.product(powers, repeat=len(rules)) if math.prod(box) == BOX]
    return min(shapes, key=lambda box: _visits(layout, rules, box))


def _visits(layout: Layout, rules: Rules, box: tuple[int, ...]) -> int:
    counted: list[int] = [pairs(*axis) for axis in zip(rules, layout.sides, box, strict=True)]
    return math.prod(counted)


def share(layout: Layout, rules: Rules) -> float:
    """How many pairs of boxes are visited, of the pairs of blocks of the whole attention."""
    if layout.endless:
        return 0.0
    box = box_of(layout, rules)
    blocks = -(-layout.length // BOX)
    edge = 2 * math.prod(folded(layout, rules, box)) // BOX * -(-layout.free // BOX)
    return (_visits(layout, rules, box) + edge) / blocks**2


def sparing(site: AttentionSite, rules_of: RulesOf, offered: Sequence[Config]) -> list[Config]:
    """Of these configs, those that visit less than half."""
    layout = layout_of(site)
    return [] if isinstance(layout, Refusal) else [c for c in offered if share(layout, rules_of(site, c)) < 0.5]
