"""Which implementation stands at a site: what the plan says, where it fits, and else what is exact and measured."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rewriter import debug
from rewriter.errors import OptionError, PlanError
from rewriter.guard import error, tolerance
from rewriter.mixture import ByHeads, ByLength, Outside, of_heads
from rewriter.plan import FIDELITIES, GOALS, Decision, HeadGroup, Plan, own_version
from rewriter.raising import Match
from rewriter.region import Region, region_of
from rewriter.sampled import SampledMatch
from rewriter.sampling import sampled, samples_for
from rewriter.settings import known_settings, wrong_setting
from rewriter.site import POSITIONAL, AttentionSite, Causal, Full, Padding, Refusal
from rewriter.target import Target
from rewriter.testing import brute_force, inputs
from rewriter.tune.measure import SiteBench
from rewriter.variant import ORIGINAL, Config, Implementation, Variant, variants

NOMINAL_TOKENS = 1024
"""Sites captured on a shorter sequence than this are measured at this length: a dummy input says nothing of use."""
WORTH_IT = 0.97
"""A candidate must need at most this part of the original's time (or memory): less is noise."""
_SECONDS_A_SITE = 1.0
_SMALL = (150, 67)
"""Tokens of the input on which an exact candidate is compared with the definition."""

_MEASURED: dict[tuple[object, ...], Decision] = {}
_LOCK = threading.Lock()


