"""Fit the parameters of learned variants to the original attention, on what flowed through it.

Attention transfer (LoLCATs, arXiv 2410.10254, section 3.1): everything else is frozen, and each replaced attention is
trained by itself to give the output of the original on the same queries, keys and values. A module with a method
`start`, of the arguments of a call, is first given those of the first sample, to set its parameters from data; for one
that has only buffers, such as centroids, this is all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rewriter.raising import Operands

Sample = tuple[Operands, Tensor]
"""The canonical operands of one call, and the original's canonical output (B, H, Sq, Dv)."""


def fit(module: nn.Module, samples: Sequence[Sample], *, steps: int = 60, rate: float = 1e-2) -> tuple[float, float]:
    """Train `module` in place on the samples. Returns the relative squared error before and after.

    The loss is the mean squared error over the mean square of the original, so that it does not depend on scale. The
    best parameters seen are kept: a fit never ends worse than it began.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not samples or not (parameters or not list(module.parameters())):
        return _loss_over(module, samples), _loss_over(module, samples)
    first = best = _loss_over(module, samples)
    kept = {name: value.detach().clone() for name, value in module.state_dict().items()}
    if callable(start := getattr(module, "start", None)):
        start(*samples[0][0].given)
        if (now := _loss_over(module, samples)) < best:
            best, kept = now, {name: value.detach().clone() for name, value in module.state_dict().items()}
        else:
            module.load_state_dict(kept)
    if not parameters:
        return first, best
    optimizer = torch.optim.Adam(parameters, lr=rate)
    with torch.enable_grad():
        for step in range(steps):
            optimizer.zero_grad(set_to_none=True)
            loss = _loss(module, samples[step % len(samples)])
            loss.backward()
            optimizer.step()
            if (step + 1) % max(1, steps // 6) == 0:
                now = _loss_over(module, samples)
                if now < best:
                    best = now
                    kept = {name: value.detach().clone() for name, value in module.state_dict().items()}
    optimizer.zero_grad(set_to_none=True)
    module.load_state_dict(kept)
    return first, best


def _loss(module: nn.Module, sample: Sample) -> Tensor:
    operands, target = sample
    out: Tensor = module(*operands.given).float()
    target = target.float()
    return (out - target).square().mean() / target.square().mean().clamp_min(1e-12)


def _loss_over(module: nn.Module, samples: Sequence[Sample]) -> float:
    with torch.no_grad():
        return sum(float(_loss(module, sample)) for sample in samples) / max(1, len(samples))
