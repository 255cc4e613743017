"""Attention over blocks and inside the own block: Block Transformer (Ho et al. 2024, arXiv:2406.02657), at one site.

The paper splits a model in two: an embedder makes one vector of each block of b tokens, the lower half of the layers
attends to the blocks before (global), the upper half inside the own block (local). Here each attention of a pretrained
model does both under one softmax, and starts from the model's own weights:

    k'_n = sum_t w_t k_{nb+t} / c_n,  v'_n = sum_t u_t v_{nb+t} / c_n    over the c_n tokens of block n that are real
    out_i = softmax over the keys j <= i of the own block, of scale * q_i k_j, and over the blocks n before it, of
            scale * q_i k'_n + log(c_n) + m, of the values v_j and v'_n

w, u = 1 and m = 0 at the start, for each key/value head: the paper's embedder begins with the mean of a block too, and
log(c_n) gives a block the weight of its tokens, so that nothing changes where keys and values of a block are equal.
Exact while all keys are in one block; else w, u and m are fitted. Padding counts for nothing.

Blocks are counted from the first key: a finished one does not change while a cache grows. A query sees N / b + b keys
at most. Kernels are generated for those of the blocks and behind them the tokens, and visit no others, in whole blocks
of theirs; without one, as for gradients on a CPU, some 256 queries are scored against all that any of them sees. Memory
is O(N). The cache of a host still holds all keys, and a step of decoding reads them all to make the blocks anew, but
attends to no more than it sees. `Cache` is one that holds N / b + b of them: a key for each finished block and those of
the last one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewriter.codegen.formula import Formula
from rewriter.codegen.implementation import Generated
from rewriter.errors import OptionError
from rewriter.kernels.exact import sdpa
from rewriter.site import AttentionSite, Causal, Dense, Full, Padding, Refusal, SlidingWindow
from rewriter.target import Target
from rewriter.variant import Case, Config, Implementation, Variant

_BLOCKS = (4, 16, 64)  # the paper's first
_ROWS = 256  # queries in one call of the plain implementation
_TOKENS = (2, 2, 1)  # the axes of tokens, or of blocks, in keys, values and what is said of them


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    padding: Tensor | None,
    site: AttentionSite,
    config: Config,
    module: GlobalLocal,
) -> Tensor:
    """The definition with both matrices of scores: (B, H, Sq, Dv). A query that sees nothing gives zeros."""
    size, groups = module.block, query.shape[1] // key.shape[1]
    real = key.new_ones(key.shape[0], key.shape[2], dtype=torch.bool) if padding is None else padding
    blocks, values, counts = module.embedded(key, value, real)
    i = torch.arange(key.shape[2] - query.shape[2], key.shape[2], device=key.device)[:, None]
    j, n = (torch.arange(t.shape[2], device=key.device) for t in (key, blocks))
    near = (j <= i) & (i // size == j // size) & real[:, None, None]
    far = (n < i // size) & (counts > 0)[:, None, None]
    keys, blocks, value, values = (t.repeat_interleave(groups, 1) for t in (key, blocks, value, values))
    mass = counts.clamp(min=1).log()[:, None, None] + module.mass.repeat_interleave(groups)[:, None, None]
    scores = torch.cat([query @ keys.mT * site.scale, query @ blocks.mT * site.scale + mass.to(query.dtype)], -1)
    seen = torch.cat([near.expand(len(key), -1, -1, -1), far.expand(len(key), -1, -1, -1)], -1)
    weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), -1).masked_fill(~seen, 0.0)
    return weights @ torch.cat([value, values], 2)


def seen(i: Any, j: Any, first: Any, block: int) -> Any:
    """The first token stands at `first[0]`, behind a key of each block before the last query's, in block `first[1]`."""
    place, token = i - first[0], j - first[0]
    own = (place // block).clamp(min=0)
    return ((token >= own * block) & (token <= place)) | ((token < 0) & (j < own + first[1]))


def weighed(s: Any, b: Any, h: Any, j: Any, mass: Any, group: int) -> Any:
    """What is added to the score of a key, (B, Hkv, n): log(c_n) + m, and 0 for a token."""
    return s + mass[b, h // group, j]


def formula(site: AttentionSite, config: Config) -> Formula:
    """Of the keys of all blocks before the last query's, and then the tokens."""
    block = int(config["block"])
    if block < 1:
        raise OptionError(f"blocks of {block} tokens: a block has at least one")
    numbers = {"block": block, "group": site.heads // site.kv_heads}
    return Formula((seen,), (weighed,), numbers, types={"first": torch.int64, "mass": torch.float32})


def read(query: Tensor, key: Tensor, padding: Tensor | None, *, mass: Tensor, block: int) -> dict[str, Tensor]:
    """What the formula reads, from the mass of the blocks that are among the keys, (B, Hkv, n)."""
    before, tokens = mass.shape[2], key.shape[2] - mass.shape[2]
    return {"mass": F.pad(mass, (0, tokens)), "first": _first(before, before - (tokens - 1) // block, key.device)}


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _first(*numbers: Any) -> Tensor:
    """The same tensor for all layers, for which lists of blocks are remembered."""
    *places, device = numbers
    return torch.tensor(places, device=device)


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, padding: Tensor | None, *, mass: Tensor, block: int,
    scale: float,
) -> Tensor:  # fmt: skip
    """Some queries at a time, with a copy of the keys that any of them sees. `mask` is not read."""
    before, heads = mass.shape[2], query.shape[1]
    kv_len = key.shape[2] - before  # of the tokens, from the first of which positions are counted
    past, gone = kv_len - query.shape[2], before - (kv_len - 1) // block
    if padding is not None:
        mass = mass.masked_fill(~padding[:, None, :before], float("-inf"))
    mass = mass.repeat_interleave(heads // mass.shape[1], 1)
    step, bounds, out = max(_ROWS // block, 1) * block, [max(past, 0)], []
    while bounds[-1] < kv_len:
        bounds.append(min(bounds[-1] // block * block + step, kv_len))
    # The last see the most: what they leave free holds all others, where growing parts would each be new memory.
    for start, stop in reversed([*itertools.pairwise(bounds)]):
        first, whole = start // block * block, (stop - 1) // block + gone  # blocks that some query sees as one key
        own = slice(before + first, before + stop)
        i = torch.arange(start, stop, device=query.device)[:, None]
        j, n = torch.arange(first, stop, device=query.device), torch.arange(whole, device=query.device)
        far = mass[:, :, None, :whole].masked_fill(n >= i // block + gone, float("-inf"))
        shown = ((j <= i) & (i // block == j // block))[None, None]
        if padding is not None:
            shown = shown & padding[:, None, None, own]
        near = far.new_zeros(shown.shape).masked_fill_(~shown, float("-inf")).expand(len(far), heads, -1, -1)
        o = sdpa.attend(
            query[:, :, start - past : stop - past],
            torch.cat([key[:, :, :whole], key[:, :, own]], 2),
            torch.cat([value[:, :, :whole], value[:, :, own]], 2),
            torch.cat([far, near], -1),
            None,
            scale=scale,
            positional=Full(),
        )
        out.append(o.transpose(1, 2))  # in memory (B, Sq, H, Dv)
    if past < 0:  # before the first key nothing is seen
        out.append(query.new_zeros(len(query), -past, heads, value.shape[3]))
    return torch.cat(out[::-1], 1).transpose(1, 2)


class GlobalLocal(nn.Module):
    """An `Implementation` with the embedder of each key/value head, in float32: the weights of the places of a block in
    its key and in its value, (Hkv, b) each, and what is added to the logarithm of its tokens, (Hkv,).
    """

    def __init__(self, site: AttentionSite, config: Config) -> None:
        super().__init__()
        self.block = int(config["block"])
        plain = partial(attend, block=self.block, scale=site.scale)
        self.inner = Generated(formula(site, config), site, plain, partial(read, block=self.block))
        shape = (site.kv_heads, self.block)
        self.key_weights = nn.Parameter(torch.ones(shape, device=site.device))
        self.value_weights = nn.Parameter(torch.ones(shape, device=site.device))
        self.mass = nn.Parameter(torch.zeros(site.kv_heads, device=site.device))

    def embedded(self, key: Tensor, value: Tensor, real: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Key and value of each whole block, (B, Hkv, n, D), and how many of its tokens are real, float (B, n)."""
        count = key.shape[2] // self.block
        whole, sizes = slice(count * self.block), (count, self.block)
        real = real[:, whole].unflatten(1, sizes)
        counts = real.sum(-1).float()

        def mean(t: Tensor, weights: Tensor) -> Tensor:
            shares = weights[:, None] * real[:, None] / counts.clamp(min=1)[:, None, :, None]
            found: Tensor = shares.to(t.dtype)[..., None, :] @ t[:, :, whole].unflatten(2, sizes)
            return found.squeeze(-2)

        return mean(key, self.key_weights), mean(value, self.value_weights), counts

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, padding: Tensor | None) -> Tensor:
        """`mask` is not read: the site's mask is causal, and `padding`."""
        operands, mass = self._of_all(query, key, value, padding)
        return self.inner(*operands, mass=mass)

    def pairs(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, padding: Tensor | None) -> int:
        """How many pairs of a query and a token or a block this call shows."""
        operands, mass = self._of_all(query, key, value, padding)
        return self.inner.pairs(*operands, mass=mass)

    def _of_all(self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None) -> tuple[Any, Tensor]:
        real = key.new_ones(key.shape[0], key.shape[2], dtype=torch.bool) if padding is None else padding
        gone = max(key.shape[2] - query.shape[2], 0) // self.block  # before the first query's
        rest, embedded = slice(gone * self.block, None), self.embedded(key, value, real)
        padding = None if padding is None else padding[:, rest]
        return self.operands(query, key[:, :, rest], value[:, :, rest], padding, embedded, gone)

    def operands(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, embedded: Sequence[Tensor], gone: int
    ) -> tuple[Any, Tensor]:
        """What `inner` takes: operands, and the mass of blocks. Given are the last queries, what is `embedded` of all
        blocks, and the tokens behind the first `gone` ones.
        """
        before = gone + (key.shape[2] - 1) // self.block
        blocks, values, counts = (t.narrow(axis, 0, before) for t, axis in zip(embedded, _TOKENS, strict=True))
        real = None if padding is None else torch.cat([counts > 0, padding], 1)
        mass = counts.clamp(min=1).log()[:, None] + self.mass[:, None]
        return (query, torch.cat([blocks, key], 2), torch.cat([values, value], 2), None, real), mass


class Cache:
    """What decoding needs of the past, (B, Hkv, N / b, D) and at most b tokens, instead of all N of them."""

    def __init__(self, module: GlobalLocal) -> None:
        self.module, self.gone = module, 0
        self.finished: tuple[Tensor, ...] = ()
        self.last: tuple[Tensor, ...] = ()

    def step(self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None = None) -> Tensor:
        """Add tokens, and attend their queries: (B, H, n, D), (B, Hkv, n, D), (B, Hkv, n, Dv), bool (B, n) -> (B, H, n,
        Dv). The same as `GlobalLocal.forward` gives of these queries with all keys so far.
        """
        real = key.new_ones(key.shape[0], key.shape[2], dtype=torch.bool) if padding is None else padding
        tokens = _joined(self.last, (key, value, real))
        keys, values, real = tokens
        blocks = _joined(self.finished, self.module.embedded(keys, values, real))
        operands, mass = self.module.operands(query, keys, values, real, blocks, self.gone)
        out = self.module.inner(*operands, mass=mass)
        done, rest = divmod(keys.shape[2], self.module.block)
        begin = done * self.module.block
        # Views would keep what is gone.
        self.last = tuple(t.narrow(axis, begin, rest).clone() for t, axis in zip(tokens, _TOKENS, strict=True))
        self.finished, self.gone = blocks, self.gone + done
        return out

    @property
    def keys(self) -> int:
        """How many are held for each head."""
        return self.gone + (self.last[0].shape[2] if self.last else 0)


def _joined(before: Sequence[Tensor], after: Sequence[Tensor]) -> tuple[Tensor, ...]:
    if not before:
        return tuple(after)
    return tuple(torch.cat(each, axis) for *each, axis in zip(before, after, _TOKENS, strict=True))


def applies(site: AttentionSite, target: Target) -> bool | Refusal:
    """Causal self-attention, with or without padding, over more than a few of the smallest blocks."""
    reason = ""
    if site.dropout_p > 0:
        reason = f"dropout of {site.dropout_p} would have other random numbers, and fewer keys to drop"
    elif site.mask.has(Dense):
        reason = "the mask is a tensor of which nothing is known, so it is not known either what it hides of a block"
    elif site.mask.positional != Causal() and not site.single_query_decode:
        reason = f"blocks before a query are defined for a causal mask, and this one is {site.mask}"
    elif site.kv_len is not None and not configs(site, target):
        reason = f"{site.kv_len} keys are too few for blocks of {_BLOCKS[0]}: own block and blocks before would be half"
    return Refusal(reason, site.path, site.source) if reason else True


def configs(site: AttentionSite, target: Target) -> list[Config]:
    """The smallest blocks first; none where own block and blocks before would be half of the keys."""
    length = site.kv_len
    return [{"block": b} for b in _BLOCKS if length is None or 2 * (b + length // b) < length]


def build(site: AttentionSite, config: Config) -> Implementation:
    """The module, whose embedder is the mean."""
    return GlobalLocal(site, config)


_SITE = AttentionSite(
    path="case", heads=6, kv_heads=2, head_dim=16, v_head_dim=16, dtype="float32", scale=0.25, mask=Causal(),
    batch=3, q_len=300, kv_len=300,
)  # fmt: skip

VARIANT = Variant(
    name="global_local",
    paper="arXiv:2406.02657, section 2",
    fidelity="learned",
    reference=reference,
    applies=applies,
    configs=configs,
    build=build,
    formula=formula,
    cases=[
        Case(site=_SITE),
        Case(site=replace(_SITE, dtype="bfloat16", q_len=515, kv_len=515), configs=[{"block": 64}]),
        Case(site=replace(_SITE, mask=Causal() & Padding(), v_head_dim=8), configs=[{"block": 7}]),
        Case(site=replace(_SITE, mask=Causal() & Padding(), kv_heads=6), configs=[{"block": 16}]),
        Case(site=replace(_SITE, q_len=137), configs=[{"block": 300}]),
        Case(site=replace(_SITE, mask=Causal() & Padding(), q_len=1)),
    ],
    near_misses=[
        replace(_SITE, dropout_p=0.1),
        replace(_SITE, mask=Causal() & Dense()),
        replace(_SITE, mask=SlidingWindow(255, 0)),
        replace(_SITE, mask=Causal(1)),
        replace(_SITE, q_len=12, kv_len=12),
    ],
)
