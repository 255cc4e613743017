"""Configs of generated kernels: what fits on a target, what is shipped for it, and how candidates are ranked unseen."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from rewriter.codegen.ahead import REGISTERS, SHARED_KIB, Binary, CompileError, parse_target
from rewriter.codegen.compiled import binaries
from rewriter.codegen.formula import Formula, of_mask, reading
from rewriter.codegen.fragments import KERNELS, Blocks
from rewriter.errors import OptionError
from rewriter.site import Causal, SlidingWindow

_BLOCKS = (32, 64, 128)

# (block_m, block_n, warps, stages) by target, kernel and head size. For sm_80 and sm_90 and the first two kernels of
# sm_100: of all candidates without spills the one with the fewest instructions a score in its main loop (`rank`),
# compiled ahead in bfloat16 for a causal window (`rewriter kernels defaults`); for backward_keys of 32 on sm_90 for the
# masks of grids, which spilled with the first of them. The others: the first tried without spills, but for some of 256.
# Nothing here was timed.
DEFAULTS: dict[str, dict[str, dict[int, tuple[int, int, int, int]]]] = {
    "sm_80": {
        "forward": {64: (128, 128, 8, 2), 128: (128, 64, 8, 2), 256: (32, 64, 4, 2)},
        "backward_keys": {64: (128, 32, 4, 2), 128: (128, 64, 8, 2), 256: (32, 32, 8, 2)},
        "backward_queries": {64: (128, 32, 4, 2), 128: (128, 64, 8, 2), 256: (32, 32, 4, 2)},
        "forward_jvp": {64: (128, 32, 8, 2), 128: (32, 32, 4, 2), 256: (32, 32, 8, 2)},
    },
    "sm_90": {
        "forward": {128: (128, 128, 8, 2), 256: (128, 32, 8, 3)},
        "backward_keys": {32: (64, 64, 4, 2), 64: (32, 128, 8, 2), 128: (128, 32, 8, 2), 256: (32, 32, 8, 2)},
        "backward_queries": {32: (128, 128, 8, 2), 64: (128, 128, 8, 3), 128: (128, 64, 8, 2), 256: (64, 32, 4, 2)},
        "forward_jvp": {64: (128, 64, 8, 2), 128: (128, 32, 8, 1), 256: (32, 32, 8, 2)},
    },
    "sm_100": {
        "forward": {128: (128, 64, 8, 2), 256: (64, 32, 8, 2)},
        "backward_keys": {64: (64, 128, 8, 2), 128: (32, 128, 8, 2), 256: (32, 64, 8, 2)},
        "backward_queries": {64: (64, 64, 4, 2), 128: (64, 32, 8, 2), 256: (32, 32, 8, 2)},
        "forward_jvp": {64: (128, 64, 8, 2), 128: (64, 32, 8, 2), 256: (32, 32, 8, 2)},
    },
    "gfx942": {
        "forward": {64: (64, 64, 4, 2), 128: (64, 64, 4, 2), 256: (64, 32, 4, 2)},
        "backward_keys": {64: (64, 64, 4, 2), 128: (32, 32, 4, 2), 256: (32, 32, 4, 2)},
        "backward_queries": {64: (64, 64, 4, 2), 128: (32, 64, 4, 2), 256: (32, 32, 4, 2)},
        "forward_jvp": {64: (64, 64, 4, 2), 128: (64, 32, 4, 2), 256: (32, 16, 4, 2)},
    },
}

# The same of formulas that read a number for each pair of a query and a key, from a bias or a mask, which takes
# registers and memory of its own: of configs of two stages, compiled ahead with a learned bias. Those of 256, of
# derivatives along tangents and of gfx942: the first tried without spills, but for backward kernels of 256 there.
PAIRED: dict[str, dict[str, dict[int, tuple[int, int, int, int]]]] = {
    "sm_80": {
        "forward": {64: (128, 32, 8, 2), 128: (128, 32, 8, 2), 256: (32, 64, 4, 2)},
        "backward_keys": {64: (64, 32, 4, 2), 128: (32, 64, 8, 2), 256: (32, 32, 8, 2)},
        "backward_queries": {64: (128, 32, 8, 2), 128: (32, 64, 8, 2), 256: (32, 32, 4, 2)},
        "forward_jvp": {64: (128, 32, 8, 2), 128: (32, 32, 4, 2), 256: (32, 32, 8, 2)},
    },
    "sm_90": {
        "forward": {64: (128, 64, 8, 2), 128: (128, 32, 8, 2), 256: (32, 64, 4, 2)},
        "backward_keys": {64: (32, 128, 8, 2), 128: (32, 64, 8, 2), 256: (32, 32, 8, 2)},
        "backward_queries": {64: (128, 32, 8, 2), 128: (32, 64, 4, 2), 256: (32, 32, 8, 2)},
        "forward_jvp": {64: (128, 32, 8, 2), 128: (32, 32, 4, 2), 256: (32, 32, 8, 2)},
    },
    "sm_100": {
        "forward": {64: (64, 128, 8, 2), 128: (32, 128, 4, 2), 256: (32, 64, 4, 2)},
        "backward_keys": {64: (32, 64, 4, 2), 128: (32, 64, 4, 2), 256: (32, 64, 8, 2)},
        "backward_queries": {64: (32, 64, 4, 2), 128: (32, 64, 8, 2), 256: (32, 32, 8, 2)},
        "forward_jvp": {64: (64, 64, 8, 2), 128: (64, 32, 8, 1), 256: (32, 32, 8, 2)},
    },
    "gfx942": {
        "forward": {64: (128, 64, 4, 2), 128: (128, 32, 4, 2), 256: (64, 32, 4, 2)},
        "backward_keys": {64: (64, 64, 4, 2), 128: (32, 32, 4, 2), 256: (32, 32, 4, 2)},
        "backward_queries": {64: (64, 64, 4, 2), 128: (64, 32, 4, 2), 256: (32, 32, 4, 2)},
        "forward_jvp": {64: (64, 64, 4, 2), 128: (64, 32, 4, 2), 256: (32, 16, 4, 2)},
    },
}

# Products of float32 are no tensor core's, and keep their operands in registers: of all kernels on all targets.
WIDE = {64: (32, 32, 8, 2), 128: (16, 16, 4, 2), 256: (16, 16, 4, 1)}


def default(
    target: str, kernel: str, head_dim: int, dtype: torch.dtype = torch.bfloat16, *, pairs: bool = False
) -> Blocks:
    """The shipped config for the nearest size at or above this one; `pairs`: of a formula that reads a number for each
    pair of a query and a key.
    """
    table = PAIRED if pairs else DEFAULTS
    family = table.get(target) or table["gfx942" if target.startswith("gfx") else "sm_80"]
    sizes = WIDE if dtype.itemsize > 2 else family[kernel]
    size = next((size for size in sorted(sizes) if size >= head_dim), max(sizes))
    return Blocks(*sizes[size])


def candidates(
    target: str,
    kernel: str,
    *,
    head_dim: int,
    v_head_dim: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    pairs: bool = False,
) -> list[Blocks]:
    """What the limits of the target leave, before anything is compiled: estimates of registers and shared memory."""
    if target not in SHARED_KIB:
        raise OptionError(f"the limits of {target} are not known, only those of {', '.join(SHARED_KIB)}")
    found = []
    for block_m, block_n, num_warps, num_stages in itertools.product(_BLOCKS, _BLOCKS, (4, 8), (2, 3)):
        blocks = Blocks(block_m, block_n, num_warps, num_stages)
        registers, shared = estimated(blocks, target, kernel, head_dim, v_head_dim or head_dim, dtype, pairs)
        if registers <= REGISTERS and shared <= SHARED_KIB[target] * 1024 and block_m * block_n >= 1024:
            found.append(blocks)
    return found


def estimated(
    blocks: Blocks, target: str, kernel: str, head_dim: int, v_head_dim: int, dtype: torch.dtype, pairs: bool = False
) -> tuple[float, int]:
    """Registers of a thread and bytes of shared memory of a block, from what has to be held: accumulators and scores in
    registers, tiles of the pipeline in shared memory.
    """
    d, e, m, n = head_dim, v_head_dim, blocks.block_m, blocks.block_n
    threads = blocks.num_warps * parse_target(target).warp_size
    scores = m * n
    held, moved = {
        "forward": (m * e + scores, n * (d + e)),
        "backward_keys": (n * (d + e) + 2 * scores, m * (d + e)),
        "backward_queries": (m * d + 2 * scores, n * (d + e)),
    }[kernel]
    return held / threads, blocks.num_stages * (moved + pairs * scores) * dtype.itemsize


def rank(binary: Binary, blocks: Blocks) -> tuple[int, float]:
    """Smaller is better where nothing can be timed: bytes of spills, then instructions of all warps for one score."""
    loop = binary.loop
    assert loop is not None
    return binary.spills, loop.instructions * blocks.num_warps / (blocks.block_m * blocks.block_n)


def best(
    ranked: list[tuple[Binary, Blocks]],
) -> Blocks:
    """The first of the ranking; of equals the one with fewer stages, which leaves memory to other blocks."""
    return min(ranked, key=lambda pair: (*rank(*pair), pair[1].num_stages))[1]


def ranked(
    targets: Iterable[str], sizes: Iterable[int], *, pairs: bool = False
) -> Iterator[tuple[str, str, int, Blocks]]:
    """(target, kernel, head size, best config), each candidate compiled ahead in bfloat16 for a causal window or, with
    `pairs`, for a causal mask and a learned bias.
    """
    masks, numbers = of_mask(Causal() if pairs else Causal() & SlidingWindow(255, None))
    learned = ("bias",) if pairs else ()
    formula, kinds = reading(Formula(masks, numbers=numbers), learned), dict.fromkeys(learned, "float")
    for target, kernel, size in itertools.product(targets, KERNELS, sizes):
        fitting = []
        for blocks in candidates(target, kernel, head_dim=size, pairs=pairs):
            with contextlib.suppress(CompileError):  # over a limit that the estimate did not see
                (binary,) = binaries(
                    formula, blocks, target, head_dim=size, kernels=(kernel,), kinds=kinds, gradients=learned
                )
                fitting.append((binary, blocks))
        yield target, kernel, size, best(fitting)


def with_splits(blocks: Blocks, programs: int, k_blocks: int, processors: int) -> Blocks:
    """A decode step has few programs: the keys are cut into as many parts as keep every processor busy twice."""
    return replace(blocks, splits=max(1, min(2 * processors // max(programs, 1), k_blocks)))
