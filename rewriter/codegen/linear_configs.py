"""Configs of the linear family's kernels: what fits on a target, and what promises less work than what is shipped."""

from __future__ import annotations

import itertools

import torch

from rewriter.codegen.ahead import REGISTERS, SHARED_KIB, parse_target
from rewriter.codegen.blocks import promising
from rewriter.codegen.fragments import power
from rewriter.codegen.linear_formula import LinearFormula
from rewriter.codegen.linear_fragments import LinearBlocks

_SIZES = (32, 64, 128)
_PER_NUMBER, _PER_STATE = 200.0, 1600.0
"""What it costs to read a number of an operand, and to write a number of a state, pass it on and read it, in products:
memory gives a byte in the time of a hundred. An estimate, never measured."""


def contenders(
    formula: LinearFormula, features: int, values: int, dtype: torch.dtype, target: str
) -> list[LinearBlocks]:
    """The configs that are worth a measurement: as shipped, and those that fit the target and promise less work."""
    shipped = LinearBlocks.of(dtype, target)
    if target not in SHARED_KIB:
        return [shipped]

    def cost(blocks: LinearBlocks) -> float:
        """Of a position."""
        block_f, block_e = blocks.widths(features, values)
        f_tiles, e_tiles = -(-features // block_f), -(-values // block_e)
        within = blocks.chunk * (e_tiles * features + values)  # each tile of values computes the weights anew
        reads = _PER_NUMBER * (e_tiles * features + f_tiles * values)
        return within + reads + features * values * (2 + _PER_STATE / blocks.chunk)

    return promising(shipped, _fitting(formula, features, values, dtype, target, shipped), cost)


def _fitting(
    formula: LinearFormula, features: int, values: int, dtype: torch.dtype, target: str, shipped: LinearBlocks
) -> list[LinearBlocks]:
    """From what has to be held: sums and weights in registers, tiles in shared memory."""
    found, least = [], min(_SIZES)
    for chunk, block_f, block_e, warps in itertools.product(_SIZES, _SIZES, _SIZES, (4, 8)):
        blocks = LinearBlocks(chunk, block_f, block_e, warps, shipped.num_stages)
        rows, wider = blocks.rows(formula), max(blocks.widths(features, values))
        registers = (rows * wider + 2 * rows * chunk) / (warps * parse_target(target).warp_size)
        shared = blocks.num_stages * (2 * chunk + wider) * wider * dtype.itemsize
        whole = block_f <= max(power(features), least) and block_e <= max(power(values), least)
        if whole and registers <= REGISTERS and shared <= SHARED_KIB[target] * 1024:
            found.append(blocks)
    return found
