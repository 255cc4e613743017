"""Attention to places in maps: the operator and its kernel against PyTorch's sampling, and by meaning in graphs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rewriter.codegen.sampling import SamplingKernel, attend, load, source
from rewriter.errors import OptionError
from rewriter.kernels.sampled.deformable import VARIANT, fused, gaussian_depth, places, reference, with_depth
from rewriter.sampling import sampled
from rewriter.site import AttentionSite, Refusal
from rewriter.testing import assert_close
from rewriter.tune.measure import peak_memory

SIZES = [(7, 9), (4, 5), (1, 1)]


def operands(
    sizes: Sequence[tuple[int, int]] = SIZES,
    points: Sequence[int] = (4, 4, 4),
    *,
    batch: int = 2,
    heads: int = 3,
    queries: int = 37,
    width: int = 16,
    dtype: torch.dtype = torch.float32,
    reach: float = 1.4,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Views of one value and of one tensor of places, as models have them; some places lie outside."""
    torch.manual_seed(0)
    lengths = [height * width for height, width in sizes]
    value = torch.randn(batch, sum(lengths), heads, width, dtype=dtype)
    maps = [
        each.unflatten(1, size).permute(0, 3, 1, 2, 4)
        for each, size in zip(value.split(lengths, 1), sizes, strict=True)
    ]
    grids = reach * (2 * torch.rand(batch, queries, heads, sum(points), 2, dtype=dtype) - 1)
    weights = torch.randn(batch, queries, heads, sum(points), dtype=dtype).softmax(-1).transpose(1, 2)
    return maps, [each.transpose(1, 2) for each in grids.split(list(points), 3)], weights


def stored(maps: Sequence[Tensor], grids: Sequence[Tensor], weights: Tensor) -> Tensor:
    """As models spell it: all samples first, (B H, D, Q, L, P), then their weighted sum."""
    samples = [
        F.grid_sample(level.flatten(0, 1).permute(0, 3, 1, 2), grid.flatten(0, 1), align_corners=False)
        for level, grid in zip(maps, grids, strict=True)
    ]
    summed = (torch.stack(samples, -2).flatten(-2) * weights.flatten(0, 1)[:, None]).sum(-1)
    return summed.unflatten(0, weights.shape[:2]).transpose(2, 3)


# --- the operator ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"points": (3, 6, 1)},
        {"sizes": [(1, 30)], "points": (5,)},
        {"width": 1}, {"width": 7}, {"width": 64},
        {"batch": 1, "heads": 1, "queries": 1},
        {"queries": 0},
        {"queries": 200, "reach": 30.0},
    ],
    ids=str,
)  # fmt: skip
def test_kernel_and_operator_equal_their_definition(facts: dict[str, Any]) -> None:
    given = operands(**facts)
    wide = operands(**facts, dtype=torch.float64)
    kernel = load(given[0][0].shape[4])
    assert isinstance(kernel, SamplingKernel), kernel
    exactly = [[each.double() for each in part] for part in given[:2]]
    expected = reference(*exactly, given[2].double())
    assert_close(kernel(*given), expected, torch.float32)
    assert_close(sampled(*given), expected, torch.float32)
    assert_close(sampled(*wide), reference(*wide), torch.float64)


def test_equals_the_usual_spelling_without_what_it_stores() -> None:
    given = operands([(20, 30), (10, 15), (5, 8)], queries=500, width=32)
    assert_close(attend(*given), stored(*given), torch.float32)
    assert_close(sampled(*given), stored(*given), torch.float32)
    samples = 2 * 3 * 32 * 500 * 12 * 4
    assert peak_memory(lambda: stored(*given)) >= 2 * samples
    assert peak_memory(lambda: attend(*given)) < samples / 8, "the result, and little else"


def test_corners_borders_and_what_is_no_number() -> None:
    level = torch.arange(12.0).view(1, 1, 3, 4, 1) + 1
    at = [(-0.75, -2 / 3), (0.75, 2 / 3), (-1.0, -1.0), (1.0, 0.0), (1.25, 0.0), (-9.0, 0.0), (0.0, 3e38)]
    at += [(math.nan, 0.0), (0.0, math.inf)]
    grid = torch.tensor(at).view(1, 1, -1, 1, 2)
    weights = torch.ones(1, 1, len(at), 1)
    found = attend([level], [grid], weights).flatten()
    # The first and the last pixel, a quarter of the first, halves on the border, and nothing beyond.
    assert found[:6].tolist() == pytest.approx([1.0, 12.0, 0.25, 4.0, 0.0, 0.0])
    torch.testing.assert_close(found, sampled([level], [grid], weights).flatten(), equal_nan=True)


def test_maps_that_lie_otherwise() -> None:
    maps, grids, weights = operands()
    by_channel = [each.permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2) for each in maps]
    turned = [each.flip(-1).flip(-1) for each in grids]
    assert torch.equal(attend(by_channel, turned, weights.contiguous()), attend(maps, grids, weights))


def test_derivatives_are_those_of_the_definition() -> None:
    maps, grids, weights = operands(dtype=torch.float64, queries=5)
    leaves = [each.detach().requires_grad_() for each in (*maps, *grids, weights)]

    def by(function: Any) -> tuple[Tensor, ...]:
        out = function(leaves[:3], leaves[3:6], leaves[6])
        return torch.autograd.grad(out.square().sum(), leaves)

    for actual, expected in zip(by(attend), by(stored), strict=True):
        assert_close(actual, expected, torch.float64)
    narrow = [each.detach().float().requires_grad_() for each in leaves]
    assert attend(narrow[:3], narrow[3:6], narrow[6]).requires_grad


