"""Which blocks of keys a block of queries has to visit, from the mask's expression alone.

The expression is evaluated on intervals: of each pair of blocks, the smallest and the largest value that each of its
parts can have. Where the mask can only be False the block is skipped, where it can only be True it needs no mask; what
intervals cannot decide is visited with the mask, so a coarse answer costs time and never exactness. The work is
O(blocks^2) on vectors, a part at a time; what is stored are runs of blocks: linear in the length for windows and causal
masks.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from rewriter.codegen.expression import Expression, kinds_of
from rewriter.codegen.formula import Formula
from rewriter.codegen.intervals import Interval, interval

_AT_ONCE = 1 << 20
"""Pairs of blocks that are looked at together: some tens of MB."""
_MOST_PAIRS = 1 << 22
"""Pairs of blocks above which nobody estimates, and pairs of tokens that are looked at together."""
_LOOK = 64
"""The side of the blocks in which pairs are counted."""
_CLEARLY, _MOST_OTHERS = 0.92, 2
T = TypeVar("T")


@dataclass(frozen=True)
class Runs:
    """Runs of key blocks. `first` is int32 (Bm, Hm, Nq + 1), where Bm and Hm are 1 if the mask is the same for all:
    query block m of one (b, h) visits `runs[first[b, h, m] : first[b, h, m + 1]]`, int32 (n, 3): the first block, one
    past the last, and 1 where the mask has to be asked, else 0.
    """

    first: Tensor
    runs: Tensor

    def to(self, device: torch.device) -> Runs:
        """The same on another device."""
        return Runs(self.first.to(device), self.runs.to(device))

    @property
    def visited(self) -> int:
        """How many pairs of blocks are visited."""
        return int((self.runs[:, 1] - self.runs[:, 0]).sum())


def runs_of(
    mask: Expression | None,
    *,
    batch: int,
    heads: int,
    q_len: int,
    kv_len: int,
    block_m: int,
    block_n: int,
    tensors: Mapping[str, Tensor] | None = None,
    transposed: bool = False,
) -> Runs:
    """The runs for these sizes. With `transposed`: for each block of keys, the blocks of queries that visit it. In a
    block that is not whole the mask has to be asked.
    """
    q_blocks, k_blocks = -(-q_len // block_m), -(-kv_len // block_n)
    known = {name: tensor.cpu() for name, tensor in (tensors or {}).items()}
    owners, others = (k_blocks, q_blocks) if transposed else (q_blocks, k_blocks)
    copies = (batch if mask and mask.uses("b") else 1) * (heads if mask and mask.uses("h") else 1)
    at_once = max(_AT_ONCE // max(others * copies, 1), 1)
    parts = []
    for start in range(0, owners, at_once):
        own, every = torch.arange(start, min(start + at_once, owners)), torch.arange(others)
        rows, columns = (every, own) if transposed else (own, every)
        m, n = rows[:, None] * block_m, columns * block_n
        last = (m + block_m).clamp(max=q_len) - 1
        past = kv_len - q_len
        given: dict[str, Interval] = {
            "row": (m, last),
            "i": (m + past, last + past),
            "j": (n, (n + block_n).clamp(max=kv_len) - 1),
            "b": (torch.arange(batch).view(-1, 1, 1, 1),) * 2,
            "h": (torch.arange(heads).view(1, -1, 1, 1),) * 2,
        }
        sure, possible = (True, True) if mask is None else interval(mask, given, known)
        state = torch.as_tensor(sure).to(torch.int8) + torch.as_tensor(possible).to(torch.int8)
        shape = (*(1,) * (4 - state.dim()), *state.shape)
        state = state.view(shape).expand(*shape[:2], len(rows), len(columns)).clone()
        if kv_len % block_n:
            state[..., columns == k_blocks - 1] = state[..., columns == k_blocks - 1].clamp(max=1)
        if transposed and q_len % block_m:
            state[..., -1, :] = state[..., -1, :].clamp(max=1)
        parts.append(_runs(state.mT if transposed else state))
    return _joined(parts)


def _runs(state: Tensor) -> tuple[Tensor, Tensor]:
    """(runs a row has, all of them, row after row) from int8 (Bm, Hm, rows, columns): 0 skipped, 1 with the mask, 2
    without.
    """
    before, after = torch.zeros_like(state), torch.zeros_like(state)
    before[..., 1:], after[..., :-1] = state[..., :-1], state[..., 1:]
    begins = (state > 0) & (state != before)
    ends = (state > 0) & (state != after)
    where = begins.nonzero(as_tuple=True)
    runs = torch.stack([where[-1], ends.nonzero(as_tuple=True)[-1] + 1, (state[where] == 1).long()], -1)
    return begins.sum(-1), runs


def _joined(parts: Sequence[tuple[Tensor, Tensor]]) -> Runs:
    """Of rows that were looked at part by part: those of one (b, h) follow one another."""
    counts = torch.cat([count for count, _ in parts], 2)
    offsets = counts.flatten().cumsum(0)
    first = torch.cat([offsets.new_zeros(1), offsets])
    per_row = counts.shape[-1]
    rows = torch.cat([first[:-1].view(counts.shape), first[per_row::per_row].view(*counts.shape[:-1], 1)], -1)
    pieces = [runs.split(count.sum(-1).flatten().tolist()) for count, runs in parts]
    runs = torch.cat([piece for own in zip(*pieces, strict=True) for piece in own])
    return Runs(rows.to(torch.int32), runs.to(torch.int32).contiguous())


class Lists:
    """The runs of a formula's mask, remembered for each size while the tensors that it reads are the same."""

    def __init__(self, formula: Formula) -> None:
        self.formula = formula
        self._known: dict[Any, tuple[list[_Read], Runs]] = {}

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        tensors: Mapping[str, Tensor],
        block_m: int,
        block_n: int,
        *,
        transposed: bool = False,
    ) -> Runs:
        """Those of a call, on its device."""
        mask = self.formula.expressions(kinds_of(tensors))[0]
        read = [tensors[name] for name in (mask.captured if mask else ())]
        (batch, heads, q_len), kv_len = query.shape[:3], key.shape[2]
        sizes = {
            "batch": batch,
            "heads": heads,
            "q_len": q_len,
            "kv_len": kv_len,
            "block_m": block_m,
            "block_n": block_n,
        }
        place = (*sizes.values(), transposed, query.device, *map(id, read))
        held, found = self._known.get(place, ([], None))
        if found is None or not all(own.is_still(tensor) for own, tensor in zip(held, read, strict=True)):
            if len(self._known) > 64:
                self._known.clear()
            found = runs_of(mask, **sizes, tensors=tensors, transposed=transposed).to(query.device)
            # What is made anew for each call has lists as long as it lives.
            self._known[place] = [_Read(tensor, lambda _: self._known.pop(place, None)) for tensor in read], found
        return found


