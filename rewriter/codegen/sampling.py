"""Attention to places in maps in generated C++: rendered, built and called. See `rewriter.sampling` for what it is.

    kernel = load(head_dim=32)
    if isinstance(kernel, SamplingKernel):  # else a refusal, for example without a compiler
        out = kernel(maps, grids, weights)

Forward only, float32. Beyond operands and result it needs no memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from rewriter.codegen.native import called
from rewriter.codegen.source import rendered
from rewriter.errors import OptionError
from rewriter.sampling import sampled
from rewriter.site import Refusal

_ROWS = 64
"""Queries that a thread takes at a time."""


def source(head_dim: int) -> str:
    """The translation unit, readable."""
    return rendered("sampling.cpp.jinja", title=f"head_dim {head_dim}", head_dim=head_dim, rows=_ROWS)


@cache
def load(head_dim: int) -> SamplingKernel | Refusal:
    """The kernel for heads of this size, built if need be. A refusal says what is missing."""
    if not 1 <= head_dim <= 512:
        return Refusal(f"heads of {head_dim} are outside of 1 to 512")
    entry = called(source(head_dim), "rewriter_sample")
    if isinstance(entry, Refusal):
        return entry
    return SamplingKernel(head_dim, entry)


@dataclass(frozen=True)
class SamplingKernel:
    """A built kernel, to be called on tensors."""

    head_dim: int
    entry: ctypes._NamedFuncPointer

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
        if any(t.dtype != torch.float32 or t.device.type != "cpu" for t in every):
            types = sorted({f"{t.dtype} on {t.device.type}".removeprefix("torch.") for t in every})
            wrong = f"a kernel for float32 on cpu was given {', '.join(types)}"
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
    """(B, H, Q, D), by the kernel where there is one and nobody wants derivatives, else by `sampled`."""
    every = [*maps, *grids, weights]
    learned = torch.is_grad_enabled() and any(t.requires_grad for t in every)
    if learned or any(t.dtype != torch.float32 or t.device.type != "cpu" for t in every):
        return sampled(maps, grids, weights)
    out: Tensor = sample(list(maps), list(grids), weights)
    return out


@torch.library.custom_op("rewriter::sample", mutates_args=())
def sample(maps: list[Tensor], grids: list[Tensor], weights: Tensor) -> Tensor:
    """The kernel as one node of a graph; (B, H, Q, D), in memory (B, Q, H, D)."""
    kernel = load(maps[0].shape[4])
    if isinstance(kernel, Refusal):
        return sampled(maps, grids, weights).transpose(1, 2).contiguous().transpose(1, 2)
    return kernel(maps, grids, weights)


@sample.register_fake
def _(maps: list[Tensor], grids: list[Tensor], weights: Tensor) -> Tensor:
    batch, heads, queries, _ = weights.shape
    return weights.new_empty(batch, queries, heads, maps[0].shape[4]).transpose(1, 2)
