"""The Triton source of the softmax family: the template, with what a formula does printed into it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from rewriter.codegen.derivative import derivatives
from rewriter.codegen.dialect import TRITON, printed, word
from rewriter.codegen.expression import Expression, Kind, axes_of, kind_of, places
from rewriter.codegen.formula import Formula
from rewriter.codegen.source import interpreted, rendered
from rewriter.errors import OptionError

KERNELS = ("forward", "backward_keys", "backward_queries")


@dataclass(frozen=True)
class Blocks:
    """The config of a kernel: queries and keys in a block, warps, stages of the pipeline, and into how many parts the
    keys of a decode step are cut.
    """

    block_m: int = 64
    block_n: int = 64
    num_warps: int = 4
    num_stages: int = 2
    splits: int = 1

    def __post_init__(self) -> None:
        check_powers(self, block_m=16, block_n=16, num_warps=1)
        check_least(self, num_stages=1, splits=1)

    @property
    def options(self) -> dict[str, int]:
        """What Triton is told of a launch."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def check_powers(config: Any, **least: int) -> None:
    """Raises OptionError where one of these settings is no power of two, or below its least value."""
    for name, bound in least.items():
        value = getattr(config, name)
        if value < bound or value & (value - 1):
            raise OptionError(f"{name} is {value}; it must be a power of two, and at least {bound}")


def check_least(config: Any, **least: int) -> None:
    """Raises OptionError where one of these settings is below its least value."""
    for name, bound in least.items():
        if (value := getattr(config, name)) < bound:
            raise OptionError(f"{name} is {value}; it must be at least {bound}")


def source(
    formula: Formula,
    blocks: Blocks,
    *,
    head_dim: int,
    v_head_dim: int,
    dtype: torch.dtype,
    kinds: Mapping[str, Kind],
    gradients: tuple[str, ...] = (),
    backward: bool = True,
    jvp: bool = False,
    packed: bool = False,
) -> str:
    """The Triton source of a formula. `gradients` names the captured tensors that are learned; `packed` puts the heads
    that share keys into one block of queries.
    """
    mask, score = formula.expressions(kinds)
    what = f"{_title(mask, score)}{where(*formula.masks, *formula.scores)}"
    return rendered(
        "softmax.py.jinja",
        title=f"{what}; {head_dim}>{v_head_dim}, {str(dtype).removeprefix('torch.')}, {asdict(blocks)}",
        normaliser=formula.normaliser,
        sink=formula.sink,
        block_m=blocks.block_m,
        block_n=blocks.block_n,
        head_dim=head_dim,
        v_head_dim=v_head_dim,
        block_d=power(head_dim),
        block_e=power(v_head_dim),
        precise=dtype == torch.float32,
        widened=dtype == torch.bfloat16 and interpreted(),
        packed=packed,
        backward=backward,
        jvp=jvp,
        captured=[(word(name), rank) for name, rank in captured(mask, score).items()],
        mask=mask and _fragment(mask),
        score=score and _fragment(score),
        slopes=score and _slopes(score),
        gradients=_gradients(score, gradients) if score and backward else [],
        learned=[(word(name), rank) for name, rank in captured(score).items() if name in gradients],
    )


def where(*functions: Any) -> str:
    """Of which variants these functions are: the files that define them, but for what all formulas share."""
    files = dict.fromkeys(each.__module__ for each in functions if each.__module__ != Formula.__module__)
    return f" ({', '.join(files)})" if files else ""


def captured(*expressions: Expression | None) -> dict[str, int]:
    """The tensors that are read, in the order in which kernels are given them, with their numbers of axes."""
    return {name: rank for each in expressions if each for name, (_, rank) in each.captured.items()}


def power(width: int) -> int:
    """The least power of two that holds it, at least 16: what a product of Triton takes."""
    return max(16, 1 << (width - 1).bit_length())


def _title(mask: Expression | None, score: Expression | None) -> str:
    return ", ".join(each.name for each in (mask, score) if each) or "every key, plain scores"


def _fragment(expression: Expression) -> dict[str, Any]:
    lines, (result,) = printed(expression.graph, TRITON)
    whole = expression.uses("s") and kind_of(expression.result) == "float"  # a number for each score
    return {"name": expression.name, "lines": lines, "result": result, "whole": whole}


def _slopes(score: Expression) -> dict[str, Any]:
    lines, results = printed(derivatives(score)[0], TRITON)
    return {"lines": lines, "results": results}


def _gradients(score: Expression, wanted: tuple[str, ...]) -> list[dict[str, Any]]:
    """Of each read of a wanted tensor: which of the slopes is its own, where it is read, and over which indices the
    place differs.
    """
    found = []
    for number, node in enumerate(derivatives(score)[1]):
        if (name := str(node.args[0])) in wanted:
            lines, index = printed(node.graph, TRITON, places(node))
            place = {"lines": lines, "index": index, "along": axes_of(node)}
            found.append({"name": word(name), "slope": number + 1, **place})
    return found
