"""Weights that do not sum to one: sigmoid (Ramapuram et al. 2024, arXiv:2409.04431, equation 3) and ReLU (Wortsman et
al. 2023, arXiv:2309.08586, section 3) of each score by itself."""

from __future__ import annotations

import math

import torch
from torch import fx

from rewriter.nodes import is_call
from rewriter.pattern import Normaliser, Pattern

_ATEN = torch.ops.aten


def normaliser(node: fx.Node) -> Normaliser | None:
    """Along which axis is said by the product with the values."""
    if is_call(node, _ATEN.sigmoid):
        return Normaliser(node.all_input_nodes[0], -1, "sigmoid")
    if is_call(node, _ATEN.relu):
        return Normaliser(node.all_input_nodes[0], -1, "relu")
    return None


PATTERN = Pattern(
    name="pointwise_normaliser",
    normaliser=normaliser,
    examples=(
        lambda q, k, v, mask: (q @ k.mT - math.log(7)).masked_fill(~mask, -1e30).sigmoid() @ v,
        lambda q, k, v, mask: (q @ k.mT * 0.3).masked_fill(~mask, -1e30).relu() @ v,
    ),
)
