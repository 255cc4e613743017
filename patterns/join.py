"""Several tensors as one: `stack` and `cat`."""

from __future__ import annotations

import torch
from torch import fx

from rewriter.nodes import argument, is_call, value_of
from rewriter.pattern import Join, Pattern

_ATEN = torch.ops.aten


def join(node: fx.Node) -> Join | None:
    """The parts and the axis, counted from the front."""
    stacked = is_call(node, _ATEN.stack)
    if not stacked and not is_call(node, _ATEN.cat, _ATEN.concat, _ATEN.concatenate):
        return None
    parts = node.args[0]
    assert isinstance(parts, (list, tuple))
    axis = int(argument(node, "dim", 0)) % value_of(node).dim()
    return Join(tuple(each for each in parts if isinstance(each, fx.Node)), axis, stacked)


PATTERN = Pattern(name="join", join=join)
