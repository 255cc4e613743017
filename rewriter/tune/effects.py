"""How much a candidate at one site would move the metric, for all sites and candidates at once.

Replacing the output o of a site by o + d changes the model's own distribution p of its answers by
KL(p || p') = d^T F d / 2 + O(d^3), with the Fisher information F = E_{y ~ p}[g g^T], g = d log p(y) / d o. One backward
pass of the original with sampled answers y therefore gives g for every site, and each candidate needs its own output
only: sum over queries and heads of (g . d)^2 / 2, where the products between positions and between heads are left out
(their expectation over independent answers is small where positions answer by themselves). Models that give vectors
are asked about a random direction instead, for 1 - cosine = |P d y|^2 / (2 |y|^2).

Where a text asks for planted tokens (`rewriter.probes`), F says little: a model that is sure has next to no gradient.
What counts there is how far their logits fall, to first order.

It ranks candidates and shares a bound among them. What a plan really does to the metric is measured.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.guard import evaluating
from rewriter.metrics import IGNORED, Batch, Metric, is_built_in, logits_of, primary, real_positions, targets
from rewriter.probes import Planted
from rewriter.tune.slots import Switches

Gradients = dict[tuple[str, int], Tensor]
"""By path and number of the call: (B, H, Sq, Dv), in float32."""

_MEMORY = 0.5
"""The part of the free memory that the activations of one backward pass may take, as seen at the last site."""


class _TooLarge(Exception):
    pass


def gradients(
    model: nn.Module, switches: Switches, metric: Metric, batch: Batch, generator: torch.Generator
) -> tuple[Gradients, int] | None:
    """g of every call of a site, and the number of answers; None where there is no way back through the model, or it
    would need too much memory.
    """
    probes: list[tuple[tuple[str, int], Tensor, Callable[[Tensor], Tensor]]] = []
    calls: dict[str, int] = {}

    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    room = (1 - _MEMORY) * _free(device)

    def probe(path: str, out: Tensor, canonical: Callable[[Tensor], Tensor]) -> Tensor:
        if _free(device) < room:
            raise _TooLarge
        added = torch.zeros_like(out, requires_grad=True)
        number = calls[path] = calls.get(path, -1) + 1
        probes.append(((path, number), added, canonical))
        return out + added

    switches.probe = probe
    try:
        with evaluating(model), torch.enable_grad():
            outputs = model(*batch.args, **batch.kwargs)
            scalar, answers = _answers(metric, outputs, batch, generator)
            found = torch.autograd.grad(scalar, [added for _, added, _ in probes], allow_unused=True)
    except (_TooLarge, RuntimeError):  # no way back: the model detaches, or calls what has no derivative
        return None
    finally:
        switches.probe = None
    return {
        place: canonical(gradient).float()
        for (place, _, canonical), gradient in zip(probes, found, strict=True)
        if gradient is not None
    }, answers


def effects(gradient: Tensor, difference: Tensor, kv_heads: int) -> list[float]:
    """(g . d)^2 / 2 summed over queries, for each key/value head with its queries."""
    products = (gradient * difference.float()).sum(-1).square().sum((0, 2)) / 2
    shares: list[float] = products.view(kv_heads, -1).sum(-1).tolist()
    return shares


def losses(gradient: Tensor, difference: Tensor, kv_heads: int) -> list[float]:
    """-g . d of the queries where that is above 0, summed, for each key/value head with its queries."""
    products = -(gradient * difference.float()).sum(-1)
    shares: list[float] = products.clamp(min=0).sum((0, 2)).view(kv_heads, -1).sum(-1).tolist()
    return shares


def _answers(metric: Metric, outputs: Any, batch: Batch, generator: torch.Generator) -> tuple[Tensor, int]:
    """A sum whose gradient is that of sampled answers, or of planted ones, and how many there are."""
    if isinstance(batch.source, Planted):
        return batch.source.logits(outputs).sum(), batch.source.wanted.numel()
    if is_built_in(metric) and metric.name in _OVER_CLASSES:
        logits = logits_of(outputs) if metric.name == "perplexity" else primary(outputs)
        wanted = targets(logits, batch) if metric.name == "perplexity" else None
        kept = real_positions(logits, batch) if wanted is None else wanted != IGNORED
        rows = _rows(logits, kept)
        scores = rows.float().log_softmax(-1)
        noise = torch.rand(scores.shape, generator=generator).to(scores.device)
        # The largest of log p + Gumbel noise is a sample of p.
        sampled = (scores.detach() - (-noise.clamp_min(1e-20).log()).log()).argmax(-1)
        return scores.gather(-1, sampled[:, None]).sum(), len(rows)
    vectors = primary(outputs)
    rows = _rows(vectors, real_positions(vectors, batch))
    rows = rows.float()
    unit = nn.functional.normalize(rows.detach(), dim=-1)
    direction = torch.randn(rows.shape, generator=generator).to(rows.device)
    direction = direction - (direction * unit).sum(-1, keepdim=True) * unit
    size = rows.detach().norm(dim=-1, keepdim=True).clamp_min(1e-20)
    return (rows * direction / size).sum(), len(rows)


_OVER_CLASSES = ("perplexity", "kl", "top1")


def _rows(t: Tensor, kept: Tensor | None) -> Tensor:
    flat = t.reshape(-1, t.shape[-1])
    return flat if kept is None else flat[kept.flatten().to(flat.device)]


def _free(device: torch.device) -> float:
    """Bytes of memory that nothing uses."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError):  # not every system says
        return 4e9
