"""The canonical operator of attention to places in maps: each query reads a few points, between pixels, by its weights.

    out[b,h,q] = sum over maps l and places p of weights[b,h,q,(l,p)] * bilinear(maps_l[b,h], grids_l[b,h,q,p])

    maps      for each level (B, H, height, width, D)
    grids     for each level (B, H, Q, P, 2): x and y, -1 and 1 at the outer edges of the map. Outside, a map is 0
    weights   (B, H, Q, sum of P), level by level

There are no scores of queries and keys here: places and weights come from the query alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from rewriter.errors import OptionError
from rewriter.site import AttentionSite


def sampled(maps: Sequence[Tensor], grids: Sequence[Tensor], weights: Tensor) -> Tensor:
    """(B, H, Q, D), level by level: what is sampled of one map is let go before the next."""
    parts = weights.split([grid.shape[3] for grid in grids], -1)
    out: Tensor | None = None
    for level, grid, weight in zip(maps, grids, parts, strict=True):
        # (B H, D, Q, P)
        samples = F.grid_sample(level.flatten(0, 1).permute(0, 3, 1, 2), grid.flatten(0, 1), align_corners=False)
        found = torch.einsum("ndqp,nqp->nqd", samples, weight.flatten(0, 1)).unflatten(0, weight.shape[:2])
        out = found if out is None else out + found
    assert out is not None, "there is at least one map"
    return out


def samples_for(
    site: AttentionSite, sizes: Sequence[tuple[int, int]] | None = None, *, seed: int = 0
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """A random input for a site with concrete batch and queries, in the strides of projections. Some places lie outside
    of the maps, which are small where their sizes are not given.
    """
    if site.batch is None or site.q_len is None or site.samples is None:
        raise OptionError("samples are made for a site of places in maps with concrete batch and queries")
    random = torch.Generator().manual_seed(seed)
    points = list(map(int, site.samples.split("+")))
    sizes = sizes or [(_LARGEST[0] - each, _LARGEST[1] - 2 * each) for each in range(len(points))]
    pixels = sum(height * width for height, width in sizes)
    value = torch.randn(site.batch, pixels, site.heads, site.head_dim, generator=random)
    weights = torch.randn(site.batch, site.q_len, site.heads, sum(points), generator=random).softmax(-1)
    places = 2.4 * torch.rand(*weights.shape, 2, generator=random) - 1.2
    value, weights, places = (each.to(site.device, site.torch_dtype) for each in (value, weights, places))
    return maps_of(value, sizes), [each.transpose(1, 2) for each in places.split(points, 3)], weights.transpose(1, 2)


def maps_of(value: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """The maps that lie one after another in (B, pixels, H, D)."""
    parts = value.split([height * width for height, width in sizes], 1)
    return [part.unflatten(1, size).permute(0, 3, 1, 2, 4) for part, size in zip(parts, sizes, strict=True)]


_LARGEST = (19, 23)
