"""Which implementation stands at a site: what the plan says, where it fits, and else what is exact and measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from rewriter import debug
from rewriter.errors import PlanError, brief
from rewriter.exact import decide_exact, doubt_of
from rewriter.instances import Run
from rewriter.mixture import ByHeads, ByLength, Outside, UpTo, of_heads
from rewriter.plan import Decision, HeadGroup, Plan, by_path, module_name, own_version
from rewriter.plan_check import variant_named
from rewriter.raising import Match
from rewriter.region import Region, region_of
from rewriter.sampled import SampledMatch
from rewriter.site import POSITIONAL, AttentionSite, Causal, Full, Padding, Refusal
from rewriter.target import Target
from rewriter.variant import ORIGINAL, Implementation


@dataclass
class Selector:
    """Chooses for the sites of one model.

    decisions     by path; filled in for unknown sites when `decide_unknown`
    shorter       by path those for calls of fewer keys, the longest first; each is for up to its `lengths[1]` keys
    modules       the learned implementations by path
    state         their parameters, from a plan, as `<path, dots as __>.<parameter>`
    notes         sentences about sites that run something else than what the plan says
    outside       the calls of each path that are longer than what was measured
    unfit         by note how many calls were of a kind that the plan was not made for
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
    unfit: dict[str, int] = field(default_factory=dict)
    doubted: bool = False
    shorter: dict[str, list[Decision]] = field(default_factory=dict)
    _checked: dict[object, str] = field(default_factory=dict)
    _unfit_here: list[str] = field(default_factory=list)

    @staticmethod
    def replaying(plan: Plan) -> Selector:
        """Takes what the plan says. Made on this machine with these versions, nothing is measured; else each kind of
        site is looked at once, whether what the plan says is right and worth it here too.
        """
        ordered = by_path(plan.decisions)
        decisions = {path: own[0] for path, own in ordered.items()}
        here = Target.current(str(plan.target.get("device", "cpu"))).to_json()
        changed = [name for name, value in here.items() if plan.target.get(name) != value]
        changed += ["rewriter"] if plan.rewriter != own_version() else []
        made = Selector(decisions, decide_unknown=False, goal=plan.goal, state=plan.state, doubted=bool(changed))
        made.shorter = {path: own[1:] for path, own in ordered.items() if own[1:]}
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
        shorter = [d for d in self.shorter.get(site.path, ()) if site.kv_len is None or site.kv_len <= d.most]
        if shorter and site.kv_len is not None:
            return self._standing(match, shorter[-1])
        standing = self._standing(match, decision)
        for each in shorter:
            own = self._standing(match, each)
            if standing is not None or own is not None:
                original = variant_named(ORIGINAL).build(site, {})
                standing = UpTo(int(each.most), own or original, standing or original)
        return standing

    def counted(self, run: Run) -> Run:
        """The graph whose sites were chosen last; its calls are counted if it is of a kind that the plan is not for."""
        texts, self._unfit_here = dict.fromkeys(self._unfit_here), []  # decisions of one path may say the same
        if not texts:
            return run

        def counting(*args: Any) -> Any:
            for text in texts:
                self.unfit[text] = self.unfit.get(text, 0) + 1
            return run(*args)

        return counting

    def _standing(self, match: Match | SampledMatch, decision: Decision) -> Implementation | None:
        """What a decision for this site comes to in this call; None for the original code."""
        site = match.site
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
            text = (
                f"{site.path}: this call is not the one that the plan was made for ({site.key()} instead of "
                f"{decision.site}); {instead}"
            )
            self.note(text)
            self._unfit_here.append(text)
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
            self._checked[place] = doubt_of(region, decision, standing, self.goal)
        return self._checked[place]

    @property
    def every(self) -> tuple[Decision, ...]:
        """All decisions, those of one path together."""
        return tuple(each for path, d in self.decisions.items() for each in (d, *self.shorter.get(path, ())))

    @property
    def said(self) -> list[str]:
        """The notes, and how many calls were longer than what was measured."""
        longer = [
            f"{path}: {seen.calls} calls were longer than what the plan was measured on (the last had {seen.keys} "
            f"keys); they ran {_in_words(self.decisions[path].otherwise)}"
            for path, seen in self.outside.items()
            if seen.calls
        ]
        counts = [f" ({self.unfit[note]} calls)" if self.unfit.get(note) else "" for note in self.notes]
        return [*map("".join, zip(self.notes, counts, strict=True)), *longer]

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
