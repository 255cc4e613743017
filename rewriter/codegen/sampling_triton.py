"""Attention to places in maps in generated Triton: the source, a launch forward and backward, and other machines.

Of any floating type; sums are float32. Beyond operands and result the forward kernel needs no memory, the backward one
that of the gradients in float32. Gradients of maps are added up in no order, as those of PyTorch's own sampling are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rewriter.codegen.fragments import check_powers, power
from rewriter.codegen.sampling_formula import SamplingFormula
from rewriter.codegen.source import loaded, rendered

if TYPE_CHECKING:
    from rewriter.codegen.ahead import Binary

KERNELS = ("sample", "sample_backward")

_SUMS = 1024  # of a program
_TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


@dataclass(frozen=True)
class SamplingBlocks:
    """The config of a kernel: queries of a program, warps and stages."""

    queries: int = 32
    num_warps: int = 4
    num_stages: int = 1

    def __post_init__(self) -> None:
        check_powers(self, queries=1, num_warps=1)

    @classmethod
    def of(cls, head_dim: int) -> SamplingBlocks:
        """What is used where nothing is chosen: so many sums as stay in registers."""
        return cls(max(_SUMS // power(head_dim), 1))

    @property
    def options(self) -> dict[str, int]:
        """What Triton is told of a launch."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def source(formula: SamplingFormula, blocks: SamplingBlocks, head_dim: int) -> str:
    """Both kernels, readable."""
    return rendered(
        "sampling.py.jinja",
        title=f"head_dim {head_dim}, places {'+'.join(map(str, formula.points))}",
        head_dim=head_dim,
        channels=power(head_dim),
        queries=blocks.queries,
        levels=len(formula.points),
        points=formula.points,
    )


def binary(
    formula: SamplingFormula, blocks: SamplingBlocks, target: str, name: str, *, head_dim: int, dtype: torch.dtype
) -> Binary:
    """What a kernel is on this target. Raises `CompileError` with one sentence where a config does not fit on it."""
    from rewriter.codegen.ahead import Launch

    kernel = getattr(_module(formula, blocks, head_dim), name)
    types = {argument: _type(argument, dtype) for argument in kernel.arg_names}
    # As of the views that models make: channels, coordinates and weights lie side by side.
    once = dict.fromkeys((a for a in types if re.fullmatch(r"m_c_\d+|g_c_\d+|w_p|o_d", a)), 1)
    signature = {argument: text for argument, text in types.items() if argument not in once}
    divisible = tuple(argument for argument, text in signature.items() if text[0] == "*")
    return Launch(kernel, signature, once, divisible).compiled(target, **blocks.options)


def forward(maps: Sequence[Tensor], grids: Sequence[Tensor], weights: Tensor) -> Tensor:
    """(B, H, Q, D), in memory (B, Q, H, D)."""
    batch, heads, queries, _ = weights.shape
    out = maps[0].new_empty(batch, queries, heads, maps[0].shape[4]).transpose(1, 2)
    given = [x for level, grid in zip(maps, grids, strict=True) for x in _read(level, grid)]
    _launch("sample", maps, grids, weights, weights, out, heads, queries, *weights.stride(), *out.stride()[:3], *given)
    return out


def backward(
    d_out: Tensor, maps: Sequence[Tensor], grids: Sequence[Tensor], weights: Tensor
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The gradients of maps, grids and weights, in their types."""
    heads, queries = weights.shape[1:3]
    d_maps = [torch.zeros(level.shape, dtype=torch.float32, device=level.device) for level in maps]
    d_grids = [torch.empty(grid.shape, dtype=torch.float32, device=grid.device) for grid in grids]
    d_weights = torch.empty(weights.shape, dtype=torch.float32, device=weights.device)
    written = zip(d_maps, d_grids, strict=True)
    given = [x for level, grid in zip(maps, grids, strict=True) for x in (*_read(level, grid), *next(written))]
    sizes = (heads, queries, *weights.stride(), *d_out.stride())
    _launch("sample_backward", maps, grids, weights, weights, d_out, d_weights, *sizes, *given)
    return (
        [made.to(given.dtype) for made, given in zip(d_maps, maps, strict=True)],
        [made.to(given.dtype) for made, given in zip(d_grids, grids, strict=True)],
        d_weights.to(weights.dtype),
    )


def _read(level: Tensor, grid: Tensor) -> Iterator[Any]:
    yield from (level, grid, *level.shape[2:4], *level.stride(), *grid.stride())


def _launch(name: str, maps: Sequence[Tensor], grids: Sequence[Tensor], weights: Tensor, *given: Any) -> None:
    (batch, heads, queries, _), blocks = weights.shape, SamplingBlocks.of(maps[0].shape[4])
    formula = SamplingFormula(tuple(grid.shape[3] for grid in grids))
    if batch * heads * queries:
        kernel = getattr(_module(formula, blocks, maps[0].shape[4]), name)
        kernel[-(-queries // blocks.queries), batch * heads](*given, **blocks.options)


@cache
def _module(formula: SamplingFormula, blocks: SamplingBlocks, head_dim: int) -> ModuleType:
    return loaded(source(formula, blocks, head_dim), "triton")


def _type(argument: str, dtype: torch.dtype) -> str:
    if re.fullmatch(r"d_(map_\d+|grid_\d+|weights)", argument):
        return "*fp32"
    return _TYPES[dtype] if re.fullmatch(r"weights|out|d_out|map_\d+|grid_\d+", argument) else "i32"
