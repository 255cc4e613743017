"""Dropout on the weights. In eval mode it is nothing; in training its probability is a fact of the site."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx

from rewriter.pattern import Answer, Pattern, Reading, argument, constant, is_call
from rewriter.site import Refusal

_ATEN = torch.ops.aten


def weight(node: fx.Node, weights: fx.Node, reading: Reading) -> Answer:
    """weights -> dropped weights."""
    if not is_call(node, _ATEN.dropout, _ATEN.dropout_, _ATEN.feature_dropout):
        return None
    probability = constant(argument(node, "p")) if argument(node, "train") else 0.0
    if probability is None:
        return Refusal("the probability of the dropout is not a number")
    if probability and (reading.dropout_p or is_call(node, _ATEN.feature_dropout)):
        return Refusal("the weights are dropped twice, or by whole heads")
    reading.dropout_p = reading.dropout_p or probability
    return node


PATTERN = Pattern(
    name="dropout",
    weight=weight,
    examples=(
        lambda q, k, v, mask: F.dropout((q @ k.mT).masked_fill(~mask, -1e30).softmax(-1), 0.1, training=False) @ v,
        lambda q, k, v, mask: F.dropout((q @ k.mT).masked_fill(~mask, -1e30).softmax(-1), 0.0, training=True) @ v,
    ),
)
