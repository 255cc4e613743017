"""A formula's kernels compiled for machines that are not here, with the arguments that a launch would give them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from rewriter.codegen.ahead import Binary, compile_ahead
from rewriter.codegen.expression import Kind
from rewriter.codegen.formula import Formula
from rewriter.codegen.fragments import Blocks, source
from rewriter.codegen.source import loaded

KERNELS = ("forward", "backward_keys", "backward_queries")

_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_POINTED = {"bool": "i1", "int": "i64", "float": "fp32"}


def binaries(
    formula: Formula,
    blocks: Blocks,
    target: str,
    *,
    head_dim: int,
    v_head_dim: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    kinds: Mapping[str, Kind] | None = None,
    kernels: tuple[str, ...] = KERNELS,
) -> list[Binary]:
    """What each kernel is on this target. Raises `CompileError` with one sentence where a config does not fit on it."""
    known = dict(kinds or {})
    sizes: dict[str, Any] = {"head_dim": head_dim, "v_head_dim": v_head_dim or head_dim, "dtype": dtype, "kinds": known}
    found = []
    for name in kernels:
        module = loaded(source(formula, blocks, **sizes, backward=name != "forward"), "triton")
        kernel = getattr(module, name)
        types = {argument: _type(argument, dtype, known) for argument in kernel.arg_names}
        constants = {"sink": None} if "sink" in types and not formula.sink else {}
        signature = {argument: text for argument, text in types.items() if argument not in constants}
        # As of contiguous tensors of these head sizes: what a launch sees by itself.
        whole = [a for a, text in signature.items() if text[0] == "*" or re.fullmatch(r"[qkvo]_[bhmn]", a)]
        divisible = whole if head_dim % 16 == 0 and (v_head_dim or head_dim) % 16 == 0 else []
        found.append(compile_ahead(kernel, signature, constants, target, divisible=divisible, **blocks.options))
    return found


def _type(argument: str, dtype: torch.dtype, kinds: Mapping[str, Kind]) -> str:
    if argument == "scale":
        return "fp32"
    if argument in ("first", "runs"):
        return "*i32"
    if argument in ("lse", "delta", "sink") or argument.startswith("d_in_"):
        return "i32" if re.search(r"_[sn]\d$", argument) else "*fp32"
    if argument.removeprefix("in_") in kinds:
        return f"*{_POINTED[kinds[argument.removeprefix('in_')]]}"
    if argument in ("query", "key", "value", "out", "d_out", "d_query", "d_key", "d_value"):
        return f"*{_TYPES[dtype]}"
    return "i32"
