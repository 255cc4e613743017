"""What there is for every formula where no kernel serves: blocks of queries, each with copies of the keys that it sees.

The blocks that a block of queries visits are those of the kernels (`blocks.py`), gathered and multiplied in batches, so
that memory and work are what the mask shows, in whole blocks, with gradients and without a compiler. The unfused form
of neighborhood attention (arXiv:2403.04690, section 3.2) is this with the tokens in the order of boxes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.autograd import forward_ad
from torch.nn import functional as F

from rewriter.codegen.blocks import Runs, lists_of
from rewriter.codegen.formula import Formula, passed, reading

BLOCK = 64
_TOGETHER = 8  # blocks of queries in one call
_NO_COPY = 1.25
"""How many times the keys that are needed a plain slice of them may hold."""


class Gathered:
    """An attention of one formula and scale, in plain PyTorch: (B, H, Sq, Dv)."""

    def __init__(self, formula: Formula, scale: float) -> None:
        self.formula, self.scale = formula, scale

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, padding: Tensor | None, /, *sink: Tensor
    ) -> Tensor:
        """The definition where the blocks cannot be looked at, or are one."""
        tensors, own = passed(mask, padding), sink[0] if sink else None
        formula = reading(self.formula, tensors)
        given = (query, key, value, *tensors.values(), *sink)
        if query.shape[2] <= BLOCK or not formula.masks or any(traced(t) or transformed(t) for t in given):
            return formula.reference(query, key, value, self.scale, sink=own, **tensors)
        call = _Call(formula, self.scale, query, key, value, own, tensors)
        visits = _visits(lists_of(formula)(query, key, tensors, BLOCK, BLOCK), -(-key.shape[2] // BLOCK))
        starts = range(0, visits.shape[2], _TOGETHER)
        return torch.cat([call.rows(start * BLOCK, visits[:, :, start : start + _TOGETHER]) for start in starts], 2)


@dataclass(frozen=True)
class _Call:
    formula: Formula
    scale: float
    query: Tensor
    key: Tensor
    value: Tensor
    sink: Tensor | None
    tensors: Mapping[str, Tensor]

    def rows(self, first: int, visits: Tensor) -> Tensor:
        """Blocks of queries from the first on, and their part of `_visits`."""
        query = self.query[:, :, first : first + visits.shape[2] * BLOCK]
        visited = visits > 0
        seen = visited.any(2).any(1).any(0).nonzero()[:, 0]
        if len(seen) == 0:
            return query.new_zeros(*query.shape[:3], self.value.shape[3])
        low, high = int(seen[0]), int(seen[-1]) + 1
        most = int(visited.sum(3).max())
        if high - low <= _NO_COPY * most:  # nearly all of them see nearly the same
            return self._of_slice(query, first, slice(low * BLOCK, high * BLOCK))
        order = visited.to(torch.uint8).argsort(dim=3, descending=True, stable=True)[..., :most]
        return self._of_copies(query, first, order, visits.gather(3, order))

    def _of_slice(self, query: Tensor, first: int, keys: slice) -> Tensor:
        row = torch.arange(first, first + query.shape[2], device=query.device).view(1, 1, -1, 1)
        j = torch.arange(self.key.shape[2], device=query.device)[keys].view(1, 1, 1, -1)
        return self._attended(query, self.key[:, :, keys], self.value[:, :, keys], self._places(row, j))

    def _of_copies(self, query: Tensor, first: int, order: Tensor, visits: Tensor) -> Tensor:
        """Each block of queries is a sequence of its own: (B, H, blocks * 64, D) -> (B * blocks, H, 64, D). `order` has
        the blocks of keys that it sees, with the `visits` of each, and others where it sees fewer.
        """
        (batch, heads, length, _), (kv_heads, kv_len), blocks = query.shape, self.key.shape[1:3], visits.shape[2]
        query = F.pad(query, (0, 0, 0, blocks * BLOCK - length)).unflatten(2, (blocks, BLOCK))
        within = torch.arange(BLOCK, device=query.device)
        j = (order[..., None] * BLOCK + within).flatten(3)
        real = (visits > 0).repeat_interleave(BLOCK, 3) & (j < kv_len)
        j = j.clamp(max=kv_len - 1)
        copied = heads if visits.shape[1] > 1 else kv_heads
        b, h = (torch.arange(n, device=query.device) for n in (batch, copied))
        index = b.view(-1, 1, 1, 1), h.view(1, -1, 1, 1) // (copied // kv_heads), j

        def apart(t: Tensor) -> Tensor:
            return t.expand(batch, *t.shape[1:]).transpose(1, 2).flatten(0, 1)

        row = (first + torch.arange(blocks * BLOCK, device=query.device)).clamp(max=self.query.shape[2] - 1)
        at = self._places(apart(row.view(1, 1, blocks, BLOCK, 1)), apart(j)[:, :, None])
        at["b"] = at["b"].repeat_interleave(blocks, 0)
        keys, values = apart(self.key[index]), apart(self.value[index])
        asked = bool((visits == 1).any())
        out = self._attended(apart(query), keys, values, at, apart(real)[:, :, None], asked=asked)
        return torch.unflatten(out, 0, (batch, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :length]

    def _places(self, row: Tensor, j: Tensor) -> dict[str, Tensor]:
        b, h = (torch.arange(n, device=row.device) for n in self.query.shape[:2])
        past = self.key.shape[2] - self.query.shape[2]
        return {"b": b.view(-1, 1, 1, 1), "h": h.view(1, -1, 1, 1), "row": row, "i": row + past, "j": j}

    def _attended(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        at: Mapping[str, Tensor],
        real: Tensor | None = None,
        *,
        asked: bool = True,
    ) -> Tensor:
        """Queries and keys that stand `at` these indices; keys that are not `real` are seen by none. A mask that hides
        nothing here need not be `asked`.
        """
        formula = self.formula
        if formula.scores or formula.normaliser != "softmax" or formula.sink or query.shape[3] != value.shape[3]:
            return formula.attended(query, key, value, self.scale, at, sink=self.sink, real=real, **self.tensors)
        seen = formula.visible(self.tensors, **at) if asked else None
        if real is not None:
            seen = real if seen is None else seen & real
        grouped = query.shape[1] != key.shape[1]
        out: Tensor = F.scaled_dot_product_attention(query, key, value, seen, scale=self.scale, enable_gqa=grouped)
        return out


def _visits(runs: Runs, k_blocks: int) -> Tensor:
    """Int64 (B or 1, H or 1, query blocks, key blocks): 0 not visited, 1 with the mask, 2 where it hides nothing."""
    first = runs.first.long()
    own = (first[..., 1:] - first[..., :-1]).flatten()
    row = torch.arange(len(own), device=own.device).repeat_interleave(own)
    steps = own.new_zeros(len(own), k_blocks + 1)
    start, stop, asked = runs.runs.long().unbind(1)
    steps.index_put_((row, start), 2 - asked, accumulate=True)
    steps.index_put_((row, stop), asked - 2, accumulate=True)
    return steps.cumsum(1)[:, :-1].view(*first.shape[:2], -1, k_blocks)


def traced(tensor: Tensor) -> bool:
    """Does a call on this become part of a graph? No kernel can be launched then, and nothing be looked at."""
    return torch.compiler.is_dynamo_compiling() or is_fake(tensor)


def transformed(tensor: Any) -> bool:
    """Is a forward derivative, or a batch of calls, carried by this?"""
    return forward_ad.unpack_dual(tensor).tangent is not None or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
