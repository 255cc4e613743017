"""The simulator: published bounds, windows at borders, and the tiles that are seen counted one by one."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewriter import cli
from rewriter.codegen.simulate import Axis, axes_of, bound, bound_in_rows, search, windows
from rewriter.errors import OptionError

Sizes = tuple[int, ...]
SEQUENCE, IMAGE, VIDEO, SHORT = (32768,), (256, 256), (30, 48, 80), (16, 44, 80)


@pytest.mark.parametrize(
    ("grid", "window", "stride", "query_tile", "key_tile", "speedup", "dense"),
    [
        (SEQUENCE, (2048,), (1,), (128,), (128,), 15.11, False),
        (SEQUENCE, (2048,), (256,), (128,), (128,), 16.0, True),
        (SEQUENCE, (2048,), (2048,), (128,), (128,), 16.0, True),
        (SEQUENCE, (2048,), (1,), (256,), (128,), 14.32, False),
        (IMAGE, (80, 80), (1, 1), (16, 8), (16, 8), 7.51, False),
        (IMAGE, (80, 80), (16, 16), (16, 8), (16, 8), 10.24, True),
        (IMAGE, (80, 80), (1, 1), (16, 16), (16, 8), 7.06, False),
        (IMAGE, (80, 80), (16, 16), (16, 16), (16, 8), 10.24, True),
        (IMAGE, (80, 80), (1, 1), (8, 8), (8, 8), 8.96, False),
        (VIDEO, (18, 24, 24), (1, 1, 1), (2, 8, 8), (2, 8, 8), 5.44, False),
        (VIDEO, (18, 24, 24), (16, 8, 8), (2, 8, 8), (2, 8, 8), 11.11, True),
        (VIDEO, (18, 24, 24), (2, 8, 8), (2, 8, 8), (2, 8, 8), 11.11, True),
        (VIDEO, (18, 24, 24), (1, 1, 1), (4, 8, 8), (2, 8, 8), 4.92, False),
        (VIDEO, (18, 24, 24), (16, 8, 8), (4, 8, 8), (2, 8, 8), 10.42, True),
        (VIDEO, (18, 24, 24), (1, 1, 1), (4, 4, 4), (4, 4, 4), 7.21, False),
        (VIDEO, (18, 24, 24), (16, 8, 8), (4, 4, 4), (4, 4, 4), 9.38, False),
        (SHORT, (16, 32, 48), (1, 1, 1), (4, 4, 8), (4, 4, 8), 2.08, False),
        (SHORT, (16, 32, 48), (1, 8, 16), (4, 4, 8), (4, 4, 8), 2.29, True),
    ],
)
def test_published_bounds(
    grid: Sizes, window: Sizes, stride: Sizes, query_tile: Sizes, key_tile: Sizes, speedup: float, dense: bool
) -> None:
    found = bound(axes_of(grid, window, stride), query_tile, key_tile)
    assert found.speedup == pytest.approx(speedup, abs=0.0051)
    assert found.dense == dense


@pytest.mark.parametrize(("grid", "window", "speedup"), [(VIDEO, (18, 24, 24), 3.23), (IMAGE, (80, 80), 3.20)])
def test_tiles_in_rows_see_more(grid: Sizes, window: Sizes, speedup: float) -> None:
    assert bound_in_rows(axes_of(grid, window), 128, 128) == pytest.approx(speedup, abs=0.0051)


@pytest.mark.parametrize(
    ("axis", "ends"),
    [
        (Axis(7, 3), [(0, 3), (0, 3), (1, 4), (2, 5), (3, 6), (4, 7), (4, 7)]),
        (Axis(7, 4), [(0, 4)] * 3 + [(1, 5), (2, 6), (3, 7), (3, 7)]),
        (Axis(8, 4, 2), [(0, 4)] * 2 + [(1, 5)] * 2 + [(3, 7)] * 2 + [(4, 8)] * 2),
        (Axis(9, 5, 3), [(0, 5)] * 3 + [(2, 7)] * 3 + [(4, 9)] * 3),
        (Axis(6, 3, causal=True), [(0, 1), (0, 2), (0, 3), (1, 4), (2, 5), (3, 6)]),
        (Axis(7, 4, 2, causal=True), [(0, 1), (0, 2), (0, 3), (0, 4), (2, 5), (2, 6), (3, 7)]),
    ],
)
def test_windows_at_borders(axis: Axis, ends: list[tuple[int, int]]) -> None:
    assert list(zip(*(end.tolist() for end in windows(axis, axis.length)), strict=True)) == ends


@st.composite
def axes(draw: st.DrawFn) -> Axis:
    length = draw(st.integers(1, 12))
    dilation = draw(st.integers(1, min(3, length)))
    window = draw(st.integers(1, length // dilation))
    return Axis(length, window, draw(st.integers(1, window)), dilation, draw(st.booleans()))


def seen(axis: Axis, i: int, j: int) -> bool:
    """The rules, for one query and one key."""
    residue = i % axis.dilation
    if j % axis.dilation != residue:
        return False
    i, j, length = i // axis.dilation, j // axis.dilation, len(range(residue, axis.length, axis.dilation))
    if axis.causal:
        leader = min(i // axis.stride * axis.stride + axis.stride - 1, length - 1)
        return max(leader - axis.window + 1, 0) <= j <= i
    leader = min(i // axis.stride * axis.stride + axis.stride // 2, length - 1)
    left, right = axis.window // 2, axis.window // 2 + axis.window % 2 - 1
    return -left <= j - min(max(leader, left), length - 1 - right) <= right


@settings(max_examples=150, deadline=None)
@given(st.lists(axes(), min_size=1, max_size=3), st.data())
def test_counts_what_is_seen(chosen: list[Axis], data: st.DataObject) -> None:
    chosen = chosen if np.prod([axis.length for axis in chosen]) <= 150 else chosen[:1]
    sides = st.integers(1, 5)
    query_tile, key_tile = (tuple(data.draw(sides) for _ in chosen) for _ in range(2))

    def tile(place: Sizes, sides: Sizes) -> Sizes:
        """Of a token: the residues of its coordinates, and the box among those of the same."""
        each = zip(place, sides, chosen, strict=True)
        return tuple(n for t, side, axis in each for n in (t % axis.dilation, t // axis.dilation // side))

    tokens = list(itertools.product(*(range(axis.length) for axis in chosen)))
    pairs, visible = set(), 0
    for query, key in itertools.product(tokens, tokens):
        if all(seen(axis, i, j) for axis, i, j in zip(chosen, query, key, strict=True)):
            visible += 1
            pairs.add((tile(query, query_tile), tile(key, key_tile)))
    found = bound(chosen, query_tile, key_tile)
    whole = -(-len(tokens) // np.prod(query_tile)) * -(-len(tokens) // np.prod(key_tile))
    assert found.speedup == pytest.approx(whole / len(pairs))
    assert found.ideal == pytest.approx(len(tokens) ** 2 / visible)
    full = {
        pair
        for pair in pairs
        if all(
            seen(axis, i, j)
            for query in tokens if tile(query, query_tile) == pair[0]
            for key in tokens if tile(key, key_tile) == pair[1]
            for axis, i, j in zip(chosen, query, key, strict=True)
        )
    }  # fmt: skip
    assert found.dense == (full == pairs)


@settings(max_examples=60, deadline=None)
@given(st.lists(axes(), min_size=1, max_size=3), st.integers(1, 5), st.integers(1, 5))
def test_tiles_in_rows_are_counted(chosen: list[Axis], queries: int, keys: int) -> None:
    chosen = chosen if np.prod([axis.length for axis in chosen]) <= 150 else chosen[:1]
    tokens = list(itertools.product(*(range(axis.length) for axis in chosen)))
    pairs = {
        (m // queries, n // keys)
        for (m, query), (n, key) in itertools.product(enumerate(tokens), enumerate(tokens))
        if all(seen(axis, i, j) for axis, i, j in zip(chosen, query, key, strict=True))
    }
    whole = -(-len(tokens) // queries) * -(-len(tokens) // keys)
    assert bound_in_rows(chosen, queries, keys) == pytest.approx(whole / len(pairs))


def test_the_whole_axis_gains_nothing() -> None:
    found = bound(axes_of((16, 24), (16, 24), (3, 5)), (4, 8), (8, 8))
    assert (found.speedup, found.ideal, found.dense) == (1.0, 1.0, True)


def test_a_closed_form_would_call_this_dense() -> None:
    assert not bound(axes_of((5,), (4,)), (1,), (2,)).dense


@pytest.mark.parametrize(("grid", "window"), [((12, 20), (5, 6)), ((24,), (7,)), ((8, 6, 10), (3, 4, 4))])
def test_a_search_finds_the_best(grid: Sizes, window: Sizes) -> None:
    found = search(axes_of(grid, window), 8, 4)
    shapes = {n: [s for s in itertools.product((1, 2, 4, 8), repeat=len(grid)) if np.prod(s) == n] for n in (4, 8)}
    every = [
        bound(axes_of(grid, window, stride), queries, keys).speedup
        for stride in itertools.product(*(range(1, w + 1) for w in window))
        for queries in shapes[8]
        for keys in shapes[4]
    ]
    assert found.speedup == pytest.approx(max(every))
    assert bound(axes_of(grid, window, found.stride), found.query_tile, found.key_tile) == found


def test_the_command_prints_what_it_counts(capsys: pytest.CaptureFixture[str]) -> None:
    line = "simulate --grid 30x48x80 --window 18x24x24 --stride 16x8x8 --tile 4x8x8/2x8x8"
    assert cli.run(line.split()) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("16x8x8", "4x8x8/2x8x8", "10.42x", "11.11x", "none needed"))
    assert cli.run([*["simulate", "--grid", "64x64", "--window", "16", "--search", "--tokens", "64"], "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["dense"] and document["speedup"] == document["ideal"] == 16.0


@pytest.mark.parametrize(
    "options",
    [
        "--grid 7 --window 9 --tile 2",
        "--grid 16 --window 4 --stride 5 --tile 2",
        "--grid 16 --window 8 --dilation 3 --tile 2",
        "--grid 16x16 --window 4x4x4 --tile 2x2",
        "--grid 16x16 --window 4 --tile 2",
        "--grid 16x16 --window 4 --tile 0x2",
        "--grid 16x0 --window 4 --tile 2x2",
        "--grid 2x2x2x2 --window 2 --tile 2x2x2x2",
        "--grid 16xa --window 4 --tile 2",
        "--grid 16 --window 4",
        "--grid 16 --window 4 --tile 2 --search",
        "--grid 16 --window 4 --stride 2 --search",
        "--grid 16 --window 4 --search --tokens 3",
        "--grid 16 --window 4 --tile 1/2/4",
    ],
)
def test_bad_input_is_one_sentence(options: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["simulate", *options.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "defect" not in line


def test_errors_say_what_is_wrong() -> None:
    with pytest.raises(OptionError, match="longer than its axis"):
        Axis(7, 4, dilation=2)
