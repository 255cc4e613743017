"""Sliding window with attention sinks: the last `window` keys and the first `sinks` keys, and nothing between.

StreamingLLM (Xiao et al. 2023, arXiv:2309.17453, section 3.2), over the window of arXiv:2004.05150.

    out_i = softmax over {j : visible in the site's own mask, and (age(i, j) < window or j < sinks)} of scale * q_i k_j

Without a causal mask the window is as wide on both sides: |age| < window. Exact while no query has more than `window`
keys before it (and after it). Sinks are the first positions, padded or not: left padding costs sinks, never exactness.
Work and memory are O(N * (window + sinks)), as queries go in blocks, each to the slice of keys that it can see.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rewriter.codegen.formula import ELEMENTS, Formula, of_site
from rewriter.codegen.implementation import defined, generated
from rewriter.site import AttentionSite, Causal, Dense, Full, Padding, Refusal, SlidingWindow
from rewriter.target import Target
from rewriter.variant import Case, Config, Implementation, Variant

_WINDOWS = (2048, 1024, 512, 256, 128)
_BLOCK = 128  # larger blocks spend more on hidden keys, smaller ones on calls; 64 to 256 differ by 10%
_ALIGN = 32  # products over ragged lengths are 10% slower
_TOGETHER = 8  # blocks in one call: as fast on an idle core, and far fewer meetings of threads


def near(i: Any, j: Any, window: int, sinks: int) -> Any:
    """The keys at less than `window` from the query, and the first ones."""
    return ((i - j).abs() < window) | (j < sinks)


def formula(site: AttentionSite, config: Config) -> Formula:
    """The site's own, with fewer keys."""
    own = of_site(site)
    numbers = {**own.numbers, "window": int(config["window"]), "sinks": int(config["sinks"])}
    return replace(own, masks=(*own.masks, near), numbers=numbers)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    padding: Tensor | None,
    *,
    scale: float,
    causal: bool,
    window: int,
    sinks: int,
) -> Tensor:
    """`mask` is not read: the site's mask is causal or full, and `padding`."""
    (q_len, kv_len), v_width = (query.shape[2], key.shape[2]), value.shape[3]
    past, behind, ahead = kv_len - q_len, window - 1, 0 if causal else window - 1
    if query.shape[3] != v_width and query.device.type == "cpu":
        # Unequal widths are not fused on the CPU; zeros change neither the scores nor the columns that are kept.
        width = max(query.shape[3], v_width)
        query, key, value = (F.pad(t, (0, width - t.shape[3])) for t in (query, key, value))
    fused = partial(F.scaled_dot_product_attention, scale=scale, enable_gqa=bool(query.shape[1] != key.shape[1]))
    hidden, out = None, []
    if padding is not None:
        hidden = query.new_zeros(padding.shape).masked_fill_(~padding, float("-inf"))[:, None, None, :]

    def band(first: int, rows: int, far: int, start: int, size: int) -> Tensor:
        """Additive (rows, far + size): what the queries from `first` see of the first `far` keys and of a slice."""
        position = partial(torch.arange, device=query.device)
        keys = torch.cat([position(far), position(start, start + size)])
        age = position(first, first + rows)[:, None] - keys
        seen = (age.abs() < window) | (keys < sinks)
        seen = seen & (age >= 0) if causal else seen
        return query.new_zeros(seen.shape).masked_fill_(~seen, float("-inf"))

    # The first queries, for which the window hides nothing.
    head = 0
    if causal and past == 0 and hidden is None:
        head = min(window + sinks, q_len)
    elif not causal and max(q_len, kv_len) <= window:
        head = q_len
    if head:
        stop = head if causal else kv_len
        o = fused(query[:, :, :head], key[:, :, :stop], value[:, :, :stop], hidden, is_causal=causal)
        out.append(o.transpose(1, 2))

    shared = None  # once the slices begin behind the sinks, one band fits every block, but for its last columns
    block = _BLOCK - (sinks + behind + ahead) % _ALIGN
    i = head
    while i < q_len:
        first, rows, count = past + i, min(block, q_len - i), 1
        far, start = (sinks, first - behind) if first - behind > sinks else (0, 0)
        if start:
            count = min(max((q_len - ahead - i) // rows, 1), _TOGETHER)
        size = min(max(first + rows + ahead, sinks, 1), kv_len) - start
        bias = None  # a single query sees all of its slice
        if q_len > 1:
            bias = band(first, rows, far, start, size) if shared is None else shared[:rows, : far + size]
            shared = bias if start and shared is None else shared
        slices = partial(windows, far=far, start=start, size=size, step=rows, count=count)
        if hidden is not None:
            unpadded = slices(hidden.transpose(2, 3)).transpose(2, 3)
            bias = unpadded if bias is None else bias + unpadded
        q = torch.unflatten(query[:, :, i : i + count * rows], 2, (count, rows)).transpose(1, 2).flatten(0, 1)
        o = fused(q, slices(key), slices(value), bias)
        # The fused kernel writes (B, Sq, H, Dv) in memory, so joining along that Sq copies whole rows.
        out.append(o.transpose(1, 2).reshape(query.shape[0], count * rows, *o.shape[1::2]))
        i += count * rows
    return torch.cat(out, 1).transpose(1, 2)[..., :v_width]


def windows(t: Tensor, far: int, start: int, size: int, step: int, count: int) -> Tensor:
    """`count` slices of (B, Hkv, Skv, D), every `step` keys, each behind the first `far` keys."""
    near = t[:, :, start : start + size + (count - 1) * step].unfold(2, size, step).permute(0, 2, 1, 4, 3)
    if far:
        near = torch.cat([t[:, None, :, :far].expand(-1, count, -1, -1, -1), near], 3)
    return near.flatten(0, 1)


def applies(site: AttentionSite, target: Target) -> bool | Refusal:
    """Causal or full self-attention, with or without padding, over more than twice the smallest window."""
    reason = ""
    if site.dropout_p > 0:
        reason = f"dropout of {site.dropout_p} would have other random numbers, and fewer keys to drop"
    elif site.mask.has(Dense):
        reason = "the mask is a tensor of which nothing is known, so its meaning inside a window is not known either"
    elif site.mask.has(SlidingWindow):
        reason = f"the attention is local already: {site.mask}"
    elif site.mask.positional not in (Full(), Causal()):
        reason = f"a window is defined for a causal or a full mask, and this one is {site.mask}"
    elif site.kv_len is not None and site.kv_len <= 2 * _WINDOWS[-1]:
        reason = f"{site.kv_len} keys are too few for a window: the smallest, {_WINDOWS[-1]}, would keep half of them"
    elif site.mask.positional == Full() and site.q_len != site.kv_len and not site.single_query_decode:
        reason = f"{site.q_len} queries over {site.kv_len} keys is cross-attention, where no key is near a query"
    return Refusal(reason, site.path, site.source) if reason else True


def configs(site: AttentionSite, target: Target) -> Iterable[Config]:
    """The widest window first; none that would keep half of the keys."""
    return [{"window": w, "sinks": 4} for w in _WINDOWS if site.kv_len is None or 2 * w < site.kv_len]


def gathered(site: AttentionSite, config: Config) -> Implementation:
    """The block loop, in plain PyTorch."""
    window, sinks = int(config["window"]), int(config["sinks"])
    return partial(attend, scale=site.scale, causal=site.mask.positional == Causal(), window=window, sinks=sinks)


_SITE = AttentionSite(
    path="case", heads=6, kv_heads=2, head_dim=16, v_head_dim=16, dtype="float32", scale=0.25, mask=Causal(),
    batch=3, q_len=520, kv_len=520,
)  # fmt: skip
_SMALL: Config = {"window": 30, "sinks": 3}

VARIANT = Variant(
    name="sliding_window",
    paper="arXiv:2309.17453, section 3.2",
    fidelity="approximate",
    reference=defined(formula),
    applies=applies,
    configs=configs,
    build=generated(formula, gathered),
    formula=formula,
    elements=ELEMENTS,
    cases=[
        Case(site=_SITE),
        Case(site=replace(_SITE, dtype="bfloat16", q_len=257, kv_len=257), configs=[_SMALL]),
        Case(site=replace(_SITE, mask=Causal() & Padding(), v_head_dim=8), configs=[_SMALL]),
        Case(site=replace(_SITE, mask=Full()), configs=[_SMALL, {"window": 128, "sinks": 0}]),
        Case(site=replace(_SITE, mask=Full() & Padding()), configs=[_SMALL]),
        Case(site=replace(_SITE, q_len=1)),
        Case(site=replace(_SITE, mask=Causal() & Padding(), q_len=3), configs=[_SMALL]),
        Case(site=replace(_SITE, q_len=500), configs=[_SMALL]),
        Case(site=replace(_SITE, bias="dense", softcap=2.0), configs=[_SMALL]),
        Case(site=replace(_SITE, sink="learned"), configs=[_SMALL]),
        Case(site=replace(_SITE, normaliser="sigmoid"), configs=[_SMALL]),
        Case(site=replace(_SITE, normaliser="relu"), configs=[_SMALL]),
    ],
    near_misses=[
        replace(_SITE, dropout_p=0.1),
        replace(_SITE, mask=Causal() & Dense()),
        replace(_SITE, mask=SlidingWindow(255, 0)),
        replace(_SITE, mask=Causal(1)),
        replace(_SITE, q_len=256, kv_len=256),
        replace(_SITE, mask=Full(), q_len=100),
    ],
)
