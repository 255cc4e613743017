"""Attention to places in maps: the operator and its kernel against PyTorch's sampling, and by meaning in graphs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rewriter
from rewriter.bench.detect import _exact, look
from rewriter.capture import Graph, compiled, module_names
from rewriter.codegen.sampling import SamplingKernel, attend, load, source
from rewriter.errors import OptionError
from rewriter.kernels.sampled.deformable import VARIANT, fused, gaussian_depth, places, reference, with_depth
from rewriter.passes import Rewrite, captured, rewritten
from rewriter.sampled import Sampled
from rewriter.sampling import maps_of, sampled, samples_for
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
    value = torch.randn(batch, sum(height * width for height, width in sizes), heads, width, dtype=dtype)
    maps = maps_of(value, sizes)
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("facts", [{}, {"points": (3, 6, 1), "width": 7}, {"queries": 200, "reach": 30.0}], ids=str)
def test_narrow_types_are_summed_in_float32(dtype: torch.dtype, facts: dict[str, Any]) -> None:
    given = operands(**facts, dtype=dtype)
    kernel = load(given[0][0].shape[4], dtype)
    assert isinstance(kernel, SamplingKernel), kernel
    wide = [[each.double() for each in part] for part in given[:2]]
    expected = reference(*wide, given[2].double())
    found = kernel(*given)
    assert found.dtype == dtype
    assert_close(found, expected, dtype)
    assert torch.equal(attend(*given), found)
    with pytest.raises(OptionError, match="was given float32"):
        kernel(*operands(**facts))


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
    unknown = attend([level], [grid], weights * math.nan).flatten()
    assert unknown.isnan().all(), "also where a place is outside"


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
    leaves = [[each.detach().requires_grad_() for each in part] for part in given[:2]]
    weights = given[2].detach().requires_grad_()
    every = [*leaves[0], *leaves[1], weights]
    above = torch.randn_like(sampled(*given))
    expected = torch.autograd.grad(sampled(*leaves, weights), every, above)
    for function in (torch.ops.rewriter.sample, torch.compile(torch.ops.rewriter.sample, backend="aot_eager")):
        for actual, wanted in zip(torch.autograd.grad(function(*leaves, weights), every, above), expected, strict=True):
            assert_close(actual, wanted, torch.float32)
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
    monkeypatch.setattr("rewriter.codegen.sampling.load", lambda *_: Refusal("there is no C++ compiler"))
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
    given = samples_for(site)
    assert [each.shape[3] for each in given[1]] == [int(each) for each in (site.samples or "").split("+")]
    assert_close(VARIANT.build(site, {})(*given), VARIANT.reference(*given, site, {}), site.torch_dtype)
    assert AttentionSite.parse(site.key()).samples == site.samples and f"samples {site.samples}" in str(site)


# --- in graphs -------------------------------------------------------------------------------------------------------

Spelling = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From the maps' pixels (B, S, H, D), places (B, Q, H, L, P, 2) in [0, 1], weights (B, Q, H, L, P) to (B, Q, H D)."""


def by_level(value: Tensor, axis: int = 1) -> tuple[Tensor, ...]:
    return value.split([height * width for height, width in SIZES], axis)