@dataclass
class Selector:
    """Chooses for the sites of one model.

    decisions     by path; filled in for unknown sites when `decide_unknown`
    modules       the learned implementations by path
    state         their parameters, from a plan, as `<path, dots as __>.<parameter>`
    notes         sentences about sites that run something else than what the plan says
    outside       the calls of each path that are longer than what was measured
    doubted       were the decisions made on another machine, or with other versions?
    """

    decisions: dict[str, Decision] = field(default_factory=dict)
    decide_unknown: bool = True
    goal: str = "latency"
    allowed: frozenset[str] | None = None
    modules: dict[str, nn.Module] = field(default_factory=dict)
    state: Mapping[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    outside: dict[str, Outside] = field(default_factory=dict)
    doubted: bool = False
    _checked: dict[object, str] = field(default_factory=dict)

    @staticmethod
    def replaying(plan: Plan) -> Selector:
        """Takes what the plan says. Made on this machine with these versions, nothing is measured; else each kind of
        site is looked at once, whether what the plan says is right and worth it here too.
        """
        decisions = {decision.path: decision for decision in plan.decisions}
        here = Target.current(str(plan.target.get("device", "cpu"))).to_json()
        changed = [name for name, value in here.items() if plan.target.get(name) != value]
        changed += ["rewriter"] if plan.rewriter != own_version() else []
        made = Selector(decisions, decide_unknown=False, goal=plan.goal, state=plan.state, doubted=bool(changed))
        if changed:
            made.note(f"the plan was made elsewhere ({', '.join(changed)} differ), so its decisions were timed again")
        return made

    def choose(self, match: Match | SampledMatch) -> Implementation | None:
        """What to place; None for the original code."""
        site = match.site
        decision = self.decisions.get(site.path)
        if decision is None and not self.decide_unknown:
            self.note(f"{site.path}: not in the plan, so it runs its original code")
            return None
        if decision is None or self._was_for_another(decision, site):
            found = decide_exact(match, self.goal, self.allowed)
            if decision is None or found.variant != ORIGINAL:
                decision = self.decisions[site.path] = found
        debug.say(1, f"{site.path}: {decision.variant} ({decision.reason})")
        standing = self.implementation(site, decision)
        if standing is not None and self.doubted and (doubt := self._doubt(match, decision, standing)):
            self.note(f"{site.path}: {decision.variant} {doubt}, so it runs its original code")
            return None
        if standing is None and decision.fidelity != "exact" and self.decide_unknown:
            return self.implementation(site, decide_exact(match, self.goal, self.allowed))
        return standing

    def implementation(self, site: AttentionSite, decision: Decision) -> Implementation | None:
        """The decision's implementation where it is allowed at this site, else None and a note."""
        if decision.variant == ORIGINAL:
            return None
        instead = "it is computed exactly" if self.decide_unknown else f"it runs {_in_words(decision.otherwise)}"
        if decision.fidelity != "exact" and not fits(site, decision.site):
            self.note(
                f"{site.path}: this call is not the one that the plan was made for ({site.key()} instead of "
                f"{decision.site}); {instead}"
            )
            return self._otherwise(site, decision)
        parts: list[tuple[Sequence[int], Implementation]] = []
        groups = decision.heads or (
            HeadGroup(heads=tuple(range(site.kv_heads)), variant=decision.variant, config=decision.config),
        )
        for group in groups:
            own = of_heads(site, group.heads) if decision.heads else site
            built = self._built(own, group, decision, instead)
            if built is None:
                return self._otherwise(site, decision)
            parts.append((group.heads, built))
        whole = ByHeads(parts) if decision.heads else parts[0][1]
        if decision.lengths is None or (site.kv_len is not None and _within(site.kv_len, decision.lengths)):
            return whole
        otherwise = self._otherwise(site, decision) or variant_named(ORIGINAL).build(site, {})
        outside = self.outside.setdefault(site.path, Outside())
        return ByLength(whole, otherwise, decision.lengths, outside)

    def _built(self, site: AttentionSite, group: HeadGroup, decision: Decision, instead: str) -> Implementation | None:
        variant = variant_named(group.variant)
        applies = variant.takes(site, Target.current(site.device))
        if isinstance(applies, Refusal):
            self.note(f"{site.path}: {group.variant} does not apply here ({applies.reason}); {instead}")
            return None
        if variant.fidelity == "learned":
            return self.learned(decision)
        try:
            return variant.build(site, group.config)
        except Exception as error:
            self.note(f"{site.path}: {group.variant} cannot be built ({brief(error)}); {instead}")
            return None

    def _otherwise(self, site: AttentionSite, decision: Decision) -> Implementation | None:
        """What runs where the decision does not fit; None for the original code."""
        if decision.otherwise == ORIGINAL:
            return None
        variant = variant_named(decision.otherwise)
        target = Target.current(site.device)
        if not variant.takes(site, target):
            return None
        return variant.build(site, next(iter(variant.configs(site, target)), {}))

    def _doubt(self, match: Match | SampledMatch, decision: Decision, standing: Implementation) -> str:
        """Why a decision of another machine is not taken here; nothing where it is."""
        region = region_of(match)
        assert isinstance(region, Region), "only proved matches are decided"
        place = (region.identity(), decision.named, str(decision.heads), str(decision.config))
        if place not in self._checked:
            self._checked[place] = _checked(region, decision, standing, self.goal)
        return self._checked[place]

    @property
    def said(self) -> list[str]:
        """The notes, and how many calls were longer than what was measured."""
        longer = [
            f"{path}: {seen.calls} calls were longer than what the plan was measured on (the last had {seen.keys} "
            f"keys); they ran {_in_words(self.decisions[path].otherwise)}"
            for path, seen in self.outside.items()
            if seen.calls
        ]
        return [*self.notes, *longer]

    def learned(self, decision: Decision) -> nn.Module:
        """The one module of a decision for a learned variant, with the plan's parameters where it has them."""
        if decision.path not in self.modules:
            prefix = module_name(decision.path) + "."
            state = {k.removeprefix(prefix): v for k, v in self.state.items() if k.startswith(prefix)}
            try:
                site = AttentionSite.parse(decision.site, decision.path)
                module = variant_named(decision.variant).build(site, decision.config)
                assert isinstance(module, nn.Module), "a learned variant builds a module"
                if state:
                    module.load_state_dict(state)
                self.modules[decision.path] = module.to(site.device)
            except Exception as error:
                raise PlanError(
                    f"the plan's {decision.variant} at {decision.path} cannot be built ({brief(error)}); tune again"
                ) from error
        return self.modules[decision.path]

    def _was_for_another(self, decision: Decision, site: AttentionSite) -> bool:
        """Nothing was found for the first kind of call (with dropout, say); this one may be another."""
        return self.decide_unknown and decision.variant == ORIGINAL and decision.site != site.key()

    def note(self, text: str) -> None:
        """Say it once."""
        if text not in self.notes:
            self.notes.append(text)


def _in_words(variant: str) -> str:
    return "its original code" if variant == ORIGINAL else variant


def _within(length: int, lengths: tuple[int, int]) -> bool:
    return lengths[0] <= length <= lengths[1]


def module_name(path: str) -> str:
    """A path as the name of a submodule, which cannot hold dots."""
    return path.replace(".", "__") or "root"


def variant_named(name: str) -> Variant:
    """The variant, or a `PlanError` that names what is missing."""
    found = variants().get(name)
    if found is None:
        raise PlanError(f"the plan uses the variant {name!r}, which is not installed; known: {', '.join(variants())}")
    return found


def read_plan(plan: Plan | str | os.PathLike[str]) -> Plan:
    """A plan or its file that makes sense: its variants are installed, are what it says they are and have the settings
    that it gives them. Raises PlanError.
    """
    if isinstance(plan, (str, os.PathLike)):
        plan = Plan.load(plan)
    if not isinstance(plan, Plan):
        raise OptionError(f"plan is a rewriter.Plan or the path of its file, not a {type(plan).__name__}")
    if plan.goal not in GOALS:
        raise PlanError(f"the plan is for the goal {plan.goal!r:.40}, not one of {', '.join(GOALS)}; tune again")
    device = plan.target.get("device", "cpu")
    try:
        torch.device(device if isinstance(device, str) else "")
    except RuntimeError as cause:
        raise PlanError(f"the plan was made for {device!r:.40}, which is no device; tune again") from cause
    for decision in plan.decisions:
        fidelity = max((variant_named(name).fidelity for name in decision.named), key=FIDELITIES.index)
        if decision.variant != ORIGINAL and fidelity != decision.fidelity:
            raise PlanError(
                f"the plan calls {decision.variant} at {decision.path} {decision.fidelity}, and it is {fidelity}; "
                "tune again"
            )
        if variant_named(decision.otherwise).fidelity != "exact":
            raise PlanError(
                f"the plan runs {decision.otherwise} at {decision.path} where nothing was measured, and "
                "it is not exact; tune again"
            )
        prefix = module_name(decision.path) + "."
        fitted = plan.guard is None or any(name.startswith(prefix) for name in plan.state)
        if decision.fidelity == "learned" and not fitted:
            raise PlanError(f"the plan has no parameters for {decision.variant} at {decision.path}; tune again")
    for decision in {(d.site, d.variant, str(d.config), str(d.heads)): d for d in plan.decisions}.values():
        _check_settings(decision)
    return plan


def _check_settings(decision: Decision) -> None:
    where = f"the plan's decision at {decision.path or '<root>'}"
    groups = decision.heads or (HeadGroup(heads=(), variant=decision.variant, config=decision.config),)
    try:
        site = AttentionSite.parse(decision.site, decision.path)
        target = Target.current(site.device)
        known = [known_settings(variant_named(group.variant), site, target) for group in groups]
    except Exception as error:
        raise PlanError(f"{where} is for {decision.site!r:.40}, which is no attention; tune again") from error
    heads = sorted(head for group in decision.heads for head in group.heads)
    if heads and (len(heads) != site.kv_heads or heads != list(range(len(heads)))):
        raise PlanError(f"{where} does not hold each of its {site.kv_heads} heads once; tune again")
    if heads and (decision.config or decision.fidelity == "learned"):
        raise PlanError(f"{where} has settings or a learned variant, which heads that differ cannot have; tune again")
    for group, settings in zip(groups, known, strict=True):
        if wrong := wrong_setting(group.config, settings):
            raise PlanError(f"{where} cannot be taken: {group.variant} {wrong}; tune again")


def brief(error: BaseException) -> str:
    """The first line of what an error says."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def fits(site: AttentionSite, key: str) -> bool:
    """Is a call of this site one that a decision for `key` was made for?

    A batch with padding is what was measured, intersected with the padding; the single query of a KV cache is the last
    row of a causal prefill.
    """
    positional = site.mask.positional
    masks = {site.mask}
    if all(isinstance(part, (Full, Padding, *POSITIONAL)) for part in site.mask.parts()):
        masks |= {positional, positional & Padding()}
        if site.single_query_decode:
            masks |= {Causal(0), Causal(0) & Padding(), Full()}
    return any(dataclasses.replace(site, mask=mask).key() == key for mask in masks)


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


def _checked(region: Region, decision: Decision, standing: Implementation, goal: str) -> str:
    """Is it still what its definition says (exact ones: what the site computes), and no slower than the original?"""
    if decision.fidelity == "learned":
        return ""  # its parameters are its definition
    for group in decision.heads or (HeadGroup(heads=(), variant=decision.variant, config=decision.config),):
        variant, site = variant_named(group.variant), region.match.site
        difference = _difference(variant.build(site, group.config), site, variant, group.config)
        if difference > tolerance(site.torch_dtype):
            return f"differs by {difference:.3g} from its definition here"
    original, result = bench(region).compare([standing], goal=goal, budget=_SECONDS_A_SITE)
    return f"took {result / original:.2f} of the original's cost here" if result > original else ""


Built = tuple[Variant, Config, Implementation]


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
            difference = _difference(implementation, trial.site) if variant.fidelity == "exact" else 0.0
        except Exception as failure:
            refused[variant.name] = f"failed here: {brief(failure)}"
            continue
        if difference <= tolerance(trial.site.torch_dtype):
            built.append((variant, config, implementation))
        else:
            refused[variant.name] = f"not exact here: its result differs by {difference:.3g}"
    return built


def _difference(
    implementation: Implementation, site: AttentionSite, variant: Variant | None = None, config: Config | None = None
) -> float:
    """How far an implementation is from the site's definition, or from that of an approximate variant, on a small
    input; 0 where dropout makes it random.
    """
    if site.dropout_p > 0:
        return 0.0
    if site.samples is not None:
        given: Any = samples_for(site.sized(batch=2, q_len=_SMALL[1], kv_len=_SMALL[0]))
        with torch.no_grad():
            return error(implementation(*given), sampled(*given))
    q_len = 1 if site.q_len == 1 else _SMALL[site.q_len is not None and site.q_len != site.kv_len]
    small = site.sized(batch=2, q_len=q_len, kv_len=_SMALL[0])
    tensors = inputs(small, seed=0)
    with torch.no_grad():
        if variant is not None and variant.fidelity == "approximate":
            return error(implementation(*tensors), variant.reference(*tensors, small, config))
        return error(implementation(*tensors), brute_force(*tensors, site=small))
