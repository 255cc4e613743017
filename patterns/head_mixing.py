"""Talking heads: a linear layer, or a normalisation, across the heads of scores or weights (Shazeer et al. 2020,
arXiv:2003.02436), as a linear layer on moved axes, an einsum, or a 1x1 convolution.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx

from rewriter.axes import shape_of
from rewriter.nodes import is_call, is_parameter, value_of
from rewriter.pattern import Pattern, Step, ask

_ATEN = torch.ops.aten
_MOST_HEADS = 256


def element(node: fx.Node) -> Step | None:
    """A product with a parameter along one axis, all others staying. The walk sees to it that the axis is of heads."""
    if is_call(node, _ATEN.linear) and value_of(node).dim() >= 4:
        source, axis = node.args[0], value_of(node).dim() - 1
    elif is_call(node, _ATEN.layer_norm):
        if len(node.args[1]) != 1:  # type: ignore[arg-type]
            return None
        source, axis = node.args[0], value_of(node).dim() - 1
    elif is_call(node, _ATEN.batch_norm):
        source, axis = node.args[0], 1
    elif is_call(node, _ATEN.conv2d, _ATEN.convolution):
        weight = node.args[1]
        assert isinstance(weight, fx.Node)
        if shape_of(weight)[2:] != [1, 1]:
            return None
        source, axis = node.args[0], 1
    else:
        found = ask("contraction", node)
        if found is None or is_parameter(found.left) == is_parameter(found.right):
            return None
        source, labels = (
            (found.left, found.left_labels) if is_parameter(found.right) else (found.right, found.right_labels)
        )
        gone = [place for place, label in enumerate(labels) if label not in found.out_labels]
        if len(gone) != 1 or len(found.out_labels) != len(labels):
            return None
        axis = gone[0]
        if [n for i, n in enumerate(labels) if i != axis] != [n for i, n in enumerate(found.out_labels) if i != axis]:
            return None
    assert isinstance(source, fx.Node)
    size = shape_of(source)[axis]
    small = isinstance(size, int) and size <= _MOST_HEADS
    return Step("edit", source, axis=axis, name="talking_heads") if small else None


_MIXER = torch.nn.Parameter(torch.linspace(-1, 1, 16).view(4, 4))
"""For the four heads of the examples."""


def _mixed(x: torch.Tensor) -> torch.Tensor:
    return F.linear(x.permute(0, 2, 3, 1), _MIXER.to(x.dtype)).permute(0, 3, 1, 2)


def _mixed_weights(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    weights = (q @ k.mT).masked_fill(~mask, -1e30).softmax(-1)
    return torch.einsum("bhqk,gh->bgqk", weights, _MIXER.to(q.dtype)) @ v


PATTERN = Pattern(
    name="head_mixing",
    element=element,
    examples=(
        lambda q, k, v, mask: _mixed(q @ k.mT).masked_fill(~mask, -1e30).softmax(-1) @ v,
        _mixed_weights,
    ),
)
