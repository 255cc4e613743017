"""Masks over grids: the rules of each axis, their identities, and the work that they save."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rewriter.codegen.blocks import Lists
from rewriter.codegen.formula import Formula
from rewriter.codegen.layout import (
    BOX,
    ENDLESS,
    AxisRule,
    Layout,
    Place,
    Rules,
    box_of,
    from_boxes,
    layout_of,
    pairs,
    seeing,
    share,
    to_boxes,
)
from rewriter.codegen.simulate import axes_of, bound, search, shapes
from rewriter.errors import OptionError
from rewriter.kernels.local.axial import Across, Along
from rewriter.kernels.local.dilated import Global, Local
from rewriter.kernels.local.halo import Halo
from rewriter.kernels.local.neighborhood import VARIANT as NEIGHBORHOOD
from rewriter.kernels.local.neighborhood import Window
from rewriter.site import AttentionSite, Causal, Full, Padding, Refusal
from rewriter.target import Target
from rewriter.testing import assert_close, brute_force, inputs
from rewriter.variant import variants

SITE = NEIGHBORHOOD.cases[2].site


def on(tokens: str, **other: Any) -> AttentionSite:
    layout = layout_of(replace(SITE, tokens=tokens, q_len=None, kv_len=None))
    assert isinstance(layout, Layout)
    return replace(SITE, tokens=tokens, **other).sized(batch=2, q_len=layout.length, kv_len=layout.length)


def along(rule: AxisRule, size: int) -> Tensor:
    """What one axis sees, bool (size, size)."""
    x = torch.arange(size)
    place = [
        Place((x % rule.dilation).view(s), (x // rule.dilation).view(s), rule.dilation) for s in ((-1, 1), (1, -1))
    ]
    return torch.as_tensor(rule.sees(*place, size)).expand(size, size)


def spans(rule: AxisRule, size: int) -> list[tuple[int, int]]:
    found = []
    for row in along(rule, size):
        keys = row.nonzero().flatten().tolist()
        assert keys == list(range(keys[0], keys[-1] + 1))
        found.append((keys[0], keys[-1] + 1))
    return found


# The windows of NATTEN 0.21.
VECTORS = [
    (7, Window(3), [(0, 3), (0, 3), (1, 4), (2, 5), (3, 6), (4, 7), (4, 7)]),
    (7, Window(4), [(0, 4)] * 3 + [(1, 5), (2, 6), (3, 7), (3, 7)]),
    (8, Window(4, 2), [(0, 4)] * 2 + [(1, 5)] * 2 + [(3, 7)] * 2 + [(4, 8)] * 2),
    (9, Window(5, 3), [(0, 5)] * 3 + [(2, 7)] * 3 + [(4, 9)] * 3),
    (10, Window(4, 4), [(0, 4)] * 4 + [(4, 8)] * 4 + [(6, 10)] * 2),
    (6, Window(3, causal=True), [(0, 1), (0, 2), (0, 3), (1, 4), (2, 5), (3, 6)]),
    (7, Window(4, 2, causal=True), [(0, 1), (0, 2), (0, 3), (0, 4), (2, 5), (2, 6), (3, 7)]),
]


@pytest.mark.parametrize(("size", "rule", "expected"), VECTORS, ids=str)
def test_windows_of_one_axis(size: int, rule: Window, expected: list[tuple[int, int]]) -> None:
    assert spans(rule, size) == expected


@pytest.mark.parametrize("size", [12, 13, 14, 17])
@pytest.mark.parametrize(("window", "stride", "causal"), [(3, 1, False), (4, 2, False), (3, 2, True), (4, 4, False)])
def test_a_dilated_window_is_one_of_each_residue(size: int, window: int, stride: int, causal: bool) -> None:
    found = along(Window(window, stride, 3, causal), size)
    expected = torch.zeros(size, size, dtype=torch.bool)
    for residue in range(3):
        own = len(range(residue, size, 3))
        expected[residue::3, residue::3] = along(Window(window, stride, 1, causal), own)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("size", [7, 10, 16])
@pytest.mark.parametrize("stride", [1, 2, 3, 7])
def test_a_window_over_the_axis_is_the_axis(size: int, stride: int) -> None:
    assert along(Window(size, stride), size).all()
    # A sequence has no end, and no leader is cut short by it.
    assert torch.equal(along(Window(size + stride, stride, causal=True), size), torch.ones(size, size).tril().bool())


@pytest.mark.parametrize("tokens", ["640", "24x24+1", "24x24+0+9", "5x9x13+3"])
@pytest.mark.parametrize("mask", [Full(), Full() & Padding()], ids=str)
def test_windows_over_every_axis_are_exact(tokens: str, mask: Any) -> None:
    site = on(tokens, mask=mask)
    arguments = inputs(site, seed=1)
    config = {"window": tokens.partition("+")[0], "stride": 2}
    with torch.no_grad():
        assert_close(NEIGHBORHOOD.build(site, config)(*arguments), brute_force(*arguments, site=site), torch.float32)


@pytest.mark.parametrize("q_len", [1, 9, 300])
def test_other_lengths_are_the_attention_of_the_site(q_len: int) -> None:
    site = SITE.sized(batch=2, q_len=q_len, kv_len=300)
    arguments = inputs(site, seed=2)
    with torch.no_grad():
        out = NEIGHBORHOOD.build(SITE, {"window": 4})(*arguments)
    assert_close(out, brute_force(*arguments, site=site), torch.float32)
    assert_close(NEIGHBORHOOD.reference(*arguments, SITE, {"window": 4}), out, torch.float32)


@pytest.mark.parametrize("border", ["mask", "zero"])
@pytest.mark.parametrize("learned", [False, True])
def test_a_grid_is_one_graph(border: str, learned: bool) -> None:
    built = variants()["halo"].build(SITE, {"block": 8, "halo": 3, "border": border})
    query, key, value, _, _ = inputs(SITE, seed=4)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return built(q, k, v, None, None)

    query.requires_grad_(learned)
    out = torch.compile(run, backend="aot_eager", fullgraph=True)(query, key, value)
    assert_close(out, run(query, key, value), torch.float32)
    if learned:
        given = torch.autograd.grad(out.square().sum(), query)[0]
        assert_close(given, torch.autograd.grad(run(query, key, value).square().sum(), query)[0], torch.float32)


@pytest.mark.parametrize("back", [0, 5])
@pytest.mark.parametrize("front", [0, 3])
def test_tokens_around_see_all_and_are_seen_by_all(front: int, back: int) -> None:
    layout, rules = Layout((9, 10), front, back), (Window(3), Window(4))
    assert layout_of(replace(SITE, tokens=str(layout), q_len=None, kv_len=None)) == layout
    x = torch.arange(layout.length)
    seen = seeing(layout, rules)(x[:, None], x)
    grid = slice(front, front + 90)
    outside = torch.ones_like(x, dtype=torch.bool)
    outside[grid] = False
    assert seen[outside].all() and seen[:, outside].all()
    assert torch.equal(seen[grid, grid], torch.kron(along(rules[0], 9).int(), along(rules[1], 10).int()).bool())


GRIDS = [
    (Layout((24, 24), 1), (Window(8, 4), Window(5))),
    (Layout((17, 34)), (Window(4, 1, 3), Window(7, 1, 2, True))),
    (Layout((5, 9, 13), 70), (Window(2), Window(3, 1, 2), Window(4, 3))),
    (Layout((17, 20), 3, 71), (Window(4, 1, 3), Window(7))),
    (Layout((24, 24), 0, 7), (Window(8, 4), Window(5))),
    (Layout((100,), 2), (Window(5, 5, 7),)),
]


@pytest.mark.parametrize(("layout", "rules"), GRIDS, ids=str)
def test_boxes_hold_the_same_tokens_and_the_same_mask(layout: Layout, rules: Rules) -> None:
    box = box_of(layout, rules)
    assert math.prod(box) == BOX
    x = torch.randn(2, 3, layout.length, 5)
    assert torch.equal(from_boxes(to_boxes(x, layout, rules, box), layout, rules, box), x)
    named = to_boxes(torch.arange(1, layout.length + 1).view(1, 1, -1, 1), layout, rules, box)[0, 0, :, 0]
    assert len(named) % BOX == layout.free % BOX
    p, t = torch.arange(len(named)), torch.arange(layout.length)
    seen = seeing(layout, rules, box)(p[:, None], p)
    there = named > 0
    assert not seen[there][:, ~there].any(), "what fills a box is not seen"
    order = named[there] - 1
    expected = seeing(layout, rules)(t[:, None], t)
    assert torch.equal(seen[there][:, there], expected[order][:, order])


def visited(layout: Layout, rules: Rules) -> int:
    """Pairs of boxes, as a kernel's lists say."""
    box = box_of(layout, rules)
    query = to_boxes(torch.zeros(1, 1, layout.length, 8), layout, rules, box)
    return Lists(Formula((seeing(layout, rules, box),)))(query, query, {}, BOX, BOX).visited


