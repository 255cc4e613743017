"""Calls of flex_attention: an attention already, with functions of its own for scores and mask.

They are compiled with the call, and not read here: such a site is recognised, and left as it is.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from rewriter.pattern import Call, Pattern


def call(node: fx.Node) -> Call | None:
    """The first result of a flex_attention call."""
    source = node.args[0] if node.target is operator.getitem and node.args[1] == 0 else None
    if not isinstance(source, fx.Node) or source.target is not torch.ops.higher_order.flex_attention:
        return None
    query, key, value, _, _, scale = source.args[:6]
    if not all(isinstance(each, fx.Node) for each in (query, key, value)) or not isinstance(scale, float):
        return None
    assert isinstance(query, fx.Node)
    assert isinstance(key, fx.Node)
    assert isinstance(value, fx.Node)
    return Call(query, key, value, scale, spelling="flex", grouped=True, edit="score_function")


PATTERN = Pattern(name="flex", call=call)
