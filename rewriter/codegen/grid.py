"""Tokens of a grid in the order of tiles, so that a block of a kernel is a box of the grid.

In rows, 64 neighbours are a thin line, and a window of the plane touches nearly every block; as boxes of 8 x 8 they
touch few (Hassani et al. 2025, arXiv:2504.16922, section 3: token permutation). A mask function asks `coordinates`
where a token of the permuted sequence stands; the intervals of a block of one tile are those of its box.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F


def to_tiles(x: Tensor, grid: Sequence[int], tile: Sequence[int], dilation: Sequence[int] | None = None) -> Tensor:
    """(B, H, prod(grid), D) in rows -> (B, H, tokens, D) tile by tile. Where a tile reaches beyond the grid there are
    zeros, which a mask has to hide: `inside`. Along an axis with a dilation the coordinates of one residue after the
    other stand side by side, each with whole tiles.
    """
    rank, dilation = len(tile), dilation or [1] * len(tile)
    full = whole(grid, tile, dilation)
    boxes = x.unflatten(2, tuple(grid))
    if full != list(grid):
        lacking = zip(reversed(grid), reversed(full), strict=True)
        boxes = F.pad(boxes, (0, 0, *(n for size, more in lacking for n in (0, more - size))))
    for axis in reversed(range(rank)):
        boxes = boxes.unflatten(2 + axis, (-1, tile[axis], dilation[axis]))
    places = range(2, 2 + 3 * rank, 3)
    order = [place for first in places for place in (first + 2, first)] + [first + 1 for first in places]
    tiled: Tensor = boxes.permute(0, 1, *order, -1).flatten(2, -2)  # the only copy
    return tiled


def from_tiles(x: Tensor, grid: Sequence[int], tile: Sequence[int], dilation: Sequence[int] | None = None) -> Tensor:
    """The inverse: (B, H, tokens, D) tile by tile -> (B, H, prod(grid), D) in rows."""
    rank, dilation = len(tile), dilation or [1] * len(tile)
    full = whole(grid, tile, dilation)
    outer = [n for axis, size in enumerate(full) for n in (dilation[axis], size // dilation[axis] // tile[axis])]
    order = [place for axis in range(rank) for place in (3 + 2 * axis, 2 + 2 * rank + axis, 2 + 2 * axis)]
    rows: Tensor = x.unflatten(2, (*outer, *tile)).permute(0, 1, *order, -1).reshape(*x.shape[:2], *full, -1)
    for axis, size in enumerate(grid):
        rows = rows.narrow(2 + axis, 0, size)
    return rows.flatten(2, -2)


def coordinates(i: Any, grid: Sequence[int], tile: Sequence[int]) -> list[Any]:
    """Where token `i` of the permuted sequence stands, axis by axis; for use in functions of indices."""
    counts = [full // side for full, side in zip(whole(grid, tile), tile, strict=True)]
    box, within = i // math.prod(tile), i % math.prod(tile)
    found = []
    for axis, side in enumerate(tile):
        place = box // math.prod(counts[axis + 1 :]) % counts[axis] if axis else box // math.prod(counts[1:])
        step = within // math.prod(tile[axis + 1 :]) % side if axis else within // math.prod(tile[1:])
        found.append(place * side + step)
    return found


def inside(places: Sequence[Any], grid: Sequence[int]) -> Any:
    """Is this a token of the grid, and not of the rest of a tile?"""
    seen = places[0] < grid[0]
    for place, size in zip(places[1:], grid[1:], strict=True):
        seen = seen & (place < size)
    return seen


def whole(grid: Sequence[int], tile: Sequence[int], dilation: Sequence[int] | None = None) -> list[int]:
    """The sides of the grid, each residue of an axis filled up to whole tiles."""
    steps = [side * step for side, step in zip(tile, dilation or [1] * len(tile), strict=True)]
    return [-(-size // step) * step for size, step in zip(grid, steps, strict=True)]
