"""Dropout on the weights. In eval mode it is nothing; in training its probability is a fact of the site."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx

from rewriter.pattern import Answer, Pattern, Reading, argument, is_call

_ATEN = torch.ops.aten


def weight(node: fx.Node, weights: fx.Node, reading: Reading) -> Answer:
    """weights -> dropped weights."""
    if not is_call(node, _ATEN.dropout, _ATEN.dropout_, _ATEN.feature_dropout):
        return None
    if argument(node, "train"):
        reading.dropout_p = float(argument(node, "p"))
    return node


PATTERN = Pattern(
    name="dropout",
    weight=weight,
    examples=(
        lambda q, k, v, mask: F.dropout((q @ k.mT).masked_fill(~mask, -1e30).softmax(-1), 0.1, training=False) @ v,
        lambda q, k, v, mask: F.dropout((q @ k.mT).masked_fill(~mask, -1e30).softmax(-1), 0.0, training=True) @ v,
    ),
)
