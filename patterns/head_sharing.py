"""Fewer key and value heads than query heads, spelled by repeating them (GQA, MQA)."""

from __future__ import annotations

import torch
from torch import fx

from rewriter.axes import View
from rewriter.nodes import argument, is_call, value_of
from rewriter.pattern import Pattern, Step

_ATEN = torch.ops.aten


def element(node: fx.Node) -> Step | None:
    """`repeat_interleave` repeats each head in place, `repeat` all heads in a row. (`expand` is a view.)"""
    if is_call(node, _ATEN.repeat_interleave):
        source, dim, repeats = node.args[0], argument(node, "dim"), argument(node, "repeats")
        if not isinstance(source, fx.Node) or dim is None or not isinstance(repeats, int):
            return None
        counts = [1] * value_of(node).dim()
        counts[int(dim)] = repeats
        return Step("view", source, view=View(repeats=tuple(counts), interleaved=True))
    if is_call(node, _ATEN.repeat):
        source, counts = node.args[0], argument(node, "repeats")
        if not isinstance(source, fx.Node) or not all(isinstance(count, int) for count in counts):
            return None
        return Step("view", source, view=View(repeats=tuple(counts)))
    return None


def _grouped(q: torch.Tensor, k: torch.Tensor) -> int:
    return q.shape[1] // k.shape[1]


def _repeat_kv(x: torch.Tensor, n: int) -> torch.Tensor:
    b, h, s, d = x.shape
    return x[:, :, None].expand(b, h, n, s, d).reshape(b, h * n, s, d)


def _grouped_queries(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    grouped = q.unflatten(1, (k.shape[1], -1))
    weights = (grouped @ k[:, :, None].mT).masked_fill(~mask.unsqueeze(2), -1e30).softmax(-1)
    out: torch.Tensor = weights @ v[:, :, None]
    return out.flatten(1, 2)


PATTERN = Pattern(
    name="head_sharing",
    element=element,
    examples=(
        lambda q, k, v, mask: (
            torch.softmax((q @ _repeat_kv(k, _grouped(q, k)).mT).masked_fill(~mask, -1e30), -1)
            @ _repeat_kv(v, _grouped(q, k))
        ),
        lambda q, k, v, mask: (
            torch.softmax((q @ k.repeat_interleave(_grouped(q, k), 1).mT).masked_fill(~mask, -1e30), -1)
            @ v.repeat_interleave(_grouped(q, k), dim=1)
        ),
        _grouped_queries,
    ),
)
