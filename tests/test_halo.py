"""Blocks with a halo whose border is zeros, beside the module of timm that is the reading's source."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter.codegen.blocks import lists_of
from rewriter.codegen.formula import reading
from rewriter.codegen.layout import BOX, Layout, Place, zeros_of
from rewriter.kernels.local.halo import VARIANT, Halo, ZeroHalo
from rewriter.site import AttentionSite, Full, Padding
from rewriter.testing import assert_close, inputs

SITE = replace(VARIANT.cases[0].site, kv_heads=4, tokens=None)
ZERO = {"border": "zero"}


def on(height: int, width: int, front: int = 0, **other: Any) -> AttentionSite:
    length = height * width + front
    made = replace(SITE, tokens=f"{height}x{width}+{front}", **other)
    return made.sized(batch=2, q_len=length, kv_len=length)


class Given(nn.Module):
    """Whatever it is called with, it gives this."""

    def __init__(self, result: Tensor) -> None:
        super().__init__()
        self.result = result

    def forward(self, x: Tensor) -> Tensor:
        return self.result


def in_windows(bias: Tensor, block: int, halo: int, sides: tuple[int, int]) -> Tensor:
    """What is added to the scores of each block's window, 0 for what is outside: (B * H, blocks, queries, keys)."""
    grid = nn.functional.pad(bias.unflatten(3, sides).unflatten(2, sides), (halo,) * 4)  # (B, H, y, x, Y, X)
    reach = block + 2 * halo
    blocks = [
        grid[:, :, y : y + block, x : x + block, y : y + reach, x : x + reach].flatten(4, 5).flatten(2, 3)
        for y in range(0, sides[0], block)
        for x in range(0, sides[1], block)
    ]
    return torch.stack(blocks, 2).flatten(0, 1)


@pytest.mark.parametrize("bias", ["none", "dense"])
@pytest.mark.parametrize(("sides", "block", "halo"), [((24, 32), 8, 3), ((8, 8), 8, 2), ((20, 30), 5, 7)])
def test_equals_timm(sides: tuple[int, int], block: int, halo: int, bias: str) -> None:
    """Its projections give our operands, and its relative positions nothing, or a bias of the site."""
    halos = pytest.importorskip("timm.layers.halo_attn")
    site = on(*sides, bias=bias)
    query, key, value, mask, _ = inputs(site, seed=0)
    theirs = halos.HaloAttn(64, num_heads=4, block_size=block, halo_size=halo, dim_head=16)

    def channels(t: Tensor) -> Tensor:  # (B, H, N, D) -> (B, H * D, height, width)
        return t.double().transpose(2, 3).flatten(1, 2).unflatten(2, sides)

    theirs.q, theirs.kv = Given(channels(query)), Given(channels(torch.cat([key, value], 3)))
    added = torch.zeros(()) if mask is None else in_windows(mask.double(), block, halo, sides)
    theirs.pos_embed = Given(added)
    with torch.no_grad():
        expected = theirs(torch.zeros(2, 64, *sides)).flatten(2).unflatten(1, (4, 16)).mT
        config = {"block": block, "halo": halo, **ZERO}
        wide = [t if t is None else t.double() for t in (query, key, value, mask)]
        assert_close(VARIANT.reference(*wide, None, site, config), expected, torch.float64)
        assert_close(VARIANT.build(site, config)(query, key, value, mask, None), expected, torch.float32)


