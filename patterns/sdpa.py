"""`F.scaled_dot_product_attention` in all its argument forms: an attention that is one call already."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import fx

from rewriter.nodes import argument, constant, fixed, is_call, value_of
from rewriter.pattern import Call, Pattern
from rewriter.site import Refusal


def call(node: fx.Node) -> Call | Refusal | None:
    """Read the arguments; `enable_gqa` needs no fact of its own, since the head counts say it."""
    if not is_call(node, torch.ops.aten.scaled_dot_product_attention):
        return None
    query, key, value = (argument(node, name) for name in ("query", "key", "value"))
    scale = argument(node, "scale")
    if scale is None:
        width = fixed(value_of(query).shape[-1])
        scale = 1 / math.sqrt(width) if width else None
    scale, dropout_p = constant(scale), constant(argument(node, "dropout_p"))
    if scale is None or dropout_p is None:
        return Refusal("the scale or the probability of the dropout is not a number")
    mask, causal = argument(node, "attn_mask"), bool(argument(node, "is_causal"))
    if mask is not None and causal:
        return Refusal("a call with both a mask and is_causal, which torch does not define")
    return Call(query, key, value, scale, mask, causal, dropout_p, "sdpa", bool(argument(node, "enable_gqa")))


PATTERN = Pattern(
    name="sdpa",
    call=call,
    examples=(
        lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
        lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, mask, 0.0, False, scale=0.5),
        lambda q, k, v, mask: F.scaled_dot_product_attention(
            q, k, v, torch.where(mask, 0.0, float("-inf")).to(q.dtype), enable_gqa=True
        ),
    ),
)