@pytest.mark.parametrize(
    ("layout", "rules", "expected"),
    [
        (Layout((64, 64)), (Window(13), Window(13)), 22 * 22),  # 3 of 8 boxes, 2 at each border
        (Layout((64, 64)), (Window(8, 8), Window(8, 8)), 64),
        (Layout((64, 64)), (Window(8, 1, 8), Window(8, 1, 8)), 64),  # each residue is a box
        (Layout((64, 64), 1), (Window(8, 8), Window(8, 8)), 64 + 2 * 64 + 1),
        (Layout((16, 32, 32)), (Window(4, 4), Window(8, 8), Window(8, 8)), 4 * (4 * 4) * 4 * 4),
    ],
    ids=str,
)
def test_lists_of_boxes_skip_what_is_hidden(layout: Layout, rules: Rules, expected: int) -> None:
    assert visited(layout, rules) == expected
    assert share(layout, rules) == pytest.approx(expected / (-(-layout.length // BOX)) ** 2, rel=0.02)


def test_residues_of_unequal_number_are_skipped_too() -> None:
    """Intervals decide what counting decides, but for borders that depend on the residue."""
    layout, rules = Layout((50, 70)), (Window(5, 1, 3), Window(7, 1, 4))
    counted = math.prod(pairs(r, n, s) for r, n, s in zip(rules, layout.sides, box_of(layout, rules), strict=True))
    assert counted <= visited(layout, rules) <= 1.1 * counted


def test_what_settings_and_sites_are_refused() -> None:
    for config in ({"window": 25}, {"window": "4x4x4"}, {"window": 4, "stride": 5}, {"window": 9, "dilation": 3}):
        with pytest.raises(OptionError):
            NEIGHBORHOOD.build(SITE, config)
    small = NEIGHBORHOOD.takes(on("14x14+1"), Target.current())
    assert isinstance(small, Refusal) and "14x14+1" in small.reason and "too few" in small.reason
    for tokens in ("", "windows", "2x2x2x2", "4x"):
        assert not layout_of(replace(SITE, tokens=tokens, q_len=None, kv_len=None))
    sequence = replace(SITE, mask=Causal(), tokens="", q_len=None, kv_len=None)
    assert layout_of(sequence) == Layout((ENDLESS,)) == layout_of(replace(sequence, tokens="577"))


def test_configs_save_more_than_half_by_their_boxes() -> None:
    for tokens in ("24x24+1", "64x64", "16x32x32", "4096"):
        site = on(tokens)
        found = list(NEIGHBORHOOD.configs(site, Target.current()))
        assert 1 <= len(found) <= 3
        layout = layout_of(site)
        assert isinstance(layout, Layout)
        for config in found:
            windows = [int(word) for word in str(config["window"]).split("x")]
            assert math.prod(windows) <= 0.6 * math.prod(layout.sides)


@pytest.mark.parametrize("tokens", ["24x24", "16x16x16", "64x64", "512"])
def test_configs_have_the_strides_that_the_simulator_finds(tokens: str) -> None:
    """Where a window of each query's own is not nearly as fast; and both count the same visits."""
    site = on(tokens)
    layout = layout_of(site)
    assert isinstance(layout, Layout)
    found = list(NEIGHBORHOOD.configs(site, Target.current()))
    assert found and len({str(config) for config in found}) == len(found)
    for config in found:
        window, stride = (tuple(map(int, str(config[name]).split("x"))) for name in ("window", "stride"))

        def best(strides: tuple[int, ...], window: tuple[int, ...] = window) -> float:
            axes = axes_of(layout.sides, window, strides)
            return max(bound(axes, tile, tile).speedup for tile in shapes(BOX, len(window)))

        assert share(layout, tuple(map(Window, window, stride))) == pytest.approx(1 / best(stride))
        highest = search(axes_of(layout.sides, window), BOX, BOX, alike=True)
        assert best(stride) > 0.9 * highest.speedup and highest.query_tile == highest.key_tile
        if max(stride) > 1:
            assert best((1,) * len(window)) <= 0.9 * highest.speedup
            assert best(stride) == pytest.approx(highest.speedup)
        wide = itertools.product(*({1, 4, w // 2, w} for w in window))
        assert all(best(each) <= highest.speedup * 1.0001 for each in wide)


# --- identities between variants -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("block", "halo"), [(4, 1), (5, 2), (8, 3), (3, 3)])
def test_a_halo_is_a_strided_neighborhood(block: int, halo: int) -> None:
    size = 6 * block
    strided = along(Window(block + 2 * halo, block), size)
    assert torch.equal(along(Halo(block, halo, shift=True), size), strided)
    masked = along(Halo(block, halo), size)
    assert torch.equal(masked[block:-block], strided[block:-block]) == (halo <= block)
    assert torch.equal(masked[0].nonzero().flatten(), torch.arange(block + halo)), "what is outside is not seen"


@pytest.mark.parametrize(("size", "group"), [(12, 4), (20, 5), (16, 16), (16, 1)])
def test_scopes_are_strided_and_dilated_neighborhoods(size: int, group: int) -> None:
    assert torch.equal(along(Local(group), size), along(Window(group, group), size))
    assert torch.equal(along(Global(size // group), size), along(Window(group, 1, size // group), size))


def test_an_axis_is_a_window_of_all_of_it_and_of_one_across() -> None:
    assert torch.equal(along(Along(), 9), along(Window(9), 9))
    assert torch.equal(along(Across(), 9), along(Window(1), 9))
    assert torch.equal(along(Along(causal=True), 9), torch.ones(9, 9).tril().bool())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("tokens", "mask"), [("24x24+1", Full()), ("5x9x13", Full() & Padding())], ids=str)
def test_all_axes_are_the_mean_of_each(tokens: str, mask: Any, causal: bool) -> None:
    site, axial = on(tokens, mask=mask), variants()["axial"]
    axes = range(tokens.count("x") + 1)
    for calls in (site, site.sized(batch=2, q_len=7, kv_len=130)):  # others than the grid: the site's own attention
        arguments = inputs(calls, seed=5)
        found = axial.build(site, {"axis": "all", "causal": causal})(*arguments)
        each = [axial.build(site, {"axis": axis, "causal": causal})(*arguments) for axis in axes]
        assert_close(found, torch.stack(each).mean(0), torch.float32)
    assert_close(found, brute_force(*arguments, site=calls), torch.float32)


def test_all_axes_by_hand() -> None:
    """Of a plane: the mean of ordinary attention in its rows, and in its columns."""
    site = on("13x40")
    arguments = inputs(site, seed=6)
    query, key, value = (t.double().unflatten(2, (13, 40)) for t in arguments[:3])
    key, value = (t.repeat_interleave(2, 1) for t in (key, value))
    rows = torch.einsum("bhyxd,bhyzd->bhyxz", query, key).mul(site.scale).softmax(-1)
    columns = torch.einsum("bhyxd,bhzxd->bhyxz", query, key).mul(site.scale).softmax(-1)
    out = torch.einsum("bhyxz,bhyzd->bhyxd", rows, value) + torch.einsum("bhyxz,bhzxd->bhyxd", columns, value)
    wide = [t.double() for t in arguments[:3]]
    found = variants()["axial"].reference(*wide, None, None, site, {"axis": "all"})
    assert_close(found, out.flatten(2, 3) / 2, torch.float64)


def test_all_axes_are_offered_and_are_several_kernels() -> None:
    axial = variants()["axial"]
    assert list(axial.configs(on("24x24"), Target.current())) == [{"axis": 0}, {"axis": 1}, {"axis": "all"}]
    assert list(axial.configs(on("1x600"), Target.current())) == []
    assert axial.formula is not None and axial.formula(SITE, {"axis": "all"}) is None


@pytest.mark.parametrize(
    ("name", "tokens", "config"),
    [
        ("halo", "5x9x13", {"block": 13, "halo": 0, "border": "mask"}),
        ("halo", "24x24+1", {"block": 9, "halo": 24, "border": "shift"}),
        ("dilated", "24x24+1", {"scope": "local", "group": 24}),
        ("dilated", "5x9x13", {"scope": "global", "group": 13}),
        ("axial", "1x600", {"axis": 1}),
    ],
)
def test_exact_where_nothing_is_hidden(name: str, tokens: str, config: Any) -> None:
    site = on(tokens)
    arguments = inputs(site, seed=3)
    wide = [t.double() for t in arguments[:3]]
    out = variants()[name].reference(*wide, *arguments[3:], site, config)
    assert_close(out, brute_force(*arguments, site=site), torch.float64)


@pytest.mark.parametrize(
    ("layout", "rules", "expected"),
    [
        (Layout((64, 64)), (Halo(8, 8), Halo(8, 8)), 22 * 22),
        (Layout((64, 64)), (Local(8), Local(8)), 64),
        (Layout((64, 64)), (Global(8), Global(8)), 64),
        (Layout((64, 64)), (Along(), Across()), 64),
    ],
    ids=str,
)
def test_their_lists_skip_what_is_hidden(layout: Layout, rules: Rules, expected: int) -> None:
    assert visited(layout, rules) == expected


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("halo", {"block": 8, "halo": 2}),
        ("halo", {"block": 8, "halo": 2, "border": "wrap"}),
        ("halo", {"block": 0, "halo": 2, "border": "mask"}),
        ("dilated", {"scope": "near", "group": 8}),
        ("dilated", {"scope": "local", "group": "8x8x8"}),
        ("axial", {"axis": 2}),
        ("axial", {"axis": "both"}),
    ],
)
def test_what_settings_of_the_others_are_refused(name: str, config: Any) -> None:
    with pytest.raises(OptionError):
        variants()[name].build(SITE, config)
