"""Scores that are distances between queries and keys (Kim et al. 2021, arXiv:2006.04710, section 3.1), as `cdist`."""

from __future__ import annotations

import torch
from torch import fx

from rewriter.nodes import is_call, value_of
from rewriter.pattern import Contraction, Pattern

_ATEN = torch.ops.aten


def contraction(node: fx.Node) -> Contraction | None:
    """(..., P, D) and (..., R, D) -> (..., P, R)."""
    if not is_call(node, _ATEN.cdist, _ATEN._cdist_forward, _ATEN._euclidean_dist):
        return None
    left, right = node.args[:2]
    assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
    batch = tuple(range(max(value_of(left).dim(), value_of(right).dim()) - 2))
    own, other = (batch[len(batch) - (value_of(side).dim() - 2) :] for side in (left, right))
    return Contraction(
        left, right, (*own, "row", "width"), (*other, "column", "width"), (*batch, "row", "column"), edit="distance"
    )


PATTERN = Pattern(
    name="distance",
    contraction=contraction,
    examples=(
        lambda q, k, v, mask: (
            torch.cdist(q.float(), k.float(), compute_mode="donot_use_mm_for_euclid_dist")
            .to(q.dtype)
            .mul(-0.5)
            .masked_fill(~mask, -1e30)
            .softmax(-1)
            @ v
        ),
        lambda q, k, v, mask: (
            (-torch.cdist(q.float(), k.float(), 1)).to(q.dtype).masked_fill(~mask, -1e9).softmax(-1) @ v
        ),
    ),
)
