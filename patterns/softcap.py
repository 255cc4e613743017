"""Scores kept between -c and c: c * tanh(scores / c) (Bello et al. 2016, arXiv:1611.09940, section A.1)."""

from __future__ import annotations

import torch
from torch import fx

from rewriter.nodes import is_call
from rewriter.pattern import Pattern, Step


def element(node: fx.Node) -> Step | None:
    """The tanh; the factors around it are scales."""
    if not is_call(node, torch.ops.aten.tanh, torch.ops.aten.tanh_):
        return None
    return Step("cap", node.all_input_nodes[0])


PATTERN = Pattern(
    name="softcap",
    element=element,
    examples=(
        lambda q, k, v, mask: (torch.tanh(q @ k.mT * 0.4 / 5) * 5).masked_fill(~mask, -1e30).softmax(-1) @ v,
        lambda q, k, v, mask: ((q @ k.mT).tanh() * 3).masked_fill(~mask, -1e30).softmax(-1) @ v,
    ),
)
