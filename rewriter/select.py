"""Which implementation stands at a site: what the plan says, where it fits, and else what is exact and measured."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from rewriter import debug
from rewriter.errors import PlanError
from rewriter.plan import Decision
from rewriter.raising import Match
from rewriter.region import Region, region_of
from rewriter.site import AttentionSite, Causal, Full, Padding, Refusal
from rewriter.target import Target
from rewriter.tune.measure import SiteBench
from rewriter.variant import ORIGINAL, Config, Implementation, Variant, variants

NOMINAL_TOKENS = 1024
"""Sites captured on a shorter sequence than this are measured at this length: a dummy input says nothing of use."""
WORTH_IT = 0.97
"""A candidate must need at most this part of the original's time (or memory): less is noise."""
_SECONDS_A_SITE = 1.0

_MEASURED: dict[tuple[str, ...], Decision] = {}
_LOCK = threading.Lock()


@dataclass
class Selector:
    """Chooses for the sites of one model.

    decisions     by path; filled in for unknown sites when `decide_unknown`
    modules       the learned implementations by path
    state         their parameters, from a plan, as `<path, dots as __>.<parameter>`
    notes         sentences about sites that run their original code although the plan says otherwise
    """

    decisions: dict[str, Decision] = field(default_factory=dict)
    decide_unknown: bool = True
    goal: str = "latency"
    allowed: frozenset[str] | None = None
    modules: dict[str, nn.Module] = field(default_factory=dict)
    state: Mapping[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def choose(self, match: Match) -> Implementation | None:
        """What to place; None for the original code."""
        site = match.site
        decision = self.decisions.get(site.path)
        if decision is None:
            if not self.decide_unknown:
                self._note(f"{site.path}: not in the plan, so it runs its original code")
                return None
            decision = self.decisions[site.path] = decide_exact(match, self.goal, self.allowed)
        debug.say(1, f"{site.path}: {decision.variant} ({decision.reason})")
        return self.implementation(site, decision)

    def implementation(self, site: AttentionSite, decision: Decision) -> Implementation | None:
        """The decision's implementation where it is allowed at this site, else None and a note."""
        if decision.variant == ORIGINAL:
            return None
        variant = variant_named(decision.variant)
        target = Target.current(site.device)
        applies = variant.applies(site, target)
        if not applies:
            self._note(f"{site.path}: {decision.variant} does not apply here ({applies}); it runs its original code")
            return None
        if variant.fidelity != "exact" and not fits(site, decision.site):
            self._note(
                f"{site.path}: this call is not the one that the plan was made for ({site.key()} instead of "
                f"{decision.site}); it runs its original code"
            )
            return None
        if variant.fidelity == "learned":
            return self.learned(decision)
        return variant.build(site, decision.config)

    def learned(self, decision: Decision) -> nn.Module:
        """The one module of a decision for a learned variant, with the plan's parameters where it has them."""
        if decision.path not in self.modules:
            site = AttentionSite.parse(decision.site, decision.path)
            module = variant_named(decision.variant).build(site, decision.config)
            assert isinstance(module, nn.Module), "a learned variant builds a module"
            prefix = module_name(decision.path) + "."
            state = {k.removeprefix(prefix): v for k, v in self.state.items() if k.startswith(prefix)}
            if state:
                module.load_state_dict(state)
            self.modules[decision.path] = module.to(site.device)
        return self.modules[decision.path]

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def module_name(path: str) -> str:
    """A path as the name of a submodule, which cannot hold dots."""
    return path.replace(".", "__") or "root"


def variant_named(name: str) -> Variant:
    """The variant, or a `PlanError` that names what is missing."""
    found = variants().get(name)
    if found is None:
        raise PlanError(f"the plan uses the variant {name!r}, which is not installed; known: {', '.join(variants())}")
    return found


def fits(site: AttentionSite, key: str) -> bool:
    """Is a call of this site one that a decision for `key` was made for?

    A batch with padding is what was measured, intersected with the padding; the single query of a KV cache is the last
    row of a causal prefill.
    """
    positional = site.mask.positional
    masks = {site.mask, positional, positional & Padding()}
    if site.single_query_decode:
        masks |= {Causal(0), Causal(0) & Padding(), Full()}
    if set(map(str, site.mask.parts())) - set(map(str, (positional & Padding()).parts())):
        masks = {site.mask}  # It has a factor of another kind.
    return any(dataclasses.replace(site, mask=mask).key() == key for mask in masks)


def candidates(
    site: AttentionSite, target: Target, allowed: frozenset[str] | None, fidelities: frozenset[str]
) -> tuple[list[tuple[Variant, Config]], dict[str, str]]:
    """(variant, config) pairs that apply, and the sentences of those that do not."""
    found: list[tuple[Variant, Config]] = []
    refused: dict[str, str] = {}
    for name, variant in variants().items():
        if name == ORIGINAL:
            continue
        if allowed is not None and name not in allowed:
            refused[name] = "not among the variants asked for"
        elif variant.fidelity not in fidelities:
            refused[name] = _NOT_NOW[variant.fidelity]
        elif isinstance(answer := variant.applies(site, target), Refusal):
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


def decide_exact(match: Match, goal: str, allowed: frozenset[str] | None) -> Decision:
    """The fastest exact implementation for a site, by measurement; equal sites are measured once in a process."""
    site = match.site
    region = region_of(match)
    assert isinstance(region, Region), "only proved matches are decided"
    identity = (site.key(), region.identity(), goal, *sorted(allowed or ("*",)))
    with _LOCK:
        if identity not in _MEASURED:
            _MEASURED[identity] = _measure_exact(region, goal, allowed)
    return dataclasses.replace(_MEASURED[identity], path=site.path)


def _measure_exact(region: Region, goal: str, allowed: frozenset[str] | None) -> Decision:
    site, target = region.match.site, Target.current(region.match.site.device)
    found, refused = candidates(site, target, allowed, frozenset({"exact"}))
    keep = Decision(
        path=site.path, site=site.key(), variant=ORIGINAL, config={}, fidelity="exact", refused=refused,
        reason="no other exact implementation applies here", evidence={},
    )  # fmt: skip
    if not found:
        return keep
    trial = bench(region)
    costs = trial.compare([v.build(site, c) for v, c in found], goal=goal, budget=_SECONDS_A_SITE)
    unit = "bytes" if goal == "memory" else "ms"
    best = min(range(len(found)), key=lambda i: costs[i + 1])
    variant, config = found[best]
    evidence = {f"original_{unit}": costs[0], f"candidate_{unit}": costs[best + 1]}
    if costs[best + 1] > WORTH_IT * costs[0]:
        reason = f"no gain here, left as it is: {variant.name} took {costs[best + 1] / costs[0]:.2f} of its {unit}"
        return dataclasses.replace(keep, reason=reason, evidence=evidence)
    return dataclasses.replace(
        keep, variant=variant.name, config=config, evidence=evidence,
        reason=f"exact, and needs {costs[best + 1] / costs[0]:.2f} of the original's {unit}",
    )  # fmt: skip
