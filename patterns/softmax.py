"""Softmax over the keys: the normaliser, with or without the upcast to float32."""

from __future__ import annotations

import torch
from torch import fx

from rewriter.pattern import Answer, Pattern, Reading, argument, is_call, value_of
from rewriter.site import Refusal

_ATEN = torch.ops.aten


def normaliser(node: fx.Node, reading: Reading) -> Answer:
    """Only over the last axis; the type in which it normalises is a fact."""
    if not is_call(node, _ATEN.softmax, _ATEN._softmax, _ATEN._safe_softmax):
        return None
    scores = argument(node, "self")
    rank = value_of(scores).dim()
    if argument(node, "dim") % max(rank, 1) != rank - 1:
        return Refusal("the softmax does not run over the last axis")
    reading.softmax_dtype = value_of(node).dtype
    return scores if isinstance(scores, fx.Node) else None


PATTERN = Pattern(
    name="softmax",
    normaliser=normaliser,
    examples=(
        lambda q, k, v, mask: (q @ k.mT * 0.5).masked_fill(~mask, -1e30).softmax(-1) @ v,
        lambda q, k, v, mask: torch.softmax((q @ k.mT).masked_fill(~mask, -1e30), -1, torch.float32).to(v.dtype) @ v,
        lambda q, k, v, mask: torch.softmax((q @ k.mT).masked_fill(~mask, -1e30).float(), dim=-1).type_as(v) @ v,
    ),
)