def stacked(pixels: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    batch, queries, heads, levels, points, _ = places.shape
    grids = 2 * places - 1
    samples = []
    for level, (value, (height, width)) in enumerate(zip(by_level(pixels), SIZES, strict=True)):
        maps = value.flatten(2).transpose(1, 2).reshape(batch * heads, -1, height, width)
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)
        samples.append(F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    weights = weights.transpose(1, 2).reshape(batch * heads, 1, queries, levels * points)
    out = (torch.stack(samples, dim=-2).flatten(-2) * weights).sum(-1)
    return out.view(batch, -1, queries).transpose(1, 2).contiguous()


def concatenated(pixels: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    batch, queries, heads, levels, points, _ = places.shape
    grids = (2 * places - 1).flatten(3, 4).permute(0, 2, 1, 3, 4).flatten(0, 1).split([points] * levels, dim=-2)
    samples, values = [], by_level(pixels.permute(0, 2, 3, 1).flatten(0, 1), -1)
    for value, grid, size in zip(values, grids, SIZES, strict=True):
        maps = value.reshape(batch * heads, -1, *size)
        samples.append(F.grid_sample(maps, grid, align_corners=False))
    weights = weights.flatten(3).permute(0, 2, 1, 3).reshape(batch * heads, 1, queries, -1)
    return (weights * torch.cat(samples, -1)).sum(-1).view(batch, -1, queries).mT


def by_einsum(pixels: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """Places before queries, and levels last."""
    grids = (places * 2 - 1).permute(3, 0, 2, 4, 1, 5).flatten(1, 2)
    samples = [
        F.grid_sample(value.permute(0, 2, 3, 1).unflatten(-1, size).flatten(0, 1), grid, align_corners=False)
        for value, grid, size in zip(by_level(pixels), grids.unbind(0), SIZES, strict=True)
    ]
    joined = torch.stack(samples, -1).unflatten(0, (places.shape[0], -1))
    return torch.einsum("bhcpql,bqhlp->bqhc", joined, weights).flatten(2)


def of_one_map(pixels: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """The first only; its weights still are a softmax over all."""
    maps, grid = (
        by_level(pixels)[0].permute(0, 2, 3, 1).flatten(0, 1).unflatten(-1, SIZES[0]),
        2 * places.flatten(3, 4) - 1,
    )
    samples = F.grid_sample(maps, grid.transpose(1, 2).flatten(0, 1), align_corners=False)
    summed = (samples.unflatten(0, (len(places), -1)) * weights.flatten(3).transpose(1, 2)[:, :, None]).sum(dim=4)
    return summed.permute(0, 3, 1, 2).flatten(2)


class Layer(nn.Module):
    """Projections around a spelling, as in the paper."""

    def __init__(self, spelled: Spelling, heads: int = 4, points: int = 4, normalise: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads, self.points, self.spelled = heads, points, spelled
        self.normalise = normalise or (lambda x: x.softmax(-1))
        self.value, self.out = nn.Linear(32, 32), nn.Linear(32, 32)
        self.offsets = nn.Linear(32, heads * len(SIZES) * points * 2)
        self.weights = nn.Linear(32, heads * len(SIZES) * points)

    def forward(self, queries: Tensor, pixels: Tensor, points: Tensor) -> Tensor:
        """(B, Q, 32) from queries (B, Q, 32), pixels of all maps (B, S, 32), points (B, Q, 2)."""
        batch, count, _ = queries.shape
        value = self.value(pixels).view(batch, -1, self.heads, 32 // self.heads)
        shape = (batch, count, self.heads, len(SIZES), self.points)
        places = points[:, :, None, None, None] + 0.1 * self.offsets(queries).view(*shape, 2)
        weights = self.normalise(self.weights(queries).view(*shape[:3], -1)).view(shape)
        return self.out(self.spelled(value, places, weights))


def arguments(batch: int = 2, queries: int = 37) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    pixels = sum(height * width for height, width in SIZES)
    return torch.randn(batch, queries, 32), torch.randn(batch, pixels, 32), torch.rand(batch, queries, 2)


def rewrite(model: nn.Module, *given: Any, dynamic: bool | None = None) -> tuple[Any, list[Rewrite], list[Graph]]:
    """The output of a rewritten model, what was found in its graphs, and the graphs as they run."""
    works, graphs = [], []

    def backend(gm: Graph, examples: Sequence[Any]) -> Any:
        works.append(captured(gm, examples, module_names(model)))
        graphs.append(rewritten(works[-1], _exact) or gm)
        return graphs[-1].forward

    torch.compiler.reset()
    with torch.no_grad():
        return compiled(model, backend, dynamic=dynamic)(*given), works, graphs


SAMPLERS = (torch.ops.aten.grid_sampler.default, torch.grid_sampler, F.grid_sample)


def samplers(graph: Graph) -> int:
    return sum(node.target in SAMPLERS for node in graph.graph.nodes)


@pytest.mark.parametrize("spelled", [stacked, concatenated, by_einsum, of_one_map])
@pytest.mark.parametrize(
    ("batch", "queries", "heads", "points"), [(2, 37, 4, 4), (1, 1, 4, 3), (3, 5, 1, 1), (1, 40, 1, 2), (2, 100, 16, 2)]
)
def test_every_spelling_is_found_once_and_replaced(
    spelled: Spelling, batch: int, queries: int, heads: int, points: int
) -> None:
    layer, given = Layer(spelled, heads, points), arguments(batch, queries)
    out, (work,), (graph,) = rewrite(layer, *given)
    assert not work.detection.refusals and not work.detection.sites
    (match,) = work.detection.sampled
    site = match.site
    maps = 1 if spelled is of_one_map else len(SIZES)
    places = maps * points if maps > 1 else len(SIZES) * points
    assert sum(map(int, (site.samples or "").split("+"))) == places and len(match.levels) == maps
    assert (site.head_dim, site.q_len, site.dtype) == (32 // heads, queries, "float32")
    assert site.heads * (site.batch or 0) == heads * batch and (heads == 1 or site.heads == heads)
    assert samplers(graph) == 0 and len(graph.graph.find_nodes(op="call_module")) == 1
    assert_close(out, layer(*given), torch.float32)


@pytest.mark.parametrize("spelled", [stacked, concatenated])
def test_the_usual_spellings_are_read_and_left_without_a_copy(spelled: Spelling) -> None:
    _, (work,), (graph,) = rewrite(Layer(spelled), *arguments())
    (match,) = work.detection.sampled
    assert all(each.target is not torch.ops.aten.clone.default for each in graph.graph.nodes)
    by_name = {each.target for each in graph.graph.nodes if each.op == "call_function"}
    assert torch.ops.aten.contiguous.default not in by_name and torch.ops.aten.stack.default not in by_name
    assert match.weights.node.target is torch.ops.aten.softmax.int
    (call,) = graph.graph.find_nodes(op="call_module")
    assert all(each.meta["val"].stride(4) == 1 for each in call.args[0]), "channels lie side by side"
    storages = {each.meta["val"].untyped_storage()._cdata for each in call.args[0]}
    assert len(storages) == 1, "all maps are views of one tensor"


def test_sizes_that_are_symbolic() -> None:
    class Maps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights, self.offsets = nn.Linear(32, 4 * 6), nn.Linear(32, 4 * 6 * 2)

        def forward(self, queries: Tensor, *maps: Tensor) -> Tensor:
            batch, count, _ = queries.shape
            grids = self.offsets(queries).view(batch, count, 4, 2, 3, 2).sigmoid() * 2 - 1
            weights = self.weights(queries).view(batch, count, 4, 6).softmax(-1).transpose(1, 2)
            samples = [
                F.grid_sample(each.reshape(batch * 4, 8, *each.shape[2:]), grid.flatten(0, 1), align_corners=False)
                for each, grid in zip(maps, grids.permute(3, 0, 2, 1, 4, 5).unbind(0), strict=True)
            ]
            summed = (torch.stack(samples, -2).flatten(-2) * weights.reshape(batch * 4, 1, count, 6)).sum(-1)
            return summed.view(batch, 32, count).mT

    model, works = Maps(), []

    def backend(gm: Graph, examples: Sequence[Any]) -> Any:
        works.append(captured(gm, examples, {}))
        return (rewritten(works[-1], _exact) or gm).forward

    torch.compiler.reset()
    run = compiled(model, backend, dynamic=True)
    for batch, queries, first, second in ((2, 11, (5, 7), (3, 4)), (3, 13, (6, 9), (2, 5))):
        given = torch.randn(batch, queries, 32), torch.randn(batch, 32, *first), torch.randn(batch, 32, *second)
        with torch.no_grad():
            assert_close(run(*given), model(*given), torch.float32)
    assert len(works) == 1
    (match,) = works[0].detection.sampled
    assert match.site.q_len is None and match.site.kv_len is None and match.site.samples == "3+3"


def _sampling(**options: Any) -> Spelling:
    def spelled(pixels: Tensor, places: Tensor, weights: Tensor) -> Tensor:
        batch, queries, heads = places.shape[:3]
        maps = by_level(pixels)[0].permute(0, 2, 3, 1).flatten(0, 1).unflatten(-1, SIZES[0])
        grid = (2 * places - 1).flatten(3, 4).transpose(1, 2).flatten(0, 1)
        samples = F.grid_sample(maps, grid, **{"align_corners": False, **options})
        weights = weights.flatten(3).transpose(1, 2).reshape(batch * heads, 1, queries, -1)
        return (samples * weights).sum(-1).view(batch, -1, queries).mT

    return spelled


def _over_queries(pixels: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """Joined along the queries, where points are summed."""
    samples = [
        F.grid_sample(value.permute(0, 2, 3, 1).flatten(0, 1).unflatten(-1, size), grid, align_corners=False)
        for value, grid, size in zip(
            by_level(pixels), (2 * places - 1).transpose(1, 2).flatten(0, 1).unbind(2), SIZES, strict=True
        )
    ]
    weights = weights.permute(0, 2, 3, 1, 4).flatten(0, 1).flatten(1, 2)[:, None]
    summed = (torch.cat(samples, 2) * weights).sum(-1).unflatten(-1, (len(SIZES), -1)).sum(2)
    return summed.unflatten(0, (len(places), -1)).flatten(1, 2).mT


def _one_is_no_sample(pixels: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    batch, queries, heads = places.shape[:3]
    maps = by_level(pixels)[0].permute(0, 2, 3, 1).flatten(0, 1).unflatten(-1, SIZES[0])
    grids = (2 * places - 1).transpose(1, 2).flatten(0, 1)
    samples = F.grid_sample(maps, grids[:, :, 0], align_corners=False)
    weights = weights.flatten(3).transpose(1, 2).reshape(batch * heads, 1, queries, -1)
    joined = torch.cat([samples, samples.exp(), samples.relu()], -1)
    return (joined * weights).sum(-1).view(batch, -1, queries).mT


def _shared_by_heads(pixels: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """All heads read the places of the first, in maps of all channels."""
    maps, grid = by_level(pixels)[0].flatten(2).mT.unflatten(-1, SIZES[0]), 2 * places[:, :, 0].flatten(2, 3) - 1
    samples = F.grid_sample(maps, grid, align_corners=False)
    return torch.einsum("bcqp,bqhp->bqhc", samples, weights.flatten(3)).mean(2)


def _by_channel(pixels: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    maps, grid = by_level(pixels)[0].flatten(2).mT.unflatten(-1, SIZES[0]), 2 * places[:, :, 0].flatten(2, 3) - 1
    weights = weights.flatten(3).repeat_interleave(8, 2).permute(0, 2, 1, 3)
    return torch.einsum("bcqp,bcqp->bqc", F.grid_sample(maps, grid, align_corners=False), weights)


@pytest.mark.parametrize(
    ("spelled", "normalise", "words"),
    [
        (_sampling(align_corners=True), None, "in another way than bilinear"),
        (_sampling(mode="nearest"), None, "in another way than bilinear"),
        (_sampling(padding_mode="border"), None, "in another way than bilinear"),
        (_sampling(), torch.sigmoid, "something else than a softmax"),
        (_sampling(), lambda x: x.softmax(-2), "something else than a softmax"),
        (_sampling(), lambda x: x.unflatten(-1, (3, 4)).softmax(-1).flatten(-2), "something else than a softmax"),
        (_over_queries, None, "another axis than the one that is summed"),
        (_one_is_no_sample, None, "some are no samples"),
        (_shared_by_heads, None, "differ where the samples do not"),
        (_by_channel, None, "or by channel"),
    ],
)  # fmt: skip
def test_a_look_alike_is_refused_and_stays(spelled: Spelling, normalise: Any, words: str) -> None:
    layer, given = Layer(spelled, normalise=normalise), arguments()
    out, (work,), _ = rewrite(layer, *given)
    assert not work.detection.sampled and not work.detection.sites
    (refusal,) = work.detection.refusals
    assert words in refusal.reason and "test_deformable.py" in refusal.source
    assert torch.equal(out, layer(*given))


def test_places_that_are_changed_below_are_refused() -> None:
    def spelled(pixels: Tensor, places: Tensor, weights: Tensor) -> Tensor:
        grid = (2 * places - 1).flatten(3, 4).transpose(1, 2).flatten(0, 1)
        maps = by_level(pixels)[0].permute(0, 2, 3, 1).flatten(0, 1).unflatten(-1, SIZES[0])
        samples = F.grid_sample(maps, grid, align_corners=False)
        grid.mul_(0.0)
        summed = (samples * weights.flatten(3).transpose(1, 2).flatten(0, 1)[:, None]).sum(-1)
        return summed.unflatten(0, (len(places), -1)).flatten(1, 2).mT + grid.sum()

    layer, given = Layer(spelled), arguments()
    out, (work,), _ = rewrite(layer, *given)
    (refusal,) = work.detection.refusals
    assert not work.detection.sampled and "changes in place" in refusal.reason
    assert torch.equal(out, layer(*given))


# --- in models -------------------------------------------------------------------------------------------------------


@pytest.fixture
def always_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine a measurement may say anything."""
    monkeypatch.setattr("rewriter.exact.WORTH_IT", math.inf)


def test_optimize_decides_reports_and_gives_back(tmp_path: Path, always_worth_it: None) -> None:
    layer, given = Layer(stacked).eval(), arguments(queries=400)
    with torch.no_grad():
        expected = layer(*given)
    report = rewriter.explain(layer, *given)
    assert not report.sites and [site.samples for site in report.sampled] == ["4+4+4"]
    assert "1 to places in maps" in str(report) and "samples 4+4+4" in str(report)
    assert report.to_json()["sampled"][0]["samples"] == "4+4+4"

    rewriter.optimize(layer)
    with torch.no_grad():
        assert_close(layer(*given), expected, torch.float32)
    plan = rewriter.plan_of(layer)
    assert plan is not None
    (decision,) = plan.decisions
    assert (decision.variant, decision.fidelity) == ("deformable", "exact")
    assert set(decision.evidence) == {"candidate_ms", "original_ms"} and not decision.refused
    again: Any = rewriter.Plan.load(plan.save(tmp_path))
    rewriter.restore(layer)
    rewriter.apply(layer, again)
    with torch.no_grad():
        out = layer(*given)
    assert_close(out, expected, torch.float32)
    assert not torch.equal(out, expected), "sums in another order"
    replayed: Any = rewriter.report_of(layer)
    assert not replayed.notes and [d.variant for d in replayed.plan.decisions] == ["deformable"]
    rewriter.restore(layer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_layer_comes_nearer_to_its_definition(dtype: torch.dtype, always_worth_it: None) -> None:
    """PyTorch's sampling works with pixels' places in the narrow type; a kernel is held to what they mean."""
    layer, given = Layer(stacked).eval().to(dtype), tuple(each.to(dtype) for each in arguments())
    with torch.no_grad():
        before = layer(*given).double()
        rewriter.optimize(layer)
        after = layer(*given).double()
        plan: Any = rewriter.plan_of(layer)
        rewriter.restore(layer)
        expected = layer.double()(*(each.double() for each in given))
    assert plan.decisions[0].variant == "deformable"
    assert (after - expected).abs().max() <= (before - expected).abs().max()


def test_behind_other_compilers_and_exported(always_worth_it: None) -> None:
    layer, given = Layer(stacked).eval(), arguments()
    torch.compiler.reset()
    fast = torch.compile(layer, backend="rewriter", options={"inner": "aot_eager"})
    assert_close(fast(*given), layer(*given), torch.float32)  # gradients are wanted
    program = torch.export.export(layer, given)
    assert [site.samples for site in rewriter.explain(program).sampled] == ["4+4+4"]
    module = rewriter.optimize(program)
    assert [type(each) for each in module.modules()].count(Sampled) == 1
    with torch.no_grad():
        expected = layer(*given)
        assert_close(fast(*given), expected, torch.float32)
        assert_close(module(*given), expected, torch.float32)


def test_what_was_not_asked_for_is_not_placed() -> None:
    layer, given = Layer(stacked).eval(), arguments()
    rewriter.optimize(layer, variants=["sdpa"])
    with torch.no_grad():
        out = layer(*given)
    plan: Any = rewriter.plan_of(layer)
    rewriter.restore(layer)
    with torch.no_grad():
        assert torch.equal(out, layer(*given))
    assert plan.decisions[0].variant == "original" and "asked for" in plan.decisions[0].refused["deformable"]


def test_a_rewritten_layer_is_trained_as_before(always_worth_it: None) -> None:
    layer, given = Layer(stacked), arguments()

    def gradients() -> list[Tensor]:
        return list(torch.autograd.grad(layer(*given).square().sum(), list(layer.parameters())))

    expected = gradients()
    rewriter.optimize(layer, variants=["deformable"])
    for actual, before in zip(gradients(), expected, strict=True):
        assert_close(actual, before, torch.float32)
    plan: Any = rewriter.plan_of(layer)
    assert plan.decisions[0].variant == "deformable"
    rewriter.restore(layer)


def _transformers() -> Any:
    return pytest.importorskip("transformers")


def _real_time(kind: str) -> nn.Module:
    t = _transformers()
    backbone = t.RTDetrResNetConfig(
        embedding_size=10, hidden_sizes=[10] * 4, depths=[1] * 4, out_features=["stage2", "stage3", "stage4"]
    )
    config = getattr(t, f"{kind}Config")(
        backbone_config=backbone, encoder_hidden_dim=32, encoder_in_channels=[10] * 3, encoder_ffn_dim=32, d_model=32,
        decoder_in_channels=[32] * 3, decoder_ffn_dim=32, num_queries=20, decoder_layers=2, num_denoising=0,
    )  # fmt: skip
    model: nn.Module = getattr(t, f"{kind}Model")(config)
    return model


def _with_encoder() -> nn.Module:
    t = _transformers()
    backbone = t.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1] * 4, out_features=["stage2", "stage3", "stage4"]
    )
    config = t.DeformableDetrConfig(
        backbone_config=backbone, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=15,
    )  # fmt: skip
    model: nn.Module = t.DeformableDetrModel(config)
    return model


def _with_points_by_level() -> nn.Module:
    t = _transformers()
    same = [16] * 4
    backbone = t.HGNetV2Config(
        out_indices=[3, 4], stem_channels=[3, 16, 16], stage_in_channels=same, stage_mid_channels=same,
        stage_out_channels=same, hidden_sizes=same, stage_num_blocks=[1] * 4, depths=[1] * 4,
    )  # fmt: skip
    config = t.DFineConfig(
        backbone_config=backbone, encoder_hidden_dim=32, encoder_in_channels=[16, 16], feat_strides=[16, 32],
        encode_proj_layers=[1], num_feature_levels=2, decoder_n_points=[3, 6], encoder_ffn_dim=32, d_model=32,
        decoder_in_channels=[32, 32], decoder_ffn_dim=32, num_queries=20, decoder_layers=2, num_denoising=0,
    )  # fmt: skip
    model: nn.Module = t.DFineModel(config)
    return model


def _segmenter() -> nn.Module:
    t = _transformers()
    backbone = t.SwinConfig(
        embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, image_size=64, window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = t.Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_layers=2,
        decoder_layers=2, num_attention_heads=4, num_queries=10, encoder_feedforward_dim=32, dim_feedforward=32,
    )  # fmt: skip
    model: nn.Module = t.Mask2FormerModel(config)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("build", "calls", "attentions"),
    [
        pytest.param(lambda: _real_time("RTDetr"), {"4+4+4": 2}, 3, id="stacked", marks=pytest.mark.slow),
        pytest.param(lambda: _real_time("RTDetrV2"), {"4+4+4": 2}, 3, id="concatenated", marks=pytest.mark.slow),
        pytest.param(_with_points_by_level, {"3+6": 2}, 3, id="by level", marks=pytest.mark.slow),
        pytest.param(_with_encoder, {"4+4+4+4": 4}, 2, id="encoder"),
        pytest.param(_segmenter, {"4+4+4": 2}, 6, id="segmenter", marks=pytest.mark.slow),
    ],
)
def test_models_are_rewritten_whole(
    build: Any, calls: dict[str, int], attentions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each execution is counted: behind graph breaks, layers share one graph."""
    torch.manual_seed(0)
    model = build().eval()
    seen: dict[str, int] = {}
    forward = Sampled.forward

    def counting(self: Sampled, *given: Any) -> Tensor:
        seen[self.site.samples or ""] = seen.get(self.site.samples or "", 0) + 1
        return forward(self, *given)

    monkeypatch.setattr(Sampled, "forward", counting)
    with torch.no_grad():
        found = look(model, (), {"pixel_values": torch.randn(2, 3, 64, 96)})
    assert {name: number / 2 for name, number in seen.items()} == calls, "two calls"
    assert found.found == attentions and not found.refused, "those with scores are counted as before"
    assert found.change <= 1
