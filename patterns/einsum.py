"""The products as `einsum`, in any letters and any order of axes."""

from __future__ import annotations

import torch
from torch import fx

from rewriter.nodes import is_call, value_of
from rewriter.pattern import Contraction, Pattern

_ATEN = torch.ops.aten


def contraction(node: fx.Node) -> Contraction | None:
    """Two tensors; every letter at most once in each."""
    if not is_call(node, _ATEN.einsum):
        return None
    equation, tensors = node.args[:2]
    assert isinstance(equation, str) and isinstance(tensors, (list, tuple))
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(tensors) != 2 or len(terms) != 2 or not arrow:
        return None
    left, right = tensors
    assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
    ranks = [value_of(left).dim(), value_of(right).dim()]
    dots = max(rank - len(term.replace("...", "")) for rank, term in zip(ranks, terms, strict=True))
    labels = [_labels(term, rank) for term, rank in zip(terms, ranks, strict=True)]
    out = _labels(output, dots + len(output.replace("...", "")))
    if any(len(set(each)) < len(each) for each in (*labels, out)):
        return None
    return Contraction(left, right, labels[0], labels[1], out)


def _labels(term: str, rank: int) -> tuple[str, ...]:
    """One label for each axis. The axes of an ellipsis are counted from the right, as they are broadcast."""
    before, dots, after = term.partition("...")
    hidden = [f".{place}" for place in reversed(range(rank - len(before) - len(after)))] if dots else []
    return (*before, *hidden, *after)


PATTERN = Pattern(
    name="einsum",
    contraction=contraction,
    examples=(
        lambda q, k, v, mask: torch.einsum(
            "bhij,bhjd->bhid", torch.einsum("bhid,bhjd->bhij", q, k).masked_fill(~mask, -1e30).softmax(-1), v
        ),
        lambda q, k, v, mask: torch.einsum(
            "bhqk,bkhd->bqhd",
            torch.einsum("bqhd,bkhd->bhqk", q.transpose(1, 2), k.transpose(1, 2)).masked_fill(~mask, -1e30).softmax(-1),
            v.transpose(1, 2),
        ).transpose(1, 2),
        lambda q, k, v, mask: torch.einsum(
            "...ts,...sd->...td", torch.einsum("...td,...sd->...ts", q, k).masked_fill(~mask, -1e30).softmax(-1), v
        ),
    ),
)
