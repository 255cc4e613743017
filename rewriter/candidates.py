"""What could stand at a site: which variants apply, and which of them can be built here and are right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from rewriter.errors import brief
from rewriter.guard import error, tolerance
from rewriter.sampling import sampled, samples_for
from rewriter.site import AttentionSite, Refusal
from rewriter.target import Target
from rewriter.testing import brute_force, inputs
from rewriter.tune.measure import SiteBench
from rewriter.variant import ORIGINAL, Config, Implementation, Variant, variants

WORTH_IT = 0.97
"""A candidate must need at most this part of the original's time (or memory): less is noise."""
_SMALL = (150, 67)
"""Tokens of the input on which a candidate is compared with its definition."""

Built = tuple[Variant, Config, Implementation]


def candidates(
    site: AttentionSite, target: Target, allowed: frozenset[str] | None, fidelities: frozenset[str]
) -> tuple[list[tuple[Variant, Config]], dict[str, str]]:
    """(variant, config) pairs that apply, and the sentences of those that do not."""
    found: list[tuple[Variant, Config]] = []
    refused: dict[str, str] = {}
    for name, variant in variants().items():
        if name == ORIGINAL or not variant.concerns(site):
            continue
        if allowed is not None and name not in allowed:
            refused[name] = "not among the variants asked for"
        elif variant.fidelity not in fidelities:
            refused[name] = _NOT_NOW[variant.fidelity]
        elif isinstance(answer := variant.takes(site, target), Refusal):
            refused[name] = answer.reason
        else:
            configs = list(variant.configs(site, target))
            found += [(variant, config) for config in configs]
            if not configs:
                refused[name] = "no setting of it makes sense at this size"
    return found, refused


_NOT_NOW = {
    "exact": "not an approximation",
    "approximate": "changes the result, and there is no calibration data to bound the change",
    "learned": "has parameters to fit: ask for it by name, with calibration data",
}


def working(
    trial: SiteBench,
    found: Sequence[tuple[Variant, Config]],
    refused: dict[str, str],
    over: Callable[[], bool] = lambda: False,
) -> list[Built]:
    """The candidates that can be built and run here, and are exact if they say so. The others go to `refused`, as do
    approximate ones that have not been tried when time is `over`.

    Nothing is timed before it is right.
    """
    built: list[Built] = []
    for variant, config in found:
        if variant.fidelity != "exact" and over():
            refused.setdefault(variant.name, "no time was left to try it")
            continue
        try:
            implementation = variant.build(trial.site, config)
            if isinstance(implementation, nn.Module):
                implementation.to(trial.site.device)
            trial.runner(implementation)()
            difference = difference_of(implementation, trial.site) if variant.fidelity == "exact" else 0.0
        except Exception as failure:
            refused[variant.name] = f"failed here: {brief(failure)}"
            continue
        if difference <= tolerance(trial.site.torch_dtype):
            built.append((variant, config, implementation))
        else:
            refused[variant.name] = f"not exact here: its result differs by {difference:.3g}"
    return built


def difference_of(
    implementation: Implementation, site: AttentionSite, variant: Variant | None = None, config: Config | None = None
) -> float:
    """How far an implementation is from the site's definition, or from that of an approximate variant, on a small
    input; 0 where dropout makes it random.
    """
    if site.dropout_p > 0:
        return 0.0
    if site.samples is not None:
        given: Any = samples_for(site.sized(batch=2, q_len=_SMALL[1], kv_len=_SMALL[0]))
        maps, grids, weights = given
        wide: Any = [each.double() for each in maps], [each.double() for each in grids], weights.double()
        with torch.no_grad():
            return error(implementation(*given), sampled(*wide))
    q_len = 1 if site.q_len == 1 else _SMALL[site.q_len is not None and site.q_len != site.kv_len]
    small = site.sized(batch=2, q_len=q_len, kv_len=_SMALL[0])
    tensors = inputs(small, seed=0)
    with torch.no_grad():
        if variant is not None and variant.fidelity == "approximate":
            return error(implementation(*tensors), variant.reference(*tensors, small, config))
        return error(implementation(*tensors), brute_force(*tensors, site=small))
