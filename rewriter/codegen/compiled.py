"""A formula's kernels compiled for machines that are not here, with the arguments that a launch would give them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from rewriter.codegen.ahead import Binary, Launch
from rewriter.codegen.expression import Kind
from rewriter.codegen.formula import Formula
from rewriter.codegen.fragments import KERNELS, Blocks, source
from rewriter.codegen.source import loaded

_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_POINTED = {"bool": "i1", "int": "i64", "float": "fp32"}


def launches(
    formula: Formula,
    blocks: Blocks,
    *,
    head_dim: int,
    v_head_dim: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    kinds: Mapping[str, Kind] | None = None,
    kernels: tuple[str, ...] = KERNELS,
    gradients: tuple[str, ...] = (),
) -> Iterator[Launch]:
    """Each kernel of a formula with the types of its arguments, those of contiguous operands. `gradients` names the
    tensors that are learned.
    """
    known = dict(kinds or {})
    sizes: dict[str, Any] = {"head_dim": head_dim, "v_head_dim": v_head_dim or head_dim, "dtype": dtype, "kinds": known}
    sizes["gradients"] = gradients
    for name in kernels:
        parts: dict[str, Any] = {"backward": name.startswith("backward"), "jvp": name == "forward_jvp"}
        module = loaded(source(formula, blocks, **sizes, **parts), "triton")
        kernel = getattr(module, name)
        types = {argument: _type(argument, dtype, known) for argument in kernel.arg_names}
        constants = {"sink": None} if "sink" in types and not formula.sink else {}
        signature = {argument: text for argument, text in types.items() if argument not in constants}
        # As of contiguous tensors of these head sizes: what a launch sees by itself.
        whole = [a for a, text in signature.items() if text[0] == "*" or re.fullmatch(r"(t_)?[qkvo]_[bhmn]", a)]
        divisible = whole if head_dim % 16 == 0 and (v_head_dim or head_dim) % 16 == 0 else []
        yield Launch(kernel, signature, constants, divisible)


def binaries(formula: Formula, blocks: Blocks, target: str, **sizes: Any) -> list[Binary]:
    """What each kernel is on this target; `sizes` as of `launches`. Raises `CompileError` with one sentence where a
    config does not fit on it.
    """
    return [each.compiled(target, **blocks.options) for each in launches(formula, blocks, **sizes)]


def _type(argument: str, dtype: torch.dtype, kinds: Mapping[str, Kind]) -> str:
    if argument == "scale":
        return "fp32"
    if argument in ("first", "runs"):
        return "*i32"
    if argument in ("lse", "delta", "sink") or argument.startswith("d_in_"):
        return "i32" if re.search(r"_[sn]\d$", argument) else "*fp32"
    if argument.removeprefix("in_") in kinds:
        return f"*{_POINTED[kinds[argument.removeprefix('in_')]]}"
    if re.fullmatch("(d_|t_)?(query|key|value|out)", argument):
        return f"*{_TYPES[dtype]}"
    return "i32"
