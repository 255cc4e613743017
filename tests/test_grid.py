"""Tokens in the order of tiles, and keys in two parts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from rewriter.codegen import cpp
from rewriter.codegen.blocks import Lists
from rewriter.codegen.formula import Formula, merged
from rewriter.codegen.grid import coordinates, from_tiles, inside, to_tiles
from rewriter.guard import error, tolerance
from rewriter.site import Refusal

GRIDS = [((16,), (4,)), ((8, 12), (4, 4)), ((7, 10), (4, 8)), ((3, 5, 9), (2, 4, 4)), ((4, 6, 5), (1, 2, 8))]


def neighbours(grid: tuple[int, ...], tile: tuple[int, ...] | None, reach: int) -> Formula:
    """Tokens of which each coordinate is at most `reach` away; without a tile in the order of rows."""
    side = tile or (1,) * len(grid)

    def near(i: Any, j: Any) -> Any:
        mine, others = coordinates(i, grid, side), coordinates(j, grid, side)
        seen = inside(others, grid)
        for own, other in zip(mine, others, strict=True):
            seen = seen & ((own - other).abs() <= reach)
        return seen

    return Formula((near,))


@pytest.mark.parametrize(("grid", "tile"), GRIDS, ids=str)
def test_there_and_back(grid: tuple[int, ...], tile: tuple[int, ...]) -> None:
    x = torch.randn(2, 3, math.prod(grid), 5)
    tiled = to_tiles(x, grid, tile)
    assert torch.equal(from_tiles(tiled, grid, tile), x)
    # Each token says where it came from.
    named = to_tiles(torch.arange(math.prod(grid)).view(1, 1, -1, 1), grid, tile)[0, 0, :, 0]
    places = coordinates(torch.arange(len(named)), grid, tile)
    there = inside(places, grid)
    rows = torch.zeros_like(named)
    for place, size in zip(places, grid, strict=True):
        rows = rows * size + place
    assert torch.equal(rows[there], named[there])
    assert int(there.sum()) == math.prod(grid)


@pytest.mark.parametrize(("grid", "tile"), GRIDS, ids=str)
def test_a_neighbourhood_in_tiles(grid: tuple[int, ...], tile: tuple[int, ...]) -> None:
    query, key, value = (torch.randn(1, 2, math.prod(grid), 16) for _ in range(3))
    expected = neighbours(grid, None, 2).reference(query, key, value, 0.25)
    formula = neighbours(grid, tile, 2)
    tiled = [to_tiles(t, grid, tile) for t in (query, key, value)]
    assert error(from_tiles(formula.reference(*tiled, 0.25), grid, tile), expected) <= tolerance(torch.float32)
    kernel = cpp.kernel(formula, 16, 16, torch.float32, ())
    if not isinstance(kernel, Refusal):
        runs = Lists(formula)(tiled[0], tiled[1], {}, kernel.spec.listed, kernel.spec.block_n)
        out = kernel(*tiled, runs.first, runs.runs, scale=0.25)
        assert error(from_tiles(out, grid, tile), expected) <= tolerance(torch.float32)


def test_tiles_visit_fewer_blocks() -> None:
    """A window of 13 x 13 in a plane of 64 x 64: boxes of 8 x 8 see 9 boxes, lines of 64 see 13 lines."""
    query = torch.randn(1, 1, 4096, 8)
    boxes = Lists(neighbours((64, 64), (8, 8), 6))(query, query, {}, 64, 64).visited
    lines = Lists(neighbours((64, 64), None, 6))(query, query, {}, 64, 64).visited
    assert boxes == 22 * 22  # 3 of 8 along each axis, but for 2 at each end
    assert lines == 64 * 13 - 2 * (6 + 5 + 4 + 3 + 2 + 1)


def test_keys_in_two_parts() -> None:
    query, key, value = torch.randn(2, 3, 9, 8), torch.randn(2, 3, 20, 8), torch.randn(2, 3, 20, 8)
    scores = query @ key.mT * 0.3
    expected = scores.softmax(-1) @ value

    def part(begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        own = scores[..., begin:end]
        return own.softmax(-1) @ value[:, :, begin:end], own.logsumexp(-1)

    out, lse = merged(part(0, 13), part(13, 20))
    assert torch.allclose(out, expected, atol=1e-6)
    assert torch.allclose(lse, scores.logsumexp(-1))
    nothing = torch.zeros_like(expected), torch.full((2, 3, 9), float("-inf"))
    assert torch.allclose(merged(nothing, (expected, lse))[0], expected)
    assert not merged(nothing, nothing)[0].any()
