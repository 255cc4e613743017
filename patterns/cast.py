"""What changes no value of the model's mathematics: casts, copies, slices that keep everything."""

from __future__ import annotations

import torch
from torch import fx

from rewriter.pattern import Answer, Pattern, Reading, is_call, unsliced, value_of

_ATEN = torch.ops.aten
_COPIES = (_ATEN.clone, _ATEN.contiguous, _ATEN.alias, _ATEN.lift_fresh_copy)
_CASTS = (_ATEN.to, _ATEN._to_copy, _ATEN.type_as)


def _source(node: fx.Node) -> fx.Node | None:
    if is_call(node, _ATEN.slice) and unsliced(node) is not node:
        return unsliced(node)
    if not is_call(node, *_COPIES, *_CASTS):
        return None
    source = node.args[0]
    assert isinstance(source, fx.Node)
    floating = value_of(source).dtype.is_floating_point and value_of(node).dtype.is_floating_point
    return source if floating and value_of(source).device == value_of(node).device else None


def score(node: fx.Node, reading: Reading) -> Answer:
    """The scores in a wider type before the softmax."""
    return _source(node)


def weight(node: fx.Node, weights: fx.Node, reading: Reading) -> Answer:
    """The weights back in the type of the values."""
    return node if _source(node) is weights else None


PATTERN = Pattern(
    name="cast",
    score=score,
    weight=weight,
    examples=(
        lambda q, k, v, mask: torch.softmax((q @ k.mT).masked_fill(~mask, -1e30).float(), -1).to(v.dtype) @ v,
        lambda q, k, v, mask: torch.softmax((q @ k.mT).clone().masked_fill(~mask, -1e30), -1).contiguous() @ v,
    ),
)
