"""Scores that are written over: `scores[...] = f(scores)`. What else reads the same memory is not followed."""

from __future__ import annotations

import torch
from torch import fx

from rewriter.axes import shape_of
from rewriter.nodes import is_call
from rewriter.pattern import Pattern, Step


def element(node: fx.Node) -> Step | None:
    """The values that are copied into a tensor of the same shape."""
    if not is_call(node, torch.ops.aten.copy_):
        return None
    target, source = node.args[:2]
    if not isinstance(source, fx.Node) or not isinstance(target, fx.Node) or shape_of(source) != shape_of(target):
        return None
    return Step("edit", source, name="changed_in_place")


def _written_over(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    scores = (q @ k.mT).copy_(((q @ k.mT) * 0.5).masked_fill(~mask, -1e30))
    return scores.softmax(-1) @ v


def _scaled_over(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    scores = q @ k.mT
    return scores.copy_(scores * 0.5).masked_fill(~mask, -1e30).softmax(-1) @ v


PATTERN = Pattern(name="in_place", element=element, examples=(_written_over, _scaled_over))
