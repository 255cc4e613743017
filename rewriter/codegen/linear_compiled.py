"""The kernels of the linear family compiled for machines that are not here, with the arguments that a launch gives."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch

from rewriter.codegen.ahead import Binary, Launch
from rewriter.codegen.linear_formula import LinearFormula
from rewriter.codegen.linear_fragments import BACKWARD, FORWARD, LinearBlocks, source
from rewriter.codegen.source import loaded

_TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
_OPERANDS = ("query", "key", "value", "out", "d_out", "d_query", "d_key", "d_value")
_SINGLE = ("gates", "states", "initial", "final", "norms", "rates", "deltas", "d_states", "d_gates")


def launches(
    formula: LinearFormula,
    blocks: LinearBlocks,
    *,
    features: int,
    values: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    padded: bool = False,
    kernels: tuple[str, ...] = FORWARD + BACKWARD,
) -> Iterator[Launch]:
    """Each kernel of a formula with the types of its arguments, those of contiguous operands."""
    width = values or features
    absent = {
        **({} if formula.decay != "none" else dict.fromkeys(("gates", "d_gates"))),
        **({} if padded else {"padding": None}),
        **({} if formula.normalised else dict.fromkeys(("norms", "rates", "deltas"))),
    }
    # No gradient stands beside a forward pass that asks for none.
    modules = {
        backward: loaded(
            source(formula, blocks, features=features, values=width, dtype=dtype, padded=padded, backward=backward),
            "triton",
        )
        for backward in {name in BACKWARD for name in kernels}
    }
    for name in kernels:
        kernel = getattr(modules[name in BACKWARD], name)
        constants: dict[str, Any] = {argument: None for argument in kernel.arg_names if argument in absent}
        if name == "step":
            constants |= blocks.step(features, width)
        if name == "passed":
            constants["REVERSED"] = False
        signature = {a: _type(a, dtype) for a in kernel.arg_names if a not in constants}
        whole = features % 16 == 0 and width % 16 == 0
        steps = r"[qkvo]_[bhn]" + (r"|g_[bhn]" if formula.decay == "channel" else "")
        divisible = (a for a, text in signature.items() if text[0] == "*" or (whole and re.fullmatch(steps, a)))
        yield Launch(kernel, signature, constants, tuple(divisible))


def binaries(formula: LinearFormula, blocks: LinearBlocks, target: str, **sizes: Any) -> list[Binary]:
    """What each kernel is on this target; `sizes` as of `launches`. Raises `CompileError` with one sentence where a
    config does not fit on it.
    """
    return [each.compiled(target, **blocks.options) for each in launches(formula, blocks, **sizes)]


def _type(argument: str, dtype: torch.dtype) -> str:
    if argument in _OPERANDS:
        return _TYPES[dtype]
    if argument in _SINGLE:
        return "*fp32"
    return "*i1" if argument == "padding" else "fp32" if argument in ("scale", "eps") else "i32"