@pytest.mark.parametrize(
    ("sides", "block", "halo"), [((200,), (16,), (5,)), ((13, 17), (4, 5), (2, 1)), ((5, 9, 6), (2, 4, 6), (1, 2, 3))]
)
def test_is_attention_over_a_grid_with_zeros_around(sides: Any, block: Any, halo: Any) -> None:
    """Of one to three axes, also where blocks do not divide them."""
    words = ["x".join(map(str, each)) for each in (sides, block, halo)]
    length = math.prod(sides)
    site = replace(SITE, tokens=words[0], kv_heads=2).sized(batch=2, q_len=length, kv_len=length)
    arguments = inputs(site, seed=2)
    query, key, value = (t.double() for t in arguments[:3])
    ends = [-(-size // b) * b + h for size, b, h in zip(sides, block, halo, strict=True)]
    around = [n for size, end, h in zip(sides, ends, halo, strict=True) for n in (end - size, h)][::-1]
    wide = [nn.functional.pad(t.unflatten(2, sides), (0, 0, *around)).flatten(2, -2) for t in (key, value)]
    wide = [t.repeat_interleave(2, 1) for t in wide]

    def places(starts: Any, stops: Any) -> Tensor:
        steps = [torch.arange(start, stop) for start, stop in zip(starts, stops, strict=True)]
        return torch.cartesian_prod(*steps).view(-1, len(steps))

    own, others = places([0] * len(sides), sides)[:, None], places([-h for h in halo], ends)
    first = own // torch.tensor(block) * torch.tensor(block) - torch.tensor(halo)
    window = torch.tensor(block) + 2 * torch.tensor(halo)
    seen = ((others >= first) & (others < first + window)).all(-1)
    assert bool((seen.sum(1) == window.prod()).all()), "as many at every border"
    scores = (query @ wide[0].mT * site.scale).masked_fill(~seen, float("-inf"))
    config = {"block": words[1], "halo": words[2], **ZERO}
    with torch.no_grad():
        assert_close(VARIANT.build(site, config)(*arguments), scores.softmax(-1) @ wide[1], torch.float32)


@pytest.mark.parametrize("front", [0, 3])
@pytest.mark.parametrize("mask", [Full(), Full() & Padding()], ids=str)
def test_zeros_are_summed_where_a_window_has_places_outside(mask: Any, front: int) -> None:
    """The keys of border "mask" again, and by hand exp(0) for each of the other places; whatever is padded."""
    site = on(13, 17, front, mask=mask, softcap=3.0)
    query, key, value, _, padding = inputs(site, seed=1)
    wide = [t.double() for t in (query, key, value)]
    config = {"block": "4x5", "halo": "2x1"}
    own = VARIANT.reference(*wide, None, padding, site, {**config, "border": "mask"})
    found = VARIANT.reference(*wide, None, padding, site, {**config, **ZERO})
    if front:  # what has no place has no window
        assert_close(found[:, :, :front], own[:, :, :front], torch.float64)

    def span(x: int, block: int, halo: int, size: int) -> range:
        start = x // block * block - halo
        return range(max(start, 0), min(start + block + 2 * halo, size))

    for y, x in ((0, 0), (6, 7), (12, 16), (0, 9), (11, 3)):
        seen = [Y * 17 + X + front for Y in span(y, 4, 2, 13) for X in span(x, 5, 1, 17)]
        outside = 8 * 7 - len(seen)
        seen = [*range(front), *seen]
        i = front + y * 17 + x
        s = 3 * torch.tanh(torch.einsum("bhd,bhjd->bhj", wide[0][:, :, i], wide[1][:, :, seen]) * 0.25 / 3)
        if padding is not None:
            s = s.masked_fill(~padding[:, None, seen], float("-inf"))
        weights = s.exp() / (s.exp().sum(-1, keepdim=True) + outside)
        expected = torch.einsum("bhj,bhjd->bhd", weights, wide[2][:, :, seen])
        assert_close(found[:, :, i], expected, torch.float64)


@pytest.mark.parametrize(("block", "halo", "size"), [(4, 1, 24), (5, 2, 24), (8, 8, 20), (30, 3, 20), (3, 0, 10)])
def test_what_a_rule_reaches(block: int, halo: int, size: int) -> None:
    x = torch.arange(size)
    seen = torch.as_tensor(Halo(block, halo).sees(Place(0, x[:, None]), Place(0, x), size)).sum(1)
    inside, every = ZeroHalo(block, halo).reach(Place(0, x), size)
    assert torch.equal(inside, seen) and every == block + 2 * halo


def test_only_blocks_at_the_border_visit_zeros() -> None:
    layout, rules = Layout((64, 64)), (ZeroHalo(8, 4), ZeroHalo(8, 4))
    zeros = zeros_of(layout, rules)
    assert zeros == 2 * BOX >= 16 * 16 - 12 * 12 > BOX
    site = on(64, 64)
    counts = []
    for border, more in (("mask", 0), ("zero", zeros)):
        formula = reading(VARIANT.formula(site, {"block": 8, "halo": 4, "border": border}), ())
        operand = torch.zeros(1, 1, 4096, 8)
        runs = lists_of(formula)(operand, torch.zeros(1, 1, 4096 + more, 8), {}, BOX, BOX)
        counts.append(runs.visited)
    corners, edges = 4, 4 * 6
    assert counts[1] - counts[0] == 2 * corners + edges
