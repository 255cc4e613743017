"""The softmax family on GPUs: Triton kernels of a formula, launched, with gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from rewriter.codegen.ahead import SHARED_KIB
from rewriter.codegen.blocks import Runs, lists_of, promising, work
from rewriter.codegen.configs import candidates, default, with_splits
from rewriter.codegen.expression import Expression, kinds_of
from rewriter.codegen.formula import Formula
from rewriter.codegen.fragments import KERNELS, Blocks, captured, power, source
from rewriter.codegen.source import loaded
from rewriter.errors import OptionError
from rewriter.target import Target

_PER_KEY = 32.0
"""What a key of a block costs on a GPU, in scores: its loads beside the products. An estimate, never measured."""


class SoftmaxKernel:
    """A formula on a GPU: query (B, H, Sq, D), key (B, Hkv, Skv, D), value (B, Hkv, Skv, Dv) -> (B, H, Sq, Dv).

    Sizes may differ from call to call; kernels are made for head sizes, type and config. `blocks` is the config of all
    kernels, or those of some by name; the others have what is shipped for the device.
    """

    def __init__(self, formula: Formula, blocks: Blocks | Mapping[str, Blocks] | None = None) -> None:
        self.formula = formula
        self.blocks = (
            dict.fromkeys((*KERNELS, "forward_jvp"), blocks) if isinstance(blocks, Blocks) else dict(blocks or {})
        )
        self.lists = lists_of(formula)

    def __str__(self) -> str:
        return f"triton {self.blocks or 'as shipped'}"

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, *, sink: Tensor | None = None, **tensors: Tensor
    ) -> Tensor:
        """Scale multiplies q k^T. `tensors` are those that the formula names. Gradients flow to all that are floats."""
        missing = set(self.formula.tensors) ^ set(tensors)
        if missing or (sink is None) == self.formula.sink:
            wanted = self.formula.tensors + (("sink",) if self.formula.sink else ())
            raise OptionError(f"the formula reads the tensors {wanted}; given are {sorted(tensors)}")
        names = tuple(self.formula.tensors)
        if scale <= 0:  # a kernel takes the maximum before it scales
            query, scale = query * scale, 1.0
        out: Tensor = _Attend.apply(self, scale, names, query, key, value, sink, *(tensors[n] for n in names))
        return out

    def config(self, kernel: str, query: Tensor, tensors: Mapping[str, Tensor]) -> Blocks:
        """That of one kernel for these operands."""
        if (chosen := self.blocks.get(kernel)) is not None:
            return chosen
        capability, pairs = Target.current(query.device).capability, self.formula.reads_pairs(kinds_of(tensors))
        return default(capability, kernel, query.shape[-1], query.dtype, pairs=pairs)

    def module(
        self, blocks: Blocks, query: Tensor, value: Tensor, tensors: Mapping[str, Tensor], **options: Any
    ) -> ModuleType:
        """The generated kernels for these operands."""
        return _module(
            self.formula, blocks, query.shape[-1], value.shape[-1], query.dtype, tuple(kinds_of(tensors).items()),
            tuple(sorted(options.items())),
        )  # fmt: skip


def contenders(
    kernels: SoftmaxKernel, name: str, tensors: Mapping[str, Tensor], query: Tensor, key: Tensor,
    target: str | None = None,
) -> list[SoftmaxKernel]:  # fmt: skip
    """The kernels of a formula that are worth a measurement: these, and with those configs of the one of this name that
    fit the target (the operands' own where none is named) and promise less work for this mask.
    """
    formula, target = kernels.formula, target or Target.current(query.device).capability
    first = kernels.config(name, query, tensors)
    if target not in SHARED_KIB or query.shape[2] <= first.block_m:
        return [kernels]

    def cost(blocks: Blocks) -> float:
        return work(formula, query, key, tensors, blocks.block_m, blocks.block_n, per_key=_PER_KEY, per_query=0.0)

    pairs = formula.reads_pairs(kinds_of(tensors))
    others = candidates(target, name, head_dim=query.shape[-1], dtype=query.dtype, pairs=pairs)
    _, *better = promising(first, others, cost)
    return [kernels, *(SoftmaxKernel(formula, {**kernels.blocks, name: blocks}) for blocks in better)]


@cache
def _module(
    formula: Formula, blocks: Blocks, head_dim: int, v_head_dim: int, dtype: torch.dtype, kinds: Any, options: Any
) -> ModuleType:
    text = source(
        formula, blocks, head_dim=head_dim, v_head_dim=v_head_dim, dtype=dtype, kinds=dict(kinds), **dict(options)
    )
    return loaded(text, "triton")


def _arguments(expressions: tuple[Expression | None, ...], tensors: Mapping[str, Tensor]) -> list[Any]:
    """Each captured tensor with the strides and sizes of its axes."""
    given: list[Any] = []
    for name, rank in captured(*expressions).items():
        tensor = tensors[name]
        if tensor.dim() != rank:
            raise OptionError(f"{name} has {tensor.dim()} axes and is read at {rank} indices")
        given += [tensor, *(n for axis in range(rank) for n in (tensor.stride(axis), tensor.shape[axis]))]
    return given


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernel: SoftmaxKernel, scale: float, names: tuple[str, ...], query: Tensor, key: Tensor,
        value: Tensor, sink: Tensor | None, *captured_: Tensor,
    ) -> Tensor:  # fmt: skip
        tensors = dict(zip(names, captured_, strict=True))
        query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
        out, lse = launched(kernel, scale, query, key, value, sink, tensors)
        ctx.save_for_backward(query, key, value, sink, out, lse, *captured_)
        ctx.save_for_forward(query, key, value, sink, *captured_)
        ctx.set_materialize_grads(False)  # a tangent that is not there is None
        ctx.kernel, ctx.scale, ctx.names = kernel, scale, names
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Any:
        query, key, value, sink, out, lse, *captured_ = ctx.saved_tensors
        tensors = dict(zip(ctx.names, captured_, strict=True))
        wanted = tuple(n for n, need in zip(ctx.names, ctx.needs_input_grad[7:], strict=True) if need)
        d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
        delta = (out.float() * d_out.float()).sum(-1)
        grads = differentiated(ctx.kernel, ctx.scale, query, key, value, d_out, lse, delta, tensors, wanted)
        d_sink = None
        if sink is not None and ctx.needs_input_grad[6]:
            share = (sink.float()[:, None] - lse).exp()
            d_sink = -(share * delta).sum((0, 2)).to(sink.dtype)
        return None, None, None, *grads[:3], d_sink, *(grads[3].get(name) for name in ctx.names)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        query, key, value, sink, *captured_ = ctx.saved_tensors
        if any(t is not None for t in tangents[6:]):
            raise OptionError("forward derivatives are along queries, keys and values, not along what the scores read")
        tensors = dict(zip(ctx.names, captured_, strict=True))
        return moved(ctx.kernel, ctx.scale, (query, key, value), tangents[3:6], sink, tensors)


def moved(
    kernel: SoftmaxKernel, scale: float, operands: tuple[Tensor, ...], tangents: Sequence[Tensor | None],
    sink: Tensor | None, tensors: Mapping[str, Tensor],
) -> Tensor:  # fmt: skip
    """The derivative of the output along the tangents of query, key and value; None stands for zeros."""
    along = [torch.zeros_like(t) if dt is None else dt for t, dt in zip(operands, tangents, strict=True)]
    along = [t if t.stride(-1) == 1 else t.contiguous() for t in along]
    (query, key, value), blocks = operands, kernel.config("forward_jvp", operands[0], tensors)
    (batch, heads, q_len, _), (kv_heads, kv_len) = query.shape, key.shape[1:3]
    runs = kernel.lists(query, key, tensors, blocks.block_m, blocks.block_n)
    paired = [t for pair in zip(operands, along, strict=True) for t in pair]
    t_out = query.new_empty((batch, heads, q_len, value.shape[3]))
    module = kernel.module(blocks, query, value, tensors, backward=False, jvp=True)
    module.forward_jvp[(-(-q_len // blocks.block_m), batch * heads)](
        *paired, sink, t_out, runs.first, runs.runs, scale, *(n for t in paired for n in t.stride()[:3]), heads,
        heads // kv_heads, q_len, kv_len, *_steps(runs),
        *_arguments(kernel.formula.expressions(kinds_of(tensors)), tensors),
        **blocks.options,
    )  # fmt: skip
    return t_out


def launched(
    kernel: SoftmaxKernel, scale: float, query: Tensor, key: Tensor, value: Tensor, sink: Tensor | None,
    tensors: Mapping[str, Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(B, H, Sq, Dv) and the logarithm of each row's sum, float32 (B, H, Sq)."""
    (batch, heads, q_len, _), (kv_heads, kv_len), width = query.shape, key.shape[1:3], value.shape[3]
    groups, blocks, formula = heads // kv_heads, kernel.config("forward", query, tensors), kernel.formula
    kinds = kinds_of(tensors)
    mask, score = formula.expressions(kinds)
    packed = groups > 1 and groups * q_len <= blocks.block_m and not (mask and mask.uses("h"))
    rows = groups * q_len if packed else q_len
    k_blocks = -(-kv_len // blocks.block_n)
    if rows <= blocks.block_m:  # a step of decoding: no larger block than it has rows, and work for every processor
        blocks = replace(blocks, block_m=power(rows))
        if "forward" not in kernel.blocks:
            blocks = with_splits(blocks, batch * (kv_heads if packed else heads), k_blocks, _processors(query.device))
    splits = min(blocks.splits, k_blocks) if q_len <= blocks.block_m else 1
    module = kernel.module(blocks, query, value, tensors, packed=packed, backward=False)
    runs = kernel.lists(query, key, tensors, q_len if packed else blocks.block_m, blocks.block_n)
    out = query.new_empty((batch, heads, q_len, width))
    lse = query.new_empty((batch, heads, q_len), dtype=torch.float32)
    parts = query.new_empty((splits, *out.shape), dtype=torch.float32) if splits > 1 else out
    lses = query.new_empty((splits, *lse.shape), dtype=torch.float32) if splits > 1 else lse
    grid = (-(-rows // blocks.block_m), batch * (kv_heads if packed else heads), splits)
    module.forward[grid](
        query, key, value, sink, parts, lses, runs.first, runs.runs, scale, *query.stride()[:3], *key.stride()[:3],
        *value.stride()[:3], batch, heads, groups, q_len, kv_len, *_steps(runs), rows, -(-k_blocks // splits),
        *_arguments((mask, score), tensors), **blocks.options,
    )  # fmt: skip
    if splits > 1:
        count = batch * heads * q_len
        module.combined[(count,)](parts, lses, out, lse, count, splits, SPLITS=1 << (splits - 1).bit_length())
    return out, lse


def differentiated(
    kernel: SoftmaxKernel, scale: float, query: Tensor, key: Tensor, value: Tensor, d_out: Tensor, lse: Tensor,
    delta: Tensor, tensors: Mapping[str, Tensor], wanted: tuple[str, ...],
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:  # fmt: skip
    """d loss / d query, key, value and the wanted tensors."""
    (batch, heads, q_len, _), (kv_heads, kv_len) = query.shape, key.shape[1:3]
    kinds = kinds_of(tensors)
    mask, score = kernel.formula.expressions(kinds)
    d_query, d_key, d_value = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value))
    strides = [n for t in (query, key, value, d_out) for n in t.stride()[:3]]
    given = _arguments((mask, score), tensors)

    def launch(name: str, transposed: bool, outputs: Sequence[Tensor], more: Sequence[Any] = ()) -> None:
        blocks = kernel.config(name, query, tensors)
        module = kernel.module(blocks, query, value, tensors, gradients=wanted)
        runs = kernel.lists(query, key, tensors, blocks.block_m, blocks.block_n, transposed=transposed)
        length, block = (kv_len, blocks.block_n) if transposed else (q_len, blocks.block_m)
        getattr(module, name)[(-(-length // block), batch * (kv_heads if transposed else heads))](
            query, key, value, d_out, lse, delta, *outputs, runs.first, runs.runs, scale, *strides, heads,
            heads // kv_heads, q_len, kv_len, *_steps(runs), *given, *more, **blocks.options,
        )  # fmt: skip

    launch("backward_keys", True, (d_key, d_value))
    sums = {name: torch.zeros(tensors[name].shape, dtype=torch.float32, device=query.device) for name in wanted}
    learned = [name for name in captured(score) if name in wanted]
    places = [each for name in learned for each in (sums[name], *sums[name].stride())]
    launch("backward_queries", False, (d_query,), places)
    return d_query, d_key, d_value, {name: total.to(tensors[name].dtype) for name, total in sums.items()}


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _steps(runs: Runs) -> tuple[int, int]:
    """How far the lists of two batch rows, and of two heads, lie apart: 0 where one list serves all."""
    batch, heads, _ = runs.first.shape
    return (runs.first.stride(0) if batch > 1 else 0), (runs.first.stride(1) if heads > 1 else 0)
