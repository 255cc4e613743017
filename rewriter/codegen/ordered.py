"""Attention of tokens that each call puts into an order of its own, in which a query sees an interval of the keys.

Where tokens are sorted by what they are near, for example: kernels take them in that order, and visit the blocks that
these intervals touch. Where there are none, tiles of queries whose intervals begin together are attended at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import starmap
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rewriter.codegen import cpp
from rewriter.codegen.blocks import lists_of
from rewriter.codegen.formula import Formula
from rewriter.codegen.gathered import traced
from rewriter.codegen.implementation import Generated
from rewriter.site import AttentionSite

_TOGETHER = 1 << 19
"""Scores of tiles at once, on a CPU."""
_CACHED = 1 << 18
"""Numbers of sorted queries that a core has at hand. Larger memory is fetched from the system for each call."""


def between(b: Any, h: Any, row: Any, j: Any, low: Any, until: Any) -> Any:
    """The keys from `low` until `until`, which is one of them; both int64 (B, Hkv, n)."""
    return (j >= low[b, h, row]) & (j <= until[b, h, row])


def formula(numbers: Mapping[str, Any]) -> Formula:
    """Of sorted tokens; the numbers say how they are sorted."""
    types = {"low": torch.int64, "until": torch.int64}
    return Formula((between,), numbers=numbers, types=types, chosen=True, ordered=True)


@dataclass(frozen=True)
class Order:
    """Tokens of one call, for each key/value head its own.

    queries      (B, Hkv, n): query i of the head's group g is number g * Sq + i
    keys         (B, Hkv, m)
    low, until   (B, Hkv, n): each query sees the keys from one place of this order until another; none if it is lower
    once         does each query stand in it once? Else the mean of all is taken that see a key, and 0 of none
    span         the most keys that a query sees
    tile, tiles  queries that are attended at once where their `low` is one, and how many such tiles are enough
    """

    queries: Tensor
    keys: Tensor
    low: Tensor
    until: Tensor
    once: bool
    span: int
    tile: int
    tiles: int

    @property
    def said(self) -> dict[str, Tensor]:
        """What the formula reads."""
        return {"low": self.low, "until": self.until}

    def back(self, query: Tensor, outs: Iterable[tuple[slice, Tensor]]) -> Tensor:
        """What sorted queries give, (B, heads, n, Dv) of some key/value heads after the other -> (B, H, Sq, Dv), in
        memory (B, Sq, H, Dv).
        """
        (batch, heads, q_len), index, found = query.shape[:3], _beside(query, self.queries), None
        for part, out in outs:
            if found is None:
                shape = batch * q_len * heads, out.shape[3]
                found = out.new_empty(shape) if self.once else out.new_zeros(shape)
            put = found.index_copy_ if self.once else found.index_add_
            put(0, index[:, part].flatten(), out.reshape(-1, out.shape[3]))
        assert found is not None
        if not self.once:
            seen = (self.until >= self.low).flatten().to(found.dtype)
            found = found / seen.new_zeros(len(found)).index_add(0, index.flatten(), seen).clamp(min=1)[:, None]
        return found.view(batch, q_len, heads, found.shape[1]).transpose(1, 2)


_ALL = slice(None)


def table(x: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of (B, H, S, D), one below the other, and which of them are the tokens (B, Hkv, n)."""
    (batch, heads, length, width), own = x.shape, at.shape[1]
    if x.is_contiguous() or not x.transpose(1, 2).is_contiguous():
        first = torch.arange(batch * own, device=at.device).view(batch, own, 1) * (heads // own * length)
        return x.reshape(-1, width), first + at
    return x.transpose(1, 2).reshape(-1, width), _beside(x, at)  # as projections leave them: without a copy


def _beside(x: Tensor, at: Tensor) -> Tensor:
    """Which rows of (B, S, H, D), that is given as (B, H, S, D), are the tokens (B, Hkv, n)."""
    (batch, heads, length), own = x.shape[:3], at.shape[1]
    head = torch.arange(0, heads, heads // own, device=at.device)[:, None]
    place, head = (at, head) if heads == own else (at % length, head + at // length)
    return (torch.arange(0, batch * length, length, device=at.device)[:, None, None] + place) * heads + head


def picked(every: Tensor, index: Tensor) -> Tensor:
    """Rows (., D) at (B, Hkv, n) -> (B, Hkv, n, D)."""
    return every.index_select(0, index.flatten()).view(*index.shape, every.shape[1])


def tiled(query: Tensor, key: Tensor, value: Tensor, order: Order, scale: float) -> Tensor:
    """In plain PyTorch, tiles of queries that see keys from the same on: (B, H, Sq, Dv)."""
    tile, place = order.tile, torch.arange(order.queries.shape[2], device=key.device)
    new = F.pad(order.low[..., 1:] != order.low[..., :-1], (1, 0), value=True)
    rank = place - (place * new).cummax(-1).values
    slot = ((rank % tile == 0).cumsum(-1) - 1) * tile + rank % tile
    index = slot.new_full((*slot.shape[:2], order.tiles * tile), len(place)).scatter(-1, slot, place.expand_as(slot))
    at_q, low, until = (F.pad(t, (0, 1), value=-1).gather(-1, index) for t in (order.queries, order.low, order.until))
    seen = low.clamp(min=0).view(*low.shape[:2], -1, tile)[..., :1] + torch.arange(order.span, device=key.device)
    at_k = order.keys.gather(-1, seen.clamp(max=order.keys.shape[2] - 1).flatten(2))
    tables = [table(x, at) for x, at in ((query, at_q.clamp(min=0)), (key, at_k), (value, at_k))]
    visible = seen.view(-1, 1, 1, order.span) <= until.view(-1, 1, tile, 1)
    few = max(_TOGETHER // (tile * order.span), 1)
    at_once, out = key.device.type != "cpu" or traced(query), []
    for here in [slice(None)] if at_once else [slice(i, i + few) for i in range(0, len(visible), few)]:
        mask = visible[here]
        q, k, v = (picked(every, at.view(len(visible), 1, -1)[here]) for every, at in tables)
        out.append(F.scaled_dot_product_attention(q, k, v, mask, scale=scale))
    whole = picked(*table(torch.cat(out).view(*index.shape, -1), slot))
    return order.back(query, [(_ALL, whole)])


class Ordered(Generated):
    """The fastest of tiles and of kernels of the formula, in the order that `orders` finds from query and key, and from
    the tensors of a call that are the variant's own. What mask and padding say is in these.
    """

    def __init__(self, formula: Formula, site: AttentionSite, orders: Callable[..., Order]) -> None:
        super().__init__(formula, site, self.tiled)
        self.orders = orders

    def tiled(self, query: Tensor, key: Tensor, value: Tensor, *_: Tensor | None, **own: Tensor) -> Tensor:
        """Without a kernel: (B, H, Sq, Dv)."""
        return tiled(query, key, value, self.orders(query, key, **own), self.site.scale)

    def _seen(
        self, given: tuple[Any, ...], own: dict[str, Tensor]
    ) -> tuple[Formula, dict[str, Tensor], tuple[Tensor, Tensor]]:
        (query, key), order = given[:2], self.orders(*given[:2], **own)
        shown = ((query, order.queries), (key, order.keys))
        query, key = (x[:, :1, :1].expand(-1, *at.shape[1:], -1) for x, at in shown)  # of their shapes, without a copy
        return self.formula, order.said, (query, key)

    def _called(self, made: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(query: Tensor, key: Tensor, value: Tensor, *_: Tensor | None, **own: Tensor) -> Tensor:
            order = self.orders(query, key, **own)
            tables = [table(x, at) for x, at in ((query, order.queries), (key, order.keys), (value, order.keys))]
            if isinstance(made, cpp.Attention):
                return order.back(query, self._by_heads(made, order, tables))
            return order.back(query, [(_ALL, made(*starmap(picked, tables), self.site.scale, **order.said))])

        return run

    def _by_heads(
        self, made: cpp.Attention, order: Order, tables: Sequence[tuple[Tensor, Tensor]]
    ) -> Iterator[tuple[slice, Tensor]]:
        """Of some key/value heads after the other, so that sorted operands are small and stay at hand."""
        spec, (batch, heads, n) = made.kernel.spec, order.queries.shape
        query, key = order.queries[..., None], order.keys[..., None]  # of their shapes
        runs = lists_of(self.formula)(query, key, order.said, spec.listed, spec.block_n)
        read = cpp.operands(self.formula, query, key, order.said)
        few = max(_CACHED * torch.get_num_threads() // (batch * n * spec.head_dim), 1)
        for part in (slice(first, first + few) for first in range(0, heads, few)):
            q, k, v = (picked(every, index[:, part]) for every, index in tables)
            said = [t[:, part] for t in read]
            yield part, made.kernel(q, k, v, runs.first[:, part], runs.runs, scale=self.site.scale, captures=said)
