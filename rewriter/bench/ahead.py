"""The generated attention kernel beside flash-linear-attention's, compiled for a GPU that need not be here.

Nothing runs: what is compared is the code that a tile of scores takes where nothing is masked. There both compute the
same.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from rewriter.codegen.ahead import Binary, Launch
from rewriter.codegen.compiled import launches
from rewriter.codegen.configs import default
from rewriter.codegen.formula import Formula, of_mask
from rewriter.codegen.fragments import Blocks
from rewriter.errors import OptionError
from rewriter.site import Causal
from rewriter.terminal import calm

TARGET, HEADS, SIZES = "sm_90", 8, (64, 128)
OURS, PEER = "generated", "parallel_attn"
_PEER_BLOCKS = Blocks(128, 64, num_warps=8, num_stages=3)  # of the peer's own launch on this target


@dataclass(frozen=True)
class Row:
    """One kernel: causal, forward, bfloat16, at one head size and config.

    `registers` are those of a thread, `spills` its bytes to and from local memory, `shared` the bytes of a block.
    `wgmma` and `instructions` are those of the main loop that a warp issues for one tile of block_m times block_n
    scores. `ratio` is the instructions of the generated kernel over the peer's, in the generated kernel's row.
    """

    head_dim: int
    blocks: Blocks
    implementation: str
    registers: int
    spills: int
    shared: int
    wgmma: float
    instructions: float
    ratio: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def compiled(peer: Any = None) -> Iterator[Row]:
    """For each head size the shipped config and the peer's own; without the peer's kernel only the generated one."""
    masks, numbers = of_mask(Causal())
    formula = Formula(masks, numbers=numbers)
    for size in SIZES:
        for blocks in dict.fromkeys((default(TARGET, "forward", size), _PEER_BLOCKS)):
            (launch,) = launches(formula, blocks, head_dim=size, kernels=("forward",))
            ours = _row(OURS, launch, size, blocks)
            if peer is None:
                yield ours
            else:
                theirs = _row(PEER, _peer_launch(peer, size, blocks), size, blocks)
                yield from (replace(ours, ratio=ours.instructions / theirs.instructions), theirs)


def peer_kernel() -> Any:
    """flash-linear-attention's forward kernel. OptionError where it is not installed."""
    try:
        with calm():  # it says that there is no GPU
            module = importlib.import_module("fla.ops.attn.parallel")
    except ImportError as cause:
        raise OptionError(
            f"flash-linear-attention cannot be imported ({cause}): its package fla-core comes with rewriter[bench]"
        ) from cause
    return module.parallel_attn_fwd_kernel.fn  # below the heuristics, which a launch asks


def _peer_launch(kernel: Any, head_dim: int, blocks: Blocks) -> Launch:
    """As its own launch gives them: contiguous (B, N, H, D), sizes but the length known when it is compiled, and here
    a length that 16 divides.
    """
    operands = dict.fromkeys(("q", "k", "v", "o"), "*bf16") | {"lse": "*fp32"}
    absent = dict.fromkeys(("g_cumsum", "sink_bias", "cu_seqlens", "chunk_indices", "W"))
    flags = dict.fromkeys(("USE_G", "USE_SINK_BIAS", "USE_WINDOW", "IS_VARLEN"), False)
    sizes = {"B": 1, "H": HEADS, "HQ": HEADS, "G": 1, "K": head_dim, "V": head_dim}
    tile = {"BT": blocks.block_m, "BS": blocks.block_n, "BK": head_dim, "BV": head_dim}
    signature = {**operands, "scale": "fp32", "T": "i32"}
    return Launch(kernel, signature, {**absent, **flags, **sizes, **tile}, (*operands, "T"))


def _row(name: str, launch: Launch, head_dim: int, blocks: Blocks) -> Row:
    binary = launch.compiled(TARGET, **blocks.options)
    assert binary.loop is not None
    # A loop may be unrolled: its products say how many tiles one round of it takes.
    tiles = products(binary) / (2 * blocks.block_m * blocks.block_n * head_dim)
    return Row(
        head_dim, blocks, name, binary.registers, binary.spills, binary.shared,
        binary.loop.tensor / tiles, binary.loop.instructions / tiles,
    )  # fmt: skip


def products(binary: Binary) -> float:
    """Multiply-adds of a block in one round of the main loop. A wgmma is that of four warps, and names its shape."""
    assert binary.loop is not None
    total = 0
    for name, count in binary.loop.tensor_core.items():
        shape = re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", name)
        assert shape is not None, name
        total += count * math.prod(map(int, shape.groups()))
    return total * binary.warps / 4
