"""The kernels of the linear family with their arguments: what one call launches, forward and backward."""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rewriter.codegen.linear_formula import LEAST, LinearFormula, LinearState
from rewriter.codegen.linear_fragments import FLAT, LinearBlocks, source
from rewriter.codegen.source import loaded
from rewriter.errors import OptionError

_PARTS = 16  # into so many the keys are cut where one state serves all queries


@cache
def module_of(
    formula: LinearFormula, blocks: LinearBlocks, features: int, values: int, dtype: torch.dtype, padded: bool,
    backward: bool,
) -> ModuleType:  # fmt: skip
    """The generated kernels for these operands."""
    sizes: dict[str, Any] = {"features": features, "values": values, "dtype": dtype}
    return loaded(source(formula, blocks, **sizes, padded=padded, backward=backward), "triton")


def cumulated(log_decay: Tensor | None, padding: Tensor | None, key: Tensor, count: int, chunk: int) -> Tensor | None:
    """The logarithms of the decay since the chunk began: float32 (B, Hs, N[, F]), N filled up to whole chunks."""
    if log_decay is None:
        return None
    batch, kv_len = key.shape[0], key.shape[2]
    channels = log_decay.dim() == 4
    log_decay = log_decay.float().clamp(min=LEAST)
    if log_decay.dim() == 1:
        log_decay = log_decay[None, :, None].expand(1, -1, kv_len)
    log_decay = log_decay if channels else log_decay[..., None]
    if padding is not None:
        log_decay = log_decay.masked_fill(~padding[:, None, :, None], 0.0)
    sums: Tensor = F.pad(log_decay, (0, 0, 0, -kv_len % chunk)).unflatten(2, (-1, chunk)).cumsum(3).flatten(2, 3)
    if sums.shape[1] < count:
        sums = sums.repeat_interleave(count // sums.shape[1], 1)
    sums = sums.expand(batch, -1, -1, -1)
    if not channels:
        return sums.squeeze(3)
    return sums if sums.stride(3) == 1 else sums.contiguous()


def flat(state: LinearState, formula: LinearFormula, query: Tensor, value: Tensor, count: int) -> Tensor:
    """(B, Hs, SIZE): the sums, and the totals behind them."""
    shape = (len(query), count, query.shape[3], value.shape[3])
    if state.sums.shape != shape or (state.totals is not None) != formula.normalised:
        raise OptionError(f"the state's sums are {tuple(state.sums.shape)}, not {shape}, or its totals are not wanted")
    sums = state.sums.float().flatten(2)
    return (sums if state.totals is None else torch.cat([sums, state.totals.float()], 2)).contiguous()


def unflat(flat: Tensor, features: int, values: int) -> LinearState:
    sums = flat[..., : features * values].unflatten(-1, (features, values))
    return LinearState(sums, flat[..., features * values :] if flat.shape[-1] > features * values else None)


def empty(formula: LinearFormula, query: Tensor, value: Tensor, count: int, chunks: int) -> Tensor:
    """Room for the states of each chunk."""
    size = query.shape[3] * (value.shape[3] + formula.normalised)
    shape = (len(query), count, chunks, size) if chunks > 1 else (len(query), count, size)
    return torch.empty(shape, dtype=torch.float32, device=query.device)


def operands(
    formula: LinearFormula, query: Tensor, key: Tensor, value: Tensor, gates: Tensor | None, padding: Tensor | None,
    count: int, chunks: int,
) -> tuple[Any, ...]:  # fmt: skip
    """What every kernel is given first."""
    past = key.shape[2] - query.shape[2] if formula.causal else 0
    padding = None if padding is None else padding.contiguous()
    return (
        query, key, value, gates, padding, *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        *_steps(gates), key.shape[2], query.shape[1], count, key.shape[1], value.shape[1], query.shape[2],
        key.shape[2], past, chunks,
    )  # fmt: skip


def _steps(gates: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if gates is None else gates.stride()[:3]


class Launch:
    """The kernels of one call, with their arguments."""

    def __init__(
        self, formula: LinearFormula, blocks: LinearBlocks, scale: float, count: int, query: Tensor, key: Tensor,
        value: Tensor, gates: Tensor | None, padding: Tensor | None,
    ) -> None:  # fmt: skip
        self.formula, self.blocks, self.scale, self.count = formula, blocks, scale, count
        self.gates, self.padding = gates, padding
        self.query, self.key, self.value = query, key, value
        self.options = {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages}
        features, width = query.shape[3], value.shape[3]
        block_f, block_e = blocks.widths(features, width)
        self.f_tiles, self.e_tiles = -(-features // block_f), -(-width // block_e)
        rows, self.chunk = blocks.rows(formula), blocks.chunk
        past = key.shape[2] - query.shape[2] if formula.causal else 0
        self.q_blocks = -(-(past + query.shape[2]) // rows) - past // rows
        self.k_blocks = -(-key.shape[2] // rows)

    def _module(self, *, backward: bool = True) -> ModuleType:
        sizes = self.query.shape[3], self.value.shape[3]
        return module_of(self.formula, self.blocks, *sizes, self.query.dtype, self.padding is not None, backward)

    def _parts(self, length: int) -> tuple[int, int]:
        """How many states there are, and the chunks of each: one each, or few parts where no order matters."""
        chunks = -(-length // self.chunk)
        per = 1 if self.formula.causal else -(-chunks // _PARTS)
        return -(-chunks // per), per

    def _given(self, chunks: int) -> tuple[Any, ...]:
        return operands(self.formula, self.query, self.key, self.value, self.gates, self.padding, self.count, chunks)

    def _passed(self, module: ModuleType, states: Tensor, initial: Tensor, chunks: int, reverse: bool) -> Tensor:
        final = torch.empty_like(initial)
        module.passed[(-(-initial.shape[-1] // FLAT), len(self.query) * self.count)](
            self.gates, initial, states, final, *_steps(self.gates), self.count, chunks, REVERSED=reverse
        )
        return final

    def states(self, initial: Tensor | None) -> tuple[Tensor, Tensor]:
        """The states that queries see, (B, Hs, chunks, SIZE) or one for all, and the last one, (B, Hs, SIZE)."""
        module = self._module(backward=False)
        chunks, per = self._parts(self.key.shape[2])
        if initial is None:
            initial = empty(self.formula, self.query, self.value, self.count, 1).zero_()
        states = initial.new_empty((*initial.shape[:2], chunks, initial.shape[2]))
        tiles = self.f_tiles * self.e_tiles
        module.states_of[(chunks, len(self.query) * self.count, tiles)](
            *self._given(chunks), states, per, **self.options
        )
        final = self._passed(module, states, initial, chunks, False)
        return (states if self.formula.causal else final[:, :, None]), final

    def outputs(self, states: Tensor) -> tuple[Tensor, Tensor | None]:
        """The answers, and what they were divided by, float32 (B, H, Sq)."""
        module = self._module(backward=False)
        batch, heads, q_len = self.query.shape[:3]
        out = self.query.new_empty((batch, heads, q_len, self.value.shape[3]))
        norms = out.new_empty((batch, heads, q_len), dtype=torch.float32) if self.formula.normalised else None
        module.outputs[(self.q_blocks, batch * heads, self.e_tiles)](
            *self._given(states.shape[2]), states, out, norms, self.scale, self.formula.eps, **self.options
        )
        return out, norms

    def gradients(
        self, initial: Tensor | None, out: Tensor, norms: Tensor | None, d_out: Tensor, d_final: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
        """d loss / d query, key, value, gates and the initial state. The states are computed again: they are many."""
        states, final = self.states(initial)
        module, causal = self._module(), self.formula.causal
        (batch, heads, q_len, features), kv_len, count = self.query.shape, self.key.shape[2], self.count
        rates = deltas = None
        if norms is not None:
            rates, deltas = self.scale / norms, -(out.float() * d_out.float()).sum(-1) / norms
        slopes = (d_out, rates, deltas, *d_out.stride()[:3], self.scale)
        chunks, per = self._parts(kv_len if causal else q_len)
        d_states = states.new_empty((batch, count, chunks, final.shape[2]))
        module.d_states_of[(chunks, batch * count, self.f_tiles * self.e_tiles)](
            *self._given(chunks), *slopes, d_states, per, **self.options
        )
        d_initial = self._passed(module, d_states, d_final, chunks, True)
        if not causal:
            d_states, chunks = d_initial[:, :, None], 1
        given = (*self._given(chunks), *slopes)

        def moved(lines: int, length: int) -> Tensor | None:
            if self.gates is None:
                return None
            shape = (self.f_tiles, batch, lines, length) if self.gates.dim() == 3 else (batch, lines, length, features)
            return states.new_empty(shape)

        d_query, by_query = torch.empty_like(self.query, memory_format=torch.contiguous_format), moved(heads, q_len)
        by_key = moved(count, kv_len)
        d_key = _shared(self.key, count)
        d_value = _shared(self.value, count)
        q_grid, k_grid = (self.q_blocks, batch * heads), (self.k_blocks, batch * count)
        module.backward_queries[(*q_grid, self.f_tiles)](*given, states, d_query, by_query, **self.options)
        module.backward_keys[(*k_grid, self.f_tiles)](*given, d_states, d_key, by_key, **self.options)
        module.backward_values[(*k_grid, self.e_tiles)](*given, d_states, d_value, **self.options)
        d_gates = None
        if by_query is not None and by_key is not None:
            d_gates = self._d_gates(by_query, by_key, states, final, d_states, d_final)
        return d_query, _summed(d_key, self.key), _summed(d_value, self.value), d_gates, d_initial

    def _d_gates(
        self, by_query: Tensor, by_key: Tensor, states: Tensor, final: Tensor, d_states: Tensor, d_final: Tensor
    ) -> Tensor:
        """Each query's products grow with the gate at its position, each key's shrink, and the state after a chunk
        grows with the gate at its last position.
        """
        assert self.gates is not None
        kv_len, past = self.key.shape[2], self.key.shape[2] - self.query.shape[2]
        if self.gates.dim() == 3:
            by_query, by_key = by_query.sum(0)[..., None], by_key.sum(0)[..., None]
        d_gates = by_key.new_zeros((*self.gates.shape[:3], by_key.shape[3]))
        d_gates[:, :, past:kv_len] = by_query.unflatten(1, (self.count, -1)).sum(2)
        d_gates[:, :, :kv_len] -= by_key
        features, width = self.query.shape[3], self.value.shape[3]
        ends = d_gates[:, :, self.chunk - 1 :: self.chunk]
        inner, last = slice(-1), slice(-1, None)
        for at, after, slope in (
            (inner, states[:, :, 1:], d_states[:, :, :-1]),
            (last, final[:, :, None], d_final[:, :, None]),
        ):
            ours, theirs = unflat(after, features, width), unflat(slope, features, width)
            share = torch.einsum("bhcfe,bhcfe->bhcf", ours.sums, theirs.sums)
            if ours.totals is not None and theirs.totals is not None:
                share = share + ours.totals * theirs.totals
            ends[:, :, at] += share if self.gates.dim() == 4 else share.sum(-1, keepdim=True)
        return d_gates if self.gates.dim() == 4 else d_gates.squeeze(3)


def _shared(operand: Tensor, count: int) -> Tensor:
    """Room for an operand's gradient by each state; float32 where several have to be added."""
    dtype = operand.dtype if operand.shape[1] == count else torch.float32
    return operand.new_empty((len(operand), count, *operand.shape[2:]), dtype=dtype)


def _summed(grad: Tensor, operand: Tensor) -> Tensor:
    if grad.shape[1] == operand.shape[1]:
        return grad
    total: Tensor = grad.unflatten(1, (operand.shape[1], -1)).sum(2)
    return total.to(operand.dtype)
