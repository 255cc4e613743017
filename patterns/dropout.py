"""Dropout on the weights. In eval mode it is nothing; in training its probability is a fact of the site."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx

from rewriter.nodes import argument, constant, is_call
from rewriter.pattern import Pattern, Step
from rewriter.site import Refusal

_ATEN = torch.ops.aten


def element(node: fx.Node) -> Step | Refusal | None:
    """weights -> dropped weights. Whole heads may be dropped too, which is an edit."""
    if not is_call(node, _ATEN.dropout, _ATEN.dropout_, _ATEN.feature_dropout):
        return None
    source = argument(node, "input") or argument(node, "self")
    assert isinstance(source, fx.Node)
    probability = constant(argument(node, "p")) if argument(node, "train") else 0.0
    if probability is None:
        return Refusal("the probability of the dropout is not a number")
    if probability and is_call(node, _ATEN.feature_dropout):
        return Step("edit", source, name="heads_dropped")
    return Step("dropout", source, number=probability)


PATTERN = Pattern(
    name="dropout",
    element=element,
    examples=(
        lambda q, k, v, mask: F.dropout((q @ k.mT).masked_fill(~mask, -1e30).softmax(-1), 0.1, training=False) @ v,
        lambda q, k, v, mask: F.dropout((q @ k.mT).masked_fill(~mask, -1e30).softmax(-1), 0.0, training=True) @ v,
    ),
)
