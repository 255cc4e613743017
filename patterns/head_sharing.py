"""Fewer key and value heads than query heads, spelled by repeating them (GQA, MQA)."""

from __future__ import annotations

import torch
from torch import fx

from rewriter.pattern import Answer, Operand, Pattern, argument, fixed, is_call, unsliced, value_of

_ATEN = torch.ops.aten


def operand(node: fx.Node, side: Operand) -> Answer:
    """(B, Hkv * n, S, D) made from (B, Hkv, S, D), each head repeated n times in place."""
    if side.role == "query" or side.transposed or side.groups != 1:
        return None
    source = _repeat_interleaved(node) or _expanded(node)
    if source is None:
        return None
    heads, kv_heads = fixed(value_of(node).shape[1]), fixed(value_of(source).shape[1])
    if heads is None or kv_heads is None or heads % kv_heads:
        return None
    side.groups = heads // kv_heads
    return source


def _repeat_interleaved(node: fx.Node) -> fx.Node | None:
    if not is_call(node, _ATEN.repeat_interleave) or value_of(node).dim() != 4:
        return None
    source = node.args[0]
    dim, repeats = argument(node, "dim"), argument(node, "repeats")
    by_heads = isinstance(repeats, int) and dim is not None and dim % 4 == 1
    return source if by_heads and isinstance(source, fx.Node) else None


def _expanded(node: fx.Node) -> fx.Node | None:
    """x[:, :, None].expand(B, Hkv, n, S, D).reshape(B, Hkv * n, S, D)"""
    if not is_call(node, _ATEN.reshape, _ATEN.view, _ATEN._unsafe_view) or value_of(node).dim() != 4:
        return None
    wide = node.args[0]
    while is_call(wide, _ATEN.clone, _ATEN.contiguous):
        wide = wide.args[0]  # type: ignore[union-attr]
    if not is_call(wide, _ATEN.expand):
        return None
    assert isinstance(wide, fx.Node)
    narrow = unsliced(wide.all_input_nodes[0])
    if not is_call(narrow, _ATEN.unsqueeze) or value_of(wide).dim() != 5:
        return None
    source = unsliced(narrow.all_input_nodes[0])
    if int(narrow.args[1]) % 5 != 2:  # type: ignore[arg-type]
        return None
    same_rest = value_of(wide).shape[3:] == value_of(node).shape[2:] == value_of(source).shape[2:]
    return source if same_rest and value_of(node).shape[0] == value_of(source).shape[0] else None


def _grouped(q: torch.Tensor, k: torch.Tensor) -> int:
    return q.shape[1] // k.shape[1]


def _repeat_kv(x: torch.Tensor, n: int) -> torch.Tensor:
    b, h, s, d = x.shape
    return x[:, :, None].expand(b, h, n, s, d).reshape(b, h * n, s, d)


PATTERN = Pattern(
    name="head_sharing",
    operand=operand,
    examples=(
        lambda q, k, v, mask: (
            torch.softmax((q @ _repeat_kv(k, _grouped(q, k)).mT).masked_fill(~mask, -1e30), -1)
            @ _repeat_kv(v, _grouped(q, k))
        ),
        lambda q, k, v, mask: (
            torch.softmax((q @ k.repeat_interleave(_grouped(q, k), 1).mT).masked_fill(~mask, -1e30), -1)
            @ v.repeat_interleave(_grouped(q, k), dim=1)
        ),
    ),
)
