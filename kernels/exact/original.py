"""Attention as it is defined: softmax(scale * q k^T + mask) v (Vaswani et al. 2017, arXiv:1706.03762, equation 1).

The compiler takes this name as "leave the site as it is". What is built here is the plain eager mathematics, which
materialises the scores: B * H * Sq * Skv numbers in float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rewriter.codegen.formula import ELEMENTS
from rewriter.ops import attention_math
from rewriter.site import AttentionSite, Causal, Dense, Full, Padding, SlidingWindow
from rewriter.target import Target
from rewriter.variant import ORIGINAL, Case, Config, Implementation, Variant


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    padding: Tensor | None,
    *given: Any,
) -> Tensor:
    """One query of one head at a time: (B, H, Sq, Dv). A query that sees no key gives zeros."""
    *sink, site, _ = given
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
        scores = site.scale * key[b, h // groups] @ query[b, h, i]
        if site.softcap is not None:
            scores = site.softcap * (scores / site.softcap).tanh()
        scores = scores + bias[b, h, i]
        if site.normaliser == "softmax":
            weights = torch.cat([scores, *(each[h : h + 1] for each in sink)]).softmax(0)[:kv_len]
        else:
            weights = scores.sigmoid() if site.normaliser == "sigmoid" else scores.relu()
        out[b, h, i] = weights @ value[b, h // groups]
    return out


def applies(site: AttentionSite, target: Target) -> bool:
    """Always."""
    return True


def configs(site: AttentionSite, target: Target) -> Iterable[Config]:
    """Nothing to set."""
    return ({},)


def build(site: AttentionSite, config: Config) -> Implementation:
    """The canonical operator's own mathematics."""
    structure = str(site.mask.positional)

    def attend(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, padding: Tensor | None, /, *sink: Tensor
    ) -> Tensor:
        if mask is None and padding is not None:
            mask = site.mask.visible(query.shape[2], key.shape[2], query.device) & padding[:, None, None, :]
        logits = sink[0] if sink else None
        return attention_math(
            query, key, value, mask, padding, site.scale, structure, site.dropout_p, logits, site.softcap or 0.0,
            site.normaliser,
        )  # fmt: skip

    return attend


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
        Case(site=replace(_SITE, mask=Causal() & Padding(), bias="dense")),
        Case(site=replace(_SITE, mask=Causal() & Padding(), softcap=2.0, dtype="bfloat16")),
        Case(site=replace(_SITE, sink="zero")),
        Case(site=replace(_SITE, mask=Full() & Padding(), sink="learned", softcap=2.0)),
        Case(site=replace(_SITE, mask=Causal() & Padding(), normaliser="sigmoid")),
        Case(site=replace(_SITE, normaliser="relu", bias="dense")),
    ],
    elements=ELEMENTS,
)
