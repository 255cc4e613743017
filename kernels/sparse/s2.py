"""Sparsely-sharded attention: each head sees the blocks near the query, and a shard of the others that is its own.

S2-Attention (Lin et al. 2024, arXiv:2407.17678), as in the authors' code. With blocks of `block` tokens, a
query of block m sees the keys of block n <= m (token by token in its own block, by the site's causal mask) iff

    m - n < local   or   (n + g * step + phase) % stride == 0   or   g is among the last `dense` key/value heads

for the key/value head g, which all its query heads share, and step = max(1, stride // number of query heads), 0 where
all heads are `alike`. The phase is absolute: a column behind the window is kept for all later queries or for none, so a
step of decoding reads 1/stride of the cache, and what is never read again needs no memory: `Cache` lets go of it.

With `right` local blocks on the other side, which count the query's own as well, this is the form for queries that also
see what comes after them. The phase is relative then, and the same for all heads: a query sees block n iff

    (max(0, m - n - local + 1) + max(0, n - m - right + 1)) % stride == 0

Exact with stride 1, and while all keys are local. Work is O(N * (N / stride + local * block)); grouped keys and values
are not repeated.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rewriter.codegen.formula import ELEMENTS, Formula, of_site
from rewriter.codegen.gathered import Gathered
from rewriter.codegen.implementation import defined, generated
from rewriter.errors import OptionError
from rewriter.kernels.exact import sdpa
from rewriter.site import AttentionSite, Causal, Dense, Full, Padding, Refusal, SlidingWindow
from rewriter.target import Target
from rewriter.variant import Case, Config, Implementation, Variant

_BLOCK = 64
_OFFERED = ((16, 8), (8, 8), (4, 16))
"""Local blocks and stride: the paper's setting for short contexts, and two that keep less."""
_ROWS = 256
"""Queries that share one copy of their keys in the plain implementation."""


