"""Softmax over the keys: the normaliser, with or without the upcast to float32."""

from __future__ import annotations

import torch
from torch import fx

from rewriter.nodes import argument, is_call, value_of
from rewriter.pattern import Normaliser, Pattern

_ATEN = torch.ops.aten


def normaliser(node: fx.Node) -> Normaliser | None:
    """Over any axis; the type in which it normalises is a fact."""
    logarithm = node.args[0] if is_call(node, _ATEN.exp) else None
    call = logarithm if is_call(logarithm, _ATEN.log_softmax, _ATEN._log_softmax) else node
    assert isinstance(call, fx.Node)
    if call is node and not is_call(node, _ATEN.softmax, _ATEN._softmax, _ATEN._safe_softmax):
        return None
    scores = argument(call, "self")
    assert isinstance(scores, fx.Node)
    return Normaliser(scores, int(argument(call, "dim")), dtype=value_of(node).dtype)


PATTERN = Pattern(
    name="softmax",
    normaliser=normaliser,
    examples=(
        lambda q, k, v, mask: (q @ k.mT * 0.5).masked_fill(~mask, -1e30).softmax(-1) @ v,
        lambda q, k, v, mask: torch.softmax((q @ k.mT).masked_fill(~mask, -1e30), -1, torch.float32).to(v.dtype) @ v,
        lambda q, k, v, mask: torch.softmax((q @ k.mT).masked_fill(~mask, -1e30).float(), dim=-1).type_as(v) @ v,
        lambda q, k, v, mask: (q @ k.mT).masked_fill(~mask, -1e30).log_softmax(-1).exp() @ v,
    ),
)
