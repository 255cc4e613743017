"""The Triton source of the linear family: the template, with the feature maps printed into it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import fx

from rewriter.codegen.derivative import derivatives
from rewriter.codegen.dialect import TRITON, printed
from rewriter.codegen.fragments import check_least, check_powers, power, where
from rewriter.codegen.linear_formula import LinearFormula
from rewriter.codegen.source import interpreted, rendered

FORWARD = ("states_of", "passed", "outputs", "step")
BACKWARD = ("d_states_of", "backward_queries", "backward_keys", "backward_values")

FLAT = 1024
"""Numbers of a state that one program passes on."""

_ROWS = 16  # of a block within a chunk where each channel decays for itself: the least that a tensor core multiplies
_STEP = 4096  # numbers of a state that a program of a decode step keeps in registers


@dataclass(frozen=True)
class LinearBlocks:
    """The config of a kernel: positions in a chunk, features and value channels in a block, warps and stages."""

    chunk: int = 64
    block_f: int = 64
    block_e: int = 64
    num_warps: int = 4
    num_stages: int = 2

    def __post_init__(self) -> None:
        check_powers(self, chunk=16, block_f=16, block_e=16, num_warps=1)
        check_least(self, num_stages=1)

    @property
    def options(self) -> dict[str, int]:
        """What Triton is told of a launch."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}

    @classmethod
    def of(cls, dtype: torch.dtype, target: str) -> LinearBlocks:
        """What is used where nothing is chosen: without a spill on sm_90 for 64 and 128 features and channels."""
        if dtype == torch.float32:  # its products are no tensor core's, and keep their operands in registers
            return cls(32, 32, 32)
        # Loops are short, and a stage more is held in registers there.
        return cls(num_stages=1) if dtype == torch.float16 or target.startswith("sm_8") else cls()

    def rows(self, formula: LinearFormula) -> int:
        """Positions in a block of queries or keys."""
        return _ROWS if formula.decay == "channel" else self.chunk

    def widths(self, features: int, values: int) -> tuple[int, int]:
        """Features and value channels in a block, no more than there are."""
        return min(self.block_f, power(features)), min(self.block_e, power(values))

    def step(self, features: int, values: int) -> dict[str, int]:
        """The sizes of a decode step."""
        every = power(features)
        return {"ALL_F": every, "STEP_E": max(min(power(values), _STEP // every), 1)}


def aligned(features: int) -> int:
    """So many features are given to a kernel, the last of them zeros: it then loads many at a time. Rows of 17 of them
    took twice the instructions, and registers that are not there.
    """
    return -(-features // 16) * 16


def source(
    formula: LinearFormula,
    blocks: LinearBlocks,
    *,
    features: int,
    values: int,
    dtype: torch.dtype,
    padded: bool = False,
    backward: bool = True,
) -> str:
    """The Triton source of a formula: `features` is the size of phi(q), `values` that of a value."""
    block_f, block_e = blocks.widths(features, values)
    maps = [each for which in ("query", "key") for each in _maps(formula, which, backward)]
    named = ", ".join(dict.fromkeys(each["name"] for each in maps)) or "features as given"
    what = f"{named}{where(*formula.maps)}; {'causal' if formula.causal else 'all keys'}, decay {formula.decay}"
    return rendered(
        "linear.py.jinja",
        title=f"{what}; {features}>{values}, {str(dtype).removeprefix('torch.')}, {asdict(blocks)}",
        causal=formula.causal,
        # One number for a head is one for each of its tokens: a load of 64 numbers beside blocks of 64 by 64.
        decay={"none": "", "head": "token"}.get(formula.decay, formula.decay),
        normalised=formula.normalised,
        padding=padded,
        maps=maps,
        query_map=formula.query_map is not None,
        key_map=formula.key_map is not None,
        chunk=blocks.chunk,
        rows=blocks.rows(formula),
        features=features,
        block_f=block_f,
        values=values,
        block_e=block_e,
        flat=FLAT,
        dtype=str(dtype).removeprefix("torch."),
        widened=dtype == torch.bfloat16 and interpreted(),
        backward=backward,
    )


def _maps(formula: LinearFormula, which: Any, backward: bool) -> Iterator[dict[str, Any]]:
    expression = formula.expression(which)
    if expression is None:
        return
    graphs: list[tuple[str, fx.Graph]] = [("", expression.graph)]
    if backward:
        graphs.append(("_slope", derivatives(expression)[0]))
    for suffix, graph in graphs:
        lines, results = printed(graph, TRITON)
        constant = not any(node.op == "placeholder" and node.users for node in graph.nodes)
        yield {
            "word": f"{which}_map{suffix}", "name": expression.name, "lines": lines, "result": results[0],
            "constant": constant,
        }  # fmt: skip
