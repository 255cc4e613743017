"""One more column of scores without a value, which takes a share of every row (Xiao et al. 2023, arXiv:2309.17453;
learned for each head in OpenAI's gpt-oss). It is concatenated before the softmax and cut off after it. So are the
scores of several sets of keys, whose weights are taken apart again.
"""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import fx

from rewriter.axes import shape_of
from rewriter.nodes import argument, constant, is_call, unsliced, value_of
from rewriter.pattern import Pattern, Step

_ATEN = torch.ops.aten


def element(node: fx.Node) -> Step | tuple[Step, ...] | None:
    """cat of the scores and one column, in either order, or other scores; one column of zeros from `pad`; and the slice
    or the part of a split that is without it.
    """
    if is_call(node, _ATEN.cat, _ATEN.concat):
        tensors = node.args[0]
        assert isinstance(tensors, (list, tuple))
        rank = value_of(node).dim()
        # An empty cache is joined as a tensor of one axis.
        if len(tensors) < 2 or any(value_of(each).dim() != rank for each in tensors):  # type: ignore[arg-type]
            return None
        axis = int(argument(node, "dim") or 0) % rank
        if len(tensors) > 2:
            parts = [each for each in tensors if isinstance(each, fx.Node)]
            return tuple(Step("edit", part, axis=axis, name="joined_scores") for part in parts)
        pairs = [(tensors[0], tensors[1]), (tensors[1], tensors[0])]
        return tuple(
            Step("sink", scores, None if constant(column) == 0 else column, axis=axis)
            if shape_of(column)[axis] == 1
            else Step("edit", scores, axis=axis, name="joined_scores")
            for scores, column in pairs
            if isinstance(scores, fx.Node) and isinstance(column, fx.Node)
        )
    if is_call(node, _ATEN.constant_pad_nd, _ATEN.pad):
        source, widths = node.args[:2]
        assert isinstance(source, fx.Node) and isinstance(widths, (list, tuple))
        value = constant(argument(node, "value")) if argument(node, "value") is not None else 0.0
        is_column = sorted(widths[:2], key=str) == [0, 1] and not any(widths[2:])
        return Step("sink", source, axis=value_of(node).dim() - 1) if is_column and value == 0 else None
    if is_call(node, _ATEN.select):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        axis = int(argument(node, "dim")) % value_of(source).dim()
        return Step("slice", source, axis=axis, number=0.0) if shape_of(source)[axis] != 1 else None
    if (is_call(node, _ATEN.slice) and unsliced(node) is node) or is_call(node, _ATEN.narrow):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return Step("slice", source, axis=int(argument(node, "dim") or 0) % value_of(node).dim())
    if node.target is operator.getitem and is_call(node.args[0], _ATEN.split, _ATEN.split_with_sizes, _ATEN.chunk):
        split = node.args[0]
        assert isinstance(split, fx.Node)
        source = split.args[0]
        assert isinstance(source, fx.Node)
        return Step("slice", source, axis=int(argument(split, "dim") or 0) % value_of(source).dim())
    return None


def _with_sink(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    scores = (q @ k.mT).masked_fill(~mask, -1e30)
    sink = torch.linspace(-1, 1, q.shape[1], dtype=q.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    both = torch.cat([scores, sink], -1)
    return (both - both.amax(-1, keepdim=True)).softmax(-1)[..., :-1] @ v


PATTERN = Pattern(
    name="sink",
    element=element,
    examples=(
        _with_sink,
        lambda q, k, v, mask: F.pad((q @ k.mT).masked_fill(~mask, -1e30), (1, 0)).softmax(-1)[..., 1:] @ v,
        lambda q, k, v, mask: (
            F.pad((q @ k.mT).masked_fill(~mask, -1e30), (0, 1)).softmax(-1).narrow(-1, 0, k.shape[-2]) @ v
        ),
        lambda q, k, v, mask: (
            F.pad((q @ k.mT).masked_fill(~mask, -1e30), (1, 0)).softmax(-1).split([1, k.shape[-2]], -1)[1] @ v
        ),
    ),
)
