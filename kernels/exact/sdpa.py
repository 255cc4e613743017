"""Fused attention: the same mathematics in blocks, with a running softmax, without storing the scores.

Flash attention (Dao et al. 2022, arXiv:2205.14135, algorithm 1): for each block of keys, with m the running maximum,
total' = total exp(m - m') + sum exp(s - m') and o' = o exp(m - m') + exp(s - m') v. Exact up to the order of the sums.
By PyTorch's own kernel, or by a generated one where that is faster or PyTorch has none (softcap, sinks, other
normalisers): it does not visit blocks that the mask hides, so that a local mask costs what it shows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from rewriter.codegen.formula import ELEMENTS, Formula, of_site
from rewriter.codegen.implementation import defined, generated
from rewriter.site import AttentionSite, Causal, Chunked, Dense, Full, Mask, Padding, Refusal, SlidingWindow
from rewriter.target import Target
from rewriter.variant import Case, Config, Implementation, Variant


def formula(site: AttentionSite, config: Config) -> Formula:
    """All that the site says of its scores."""
    return of_site(site)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    padding: Tensor | None,
    *,
    scale: float,
    positional: Mask,
) -> Tensor:
    """One fused call, with as little mask as the sizes of this call allow."""
    q_len, kv_len = query.shape[2], key.shape[2]
    causal = False
    if mask is None:
        # `is_causal` aligns the first query with the first key, our masks the last with the last.
        if positional == Causal() and padding is None and q_len == kv_len:
            causal = True
        elif positional != Full() and not (positional == Causal() and q_len == 1):
            mask = positional.visible(q_len, kv_len, query.device)
        if padding is not None:
            mask = padding[:, None, None, :] if mask is None else mask & padding[:, None, None, :]
    if mask is not None:
        # Fewer than four dimensions are not fused.
        mask = (mask if mask.dtype == torch.bool else mask.to(query.dtype))[(None,) * (4 - mask.dim())]
    width, v_width = query.shape[3], value.shape[3]
    if width != v_width and query.device.type == "cpu":
        # Unequal widths are not fused on the CPU; zeros change neither the scores nor the columns that are kept.
        query, key = (F.pad(t, (0, max(0, v_width - width))) for t in (query, key))
        value = F.pad(value, (0, max(0, width - v_width)))
    gqa = bool(query.shape[1] != key.shape[1])  # also of symbolic sizes
    out = F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=scale, enable_gqa=gqa)
    return out[..., :v_width]


def applies(site: AttentionSite, target: Target) -> bool | Refusal:
    """Any mask, any head size; no dropout."""
    if site.dropout_p > 0:
        reason = f"dropout of {site.dropout_p} would have the same distribution but other random numbers"
        return Refusal(reason, site.path, site.source)
    return True


def configs(site: AttentionSite, target: Target) -> Iterable[Config]:
    """Nothing to set."""
    return ({},)


def plain(site: AttentionSite, config: Config) -> Implementation:
    """`torch.nn.functional.scaled_dot_product_attention`."""
    return partial(attend, scale=site.scale, positional=site.mask.positional)


_SITE = AttentionSite(
    path="case", heads=6, kv_heads=2, head_dim=16, v_head_dim=16, dtype="float32", scale=0.25, mask=Causal(),
    batch=3, q_len=137, kv_len=137,
)  # fmt: skip

VARIANT = Variant(
    name="sdpa",
    paper="arXiv:2205.14135, algorithm 1",
    fidelity="exact",
    reference=defined(formula),
    applies=applies,
    configs=configs,
    build=generated(formula, plain, computes=frozenset({"bias"})),
    formula=formula,
    cases=[
        Case(site=_SITE),
        Case(site=replace(_SITE, dtype="bfloat16")),
        Case(site=replace(_SITE, q_len=5)),
        Case(site=replace(_SITE, q_len=1)),
        Case(site=replace(_SITE, mask=Causal() & Padding())),
        Case(site=replace(_SITE, mask=Full(), kv_heads=6, kv_len=50, v_head_dim=8)),
        Case(site=replace(_SITE, mask=Full() & Padding(), v_head_dim=24)),
        Case(site=replace(_SITE, mask=Causal() & SlidingWindow(20, 0))),
        Case(site=replace(_SITE, mask=Dense())),
        Case(site=replace(_SITE, bias="dense")),
        Case(site=replace(_SITE, mask=Causal() & Chunked(32))),
        Case(site=replace(_SITE, softcap=5.0)),
        Case(site=replace(_SITE, sink="learned")),
        Case(site=replace(_SITE, normaliser="sigmoid")),
        Case(site=replace(_SITE, normaliser="relu", mask=Full())),
    ],
    near_misses=[replace(_SITE, dropout_p=0.1)],
    elements=ELEMENTS,
)
