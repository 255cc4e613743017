"""The exact implementation of a site, by measurement; and whether a decision of another machine holds here."""

from __future__ import annotations

import dataclasses
import threading

from rewriter.candidates import WORTH_IT, candidates, difference_of, working
from rewriter.guard import tolerance
from rewriter.plan import Decision, HeadGroup
from rewriter.plan_check import variant_named
from rewriter.raising import Match
from rewriter.region import Region, region_of
from rewriter.sampled import SampledMatch
from rewriter.target import Target
from rewriter.tune.measure import SiteBench
from rewriter.variant import ORIGINAL, Implementation, variants

NOMINAL_TOKENS = 1024
"""Sites captured on a shorter sequence than this are measured at this length: a dummy input says nothing of use."""
_SECONDS_A_SITE = 1.0

_MEASURED: dict[tuple[object, ...], Decision] = {}
_LOCK = threading.Lock()


def bench(region: Region) -> SiteBench:
    """The region at its own size, or at a nominal one where it was captured on less."""
    q_len, kv_len = region.lengths
    sizes = region.resized(NOMINAL_TOKENS, NOMINAL_TOKENS) if q_len == kv_len < NOMINAL_TOKENS else {}
    if sizes:
        try:
            resized = SiteBench(region, sizes)
            resized.original()
            return resized
        except (RuntimeError, IndexError, ValueError):
            pass  # A size depends on the length in a way of its own.
    return SiteBench(region, {})


def decide_exact(match: Match | SampledMatch, goal: str, allowed: frozenset[str] | None) -> Decision:
    """The fastest exact implementation for a site, by measurement; equal sites are measured once in a process."""
    site = match.site
    region = region_of(match)
    assert isinstance(region, Region), "only proved matches are decided"
    builders = tuple((name, v.build) for name, v in variants().items() if allowed is None or name in allowed)
    identity = (site.key(), region.identity(), goal, builders)
    with _LOCK:
        if identity not in _MEASURED:
            _MEASURED[identity] = _measure_exact(region, goal, allowed)
    return dataclasses.replace(_MEASURED[identity], path=site.path)


def _measure_exact(region: Region, goal: str, allowed: frozenset[str] | None) -> Decision:
    site, target = region.match.site, Target.current(region.match.site.device)
    found, refused = candidates(site, target, allowed, frozenset({"exact"}))
    trial = bench(region) if found else None
    built = working(trial, found, refused) if trial else []
    keep = Decision(
        path=site.path, site=site.key(), variant=ORIGINAL, config={}, fidelity="exact", refused=refused,
        reason="no other exact implementation applies here", evidence={},
    )  # fmt: skip
    if trial is None or not built:
        return keep
    costs = trial.compare([implementation for _, _, implementation in built], goal=goal, budget=_SECONDS_A_SITE)
    unit = "bytes" if goal == "memory" else "ms"
    best = min(range(len(built)), key=lambda i: costs[i + 1])
    variant, config, _ = built[best]
    part = costs[best + 1] / max(costs[0], 1e-9)
    evidence = {f"original_{unit}": costs[0], f"candidate_{unit}": costs[best + 1]}
    if part > WORTH_IT:
        reason = f"no gain here, left as it is: {variant.name} took {part:.2f} of its {unit}"
        return dataclasses.replace(keep, reason=reason, evidence=evidence)
    return dataclasses.replace(
        keep, variant=variant.name, config=config, evidence=evidence,
        reason=f"exact, and needs {part:.2f} of the original's {unit}",
    )  # fmt: skip


def doubt_of(region: Region, decision: Decision, standing: Implementation, goal: str) -> str:
    """Why a decision of another machine is not taken here; "" where it still is what its definition says (exact ones:
    what the site computes), and no slower than the original.
    """
    if decision.fidelity == "learned":
        return ""  # its parameters are its definition
    for group in decision.heads or (HeadGroup(heads=(), variant=decision.variant, config=decision.config),):
        variant, site = variant_named(group.variant), region.match.site
        difference = difference_of(variant.build(site, group.config), site, variant, group.config)
        if difference > tolerance(site.torch_dtype):
            return f"differs by {difference:.3g} from its definition here"
    original, result = bench(region).compare([standing], goal=goal, budget=_SECONDS_A_SITE)
    return f"took {result / original:.2f} of the original's cost here" if result > original else ""
