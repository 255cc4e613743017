"""`rewriter::attention`, the canonical operator to which every spelling is raised.

    s = scale * q k^T                              q (B, H, Sq, D), k (B, Hkv, Skv, D), v (B, Hkv, Skv, Dv)
    s = softcap * tanh(s / softcap)                where softcap > 0
    out = normalise(s + mask) v                    softmax, sigmoid or relu

`mask` is all that is added to the scores, bool (True: visible) or additive; where it is None, `structure` (a positional
`Mask` as text) says everything. `padding` (bool (B, Skv)) is the data-dependent factor of a mask that is structure and
padding: it adds nothing to the mathematics here, and spares variants the search for it. `sink` (H,) holds one more
logit for each head, which takes part in the softmax and has no value. A row whose mask hides every key, by False or by
-inf, gives 0.
The operator is composite: fake tensors and autograd see its plain mathematics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rewriter.site import Mask

_LIBRARY = torch.library.Library("rewriter", "DEF")
_LIBRARY.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? padding, float scale, str structure, "
    "float dropout_p, Tensor? sink=None, float softcap=0.0, str normaliser='softmax') -> Tensor"
)


def attention_math(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    padding: Tensor | None,
    scale: float,
    structure: str,
    dropout_p: float,
    sink: Tensor | None = None,
    softcap: float = 0.0,
    normaliser: str = "softmax",
) -> Tensor:
    """The definition, in float32 or wider."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(wide) @ key.to(wide).transpose(-2, -1) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        positional = Mask.parse(structure).positional
        mask = positional.visible(query.shape[-2], key.shape[-2], query.device) if list(positional.parts()) else None
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask.to(wide)
    weights = normalised(scores, sink, normaliser)
    weights = torch.dropout(weights, dropout_p, train=dropout_p > 0)
    return (weights @ value.to(wide)).to(query.dtype)


def normalised(scores: Tensor, sink: Tensor | None, normaliser: str) -> Tensor:
    """Weights (B, H, Sq, Skv) from scores, in the scores' type."""
    if normaliser == "sigmoid":
        return scores.sigmoid()
    if normaliser == "relu":
        return scores.relu()
    if sink is not None:
        column = sink.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:-1], 1)
        return torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    # The softmax of nothing but -inf would be NaN, forward and backward.
    blind = (scores == float("-inf")).all(-1, keepdim=True)
    return scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)


_LIBRARY.impl("attention", attention_math, "CompositeImplicitAutograd")

attention = torch.ops.rewriter.attention.default
