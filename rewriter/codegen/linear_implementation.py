"""What a linear formula runs on each device: its Triton kernels on GPUs, elsewhere chunks in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from rewriter.codegen.gathered import traced
from rewriter.codegen.linear_cpu import Map, scan
from rewriter.codegen.linear_formula import LinearFormula


def linear_attention(
    formula: LinearFormula,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    *,
    query_map: Map,
    key_map: Map,
    padding: Tensor | None = None,
) -> Tensor:
    """(B, H, Sq, Dv), for maps from (B, heads, S, D) to (B, heads, S, F) that mix channels, as no traced map does.

    On a GPU the kernel is given phi(q) and phi(k) whole; in chunks they are mapped as they are needed.
    """
    early = max(query.shape[2] - key.shape[2], 0) if formula.causal else 0  # queries that see no key
    if early:
        query = query[:, :, early:]
    if query.device.type == "cuda" and query.dtype != torch.float64 and not traced(query):
        out = by_kernels(formula, query_map(query), key_map(key), value, scale, padding)
    else:
        out, _ = scan(
            query, key, value, scale, query_map=query_map, key_map=key_map, padding=padding,
            normalised=formula.normalised, eps=formula.eps, causal=formula.causal, ended=False,
        )  # fmt: skip
    return F.pad(out, (0, 0, early, 0)) if early else out


def by_kernels(
    formula: LinearFormula, query: Tensor, key: Tensor, value: Tensor, scale: float, padding: Tensor | None
) -> Tensor:
    """The same of phi(q) and phi(k), by Triton kernels."""
    from rewriter.codegen.linear import LinearKernel
    from rewriter.codegen.linear_fragments import aligned

    more = (0, aligned(query.shape[3]) - query.shape[3])
    out, _ = LinearKernel(formula)(F.pad(query, more), F.pad(key, more), value, scale, padding=padding)
    return out
