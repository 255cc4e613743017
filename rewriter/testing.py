"""For authors of variants: inputs for a site, the mathematics that variants are measured by, and a verdict."""

from __future__ import annotations

import torch
from torch import Tensor

from rewriter.errors import OptionError
from rewriter.guard import error, tolerance
from rewriter.site import AttentionSite, Dense, Padding

Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, *tuple[Tensor, ...]]
"""The arguments of an implementation: query, key, value, mask, padding, and the sink where the site has one."""


def brute_force(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    padding: Tensor | None,
    sink: Tensor | None = None,
    *,
    site: AttentionSite,
) -> Tensor:
    """softmax(scale * q k^T + mask) v in float64, (B, H, Sq, Dv), with the softcap, the sink and the normaliser of the
    site; a query that sees no key gives zeros.

    What is visible is the intersection of the site's positional mask, `padding` and `mask` (bool or additive).
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1).double(), value.repeat_interleave(groups, 1).double()
    scores = site.scale * torch.einsum("bhid,bhjd->bhij", query.double(), key)
    if site.softcap is not None:
        scores = site.softcap * (scores / site.softcap).tanh()
    hidden = ~site.mask.visible(query.shape[2], key.shape[2], query.device)
    if padding is not None:
        hidden = hidden | ~padding[:, None, None, :]
    if mask is not None and mask.dtype == torch.bool:
        hidden = hidden | ~mask
    elif mask is not None:
        scores = scores + mask.double()
    scores = scores.masked_fill(hidden, float("-inf"))
    if site.normaliser != "softmax":
        weights = {"sigmoid": torch.sigmoid, "relu": torch.relu}[site.normaliser](scores)
    else:
        blind = (scores == float("-inf")).all(-1, keepdim=True)
        scores = scores.masked_fill(blind, 0.0)
        total = scores.logsumexp(-1, keepdim=True)
        if sink is not None:
            total = torch.logaddexp(total, sink.double()[:, None, None])
        weights = (scores - total).exp().masked_fill(blind, 0.0)
    return torch.einsum("bhij,bhjd->bhid", weights, value)


def inputs(site: AttentionSite, *, seed: int, requires_grad: bool = False) -> Inputs:
    """Random (query, key, value, mask, padding) for a site with concrete sizes, in the strides of a projection.

    With a `Padding` factor, batch rows are by turns padded on the left, all but one key, and on the right. `mask` is
    given where the positional factors do not say everything: bool, or additive where the site has a bias.
    """
    if site.batch is None or site.q_len is None or site.kv_len is None:
        raise OptionError(f"inputs need concrete sizes; give {site.path or 'the site'} some with site.sized(...)")
    random = torch.Generator().manual_seed(seed)

    def projection(length: int, heads: int, width: int) -> Tensor:
        made = torch.randn(site.batch or 0, length, heads, width, generator=random)
        # Heads are split from the last dimension, so a head's rows lie far apart.
        return made.to(site.device, site.torch_dtype).transpose(1, 2).requires_grad_(requires_grad)

    query = projection(site.q_len, site.heads, site.head_dim)
    key = projection(site.kv_len, site.kv_heads, site.head_dim)
    value = projection(site.kv_len, site.kv_heads, site.v_head_dim)
    mask, padding = None, None
    seen = site.mask.visible(site.q_len, site.kv_len, site.device)[None, None].expand(site.batch, 1, -1, -1)
    if site.mask.has(Padding):
        padding = torch.stack([_real(row, site.kv_len) for row in range(site.batch)]).to(site.device)
        mask = seen = seen & padding[:, None, None, :]
    if site.mask.has(Dense):
        dense = torch.rand(site.batch, 1, site.q_len, site.kv_len, generator=random) > 0.3
        mask = seen & dense.to(site.device)
    if site.bias != "none":
        bias = torch.randn(site.batch, site.heads, site.q_len, site.kv_len, generator=random)
        hidden = ~(seen if mask is None else mask)
        mask = bias.to(site.device, site.torch_dtype).masked_fill(hidden, float("-inf"))
    if site.sink is None:
        return query, key, value, mask, padding
    sink = torch.randn(site.heads, generator=random) if site.sink == "learned" else torch.zeros(site.heads)
    return query, key, value, mask, padding, sink.to(site.device, site.torch_dtype).requires_grad_(requires_grad)


def _real(row: int, length: int) -> Tensor:
    position = torch.arange(length)
    third = length // 3
    return (position >= third, position == length - 1, position < length - third)[row % 3]


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Raise AssertionError unless the error, relative to the largest magnitude, is within the tolerance of `dtype`."""
    found, allowed = error(actual, expected), tolerance(dtype)
    assert found <= allowed, f"error {found:.2g} is above the tolerance {allowed:.2g} of {dtype}"