def test_one_node_of_a_traced_graph() -> None:
    given = operands()
    torch.library.opcheck(torch.ops.rewriter.sample.default, given)
    assert_close(torch.compile(attend, backend="aot_eager")(*given), attend(*given), torch.float32)


def test_what_does_not_fit_is_an_error() -> None:
    maps, grids, weights = operands()
    kernel: Any = load(16)
    wrong: list[tuple[Any, Any, Any, str]] = [
        (maps, grids[:2], weights, "one grid for each map"),
        (maps, grids, weights[..., :-1], "11 weights for 12 places"),
        (maps, grids, weights.double(), "float64"),
        (maps, [each[:1] for each in grids], weights, "same batch"),
        ([each[..., :8] for each in maps], grids, weights, "heads of 16"),
        (maps, [each[:, :, :3] for each in grids], weights, "37 queries"),
        ([each[0] for each in maps], grids, weights, "are \\(B, H, height, width, D\\)"),
        (maps, grids, weights.clone().requires_grad_(), "no backward"),
    ]
    for *given, words in wrong:
        with pytest.raises(OptionError, match=words):
            kernel(*given)
    assert "D = 16" in source(16) and isinstance(load(513), Refusal)


def test_without_a_compiler_it_is_refused_and_still_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewriter.codegen.sampling.load", lambda head_dim: Refusal("there is no C++ compiler"))
    given = operands()
    assert_close(attend(*given), stored(*given), torch.float32)


# --- the paper -------------------------------------------------------------------------------------------------------


def test_places_are_those_of_the_paper() -> None:
    """One query on the centre of a pixel, whose offsets of whole pixels read the pixels around."""
    value = torch.randn(1, 1, 5, 8, 4)
    point = torch.tensor([2.5 / 8, 1.5 / 5]).view(1, 1, 1, 2)
    offsets = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0], [-1.0, -1.0], [9.0, 0.0]])[None, None, None, None]
    grids = places(point, offsets, [(5, 8)])
    read = [reference([value], [grids[0][:, :, :, [i]]], torch.ones(1, 1, 1, 1)).flatten() for i in range(5)]
    around = [value[0, 0, y, x] for y, x in ((1, 2), (1, 3), (3, 2), (0, 1))]
    torch.testing.assert_close(read, [*around, torch.zeros(4)])


def test_places_in_boxes() -> None:
    """An offset of P reaches the edge of the box."""
    boxes = torch.tensor([0.4, 0.6, 0.2, 0.4]).view(1, 1, 1, 4).expand(1, 1, 2, 4)
    offsets = torch.tensor([[3.0, 0.0], [0.0, -3.0], [0.0, 0.0]]).expand(1, 1, 1, 2, 3, 2)
    first, second = places(boxes, offsets, [(5, 8), (2, 2)])
    expected = 2 * torch.tensor([[0.5, 0.6], [0.4, 0.4], [0.4, 0.6]]) - 1
    torch.testing.assert_close(first[0, 0, 0], expected)
    torch.testing.assert_close(second, first)


def test_gaussian_depth_point_by_point() -> None:
    points, depths = torch.tensor([[[2.0, 1.0], [4.0, 1.0], [3.25, 3.5]]]), torch.tensor([[10.0, 4.0, 7.0]])
    made = gaussian_depth(points, depths, (5, 12), sigma=0.8)
    for y in range(5):
        for x in range(12):
            near = [
                depth * math.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * 0.8**2))
                for (px, py), depth in zip(points[0].tolist(), depths[0].tolist(), strict=True)
                if math.hypot(x - px, y - py) <= 3 * 0.8
            ]
            assert made[0, y, x].item() == pytest.approx(min(near, default=0.0), rel=1e-5)
    assert (made[0, :, 8:] == 0).all() and made[0, 1, 2] < 10, "the second point covers the first"


def test_depth_and_fusion_as_options() -> None:
    maps, grids, weights = operands()
    depth = [gaussian_depth(torch.rand(2, 5, 2) * 6, torch.rand(2, 5) + 1, size, sigma=2.0) for size in SIZES]
    plain, deeper = reference(maps, grids, weights), reference(maps, grids, weights, depth=depth)
    assert deeper.shape == (*plain.shape[:3], 17) and torch.equal(deeper[..., :16], plain)
    alone = [each[:, None, :, :, None].expand(-1, 3, -1, -1, -1) for each in depth]
    assert_close(deeper[..., 16:], stored(alone, grids, weights), torch.float32)
    assert_close(attend(with_depth(maps, depth), grids, weights), deeper, torch.float32)

    other, gate = torch.randn_like(plain), torch.randn(2, 1, 37, 1)
    both = reference(maps, grids, weights, fusion=(other, gate))
    assert_close(both, plain * gate.sigmoid() + other * (1 - gate.sigmoid()), torch.float32)
    wide = torch.full_like(gate, 40.0)
    torch.testing.assert_close([fused(plain, other, wide), fused(plain, other, -wide)], [plain, other])


@pytest.mark.parametrize("case", VARIANT.cases)
def test_cases_of_the_variant(case: Any) -> None:
    site: AttentionSite = case.site
    points = [int(each) for each in (site.samples or "").split("+")]
    given = operands(points=points, heads=site.heads, width=site.head_dim, queries=site.q_len or 0)
    assert sum(height * width for height, width in SIZES) == site.kv_len
    assert_close(VARIANT.build(site, {})(*given), VARIANT.reference(*given, site, {}), torch.float32)  # type: ignore[call-arg]
    assert AttentionSite.parse(site.key()).samples == site.samples and "samples" in str(site)
