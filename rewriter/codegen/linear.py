"""The linear family on GPUs: Triton kernels of a formula, launched, with gradients."""

from __future__ import annotations

from functools import partial
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from rewriter.codegen.gathered import transformed
from rewriter.codegen.linear_configs import contenders
from rewriter.codegen.linear_formula import LinearFormula, LinearState, state_heads
from rewriter.codegen.linear_fragments import LinearBlocks, source
from rewriter.codegen.linear_launch import Launch, cumulated, empty, flat, module_of, operands, unflat
from rewriter.codegen.tuning import as_called, fastest, up_to
from rewriter.errors import OptionError
from rewriter.target import Target

_TUNED: dict[tuple[Any, ...], LinearBlocks] = {}


class LinearKernel:
    """A formula on a GPU: query (B, H, Sq, F), key (B, Hk, Skv, F), value (B, Hv, Skv, Dv) -> (B, H, Sq, Dv), state.

    Hk and Hv divide the number of states (`state_heads`), and that divides H. Sizes may differ from call to call;
    kernels are made for head sizes, type and config.
    """

    def __init__(self, formula: LinearFormula, blocks: LinearBlocks | None = None) -> None:
        self.formula, self._blocks = formula, blocks

    def blocks(self, query: Tensor) -> LinearBlocks:
        """The config for queries of this type on their device."""
        return self._blocks or LinearBlocks.of(query.dtype, Target.current(query.device).capability)

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, *, log_decay: Tensor | None = None,
        padding: Tensor | None = None, state: LinearState | None = None,
    ) -> tuple[Tensor, LinearState]:  # fmt: skip
        """The answer and the state after the last key. Gradients flow to all that are floats, and from both."""
        count = state_heads(self.formula, query, key, value, log_decay)
        kernel = self
        if self._blocks is None and query.device.type == "cuda":
            kernel = LinearKernel(self.formula, self.tuned(query, key, value, scale, log_decay, padding))
        gates = cumulated(log_decay, padding, key, count, kernel.blocks(query).chunk)
        initial = None if state is None else flat(state, self.formula, query, value, count)
        out, final = _Scan.apply(kernel, scale, count, query, key, value, gates, padding, initial)
        return out, unflat(final, query.shape[3], value.shape[3])

    def tuned(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, log_decay: Tensor | None, padding: Tensor | None
    ) -> LinearBlocks:
        """The config with which a call of these sizes, with the gradients that are wanted, is the fastest."""
        given = (query, key, value, log_decay, padding)
        captured = query.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if captured or any(each is not None and transformed(each) for each in given):
            return self.blocks(query)  # nothing can be timed
        learned = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in given)
        lengths = up_to(query.shape[2]), up_to(key.shape[2])
        heads = [each.shape[1] for each in (query, key, value)]
        sizes = (len(query), *heads, *lengths, query.shape[3], value.shape[3], padding is not None, learned)
        known_by = (self.formula, query.dtype, query.device, *sizes)
        if (known := _TUNED.get(known_by)) is not None:
            return known
        options = contenders(
            self.formula, query.shape[3], value.shape[3], query.dtype, Target.current(query.device).capability
        )
        text = source(  # which says what is computed, also in a later process
            self.formula, options[0], features=query.shape[3], values=value.shape[3], dtype=query.dtype,
            padded=padding is not None,
        )  # fmt: skip
        place = [sha256(text.encode()).hexdigest(), *sizes]

        def run(blocks: LinearBlocks, q: Tensor, k: Tensor, v: Tensor, decay: Any, padding: Any) -> Tensor:
            return LinearKernel(self.formula, blocks)(q, k, v, scale, log_decay=decay, padding=padding)[0]

        made = {str(each): each for each in options}
        calls = {name: as_called(partial(run, each), given) for name, each in made.items()}
        chosen = fastest("linear attention, by config", place, calls, query.device) if len(made) > 1 else None
        _TUNED[known_by] = made[chosen] if chosen else options[0]
        return _TUNED[known_by]

    def step(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, state: LinearState | None = None, *,
        log_decay: Tensor | None = None, padding: Tensor | None = None, in_place: bool = False,
    ) -> tuple[Tensor, LinearState]:  # fmt: skip
        """The same for a few tokens after a state, one after the other, without gradients. With `in_place` the tensors
        of the state are written over.
        """
        formula, (features, width) = self.formula, (query.shape[3], value.shape[3])
        count = state_heads(formula, query, key, value, log_decay)
        if not formula.causal or query.shape[2] != key.shape[2]:
            raise OptionError(
                f"a step is causal and has one query for each key; given are {query.shape[2]} and {key.shape[2]}"
            )
        query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
        gates = cumulated(log_decay, padding, key, count, 1)
        before = (
            empty(formula, query, value, count, 1).zero_()
            if state is None
            else flat(state, formula, query, value, count)
        )
        after = torch.empty_like(before)
        out = query.new_empty((*query.shape[:3], width))
        blocks = self.blocks(query)
        module = module_of(formula, blocks, features, width, query.dtype, padding is not None, False)
        sizes = blocks.step(features, width)
        with torch.no_grad():
            module.step[(-(-width // sizes["STEP_E"]), len(query) * count)](
                *operands(formula, query, key, value, gates, padding, count, 1), before, after, out, scale,
                formula.eps, **sizes, num_warps=blocks.num_warps,
            )  # fmt: skip
            new = unflat(after, features, width)
            if state is None or not in_place:
                return out, new
            for old, own in zip(state, new, strict=True):
                if old is not None and own is not None:
                    old.copy_(own)
        return out, state


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernel: LinearKernel, scale: float, count: int, query: Tensor, key: Tensor, value: Tensor,
        gates: Tensor | None, padding: Tensor | None, initial: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
        launch = Launch(kernel.formula, kernel.blocks(query), scale, count, query, key, value, gates, padding)
        states, final = launch.states(initial)
        out, norms = launch.outputs(states)
        ctx.save_for_backward(query, key, value, gates, padding, initial, out, norms)
        ctx.kernel, ctx.scale, ctx.count = kernel, scale, count
        return out, final

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_final: Tensor) -> Any:
        query, key, value, gates, padding, initial, out, norms = ctx.saved_tensors
        d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
        formula, blocks = ctx.kernel.formula, ctx.kernel.blocks(query)
        launch = Launch(formula, blocks, ctx.scale, ctx.count, query, key, value, gates, padding)
        grads = launch.gradients(initial, out, norms, d_out, d_final.contiguous())
        return None, None, None, *grads[:4], None, grads[4] if initial is not None else None
