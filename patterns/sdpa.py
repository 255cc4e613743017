"""`F.scaled_dot_product_attention` in all its argument forms, and the kernels below it: an attention that is one
call already.
"""

from __future__ import annotations

import math
import operator

import torch
import torch.nn.functional as F
from torch import fx

from rewriter.nodes import argument, constant, fixed, is_call, value_of
from rewriter.pattern import Call, Pattern
from rewriter.site import Refusal


def call(node: fx.Node) -> Call | Refusal | None:
    """Read the arguments; `enable_gqa` needs no fact of its own, since the head counts say it."""
    if is_call(node, _ATEN.scaled_dot_product_attention):
        return _read(node, grouped=bool(argument(node, "enable_gqa")))
    if node.target is not operator.getitem or not is_call(node.args[0], *_KERNELS) or node.args[1] != 0:
        return None
    kernel = node.args[0]
    assert isinstance(kernel, fx.Node)
    if any(user is not node and user.users for user in kernel.users):
        return Refusal("more than the output of a kernel for attention is used")
    if argument(kernel, "dropout_mask") is not None:
        return Refusal("which weights are dropped is given")
    read = _read(kernel, grouped=True)
    if isinstance(read, Call) and read.mask is not None and value_of(read.mask).dtype == torch.bool:
        return Refusal("a kernel for attention adds its mask, and this one is bool")
    return read


def _read(node: fx.Node, *, grouped: bool) -> Call | Refusal:
    query, key, value = (argument(node, name) for name in ("query", "key", "value"))
    scale = argument(node, "scale")
    if scale is None:
        width = fixed(value_of(query).shape[-1])
        scale = 1 / math.sqrt(width) if width else None
    scale, dropout_p = constant(scale), constant(argument(node, "dropout_p"))
    if scale is None or dropout_p is None:
        return Refusal("the scale or the probability of the dropout is not a number")
    mask, causal = argument(node, "attn_mask"), bool(argument(node, "is_causal"))
    mask = argument(node, "attn_bias") if mask is None else mask
    if mask is not None and causal:
        return Refusal("a call with both a mask and is_causal, which torch does not define")
    return Call(query, key, value, scale, mask, causal, dropout_p, "sdpa", grouped)


_ATEN = torch.ops.aten
_KERNELS = (
    _ATEN._scaled_dot_product_attention_math, _ATEN._scaled_dot_product_flash_attention_for_cpu,
    _ATEN._scaled_dot_product_flash_attention, _ATEN._scaled_dot_product_efficient_attention,
    _ATEN._scaled_dot_product_cudnn_attention, _ATEN._scaled_dot_product_fused_attention_overrideable,
)  # fmt: skip
"""What the call runs, as programs hold it that are taken apart: the output is the first of several results."""


PATTERN = Pattern(
    name="sdpa",
    call=call,
    examples=(
        lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
        lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, mask, 0.0, False, scale=0.5),
        lambda q, k, v, mask: F.scaled_dot_product_attention(
            q, k, v, torch.where(mask, 0.0, float("-inf")).to(q.dtype), enable_gqa=True
        ),
        lambda q, k, v, mask: _ATEN._scaled_dot_product_attention_math(
            q, k, v, torch.where(mask, 0.0, float("-inf")).to(q.dtype), scale=0.5
        )[0],
    ),
)
