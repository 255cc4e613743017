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


def to_tiles(x: Tensor, grid: Sequence[int], tile: Sequence[int]) -> Tensor:
    """(B, H, prod(grid), D) in rows -> (B, H, tokens, D) tile by tile. Where a tile reaches beyond the grid there are
    zeros, which a mask has to hide: `inside`.
    """
    whole = _whole(grid, tile)
    boxes = x.unflatten(2, tuple(grid))
    lacking = [n for size, full in zip(reversed(grid), reversed(whole), strict=True) for n in (0, full - size)]
    boxes = F.pad(boxes, (0, 0, *lacking))
    for axis, side in reversed(list(enumerate(tile))):
        boxes = boxes.unflatten(2 + axis, (-1, side))
    rank = len(tile)
    order = [2 * axis + 2 for axis in range(rank)] + [2 * axis + 3 for axis in range(rank)]
    tiled: Tensor = boxes.permute(0, 1, *order, 2 * rank + 2).flatten(2, -2)
    return tiled


def from_tiles(x: Tensor, grid: Sequence[int], tile: Sequence[int]) -> Tensor:
    """The inverse: (B, H, tokens, D) tile by tile -> (B, H, prod(grid), D) in rows."""
    whole, rank = _whole(grid, tile), len(tile)
    counts = [full // side for full, side in zip(whole, tile, strict=True)]
    boxes = x.unflatten(2, (*counts, *tile))
    order = [2 + axis + half * rank for axis in range(rank) for half in (0, 1)]
    boxes = boxes.permute(0, 1, *order, 2 * rank + 2)
    for axis in range(rank):
        boxes = boxes.flatten(2 + axis, 3 + axis)
    for axis, size in enumerate(grid):
        boxes = boxes.narrow(2 + axis, 0, size)
    rows: Tensor = boxes.flatten(2, -2)
    return rows


def coordinates(i: Any, grid: Sequence[int], tile: Sequence[int]) -> list[Any]:
    """Where token `i` of the permuted sequence stands, axis by axis; for use in functions of indices."""
    counts = [full // side for full, side in zip(_whole(grid, tile), tile, strict=True)]
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


def _whole(grid: Sequence[int], tile: Sequence[int]) -> list[int]:
    return [-(-size // side) * side for size, side in zip(grid, tile, strict=True)]
