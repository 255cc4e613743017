"""A map that is read at places between its pixels."""

from __future__ import annotations

import torch
from torch import fx

from rewriter.nodes import argument, is_call, value_of
from rewriter.pattern import Pattern, Sampler
from rewriter.site import Refusal

_ATEN = torch.ops.aten


def sampler(node: fx.Node) -> Sampler | Refusal | None:
    """`grid_sample` of two axes: bilinear, 0 outside, -1 and 1 at the outer edges."""
    if not is_call(node, _ATEN.grid_sampler, _ATEN.grid_sampler_2d):
        return None
    source, grid, mode, border, corners = (argument(node, name) for name in _ARGUMENTS)
    if value_of(source).dim() != 4:
        return Refusal("volumes are sampled, and only maps of two axes are read")
    if (mode, border, bool(corners)) != (0, 0, False):
        return Refusal("maps are sampled in another way than bilinear, 0 outside, without align_corners")
    return Sampler(source, grid)


_ARGUMENTS = ("input", "grid", "interpolation_mode", "padding_mode", "align_corners")

PATTERN = Pattern(name="grid_sample", sampler=sampler)
