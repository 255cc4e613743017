"""Linear attention with a learned feature map: Hedgehog (Zhang et al. 2024, arXiv:2402.04347, section 4).

    phi(x) = [softmax(W x), softmax(-W x)]
    out_i = sum_j phi_q(q_i) . phi_k(k_j) v_j / sum_j phi_q(q_i) . phi_k(k_j)          over the keys j that i sees

One W (D x D) for the queries and one for the keys of each query head, from the identity on, applied to q and k times
sqrt(scale). Never exact: the maps are fitted until the weights resemble those of the softmax. A causal pass takes
chunks: within one the products directly, before it the running sum of phi(k) v^T, so that work and memory are O(N).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewriter.site import AttentionSite, Causal, Dense, Full, Padding, Refusal, SlidingWindow
from rewriter.target import Target
from rewriter.variant import Case, Config, Implementation, Variant

_CHUNK = 128
_EPS = 1e-6  # a visible key weighs about 2 / D


def features(x: Tensor, weight: Tensor) -> Tensor:
    """phi: (B, H, S, D) with weights (H, D, D) -> (B, H, S, 2 D), positive, each half a distribution."""
    mapped = x @ weight.transpose(-2, -1)
    return torch.cat([mapped.softmax(-1), (-mapped).softmax(-1)], -1)


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    padding: Tensor | None,
    site: AttentionSite,
    config: Config,
    module: LinearAttention,
) -> Tensor:
    """The definition with the whole matrix of weights: (B, H, Sq, Dv). A query that sees no key gives zeros."""
    groups, root = query.shape[1] // key.shape[1], math.sqrt(site.scale)
    phi_q = features(root * query, module.query_map.to(query.dtype))
    phi_k = features(root * key.repeat_interleave(groups, 1), module.key_map.to(query.dtype))
    seen = site.mask.visible(query.shape[2], key.shape[2], query.device)[None, None]
    if padding is not None:
        seen = seen & padding[:, None, None, :]
    weights = (phi_q @ phi_k.transpose(-2, -1)).masked_fill(~seen, 0.0)
    return weights / (weights.sum(-1, keepdim=True) + _EPS) @ value.repeat_interleave(groups, 1)


class LinearAttention(nn.Module):
    """An `Implementation` with two feature maps, in float32: `query_map` and `key_map`, (H, D, D)."""

    def __init__(self, site: AttentionSite) -> None:
        super().__init__()
        identity = torch.eye(site.head_dim, device=site.device).repeat(site.heads, 1, 1)
        self.query_map = nn.Parameter(identity)
        self.key_map = nn.Parameter(identity.clone())
        self.root = math.sqrt(site.scale)
        self.causal = site.mask.positional == Causal()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, padding: Tensor | None) -> Tensor:
        """`mask` is not read: the site's mask is causal or full, and `padding`."""
        wide = torch.promote_types(query.dtype, torch.float32)  # sums over the sequence need the digits
        groups = query.shape[1] // key.shape[1]
        phi_q = features(self.root * query.to(wide), self.query_map.to(wide))
        phi_k = features(self.root * key.to(wide).repeat_interleave(groups, 1), self.key_map.to(wide))
        if padding is not None:
            phi_k = phi_k.masked_fill(~padding[:, None, :, None], 0.0)
        # A column of ones sums the weights themselves.
        sums = weigh(phi_q, phi_k, F.pad(value.to(wide).repeat_interleave(groups, 1), (0, 1), value=1.0), self.causal)
        return (sums[..., :-1] / (sums[..., -1:] + _EPS)).to(query.dtype)


def weigh(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """sum_j (q_i . k_j) v_j over the visible keys: (B, H, Sq, F), (B, H, Skv, F), (B, H, Skv, Dv) -> (B, H, Sq, Dv)."""
    q_len = q.shape[2]
    past = k.shape[2] - q_len
    if q_len <= _CHUNK or past < 0:
        weights = q @ k.transpose(-2, -1)
        return (weights.tril(past) if causal else weights) @ v
    if not causal:
        return q @ (k.transpose(-2, -1) @ v)
    before = k[:, :, :past].transpose(-2, -1) @ v[:, :, :past]
    rest = (0, 0, 0, -q_len % _CHUNK)
    q, k, v = (torch.unflatten(F.pad(t, rest), 2, (-1, _CHUNK)) for t in (q, k[:, :, past:], v[:, :, past:]))
    states = torch.cat([before[:, :, None], (k.transpose(-2, -1) @ v)[:, :, :-1]], 2).cumsum(2)
    out = q @ states + (q @ k.transpose(-2, -1)).tril() @ v
    return out.flatten(2, 3)[:, :, :q_len]


def applies(site: AttentionSite, target: Target) -> bool | Refusal:
    """Causal or full attention, with or without padding, of any lengths."""
    reason = ""
    if site.dropout_p > 0:
        reason = f"dropout of {site.dropout_p} acts on attention weights, which linear attention never forms"
    elif site.mask.has(Dense):
        reason = (
            "the mask is a tensor of which nothing is known, and a sum over keys cannot leave any out for one query"
        )
    elif site.mask.positional not in (Full(), Causal()):
        reason = f"a running sum can be causal or full, and the mask is {site.mask}"
    return Refusal(reason, site.path, site.source) if reason else True


def configs(site: AttentionSite, target: Target) -> Iterable[Config]:
    """One feature map."""
    return ({"feature_map": "hedgehog"},)


def build(site: AttentionSite, config: Config) -> Implementation:
    """The module, its maps at the identity."""
    return LinearAttention(site)


_SITE = AttentionSite(
    path="case", heads=6, kv_heads=2, head_dim=16, v_head_dim=16, dtype="float32", scale=0.25, mask=Causal(),
    batch=3, q_len=300, kv_len=300,
)  # fmt: skip

VARIANT = Variant(
    name="linear",
    paper="arXiv:2402.04347, section 4",
    fidelity="learned",
    reference=reference,
    applies=applies,
    configs=configs,
    build=build,
    cases=[
        Case(site=_SITE),
        Case(site=replace(_SITE, dtype="bfloat16")),
        Case(site=replace(_SITE, mask=Causal() & Padding(), v_head_dim=8)),
        Case(site=replace(_SITE, mask=Full() & Padding())),
        Case(site=replace(_SITE, mask=Full(), q_len=137)),
        Case(site=replace(_SITE, q_len=1)),
        Case(site=replace(_SITE, q_len=200)),
    ],
    near_misses=[
        replace(_SITE, dropout_p=0.1),
        replace(_SITE, mask=Dense()),
        replace(_SITE, mask=Causal() & SlidingWindow(20, 0)),
        replace(_SITE, mask=Causal(1)),
    ],
)
