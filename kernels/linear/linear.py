"""Linear attention with a learned feature map: Hedgehog (Zhang et al. 2024, arXiv:2402.04347, section 4).

    phi(x) = [softmax(W x), softmax(-W x)]
    out_i = sum_j phi_q(q_i) . phi_k(k_j) v_j / sum_j phi_q(q_i) . phi_k(k_j)          over the keys j that i sees

One W (D x D) for the queries and one for the keys of each query head, from the identity on, applied to q and k times
sqrt(scale). Never exact: the maps are fitted until the weights resemble those of the softmax. Work is O(N), memory that
of one chunk on a CPU, of phi(q) and phi(k) on a GPU: the maps mix channels, so the kernel is given what they made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from rewriter.codegen.linear_formula import LinearFormula
from rewriter.codegen.linear_implementation import linear_attention
from rewriter.site import AttentionSite, Causal, Dense, Full, Padding, Refusal, SlidingWindow
from rewriter.target import Target
from rewriter.variant import Case, Config, Implementation, Variant

_EPS = 1e-6  # a visible key weighs about 2 / D


def signed(weight: Tensor) -> Tensor:
    """[W, -W]: (H, D, D) -> (H, 2 D, D)."""
    return torch.cat([weight, -weight], -2)


def features(x: Tensor, both: Tensor) -> Tensor:
    """phi: (B, H, S, D) with `signed` weights (H, 2 D, D) -> (B, H, S, 2 D), positive, each half a distribution."""
    halves: Tensor = (x @ both.mT).unflatten(-1, (2, -1))
    return halves.softmax(-1).flatten(-2)


def formula(site: AttentionSite, config: Config) -> LinearFormula:
    """The sum over phi(q) and phi(k), which are computed before it."""
    causal = site.mask.positional == Causal()
    return LinearFormula(normalised=True, eps=_EPS, causal=causal, features=2 * site.head_dim)


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
    phi_q = features(root * query, signed(module.query_map.to(query.dtype)))
    phi_k = features(root * key.repeat_interleave(groups, 1), signed(module.key_map.to(query.dtype)))
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
        self.formula = formula(site, {})

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, padding: Tensor | None) -> Tensor:
        """`mask` is not read: the site's mask is causal or full, and `padding`."""

        def mapped(weight: Tensor) -> Callable[[Tensor], Tensor]:
            both = signed(self.root * weight)
            return lambda x: features(x.repeat_interleave(len(both) // x.shape[1], 1), both.to(x.dtype))

        maps = {"query_map": mapped(self.query_map), "key_map": mapped(self.key_map)}
        return linear_attention(self.formula, query, key, value, 1.0, **maps, padding=padding)


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
    formula=formula,
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
