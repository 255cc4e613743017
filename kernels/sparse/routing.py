"""Attention inside clusters of tokens: Routing Transformer (Roy et al. 2021, arXiv:2003.05997).

    u(x) = (x - mean x) / |x - mean x|                         layer norm without scale, on the unit sphere
    mu(x) = argmax_c mu_c . u(x)                               the nearest of C centroids of the key head
    out_i = sum_{j in S_i} softmax_j(scale q_i . k_j) v_j

"none" (for sites that are not causal), "position" and "rank" are the paper's clusters of equal size: cluster c holds
the `window` queries and the `window` keys nearest to mu_c, attention is inside each, and a query in several gets their
mean, in none 0. "position" hides keys that stand after a query; "rank" is the triangle that the published code lays
over the sorted list, right only where queries and keys are the same tokens: else IT SHOWS THE FUTURE. Both let later
tokens decide who is in a cluster at all, so that a step of decoding differs from the same place of a whole sequence.

"past", the default where a site is causal, does neither. S_i are the keys with mu(k_j) = mu(q_i) that stand at or
before i, counted in blocks of window / 2 from the first; seen are the last block and the one before, up to `window`
keys. A cache is routed anew in each step and gives the same. A call of one query is always of this form.

`shared`: a token is routed once, by its key, and its query goes along, as where the paper sets k := q; else q and k are
routed each by itself, and a query may find no key. Of grouped queries the centroids are those of their key head. Exact
with C = 1 and a window over all tokens. Deviations: the scores keep the site's scale, which the published code loses;
the mean over clusters is no sum / (n + 0.01); all heads are routed, of which the paper leaves some local, and a decoder
that was not trained so loses its first tokens, to which much attention goes. Padding is in no cluster, but "past"
routes its queries.

Centroids are buffers, in training moved by the mean direction of their tokens with decay 0.999, frozen in eval, as they
are built, and in graphs of other compilers, which know no mode. `start` finds them by spherical k-means. The choice is
a constant to gradients and in float64, so that it does not depend on the order of a sum. Work: N C d for the choice and
N window d; memory: indices, and on a CPU the operands of some tiles. No kernel is generated: theirs are told what q, k
and padding say in the order in which they stand, and here tokens are sorted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewriter.codegen.gathered import traced
from rewriter.kernels.exact import sdpa
from rewriter.site import AttentionSite, Causal, Dense, Full, Padding, Refusal, SlidingWindow
from rewriter.target import Target
from rewriter.variant import Case, Config, Implementation, Variant

_WINDOW, _CLUSTERS = 512, (8, 16)  # of the paper's models of words
_DECAY, _ROUNDS = 0.999, 10
_ROWS, _TOGETHER = 64, 1 << 19  # queries of a tile, which is computed whole; scores at once, on a CPU


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
            seen = (near_q.argmax(-1, True) == c) & (real_k & (near_k.argmax(-1, True) == c)).mT & earlier
            number, half = seen.cumsum(-1) - 1, module.block
            seen = seen & (number // half >= number[..., -1:] // half - 1)
        else:
            members = []
            for near in (near_q[..., c], near_k[..., c]):
                best = near.topk(min(module.window, near.shape[2])).indices
                members.append(torch.zeros_like(near, dtype=torch.bool).scatter(2, best, True))
            seen = (members[0][..., None] & real_q) & (members[1][..., None] & real_k).mT
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
        tokens, clusters = key.transpose(0, 1), self.centroids.shape[1]
        tokens = unit(tokens.flatten(1, 2) if padding is None else tokens[:, padding])
        chosen = torch.randperm(tokens.shape[1], generator=torch.Generator().manual_seed(0)).repeat(clusters)[:clusters]
        self.centroids.copy_(tokens[:, chosen.to(tokens.device)])
        for _ in range(_ROUNDS):
            self.centroids.copy_(self.moved(query, key, padding))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, padding: Tensor | None) -> Tensor:
        """`mask` is not read: the site's mask is causal or full, and `padding`."""
        attend = self._before if self.past(query.shape[2]) else self._inside
        out = attend(query.unflatten(1, (key.shape[1], -1)), key, value, *self.near(query, key, padding))
        if self.training and not traced(query):
            with torch.no_grad():
                both = _DECAY * self.centroids + (1 - _DECAY) * self.moved(query, key, padding)
                self.centroids.copy_(F.normalize(both, dim=-1))
        return out.flatten(1, 2)

    def _inside(self, query: Tensor, key: Tensor, value: Tensor, near_q: Tensor, near_k: Tensor) -> Tensor:
        """The nearest tokens of each cluster, in the order in which they stand: gather, attend, scatter the mean."""
        (groups, q_len), kv_len = query.shape[2:4], key.shape[2]
        wide, high = min(self.window, q_len), min(self.window, kv_len)
        at_q = near_q.topk(wide, dim=-2).indices.sort(-2).values.mT.transpose(2, 3)  # (B, Hkv, C, G, w)
        at_k = near_k.topk(high, dim=-2).indices.sort(-2).values.mT
        # A query may see places up to one; what is in no cluster has one that is before, or beyond, all others.
        if self.causal == "rank":
            until, place = (torch.arange(m, device=key.device).expand_as(at) for m, at in ((wide, at_q), (high, at_k)))
            until = until + high - wide
        else:
            until, place = at_q + (kv_len - q_len if self.causal == "position" else kv_len), at_k
        until = until.masked_fill(near_q.mT.transpose(2, 3).gather(-1, at_q) == -2, -1).flatten(3)
        place = place.masked_fill(near_k.mT.gather(-1, at_k) == -2, 2 * kv_len + q_len)
        at_q = (torch.arange(groups, device=key.device)[:, None] * q_len + at_q).flatten(3)  # a group's rows together
        out = tiled(query.flatten(2, 3), key, value, at_q, at_k, until, place, self.scale).flatten(2, 3)
        weight = (until >= place.amin(-1, keepdim=True)).flatten(2)[..., None].to(out.dtype)
        index, size = at_q.flatten(2)[..., None], (*key.shape[:2], groups * q_len)
        count = weight.new_zeros(*size, 1).scatter_add(2, index, weight)
        sums = out.new_zeros(*size, out.shape[-1]).scatter_add(2, index.expand_as(out), out)
        return (sums / count.clamp(min=1)).unflatten(2, (groups, q_len))  # type: ignore[no-any-return]

    def _before(self, query: Tensor, key: Tensor, value: Tensor, near_q: Tensor, near_k: Tensor) -> Tensor:
        """Keys sorted by cluster: what a query sees is an interval of them. Queries of one block share tiles."""
        (groups, q_len), kv_len, clusters, block = query.shape[2:4], key.shape[2], near_k.shape[-1], self.block
        n = groups * q_len
        home = torch.where(near_k[..., 0] > -2, near_k.argmax(-1), clusters)
        order = home.argsort(dim=-1, stable=True)
        count = F.one_hot(home, clusters + 1)[..., :clusters].cumsum(2)  # how many of each cluster up to here
        past = torch.arange(q_len, device=key.device) + kv_len - q_len
        own = near_q.flatten(2, 3).argmax(-1, keepdim=True)
        number = (count[:, :, past.clamp(min=0)] * (past >= 0)[:, None]).repeat(1, 1, groups, 1).gather(-1, own)[..., 0]
        begin = (count[:, :, -1].cumsum(-1) - count[:, :, -1]).gather(-1, own[..., 0])
        last = (number - 1).clamp(min=0) // block * block  # where the block of the query begins in its cluster
        low, until = begin + (last - block).clamp(min=0), torch.where(number > 0, begin + number - 1, -1)
        base = torch.where(number > 0, begin + last, kv_len)  # one number for each block, and one for no keys

        sequence, rows = base.argsort(dim=-1, stable=True), min(block, _ROWS, n)
        base, place = base.gather(-1, sequence), torch.arange(n, device=key.device)
        new = F.pad(base[..., 1:] != base[..., :-1], (1, 0), value=True)
        rank = place - (place * new).cummax(-1).values
        slot = ((rank % rows == 0).cumsum(-1) - 1) * rows + rank % rows
        tiles = min(n // rows + kv_len // block + clusters + 1, n)  # each block may leave a tile that is not full
        index = (
            slot.new_full((*slot.shape[:2], tiles * rows), n).scatter(-1, slot, sequence).unflatten(-1, (tiles, rows))
        )
        low, until = (F.pad(t, (0, 1), value=-1).gather(-1, index.flatten(2)).view_as(index) for t in (low, until))
        span = low[..., :1].clamp(min=0) + torch.arange(2 * block, device=key.device)  # (B, Hkv, tiles, 2 block)
        at_k = order.gather(-1, span.clamp(max=kv_len - 1).flatten(2)).view_as(span)
        out = tiled(query.flatten(2, 3), key, value, index.clamp(max=n - 1), at_k, until, span, self.scale).flatten(
            2, 3
        )
        back = torch.zeros_like(sequence).scatter(-1, sequence, slot)[..., None]
        return out.gather(2, back.expand(-1, -1, -1, out.shape[-1])).unflatten(2, (groups, q_len))  # type: ignore


def tiled(
    query: Tensor, key: Tensor, value: Tensor, at_q: Tensor, at_k: Tensor, until: Tensor, place: Tensor, scale: float
) -> Tensor:
    """Attention in tiles: those of the queries (B, Hkv, n, D) at an index (B, Hkv, tiles, rows) to the keys at an index
    (B, Hkv, tiles, keys) whose `place` is not beyond the `until` of the query: (B, Hkv, tiles, rows, Dv).
    """

    def table(x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        first = torch.arange(x.shape[0] * x.shape[1], device=x.device) * x.shape[2]
        return x.reshape(-1, x.shape[3]), (index.flatten(0, 1) + first[:, None, None]).flatten(0, 1)

    tables = [table(x, index) for x, index in ((query, at_q), (key, at_k), (value, at_k))]
    until, place = until.flatten(0, 2)[:, None, :, None], place.flatten(0, 2)[:, None, None]
    few = max(_TOGETHER // (at_q.shape[3] * at_k.shape[3]), 1)
    at_once, out = query.device.type != "cpu" or traced(query), []
    for here in [slice(None)] if at_once else [slice(i, i + few) for i in range(0, len(until), few)]:
        q, k, v = (x.index_select(0, at[here].flatten()).view(*at[here].shape, -1)[:, None] for x, at in tables)
        out.append(sdpa.attend(q, k, v, place[here] <= until[here], None, scale=scale, positional=Full()))
    return torch.cat(out).view(*at_q.shape, -1)


def applies(site: AttentionSite, target: Target) -> bool | Refusal:
    """Causal or full self-attention, with or without padding."""
    reason = ""
    if site.dropout_p > 0:
        reason = f"dropout of {site.dropout_p} would have other random numbers, and fewer keys to drop"
    elif site.mask.has(Dense):
        reason = "the mask is a tensor of which nothing is known, so it is not known what it hides of a cluster"
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
    paper="arXiv:2003.05997",
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
        Case(site=replace(_PADDED, q_len=137), configs=[_config(4, 60, how) for how in ("position", "rank")]),
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
