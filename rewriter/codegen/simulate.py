"""The speed of light of attention in windows of a grid: how much less work than the whole, counted in tiles.

From Generalized Neighborhood Attention (Hassani et al. 2025, arXiv:2504.16922, section 4). Tokens are permuted so that
a tile of a kernel is a box of the grid. A tile of queries visits every tile of keys that holds a key which one of its
queries sees; the bound is the number of pairs of tiles of the whole attention, over those that are visited. Axes are
independent, so a count is the product of counts of axes, and these are enumerated: closed forms fail at borders.

Which keys a query sees along an axis is told in `windows`. Residues of a dilated axis are sequences of their own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rewriter.errors import OptionError

Sizes = tuple[int, ...]
_Ends = tuple[NDArray[np.int64], NDArray[np.int64]]


@dataclass(frozen=True)
class Axis:
    """A window of `window` tokens on an axis of `length`; `stride` queries share it; `dilation` tokens apart."""

    length: int
    window: int
    stride: int = 1
    dilation: int = 1
    causal: bool = False

    def __post_init__(self) -> None:
        if min(self.length, self.window, self.stride, self.dilation) < 1:
            raise OptionError("lengths, windows, strides and dilations are at least 1")
        if self.window * self.dilation > self.length:
            apart = f", {self.dilation} tokens apart," if self.dilation > 1 else ""
            raise OptionError(f"a window of {self.window}{apart} is longer than its axis of {self.length}")
        if self.stride > self.window:
            raise OptionError(f"a stride of {self.stride} skips keys: it is at most the window, {self.window}")

    @property
    def groups(self) -> dict[int, int]:
        """Lengths of the sequences that a dilation makes -> how many there are."""
        short, longer = divmod(self.length, self.dilation)
        return {n: count for n, count in ((short + 1, longer), (short, self.dilation - longer)) if count}


@cache
def windows(axis: Axis, length: int) -> _Ends:
    """[start, end) of the keys of each query, in a sequence of `length` tokens of the axis.

    `stride` queries follow one leader: the one right of their middle, or the last where the axis is causal; the last
    token where they are cut short. The window lies around it, moved inward at borders, or ends at the query itself.
    """
    query = np.arange(length)
    leader = query // axis.stride * axis.stride
    if axis.causal:
        leader = np.minimum(leader + axis.stride - 1, length - 1)
        return np.maximum(leader - axis.window + 1, 0), query + 1
    leader = np.minimum(leader + axis.stride // 2, length - 1)
    left = axis.window // 2
    start = np.clip(leader, left, length - axis.window + left) - left
    return start, start + axis.window


@cache
def _seen(axis: Axis) -> int:
    """Pairs of a query and a key that it sees."""
    ends = ((windows(axis, length), count) for length, count in axis.groups.items())
    return sum(count * int((end - start).sum()) for (start, end), count in ends)


@cache
def _visited(axis: Axis, queries: int, keys: int) -> tuple[int, bool]:
    """Pairs of tiles of this many queries and keys, and whether every query of each sees all keys of the other."""
    visits, dense = 0, True
    for length, count in axis.groups.items():
        start, end = windows(axis, length)
        firsts = np.arange(0, length, queries)
        low, high = np.minimum.reduceat(start, firsts), np.maximum.reduceat(end, firsts)
        visits += count * int((-(-high // keys) - low // keys).sum())
        shared = (np.maximum.reduceat(start, firsts) == low) & (np.minimum.reduceat(end, firsts) == high)
        dense &= bool((shared & (low % keys == 0) & ((high % keys == 0) | (high == length))).all())
    return visits, dense


@dataclass(frozen=True)
class Bound:
    """What there is to win, and with what.

    speedup  whole attention over this one, in pairs of tiles: no kernel of these tiles gains more
    ideal    the same in pairs of tokens
    dense    is every visited tile seen as a whole, so that no mask is needed?
    """

    stride: Sizes
    query_tile: Sizes
    key_tile: Sizes
    speedup: float
    ideal: float
    dense: bool

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def axes_of(
    grid: Sizes, window: Sizes, stride: Sizes = (1,), dilation: Sizes = (1,), causal: Sizes = (0,)
) -> tuple[Axis, ...]:
    """One axis for each side of the grid; a single number serves all. Raises OptionError."""
    if not 1 <= len(grid) <= 3:
        raise OptionError(f"a grid has one to three axes, not {len(grid)}")
    each = (_for_all(name, x, grid) for name, x in
            (("window", window), ("stride", stride), ("dilation", dilation), ("causal", causal)))  # fmt: skip
    return tuple(Axis(n, w, s, d, bool(c)) for n, w, s, d, c in zip(grid, *each, strict=True))


def _for_all(name: str, sizes: Sizes, grid: Sizes) -> Sizes:
    if len(sizes) not in (1, len(grid)):
        raise OptionError(f"{name} has {len(sizes)} numbers for a grid of {len(grid)} axes")
    return sizes if len(sizes) == len(grid) else sizes * len(grid)


def bound(axes: Sequence[Axis], query_tile: Sizes, key_tile: Sizes) -> Bound:
    """For tiles that are boxes of the grid."""
    if not len(query_tile) == len(key_tile) == len(axes) or min(*query_tile, *key_tile) < 1:
        raise OptionError(f"a tile of this grid is {len(axes)} numbers of at least 1")
    found = [_visited(*each) for each in zip(axes, query_tile, key_tile, strict=True)]
    tokens = math.prod(axis.length for axis in axes)
    whole = -(-tokens // math.prod(query_tile)) * -(-tokens // math.prod(key_tile))
    return Bound(
        stride=tuple(axis.stride for axis in axes),
        query_tile=query_tile,
        key_tile=key_tile,
        speedup=whole / math.prod(visits for visits, _ in found),
        ideal=tokens**2 / math.prod(map(_seen, axes)),
        dense=all(dense for _, dense in found),
    )


def bound_in_rows(axes: Sequence[Axis], queries: int, keys: int) -> float:
    """The bound on the speed-up for tiles of consecutive tokens, row by row: those of a kernel without permutation."""
    sides = [axis.length for axis in axes]
    tokens, visits = math.prod(sides), 0
    for first in range(0, tokens, queries):
        seen = np.zeros(sides, dtype=bool)
        for row, group in itertools.groupby(range(first, min(first + queries, tokens)), lambda t: t // sides[-1]):
            last = _keys(axes[-1], np.array(list(group)) % sides[-1])
            places = np.unravel_index(row, sides[:-1]) if len(sides) > 1 else ()
            outer = [_keys(axis, np.array([place])) for axis, place in zip(axes, places, strict=False)]
            seen[np.ix_(*outer, last)] = True
        visits += len(np.unique(seen.reshape(-1).nonzero()[0] // keys))
    return -(-tokens // queries) * -(-tokens // keys) / visits


def _keys(axis: Axis, places: NDArray[np.int64]) -> NDArray[np.bool_]:
    """bool (length,): is a key seen from any of these places?"""
    key, seen = np.arange(axis.length), np.zeros(axis.length, dtype=bool)
    for residue in range(axis.dilation):
        own = places[places % axis.dilation == residue] // axis.dilation
        start, end = windows(axis, len(range(residue, axis.length, axis.dilation)))
        for first, last in set(zip(start[own].tolist(), end[own].tolist(), strict=True)):
            seen |= (key % axis.dilation == residue) & (key // axis.dilation >= first) & (key // axis.dilation < last)
    return seen


def search(axes: Sequence[Axis], query_tokens: int, key_tokens: int, *, alike: bool = False) -> Bound:
    """The best strides and tiles for these windows, tiles being powers of two along each axis, where they are `alike`
    the same of queries and keys. Of equals, that of the least stride, which is the nearest to a window of each query's
    own.
    """

    @cache
    def best(number: int, queries: int, keys: int) -> Axis:
        axis = axes[number]
        strided = (Axis(axis.length, axis.window, s, axis.dilation, axis.causal) for s in range(1, axis.window + 1))
        return min(strided, key=lambda each: _visited(each, queries, keys)[0])

    found = []
    for query_tile, key_tile in itertools.product(*(shapes(n, len(axes)) for n in (query_tokens, key_tokens))):
        if alike and query_tile != key_tile:
            continue
        chosen = [best(*each) for each in zip(range(len(axes)), query_tile, key_tile, strict=True)]
        found.append(bound(chosen, query_tile, key_tile))
    return max(found, key=lambda each: (each.speedup, each.dense, -math.prod(each.stride)))


def shapes(tokens: int, rank: int) -> Iterator[Sizes]:
    """The tiles of so many tokens whose sides are powers of two."""
    if tokens < 1 or tokens & (tokens - 1):
        raise OptionError(f"a tile of {tokens} tokens: a search takes powers of two")
    sides = [1 << n for n in range(tokens.bit_length())]
    return (shape for shape in itertools.product(sides, repeat=rank) if math.prod(shape) == tokens)
