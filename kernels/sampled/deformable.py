"""Multi-scale deformable attention: Deformable DETR (Zhu et al. 2020, arXiv:2010.04159, equation 3).

    out_q = sum over maps l and places p of A_qlp * V_l(phi_l(r_q) + offset_qlp)       for each head; A: a softmax

V_l(x) is bilinear between pixels and 0 outside. Work is O(Q * L * P * D) whatever the maps' size. Exact: in a generated
kernel each query keeps one row of sums, where the usual spelling stores all that is sampled, Q * L * P * D numbers a
head. Training on a CPU takes PyTorch's own sampling, level by level; on a GPU there is a backward kernel.

The reference has two options more, of MS-Occ (Wei et al. 2025, arXiv:2504.15888), which fuses cameras and LiDAR: the
depth of sparse points, spread by Gaussians, as one more channel of the maps; and the adaptive fusion with what another
sensor says. Both stay outside of the operator, as what it is given and what is done with its result.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rewriter.codegen.sampling import LARGEST, NUMBERS, attend, load
from rewriter.codegen.sampling_formula import SamplingFormula
from rewriter.site import AttentionSite, Full, Refusal
from rewriter.target import Target
from rewriter.variant import Case, Config, Variant

Sizes = Sequence[tuple[int, int]]
"""(height, width) of each map."""

_REACH = 3.0
"""Standard deviations that a Gaussian covers."""


def reference(
    maps: Sequence[Tensor],
    grids: Sequence[Tensor],
    weights: Tensor,
    site: AttentionSite | None = None,
    config: Config | None = None,
    *,
    depth: Sequence[Tensor] | None = None,
    fusion: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """One corner of one level at a time, and at least in float32, of which places need every bit: (B, H, Q, D).
    Arguments as in `rewriter.sampling`.

    With `depth`, (B, height, width) for each level, the result has one channel more, the depth that was sampled; with
    `fusion` it is what `fused` makes of it and these two tensors.
    """
    dtype, wide = weights.dtype, torch.promote_types(weights.dtype, torch.float32)
    maps = [level.to(wide) for level in (maps if depth is None else with_depth(maps, depth))]
    grids, weights = [grid.to(wide) for grid in grids], weights.to(wide)
    parts = weights.split([grid.shape[3] for grid in grids], -1)
    out = weights.new_zeros(*weights.shape[:3], maps[0].shape[-1])
    for level, grid, weight in zip(maps, grids, parts, strict=True):
        batch, heads, height, width, _ = level.shape
        size = torch.tensor([width, height], dtype=grid.dtype)
        x, y = ((grid + 1) * size / 2 - 0.5).unbind(-1)
        for column, share_x in ((x.floor(), 1 - x % 1), (x.floor() + 1, x % 1)):
            for row, share_y in ((y.floor(), 1 - y % 1), (y.floor() + 1, y % 1)):
                inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
                b, h = torch.arange(batch)[:, None, None, None], torch.arange(heads)[:, None, None]
                value = level[b, h, row.long().clamp(0, height - 1), column.long().clamp(0, width - 1)]
                out += ((weight * share_x * share_y * inside)[..., None] * value).sum(3)
    return (out if fusion is None else fused(out, *fusion)).to(dtype)


def places(points: Tensor, offsets: Tensor, sizes: Sizes) -> list[Tensor]:
    """The grids: where the queries look in each map.

    points (B, Q, L, 2) as x and y in [0, 1], or boxes (B, Q, L, 4) with width and height as well; offsets
    (B, Q, H, L, P, 2) in pixels of each map, or in halves of the box over P.
    """
    if points.shape[-1] == 4:
        step = points[:, :, None, :, None, 2:] / (2 * offsets.shape[4])
    else:
        step = 1 / torch.tensor([[width, height] for height, width in sizes]).to(offsets)[:, None]
    grids = 2 * (points[:, :, None, :, None, :2] + offsets * step) - 1
    return [grid.transpose(1, 2) for grid in grids.unbind(3)]


def gaussian_depth(points: Tensor, depths: Tensor, size: tuple[int, int], sigma: float) -> Tensor:
    """Depth of sparse points spread over a map (B, height, width), 0 where none is near (MS-Occ, Gaussian-Geo):

        Y_q = min over points j that cover q of D_j exp(-|q - p_j|^2 / (2 sigma^2))

    points (B, N, 2) as x and y in pixels, depths (B, N). A point covers 3 sigma, which the paper leaves open.
    """
    rows, columns = (torch.arange(n, dtype=points.dtype, device=points.device) for n in size)
    distance = (columns - points[..., None, None, 0]) ** 2 + (rows[:, None] - points[..., None, None, 1]) ** 2
    spread = depths[..., None, None] * (-distance / (2 * sigma**2)).exp()
    covered = distance <= (_REACH * sigma) ** 2
    return spread.masked_fill(~covered, float("inf")).amin(1).masked_fill(~covered.any(1), 0.0)


def with_depth(maps: Sequence[Tensor], depth: Sequence[Tensor]) -> list[Tensor]:
    """The maps (B, H, height, width, D) with (B, height, width) as one more channel of every head."""
    return [
        torch.cat([level, each[:, None, :, :, None].expand(*level.shape[:4], 1)], -1)
        for level, each in zip(maps, depth, strict=True)
    ]


def fused(own: Tensor, other: Tensor, gate: Tensor) -> Tensor:
    """sigmoid(gate) own + (1 - sigmoid(gate)) other (MS-Occ, Adaptive Fusion); `gate` broadcasts to both."""
    share = gate.sigmoid()
    return share * own + (1 - share) * other


def applies(site: AttentionSite, target: Target) -> bool | Refusal:
    """float32, bfloat16 or float16, on a CPU with a compiler or on a GPU."""
    reason = ""
    if site.samples is None:
        reason = "its weights come from scores of queries and keys, not from the query alone"
    elif site.torch_dtype not in NUMBERS:
        reason = f"there are kernels for float32, bfloat16 and float16, and this is {site.dtype}"
    elif site.device not in ("cpu", "cuda"):
        reason = f"there are kernels for CPUs and GPUs, and this is on {site.device}"
    elif site.head_dim > LARGEST:
        reason = f"heads of {site.head_dim} are more than the {LARGEST} channels whose sums a kernel keeps"
    elif site.device == "cuda" and target.triton is None:
        reason = "a kernel for a GPU needs Triton, which is not installed"
    elif site.device == "cpu" and isinstance(found := load(site.head_dim, site.torch_dtype), Refusal):
        reason = found.reason
    return Refusal(reason, site.path, site.source) if reason else True


def configs(site: AttentionSite, target: Target) -> Iterable[Config]:
    """Nothing to set."""
    return ({},)


def formula(site: AttentionSite, config: Config) -> SamplingFormula:
    """The places in each map."""
    assert site.samples is not None
    return SamplingFormula(tuple(map(int, site.samples.split("+"))))


def build(site: AttentionSite, config: Config) -> Any:
    """(maps, grids, weights) -> (B, H, Q, D)."""
    return attend


_SITE = AttentionSite(
    path="case", heads=3, kv_heads=3, head_dim=16, v_head_dim=16, dtype="float32", scale=1.0, mask=Full(),
    batch=2, q_len=37, kv_len=84, samples="4+4+4",
)  # fmt: skip

VARIANT = Variant(
    name="deformable",
    paper="arXiv:2010.04159, equation 3",
    fidelity="exact",
    reference=reference,
    applies=applies,
    configs=configs,
    build=build,
    formula=formula,
    cases=[
        Case(site=_SITE),
        Case(site=replace(_SITE, samples="3+6+1", head_dim=7, v_head_dim=7)),
        Case(site=replace(_SITE, dtype="bfloat16")),
    ],
    near_misses=[replace(_SITE, samples=None), replace(_SITE, dtype="float64"), replace(_SITE, head_dim=1024)],
    elements=frozenset({"samples"}),
)