class _Read:
    """A tensor as it was read, to be told from what it becomes; `gone` is called when it is no more."""

    def __init__(self, tensor: Tensor, gone: Callable[[Any], object]) -> None:
        self._tensor = weakref.ref(tensor, gone)
        # In inference mode nothing counts what is written: only values tell.
        self._told = tensor.clone() if tensor.is_inference() else tensor._version

    def is_still(self, tensor: Tensor) -> bool:
        if self._tensor() is not tensor:
            return False
        return torch.equal(self._told, tensor) if isinstance(self._told, Tensor) else tensor._version == self._told


@cache
def lists_of(formula: Formula) -> Lists:
    """The lists of a formula, which all layers share."""
    return Lists(formula)


def pairs_of(formula: Formula, query: Tensor, key: Tensor, tensors: Mapping[str, Tensor]) -> int:
    """How many pairs of a query and a key a call shows, over batch and heads. Only blocks that are shown in part are
    looked into.
    """
    (batch, heads, q_len), kv_len = query.shape[:3], key.shape[2]
    runs = lists_of(formula)(query, key, tensors, _LOOK, _LOOK)
    first, listed = runs.first.cpu().long(), runs.runs.cpu().long()
    own = (first[..., 1:] - first[..., :-1]).flatten()
    row = torch.arange(len(own)).repeat_interleave(own)  # of each run
    length = listed[:, 1] - listed[:, 0]
    within = torch.arange(int(length.sum())) - (length.cumsum(0) - length).repeat_interleave(length)
    row, asked = row.repeat_interleave(length), listed[:, 2].repeat_interleave(length) > 0
    column = listed[:, 0].repeat_interleave(length) + within
    q_blocks, copies = first.shape[2] - 1, batch * heads // (first.shape[0] * first.shape[1])
    total = int((q_len - row[~asked] % q_blocks * _LOOK).clamp(max=_LOOK).sum()) * _LOOK
    step = torch.arange(_LOOK)
    known = {name: tensor.cpu() for name, tensor in tensors.items()}
    for part in asked.nonzero()[:, 0].split(_MOST_PAIRS // _LOOK**2):
        head, at = row[part] // q_blocks, row[part] % q_blocks
        rows, j = (x[:, None] * _LOOK + step for x in (at, column[part]))
        rows, j = rows[:, :, None], j[:, None]
        b, h = (x[:, None, None] for x in (head // first.shape[1], head % first.shape[1]))
        seen = formula.visible(known, b=b, h=h, i=rows + kv_len - q_len, j=j, row=rows)
        total += int((seen & (rows < q_len) & (j < kv_len)).sum())
    return total * copies


def work(
    formula: Formula,
    query: Tensor,
    key: Tensor,
    tensors: Mapping[str, Tensor],
    block_m: int,
    block_n: int,
    *,
    per_key: float,
    per_query: float,
) -> float:
    """An estimate, in scores: of each visited pair of blocks its scores, and what a key and a query of it cost."""
    if -(-query.shape[2] // block_m) * -(-key.shape[2] // block_n) > _MOST_PAIRS:
        return math.inf  # the lists alone would take long
    visited = lists_of(formula)(query, key, tensors, block_m, block_n).visited
    return visited * (block_m * block_n + per_key * block_n + per_query * block_m)


def promising(default: T, others: Iterable[T], cost: Callable[[T], float]) -> list[T]:
    """The default, and the best others that should cost clearly less."""
    bound = _CLEARLY * cost(default)
    less = [(estimate, each) for each in others if each != default and (estimate := cost(each)) < bound]
    return [default, *(each for _, each in sorted(less, key=lambda pair: pair[0])[:_MOST_OTHERS])]
