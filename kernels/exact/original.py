"""Attention as it is defined: softmax(scale * q k^T + mask) v (Vaswani et al. 2017, arXiv:1706.03762, equation 1).

The compiler takes this name as "leave the site as it is". What is built here is the plain eager mathematics, which
materialises the scores: B * H * Sq * Skv numbers in float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from rewriter.site import AttentionSite, Causal, Dense, Full, Mask, Padding, SlidingWindow
from rewriter.target import Target
from rewriter.variant import ORIGINAL, Case, Config, Implementation, Variant


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    padding: Tensor | None,
    site: AttentionSite,
    config: Config,
) -> Tensor:
    """One query of one head at a time: (B, H, Sq, Dv). A query that sees no key gives zeros."""
    batch, heads, q_len, _ = query.shape
    kv_len, groups = key.shape[2], heads // key.shape[1]
    seen = site.mask.visible(q_len, kv_len, query.device).expand(batch, heads, q_len, kv_len)
    if padding is not None:
        seen = seen & padding[:, None, None, :]
    bias = torch.zeros(seen.shape, dtype=query.dtype, device=query.device).masked_fill(~seen, float("-inf"))
    if mask is not None:
        bias = bias.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else bias + mask
    out = query.new_zeros(batch, heads, q_len, value.shape[-1])
    for b, h, i in torch.isfinite(bias).any(-1).nonzero().tolist():
        scores = site.scale * key[b, h // groups] @ query[b, h, i] + bias[b, h, i]
        out[b, h, i] = scores.softmax(0) @ value[b, h // groups]
    return out


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    padding: Tensor | None,
    *,
    scale: float,
    positional: Mask,
    dropout_p: float,
) -> Tensor:
    """The definition with all queries at once, normalised in float32 or wider."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query @ key.transpose(-2, -1) * scale).to(torch.promote_types(query.dtype, torch.float32))
    if mask is None:
        mask = positional.visible(query.shape[2], key.shape[2], query.device)
        if padding is not None:
            mask = mask & padding[:, None, None, :]
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    # softmax of nothing but -inf would be NaN, forward and backward.
    blind = (scores == float("-inf")).all(-1, keepdim=True)
    weights = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0).to(query.dtype)
    return torch.dropout(weights, dropout_p, train=dropout_p > 0) @ value


def applies(site: AttentionSite, target: Target) -> bool:
    """Always."""
    return True


def configs(site: AttentionSite, target: Target) -> Iterable[Config]:
    """Nothing to set."""
    return ({},)


def build(site: AttentionSite, config: Config) -> Implementation:
    """The eager mathematics."""
    return partial(attend, scale=site.scale, positional=site.mask.positional, dropout_p=site.dropout_p)


_SITE = AttentionSite(
    path="case", heads=6, kv_heads=2, head_dim=16, v_head_dim=16, dtype="float32", scale=0.25, mask=Causal(),
    batch=3, q_len=37, kv_len=37,
)  # fmt: skip

VARIANT = Variant(
    name=ORIGINAL,
    paper="arXiv:1706.03762, equation 1",
    fidelity="exact",
    reference=reference,
    applies=applies,
    configs=configs,
    build=build,
    cases=[
        Case(site=_SITE),
        Case(site=replace(_SITE, mask=Causal() & Padding())),
        Case(site=replace(_SITE, mask=Full(), kv_len=20, v_head_dim=8)),
        Case(site=replace(_SITE, mask=SlidingWindow(7, 0) & Dense(), dtype="bfloat16")),
    ],
)