def kept(
    h: Any, i: Any, j: Any, block: int, local: int, stride: int, step: int, phase: int, group: int, sparse: int
) -> Any:
    """Near blocks, the head's shard of the others, and everything for the heads behind the sparse ones."""
    own = (j // block + h // group * step + phase) % stride == 0
    return (i // block - j // block < local) | own | (h // group >= sparse)


def around(i: Any, j: Any, block: int, left: int, right: int, stride: int) -> Any:
    """Near blocks on both sides, and every `stride`-th of those beyond them."""
    before = i // block - j // block  # blocks from the key's to the query's
    return ((before - left + 1).clamp(min=0) + (1 - before - right).clamp(min=0)) % stride == 0


def numbers(site: AttentionSite, config: Config) -> dict[str, int]:
    """Those of `kept`, or of `around`."""
    block, local, stride = (int(config[name]) for name in ("block", "local", "stride"))
    if "right" in config:
        if own := sorted({"phase", "dense", "alike"} & set(config)):
            raise OptionError(f"{' and '.join(own)}: with blocks on the right, all heads keep the same")
        return {"block": block, "left": local, "right": int(config["right"]), "stride": stride}
    return {
        "block": block,
        "local": local,
        "stride": stride,
        "step": 0 if config.get("alike", False) else max(1, stride // site.heads),
        "phase": int(config.get("phase", 0)),
        "group": site.heads // site.kv_heads,
        "sparse": site.kv_heads - int(config.get("dense", 0)),
    }


def formula(site: AttentionSite, config: Config) -> Formula:
    """The site's own, with fewer keys."""
    own, mask = of_site(site), around if "right" in config else kept
    return replace(own, masks=(*own.masks, mask), numbers={**own.numbers, **numbers(site, config)})


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    padding: Tensor | None,
    *,
    scale: float,
    pattern: dict[str, int],
) -> Tensor:
    """Blocks of queries, each with a copy of the keys that it can see, for each key/value head its own. `mask` is not
    read: the site's mask is causal, and `padding`.
    """
    sparse, group = pattern["sparse"], pattern["group"]
    if 0 < sparse < key.shape[1]:  # what the dense heads see is one slice, without a copy
        heads = slice(0, sparse), slice(sparse, None)
        parts = [(query.unflatten(1, (-1, group))[:, of].flatten(1, 2), key[:, of], value[:, of]) for of in heads]
        both = zip(parts, (pattern, pattern | {"sparse": 0}), strict=True)
        return torch.cat([attend(*part, None, padding, scale=scale, pattern=each) for part, each in both], 1)
    past, out = key.shape[2] - query.shape[2], []
    for start in range(0, query.shape[2], _ROWS):
        rows = query[:, :, start : start + _ROWS]
        i = torch.arange(past + start, past + start + rows.shape[2], device=query.device)
        near, stop = behind(past + start, pattern), max(past + start + rows.shape[2], 1)
        j = torch.arange(near, stop, device=query.device)[None]
        k, v = key[:, :, near:stop], value[:, :, near:stop]
        real = torch.ones_like(j, dtype=torch.bool)
        if near:
            far = shards(near, key.shape[1], pattern, query.device)
            real = torch.cat([far < near, real.expand(len(far), -1)], 1)
            j = torch.cat([far.clamp(max=near), j.expand(len(far), -1)], 1)
            head = torch.arange(len(far), device=query.device)[:, None]
            k, v = key[:, head, j], value[:, head, j]
        h = torch.arange(key.shape[1], device=query.device)[:, None, None] * group
        seen = (kept(h, i[:, None], j[:, None], **pattern) & (j[:, None] <= i[:, None]) & real[:, None])[None]
        seen = seen if padding is None else seen & padding[:, j][:, :, None]
        bias = rows.new_zeros(seen.shape).masked_fill_(~seen, float("-inf"))
        bias = bias.repeat_interleave(group, 1)
        out.append(F.scaled_dot_product_attention(rows, k, v, bias, scale=scale, enable_gqa=group > 1))
    return torch.cat(out, 2)


def behind(first: int, pattern: dict[str, int]) -> int:
    """Where the local keys of a query begin. Dense heads have no others."""
    block = pattern["block"]
    return max(first // block - pattern["local"] + 1, 0) * block if pattern["sparse"] else 0


def shards(near: int, kv_heads: int, pattern: dict[str, int], device: torch.device) -> Tensor:
    """int64 (Hkv, n): each head's own keys among the first `near`, of blocks that go one beyond it for some heads."""
    block, stride = pattern["block"], pattern["stride"]
    first = -(torch.arange(kv_heads, device=device) * pattern["step"] + pattern["phase"]) % stride
    blocks = first[:, None] + torch.arange(0, near // block, stride, device=device)
    return (blocks[..., None] * block + torch.arange(block, device=device)).flatten(1)


class Cache:
    """The keys that decoding may still read, of each key/value head its own: with N tokens so far, N / stride and those
    of the local blocks, and all of a dense head. Settings are those of the variant, without blocks on the right.
    """

    def __init__(self, site: AttentionSite, config: Config) -> None:
        if "right" in config:
            raise OptionError("what a query sees of what comes after it cannot be let go of")
        self.scale, self.pattern, self.seen = site.scale, numbers(site, config), 0
        self.held: dict[str, tuple[Tensor, ...]] = {}

    def step(self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None = None) -> Tensor:
        """Add tokens, and attend their queries: (B, H, n, D), (B, Hkv, n, D), (B, Hkv, n, Dv), bool (B, n) -> (B, H, n,
        Dv). The same as the variant gives of these queries with all keys so far.
        """
        sparse, out = self.pattern["sparse"], []
        real = key.new_ones(key.shape[0], key.shape[2], dtype=torch.bool) if padding is None else padding
        grouped = query.unflatten(1, (key.shape[1], -1))
        parts = {
            "sparse": (slice(0, sparse), self.pattern),
            "dense": (slice(sparse, None), self.pattern | {"sparse": 0}),
        }
        for name, (heads, pattern) in parts.items():
            if key[:, heads].shape[1]:
                out.append(
                    self._part(name, pattern, grouped[:, heads].flatten(1, 2), key[:, heads], value[:, heads], real)
                )
        self.seen += key.shape[2]
        return torch.cat(out, 1)

    def _part(
        self, name: str, pattern: dict[str, int], query: Tensor, key: Tensor, value: Tensor, real: Tensor
    ) -> Tensor:
        """Of heads that keep as many keys, but for a block."""
        count, new, group, block = *key.shape[1:3], pattern["group"], pattern["block"]
        after = self.seen + new
        i = torch.arange(self.seen, after, device=key.device)
        h = torch.arange(count, device=key.device)[:, None]
        given: Sequence[Tensor] = key, value, real[:, None].expand(-1, count, -1), i.expand(1, count, -1)
        if name in self.held:
            given = [torch.cat(each, 2) for each in zip(self.held[name], given, strict=True)]
        keys, values, real, (places,) = given
        j = places[:, None]
        seen = kept(h[..., None] * group, i[:, None], j, **pattern) & (j <= i[:, None]) & real[:, :, None]
        bias = query.new_zeros(seen.shape).masked_fill_(~seen, float("-inf")).repeat_interleave(group, 1)
        out = sdpa.attend(query, keys, values, bias, None, scale=self.scale, positional=Full())
        if after // block > self.seen // block:  # local blocks have moved on
            wanted = kept(h * group, after, places, **pattern)
            order = wanted.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[:, : int(wanted.sum(-1).max())]
            # A head of fewer keys than others is filled up with some that nobody sees.
            given = [t[:, h, order] for t in (keys, values, real & wanted, places[None])]
        self.held[name] = tuple(given)
        return out


def applies(site: AttentionSite, target: Target) -> bool | Refusal:
    """Causal or full self-attention, with or without padding, over more keys than twice the fewest local ones."""
    reason, fewest = "", min(2 * locals_of(site, local) for local, _ in _OFFERED)
    if site.dropout_p > 0:
        reason = f"dropout of {site.dropout_p} would have other random numbers, and fewer keys to drop"
    elif site.mask.has(Dense):
        reason = "the mask is a tensor of which nothing is known, so what a shard of it means is not known either"
    elif site.mask.has(SlidingWindow):
        reason = f"the attention is local already: {site.mask}"
    elif site.mask.positional not in (Full(), Causal()):
        reason = f"shards are defined for a causal or a full mask, and this one is {site.mask}"
    elif site.q_len != site.kv_len and not looks_back(site):
        reason = f"{site.q_len} queries over {site.kv_len} keys is cross-attention, where no key is near a query"
    elif site.kv_len is not None and site.kv_len <= fewest:
        reason = f"{site.kv_len} keys are too few for shards: of {fewest} the local ones are half"
    return Refusal(reason, site.path, site.source) if reason else True


def configs(site: AttentionSite, target: Target) -> Iterable[Config]:
    """The most keys first; none whose local blocks hold half of the keys."""
    fitting = [each for each in _OFFERED if site.kv_len is None or 2 * locals_of(site, each[0]) < site.kv_len]
    found: list[Config] = [{"block": _BLOCK, "local": local, "stride": stride} for local, stride in fitting]
    return found if looks_back(site) else [{**config, "right": config["local"]} for config in found]


def looks_back(site: AttentionSite) -> bool:
    """Do its queries see nothing that comes after them?"""
    return site.mask.positional == Causal() or site.single_query_decode


def locals_of(site: AttentionSite, local: int) -> int:
    """Keys in the local blocks of a query."""
    return _BLOCK * (local if looks_back(site) else 2 * local - 1)


def gathered(site: AttentionSite, config: Config) -> Implementation:
    """Keys gathered for each head, in plain PyTorch."""
    if "right" in config:
        return Gathered(formula(site, config), site.scale)
    return partial(attend, scale=site.scale, pattern=numbers(site, config))


_SITE = AttentionSite(
    path="case", heads=6, kv_heads=2, head_dim=16, v_head_dim=16, dtype="float32", scale=0.25, mask=Causal(),
    batch=3, q_len=520, kv_len=520,
)  # fmt: skip
_SMALL: Config = {"block": 16, "local": 2, "stride": 3}
_FULL, _BOTH = replace(_SITE, mask=Full(), q_len=921, kv_len=921), {**_SMALL, "right": 3}
_MIXED: Config = {"block": 16, "local": 1, "stride": 12, "phase": 5, "dense": 1}

VARIANT = Variant(
    name="s2",
    paper="arXiv:2407.17678",
    fidelity="approximate",
    reference=defined(formula),
    applies=applies,
    configs=configs,
    build=generated(formula, gathered),
    formula=formula,
    elements=ELEMENTS,
    cases=[
        Case(site=_SITE),
        Case(site=replace(_SITE, dtype="bfloat16", q_len=515, kv_len=515), configs=[_SMALL]),
        Case(site=replace(_SITE, mask=Causal() & Padding(), v_head_dim=8), configs=[_MIXED]),
        Case(site=replace(_SITE, kv_heads=6, q_len=500), configs=[{**_SMALL, "alike": True, "phase": 0, "dense": 0}]),
        Case(site=replace(_SITE, q_len=1), configs=[_SMALL]),
        Case(site=replace(_SITE, mask=Causal() & Padding(), q_len=3), configs=[_SMALL]),
        Case(site=replace(_SITE, bias="dense", softcap=2.0), configs=[_SMALL]),
        Case(site=replace(_SITE, sink="learned"), configs=[_SMALL]),
        Case(site=replace(_SITE, normaliser="sigmoid"), configs=[_SMALL]),
        Case(site=replace(_SITE, normaliser="relu"), configs=[_SMALL]),
        Case(site=replace(_FULL, batch=1)),
        Case(site=replace(_FULL, mask=Padding() & Full(), dtype="bfloat16"), configs=[_BOTH]),
        Case(site=replace(_FULL, bias="dense", sink="learned"), configs=[_BOTH]),
    ],
    near_misses=[
        replace(_SITE, dropout_p=0.1),
        replace(_SITE, mask=Causal() & Dense()),
        replace(_SITE, mask=SlidingWindow(255, 0)),
        replace(_SITE, mask=Causal(1)),
        replace(_SITE, q_len=512, kv_len=512),
        replace(_FULL, q_len=896, kv_len=896),
        replace(_FULL, q_len=512, kv_len=4096),
    ],
)
