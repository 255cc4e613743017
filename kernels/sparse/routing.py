"""Attention inside clusters of tokens: Routing Transformer (Roy et al. 2021, arXiv:2003.05997, sections 4.1 and 4.2).

    u(x) = (x - mean x) / |x - mean x|                         layer norm without scale, on the unit sphere
    mu(x) = argmax_c mu_c . u(x)                               the nearest of C centroids of the key head
    out_i = sum_{j in S_i} softmax_j(scale q_i . k_j) v_j

"none", "position" and "rank" are the balanced clusters of section 4.1: cluster c holds the `window` queries and the
`window` keys nearest to mu_c, attention is within each, and a query in several is their mean, in none 0 ("none" for
sites that are not causal). "position" hides keys that stand after a query; "rank" is the triangle that the published
code lays over the sorted list, right only where queries and keys are the same tokens: else IT SHOWS THE FUTURE. Both
let later tokens decide who is in a cluster at all, so that a step of decoding differs from the whole sequence.

"past", the default where a site is causal, does neither. It is equation 7 as it stands: S_i are the keys of cluster
mu(q_i) that stand at or before i, counted in blocks of window / 2 from the first; seen are the block where i is and the
one before, up to `window` keys. A cache is routed anew in each step and gives the same. Calls of one query are of this
form always.

`shared`: a token is routed once, by its key, and its query goes along, as where the paper sets k := q; else q and k are
routed each by itself, and a query may find no key. Of grouped queries the centroids are those of their key head. Exact
with C = 1 and a window over all tokens. Deviations: the scores keep the site's scale, which the published code loses,
and the mean over clusters is no sum / (n + 0.01). Padding is in no cluster, but "past" routes its queries.

Centroids are buffers, in training moved by the mean direction of their tokens with decay 0.999, in eval frozen, which
they are as built; `start` finds them by spherical k-means. The choice is a constant to gradients and made in float64,
so that it does not depend on the order of a sum. Work: N C d for the choice and N window d; memory: some copies of the
operands, C * window long. Kernels are not generated: theirs see keys where they lie, and here each call sorts them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewriter.kernels.exact import sdpa
from rewriter.site import AttentionSite, Causal, Dense, Full, Padding, Refusal, SlidingWindow
from rewriter.target import Target
from rewriter.variant import Case, Config, Implementation, Variant

_WINDOW, _CLUSTERS = 512, (8, 16)  # of the paper's models of words
_DECAY, _ROUNDS = 0.999, 10


def unit(x: Tensor) -> Tensor:
    """u(x), float64."""
    x = x.double()
    return F.normalize(x - x.mean(-1, keepdim=True), dim=-1)


def reference(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, padding: Tensor | None, site: AttentionSite,
    config: Config, module: Routing,
) -> Tensor:  # fmt: skip
    """With the whole matrix of scores, cluster by cluster: (B, H, Sq, Dv)."""
    (q_len, kv_len), groups = (query.shape[2], key.shape[2]), query.shape[1] // key.shape[1]
    near_q, near_k = module.near(query, key, padding)
    near_q, near_k = near_q.flatten(1, 2), near_k.repeat_interleave(groups, 1)
    key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    scores, real_q, real_k = site.scale * query @ key.mT, near_q[..., :1] > -2, near_k[..., :1] > -2
    earlier = Causal().visible(q_len, kv_len, query.device)
    out, count = torch.zeros_like(scores @ value), torch.zeros_like(scores[..., :1])
    for c in range(int(config["clusters"])):
        if module.past(q_len):
            member = near_q.argmax(-1, True) == c
            seen = member & (real_k & (near_k.argmax(-1, True) == c)).mT & earlier
            number, half = seen.cumsum(-1) - 1, module.block
            seen = seen & (number // half >= number[..., -1:] // half - 1)
        else:
            members = []
            for near in (near_q[..., c], near_k[..., c]):
                best = near.topk(min(module.window, near.shape[2])).indices
                members.append(torch.zeros_like(near, dtype=torch.bool).scatter(2, best, True))
            member, here = members[0][..., None] & real_q, members[1][..., None] & real_k
            seen = member & here.mT
            if config["causal"] == "position":
                seen = seen & earlier
            elif config["causal"] == "rank":
                rank_q, rank_k = (m.cumsum(-1) - m.sum(-1, keepdim=True) for m in members)
                seen = seen & (rank_q[..., None] >= rank_k[..., None, :])
        any_seen = seen.any(-1, keepdim=True)
        weights = scores.masked_fill(~seen, float("-inf")).masked_fill(~any_seen, 0.0).softmax(-1)
        out, count = out + (weights * any_seen) @ value, count + any_seen
    return out / count.clamp(min=1)


class Routing(nn.Module):
    """An `Implementation` with `centroids` (Hkv, C, D), float32, of length 1."""

    centroids: Tensor

    def __init__(self, site: AttentionSite, config: Config) -> None:
        super().__init__()
        self.window, self.causal, self.shared = int(config["window"]), config["causal"], bool(config["shared"])
        self.block, self.scale = max(self.window // 2, 1), site.scale
        random = torch.Generator().manual_seed(0)
        points = torch.randn(site.kv_heads, int(config["clusters"]), site.head_dim, generator=random)
        self.register_buffer("centroids", unit(points).float().to(site.device))

    def past(self, q_len: int) -> bool:
        """Does each query see a part of its cluster that stands before it, rather than all that is near?"""
        return self.causal == "past" or q_len == 1

    @torch.no_grad()
    def near(self, query: Tensor, key: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
        """mu_c . u(x) of queries (B, Hkv, G, Sq, C) and of keys (B, Hkv, Skv, C), -2 where in no cluster."""
        centroids, past = self.centroids.double().mT, key.shape[2] - query.shape[2]
        # The queries are the last tokens; one that would stand before the first key goes with it.
        own = (torch.arange(query.shape[2], device=key.device) + past).clamp(min=0)
        grouped, keys = query.unflatten(1, (key.shape[1], -1)), unit(key) @ centroids
        if self.shared:
            queries = keys[:, :, None, own].expand(*grouped.shape[:4], -1)
        else:
            queries = unit(grouped) @ centroids[:, None]
        if padding is None:
            return queries, keys
        hidden = ~padding[:, None, :, None]
        if not self.past(query.shape[2]):  # where there are only so many places
            queries = queries.masked_fill(hidden[:, None, :, own], -2)
        return queries, keys.masked_fill(hidden, -2)

    @torch.no_grad()
    def moved(self, query: Tensor, key: Tensor, padding: Tensor | None) -> Tensor:
        """The mean direction of the tokens that are nearest to each centroid; where there are none, the centroid."""
        tokens, near = unit(key), (found := self.near(query, key, padding))[1]
        if not self.shared:
            tokens = torch.cat([unit(query.unflatten(1, (key.shape[1], -1))).flatten(2, 3), tokens], 2)
            near = torch.cat([found[0].flatten(2, 3), near], 2)
        chosen = F.one_hot(near.argmax(-1), near.shape[-1]) * (near[..., :1] > -2)
        sums = (chosen.to(tokens).mT @ tokens).sum(0)
        return torch.where(chosen.sum((0, 2))[..., None] > 0, F.normalize(sums, dim=-1), self.centroids.double())

    @torch.no_grad()
    def start(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, padding: Tensor | None) -> None:
        """Spherical k-means over the tokens of a call, from some of them."""
        real = key.new_ones(len(key), key.shape[2], dtype=torch.bool) if padding is None else padding
        tokens, (_, clusters, _) = unit(key.transpose(0, 1)[:, real]), self.centroids.shape
        chosen = torch.randperm(tokens.shape[1], generator=torch.Generator().manual_seed(0)).repeat(clusters)[:clusters]
        self.centroids.copy_(tokens[:, chosen.to(tokens.device)])
        for _ in range(_ROUNDS):
            self.centroids.copy_(self.moved(query, key, padding))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, padding: Tensor | None) -> Tensor:
        """`mask` is not read: the site's mask is causal or full, and `padding`."""
        near_q, near_k = self.near(query, key, padding)
        grouped = query.unflatten(1, (key.shape[1], -1))
        attend = self._before if self.past(query.shape[2]) else self._inside
        out = attend(grouped, key, value, near_q, near_k)
        if self.training:
            with torch.no_grad():
                both = _DECAY * self.centroids + (1 - _DECAY) * self.moved(query, key, padding)
                self.centroids.copy_(F.normalize(both, dim=-1))
        return out.flatten(1, 2)

    def _inside(self, query: Tensor, key: Tensor, value: Tensor, near_q: Tensor, near_k: Tensor) -> Tensor:
        """The nearest tokens of each cluster, in the order in which they stand: gather, attend, scatter the mean."""
        (batch, heads, groups, q_len, _), kv_len = query.shape, key.shape[2]
        wide, high = min(self.window, q_len), min(self.window, kv_len)
        at_q = near_q.topk(wide, dim=-2).indices.sort(-2).values.mT.transpose(2, 3)  # (B, Hkv, C, G, w)
        at_k = near_k.topk(high, dim=-2).indices.sort(-2).values.mT
        kept_q = near_q.mT.transpose(2, 3).gather(-1, at_q) > -2
        seen = (kept_q[..., None] & (near_k.mT.gather(-1, at_k) > -2)[:, :, :, None, None]).flatten(3, 4)
        if self.causal == "position":
            seen = seen & (at_q.flatten(3)[..., None] + kv_len - q_len >= at_k[:, :, :, None])
        elif self.causal == "rank":
            seen = seen & Causal().visible(wide, high, key.device).repeat(groups, 1)
        place = torch.arange(groups, device=key.device)[:, None] * q_len + at_q  # among the queries of a group
        rows = taken(query.flatten(2, 3), place.flatten(3))
        out = tiled(rows, taken(key, at_k), taken(value, at_k), seen, self.scale)
        weight = seen.any(-1, keepdim=True).to(out.dtype)
        index, size = place.flatten(2)[..., None], (batch, heads, groups * q_len)
        count = weight.new_zeros(*size, 1).scatter_add(2, index, weight.flatten(2, 3))
        sums = out.new_zeros(*size, out.shape[-1])
        sums = sums.scatter_add(2, index.expand(-1, -1, -1, out.shape[-1]), (out * weight).flatten(2, 3))
        return (sums / count.clamp(min=1)).unflatten(2, (groups, q_len))  # type: ignore[no-any-return]

    def _before(self, query: Tensor, key: Tensor, value: Tensor, near_q: Tensor, near_k: Tensor) -> Tensor:
        """Keys sorted by cluster: what a query sees is an interval of them. Queries of one block share tiles."""
        (groups, q_len), kv_len, clusters, half = query.shape[2:4], key.shape[2], near_k.shape[-1], self.block
        near_q, real = near_q.flatten(2, 3), near_k[..., :1] > -2
        home = torch.where(real[..., 0], near_k.argmax(-1), clusters)
        order = home.argsort(dim=-1, stable=True)
        count = (F.one_hot(home, clusters + 1)[..., :clusters]).cumsum(2)  # how many of each cluster up to here
        past = torch.arange(q_len, device=key.device) + kv_len - q_len
        own = near_q.argmax(-1, keepdim=True)
        number = count[:, :, past.clamp(min=0)].repeat(1, 1, groups, 1).gather(-1, own)[..., 0]
        number = number * (past >= 0).repeat(groups)
        first = (count[:, :, -1].cumsum(-1) - count[:, :, -1]).gather(-1, own[..., 0])
        block = (number - 1).clamp(min=0) // half
        low, high = first + (block - 1).clamp(min=0) * half, first + number
        base = torch.where(number > 0, first + block * half, kv_len)  # one number for each block, and one for no keys

        n = groups * q_len
        rows = min(half, n)
        sequence = base.argsort(dim=-1, stable=True)
        base = base.gather(-1, sequence)
        place = torch.arange(n, device=key.device)
        new = F.pad(base[..., 1:] != base[..., :-1], (1, 0), value=True)
        rank = place - (place * new).cummax(-1).values
        slot = ((rank % rows == 0).cumsum(-1) - 1) * rows + rank % rows
        tiles = min(n // rows + kv_len // half + clusters + 1, n)  # a block may leave one of its own half empty
        empty = slot.new_full((*slot.shape[:2], tiles * rows), n)
        index = empty.scatter(-1, slot, sequence).unflatten(-1, (tiles, rows))

        low, high, start = (F.pad(t, (0, 1)).gather(-1, index.flatten(2)).view_as(index) for t in (low, high, low))
        span = start[..., :1] + torch.arange(2 * half, device=key.device)  # (B, Hkv, tiles, 2 half)
        seen = (span[..., None, :] >= low[..., None]) & (span[..., None, :] < high[..., None])
        span = order.gather(-1, span.clamp(max=kv_len - 1).flatten(2)).view_as(span)
        padded = F.pad(query.flatten(2, 3), (0, 0, 0, 1))
        out = tiled(taken(padded, index), taken(key, span), taken(value, span), seen, self.scale)
        back = torch.zeros_like(sequence).scatter(-1, sequence, slot)
        return taken(out.flatten(2, 3), back).unflatten(2, (groups, q_len))  # type: ignore[no-any-return]


def taken(x: Tensor, index: Tensor) -> Tensor:
    """Tokens (B, Hkv, n, D) at an index (B, Hkv, ...): (B, Hkv, ..., D)."""
    flat = index.flatten(2)[..., None].expand(-1, -1, -1, x.shape[-1])
    return x.gather(2, flat).unflatten(2, index.shape[2:])  # type: ignore[no-any-return]


def tiled(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Dense attention of each tile: (B, Hkv, tiles, rows, D) over (B, Hkv, tiles, keys, D)."""
    q, k, v, mask = (t.flatten(0, 2)[:, None] for t in (query, key, value, seen))
    out = sdpa.attend(q, k, v, mask, None, scale=scale, positional=Full())
    return out.view(*query.shape[:4], -1)


def applies(site: AttentionSite, target: Target) -> bool | Refusal:
    """Causal or full self-attention, with or without padding."""
    reason = ""
    if site.dropout_p > 0:
        reason = f"dropout of {site.dropout_p} would have other random numbers, and fewer keys to drop"
    elif site.mask.has(Dense):
        reason = (
            "the mask is a tensor of which nothing is known, so what a cluster would show of it is not known either"
        )
    elif site.mask.positional not in (Full(), Causal()):
        reason = f"clusters are of all tokens, or of all that stand before, and the mask is {site.mask}"
    elif site.mask.positional == Full() and site.q_len != site.kv_len and not site.single_query_decode:
        reason = (
            f"{site.q_len} queries over {site.kv_len} keys is cross-attention, where a query is no token among keys"
        )
    return Refusal(reason, site.path, site.source) if reason else True


def configs(site: AttentionSite, target: Target) -> Iterable[Config]:
    """As many keys as there are in a cluster of equal ones; larger clusters first."""
    causal = "past" if site.mask.has(Causal) else "none"
    windows = [(c, _WINDOW if site.kv_len is None else max(-(-site.kv_len // c), 2)) for c in _CLUSTERS]
    return [_config(c, window, causal) for c, window in windows]


def _config(clusters: int, window: int, causal: str, *, shared: bool = True) -> Config:
    return {"clusters": clusters, "window": window, "causal": causal, "shared": shared}


def build(site: AttentionSite, config: Config) -> Implementation:
    """The module, its centroids at random, the same every time, and frozen until `train` is called."""
    return Routing(site, config).eval()


_SITE = AttentionSite(
    path="case", heads=6, kv_heads=2, head_dim=16, v_head_dim=16, dtype="float32", scale=0.25, mask=Causal(),
    batch=3, q_len=300, kv_len=300,
)  # fmt: skip
_PADDED = replace(_SITE, mask=Causal() & Padding())
_FULL = replace(_SITE, mask=Full() & Padding())


VARIANT = Variant(
    name="routing",
    paper="arXiv:2003.05997, sections 4.1 and 4.2",
    fidelity="learned",
    reference=reference,
    applies=applies,
    configs=configs,
    build=build,
    cases=[
        Case(site=_SITE),
        Case(site=replace(_SITE, q_len=137), configs=[_config(5, 33, "past", shared=False)]),
        Case(site=replace(_SITE, dtype="bfloat16", v_head_dim=8), configs=[_config(8, 40, "past", shared=False)]),
        Case(site=_PADDED, configs=[_config(4, 30, "past", shared=share) for share in (True, False)]),
        Case(site=_PADDED, configs=[_config(4, 60, how, shared=False) for how in ("position", "rank")]),
        Case(
            site=replace(_PADDED, q_len=137), configs=[_config(4, 60, how, shared=True) for how in ("position", "rank")]
        ),
        Case(site=_FULL),
        Case(site=replace(_FULL, mask=Full(), v_head_dim=8), configs=[_config(7, 30, "none", shared=False)]),
        Case(site=replace(_SITE, q_len=1)),
    ],
    near_misses=[
        replace(_SITE, dropout_p=0.1),
        replace(_SITE, mask=Dense()),
        replace(_SITE, mask=Causal() & SlidingWindow(20, 0)),
        replace(_SITE, mask=Causal(1)),
        replace(_SITE, mask=Full(), q_len=137),
    ],
)
