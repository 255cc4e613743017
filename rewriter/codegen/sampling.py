"""Attention to places in maps, generated: C++ on a CPU, Triton on a GPU. See `rewriter.sampling` for what it is.

    kernel = load(head_dim=32)
    if isinstance(kernel, SamplingKernel):  # else a refusal, for example without a compiler
        out = kernel(maps, grids, weights)

The C++ is forward only. Sums are float32; beyond operands and result it needs no memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from rewriter.codegen.gathered import transformed
from rewriter.codegen.native import called
from rewriter.codegen.source import rendered
from rewriter.errors import OptionError
from rewriter.sampling import sampled
from rewriter.site import Refusal

LARGEST = 512
"""Channels of a head."""
_ROWS = 64
"""Queries that a thread takes at a time."""


NUMBERS = {torch.float32: "float", torch.bfloat16: "c10::BFloat16", torch.float16: "c10::Half"}
"""The types of operands and result."""


def source(head_dim: int, dtype: torch.dtype = torch.float32) -> str:
    """The translation unit, readable."""
    number = NUMBERS[dtype]
    title = f"head_dim {head_dim}, {number}"
    return rendered("sampling.cpp.jinja", title=title, head_dim=head_dim, number=number, rows=_ROWS)


@cache
def load(head_dim: int, dtype: torch.dtype = torch.float32) -> SamplingKernel | Refusal:
    """The kernel for heads of this size and type, built if need be. A refusal says what is missing."""
    if not 1 <= head_dim <= LARGEST:
        return Refusal(f"heads of {head_dim} are outside of 1 to {LARGEST}")
    entry = called(source(head_dim, dtype), "rewriter_sample")
    if isinstance(entry, Refusal):
        return entry
    return SamplingKernel(head_dim, entry, dtype)


@dataclass(frozen=True)
class SamplingKernel:
    """A built kernel, to be called on tensors."""

    head_dim: int
    entry: ctypes._NamedFuncPointer
    dtype: torch.dtype = torch.float32

    def __call__(self, maps: Sequence[Tensor], grids: Sequence[Tensor], weights: Tensor) -> Tensor:
        """(B, H, Q, D), in memory (B, Q, H, D), as the projection that follows reads it."""
        self._check(maps, grids, weights)
        maps = [each if each.stride(4) == 1 or self.head_dim == 1 else each.contiguous() for each in maps]
        batch, heads, queries, _ = weights.shape
        out = weights.new_empty(batch, queries, heads, self.head_dim).transpose(1, 2)
        pointers = [weights.data_ptr(), out.data_ptr()]
        numbers = [batch, heads, queries, len(maps), *weights.stride(), *out.stride()[:3]]
        for level, grid in zip(maps, grids, strict=True):
            pointers += [level.data_ptr(), grid.data_ptr()]
            numbers += [*level.shape[2:4], grid.shape[3], *level.stride()[:4], *grid.stride()]
        error = self.entry((ctypes.c_void_p * len(pointers))(*pointers), (ctypes.c_int64 * len(numbers))(*numbers))
        if error:
            raise RuntimeError(error.decode())
        return out

    def _check(self, maps: Sequence[Tensor], grids: Sequence[Tensor], weights: Tensor) -> None:
        """What would otherwise be read outside of its memory."""
        every = [*maps, *grids, weights]
        wrong = ""
        if any(t.dtype != self.dtype or t.device.type != "cpu" for t in every):
            types = sorted({f"{t.dtype} on {t.device.type}".removeprefix("torch.") for t in every})
            own = f"{self.dtype}".removeprefix("torch.")
            wrong = f"a kernel for {own} on cpu was given {', '.join(types)}"
        elif not maps or len(maps) != len(grids):
            wrong = f"{len(maps)} maps and {len(grids)} grids: there is one grid for each map, and at least one"
        elif any(t.dim() != 5 for t in (*maps, *grids)) or weights.dim() != 4:
            wrong = "maps are (B, H, height, width, D), grids (B, H, Q, P, 2), weights (B, H, Q, P)"
        elif any(t.shape[:2] != weights.shape[:2] for t in every):
            wrong = "maps, grids and weights are not of the same batch and heads"
        elif any(grid.shape[2] != weights.shape[2] or grid.shape[4] != 2 for grid in grids):
            wrong = f"each of {weights.shape[2]} queries has places of two coordinates in each map"
        elif sum(grid.shape[3] for grid in grids) != weights.shape[3]:
            wrong = f"{weights.shape[3]} weights for {sum(grid.shape[3] for grid in grids)} places"
        elif any(level.shape[4] != self.head_dim for level in maps):
            wrong = f"a kernel for heads of {self.head_dim} was given others"
        elif torch.is_grad_enabled() and any(t.requires_grad for t in every):
            wrong = "generated C++ has no backward: call it under torch.no_grad()"
        if wrong:
            raise OptionError(wrong)


def attend(maps: Sequence[Tensor], grids: Sequence[Tensor], weights: Tensor) -> Tensor:
    """(B, H, Q, D), by a kernel where there is one, else by `sampled`. On a CPU there is none with derivatives, and
    none anywhere whose gradients are sums in one order.
    """
    every = [*maps, *grids, weights]
    learned = torch.is_grad_enabled() and any(t.requires_grad for t in every)
    on_gpu, kinds = weights.device.type == "cuda", {(t.device.type, t.dtype) for t in every}
    differentiated = on_gpu and not torch.are_deterministic_algorithms_enabled()
    of_one_kind = len(kinds) == 1 and (on_gpu or weights.device.type == "cpu") and weights.dtype in NUMBERS
    carried = not torch.compiler.is_dynamo_compiling() and any(map(transformed, every))
    if not of_one_kind or (learned and not differentiated) or carried:
        return sampled(maps, grids, weights)
    out: Tensor = sample(list(maps), list(grids), weights)
    return out


@torch.library.custom_op("rewriter::sample", mutates_args=())
def sample(maps: list[Tensor], grids: list[Tensor], weights: Tensor) -> Tensor:
    """The kernel as one node of a graph; (B, H, Q, D), in memory (B, Q, H, D)."""
    if weights.device.type == "cuda":
        from rewriter.codegen import sampling_triton

        return sampling_triton.forward(maps, grids, weights)
    kernel = load(maps[0].shape[4], weights.dtype)
    if isinstance(kernel, Refusal):
        return sampled(maps, grids, weights).transpose(1, 2).contiguous().transpose(1, 2)
    return kernel(maps, grids, weights)


@sample.register_fake
def _(maps: list[Tensor], grids: list[Tensor], weights: Tensor) -> Tensor:
    batch, heads, queries, _ = weights.shape
    return weights.new_empty(batch, queries, heads, maps[0].shape[4]).transpose(1, 2)


@torch.library.custom_op("rewriter::sample_backward", mutates_args=())
def sample_backward(d_out: Tensor, maps: list[Tensor], grids: list[Tensor], weights: Tensor) -> list[Tensor]:
    """The gradients of maps, grids and weights, one after another; where no kernel gives them, by recomputation."""
    if weights.device.type == "cuda":
        from rewriter.codegen import sampling_triton

        d_maps, d_grids, d_weights = sampling_triton.backward(d_out, maps, grids, weights)
        return [*d_maps, *d_grids, d_weights]
    leaves = [t.detach().requires_grad_() for t in (*maps, *grids, weights)]
    # Below an operator nothing is recorded, but for this.
    recorded = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
    with torch.enable_grad(), recorded:
        out = sampled(leaves[: len(maps)], leaves[len(maps) : -1], leaves[-1])
    return [found.contiguous() for found in torch.autograd.grad(out, leaves, d_out)]


@sample_backward.register_fake
def _(d_out: Tensor, maps: list[Tensor], grids: list[Tensor], weights: Tensor) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in (*maps, *grids, weights)]


def _saved(ctx: Any, inputs: tuple[list[Tensor], list[Tensor], Tensor], output: Tensor) -> None:
    maps, grids, weights = inputs
    ctx.levels = len(maps)
    ctx.save_for_backward(*maps, *grids, weights)


def _derived(ctx: Any, d_out: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
    *given, weights = ctx.saved_tensors
    found = sample_backward(d_out, given[: ctx.levels], given[ctx.levels :], weights)
    return found[: ctx.levels], found[ctx.levels : -1], found[-1]


sample.register_autograd(_derived, setup_context=_saved)
