"""What changes no value of the model's mathematics: casts, copies, slices that keep everything."""

from __future__ import annotations

import torch
from torch import fx

from rewriter.nodes import DATA_OF, is_call, unsliced, value_of
from rewriter.pattern import Pattern, Step

_ATEN = torch.ops.aten
_COPIES = (_ATEN.clone, _ATEN.contiguous, _ATEN.alias, _ATEN.lift_fresh_copy, _ATEN.detach, DATA_OF)
_CASTS = (_ATEN.to, _ATEN._to_copy, _ATEN.type_as)


def element(node: fx.Node) -> Step | None:
    """Between floating types, on one device."""
    if is_call(node, _ATEN.slice) and unsliced(node) is not node:
        return Step("same", unsliced(node))
    if not is_call(node, *_COPIES, *_CASTS):
        return None
    source = node.args[0]
    assert isinstance(source, fx.Node)
    floating = value_of(source).dtype.is_floating_point and value_of(node).dtype.is_floating_point
    return Step("same", source) if floating and value_of(source).device == value_of(node).device else None


PATTERN = Pattern(
    name="cast",
    element=element,
    examples=(
        lambda q, k, v, mask: torch.softmax((q @ k.mT).masked_fill(~mask, -1e30).float(), -1).to(v.dtype) @ v,
        lambda q, k, v, mask: torch.softmax((q @ k.mT).clone().masked_fill(~mask, -1e30), -1).contiguous() @ v,
    ),
)
