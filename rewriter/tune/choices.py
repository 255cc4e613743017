"""What can stand at each site of a model, and what it costs: every kind of site measured once."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from rewriter.candidates import WORTH_IT, candidates, working
from rewriter.codegen.expression import parameters
from rewriter.codegen.formula import Formula
from rewriter.mixture import ByHeads, of_heads
from rewriter.plan import Tried
from rewriter.region import Region
from rewriter.site import AttentionSite
from rewriter.sources import version
from rewriter.target import Target
from rewriter.tune.measure import SiteBench
from rewriter.tune.record import Ledger
from rewriter.tune.solve import Column, Table
from rewriter.variant import Config, Implementation, Variant, variants

_SECONDS_A_KIND = 4.0
_SHORTEST = 128
"""Keys below which nobody asks whether an approximation pays."""


@dataclass
class Candidate:
    """One way to compute one site, built.

    cost     in the goal's unit
    error    local and relative; None until it was run on data
    effects  predicted share of the metric's drop, for each key/value head; None until then
    whole    must all heads of the site take it, or none?
    """

    variant: Variant
    config: Config
    implementation: Implementation
    cost: float
    error: float | None = None
    effects: list[float] | None = None
    whole: bool = False

    @property
    def exact(self) -> bool:
        """The same mathematics: no error to measure."""
        return self.variant.fidelity == "exact"

    def tried(self) -> Tried:
        """As it stands in a plan."""
        known = self.effects is not None and self.error is not None and self.error < math.inf
        return Tried(
            variant=self.variant.name,
            config=self.config,
            cost=self.cost,
            error=self.error if known else None,
            effect=sum(self.effects) if known and self.effects is not None else None,
        )


@dataclass
class SiteChoices:
    """A site with what may stand there.

    original  what its own code costs
    exact     the cheapest exact candidate, worth it or not
    others    candidates that change the result and are worth a look
    split     what a second implementation for some of the heads adds
    """

    region: Region
    site: AttentionSite
    original: float
    exact: Candidate | None
    others: list[Candidate]
    measured: list[Candidate]
    refused: dict[str, str]
    split: float | None

    @property
    def base(self) -> Candidate | None:
        """What is exact and cheapest; None is the original code."""
        return self.exact if self.exact is not None and self.exact.cost <= WORTH_IT * self.original else None

    @property
    def usable(self) -> list[Candidate]:
        """Those of `others` whose effect is known to be finite."""
        return [c for c in self.others if c.effects is not None and c.error is not None and c.error < math.inf]

    @property
    def whole(self) -> list[Candidate]:
        """Choices for all heads together, after the original."""
        return [c for c in self.usable if c.whole]

    @property
    def columns(self) -> list[Candidate]:
        """Choices for a group of heads, exact ones first."""
        exact = [self.exact] if self.exact is not None else []
        return exact + [c for c in self.usable if not c.whole]

    def table(self, scale: float, *, by_heads: bool) -> Table:
        """What the solver chooses from, with effects times `scale`. An exact candidate that is not worth it serves some
        of the heads only.
        """
        heads = self.site.kv_heads
        groups = heads if by_heads and self.split is not None and heads > 1 else 1
        exact = self.exact if groups > 1 else self.base
        columns = [c for c in self.columns if not c.exact or c is exact]

        def effects(candidate: Candidate) -> list[float]:
            own = [0.0] * heads if candidate.effects is None else [e * scale for e in candidate.effects]
            return own if groups > 1 else [sum(own)]

        # What is no gain over the original code for all heads is none for some of them.
        floor = self.original if self.base is None else 0.0
        return Table(
            whole=[Column(self.original, [0.0]), *(Column(c.cost, [sum(effects(c))]) for c in self.whole)],
            columns=[Column(max(c.cost, floor) if c is exact else c.cost, effects(c)) for c in columns],
            groups=groups,
            split=self.split or 0.0,
        )


@dataclass
class Workbench:
    """Measures sites, equal ones once; what an earlier run measured on this machine is not measured again."""

    goal: str
    allowed: frozenset[str] | None
    fresh: bool = False
    ledgers: dict[str, Ledger] = field(default_factory=dict)

    def candidates(self, region: Region) -> tuple[list[tuple[Variant, Config]], dict[str, str]]:
        """(variant, config) pairs that may stand at a region's site, and the sentences of those that may not."""
        site, (q_len, kv_len) = region.match.site, region.lengths
        sized = site.sized(batch=region.batch, q_len=q_len, kv_len=kv_len)
        # Learned variants take part when they are asked for by name: fitting them costs minutes.
        fidelities = {"exact", "approximate"} | ({"learned"} if self.allowed is not None else set())
        return candidates(sized, Target.current(site.device), self.allowed, frozenset(fidelities))

    def choices(self, region: Region, seconds: float) -> SiteChoices:
        """What may stand at a region's site, built for it."""
        site = region.match.site
        found, refused = self.candidates(region)
        named = [[variant.name, dict(config)] for variant, config in found]
        end = time.monotonic() + seconds
        what = [region.identity(), named, self.goal]
        hurried = seconds < _SECONDS_A_KIND  # what is measured in haste is not believed by those who have time
        facts = self.ledger(site.device).measured(
            "site", what, lambda: self._measure(region, found, refused, end), keep=not hurried
        )
        built = [
            Candidate(
                (variant := variants()[name]), config, _built(variant, site, config), cost,
                whole=serves_all_heads(variant, site, config),
            )
            for (name, config), cost in zip(facts["candidates"], facts["costs"][1:], strict=True)
        ]  # fmt: skip
        return _choices(region, facts["costs"][0], built, dict(facts["refused"]), facts["split"])

    def _measure(
        self, region: Region, found: Sequence[tuple[Variant, Config]], refused: dict[str, str], end: float
    ) -> dict[str, object]:
        trial = SiteBench(region, {})  # at the size that the user's own data have
        exact_first = sorted(found, key=lambda pair: pair[0].fidelity != "exact")
        built = working(trial, exact_first, refused, lambda: time.monotonic() > end)
        implementations = [implementation for _, _, implementation in built]
        exact = next((n for n, (variant, _, _) in enumerate(built) if variant.fidelity == "exact"), None)
        halved = _halved(trial.site, *built[exact][:2]) if exact is not None else None
        costs = trial.compare([*implementations, *([halved] if halved else [])], goal=self.goal, budget=_left(end))
        split = None
        if halved is not None and exact is not None:
            split = max(costs.pop() - costs[exact + 1], 0.0)
        kept = [[variant.name, dict(config)] for variant, config, _ in built]
        return {"candidates": kept, "costs": costs, "refused": refused, "split": split}

    def shortest(self, choices: SiteChoices, candidate: Candidate) -> int:
        """The fewest keys at which a candidate was cheaper than what is exact, going down by halves from the captured
        length; that length itself where the region has no other.
        """
        region, base = choices.region, choices.base
        q_len, least = region.lengths
        if q_len != least:
            return least
        named = [candidate.variant.name, dict(candidate.config), base.variant.name if base else None]

        def pays(length: int) -> bool:
            sizes = region.resized(length, length) if length >= _SHORTEST else {}

            def ratio() -> float:
                try:
                    trial = SiteBench(region, sizes)
                    runs = [candidate.implementation, *([base.implementation] if base else [])]
                    costs = trial.compare(runs, goal="latency", budget=0.5)
                except (RuntimeError, IndexError, ValueError):  # A size depends on the length in a way of its own.
                    return math.inf
                return costs[1] / (costs[2] if base else costs[0])

            what = [region.identity(), named, length]
            found: float = self.ledger(choices.site.device).measured("length", what, ratio) if sizes else math.inf
            return found <= WORTH_IT

        while pays(least // 2):
            least //= 2
        return between if pays(between := 3 * least // 4) else least

    def ledger(self, device: str) -> Ledger:
        """Measurements of time on this machine, with these versions."""
        if device not in self.ledgers:
            self.ledgers[device] = Ledger([version(), Target.current(device).to_json()], self.fresh)
        return self.ledgers[device]


def serves_all_heads(variant: Variant, site: AttentionSite, config: Config) -> bool:
    """Must all heads of the site take it, or none? Parameters are fitted to all of them; and where what is seen differs
    by heads, another number of heads would see something else, unless each call chooses it from what heads hold.
    """
    formula = None if variant.formula is None else variant.formula(site, config)
    masks = formula.masks if isinstance(formula, Formula) and not formula.chosen else ()
    return variant.fidelity == "learned" or any("h" in parameters(mask) for mask in masks)


def _left(end: float) -> float:
    return min(_SECONDS_A_KIND, max(end - time.monotonic(), 0.0))


def _halved(site: AttentionSite, variant: Variant, config: Config) -> Implementation | None:
    """The same twice, for half of the heads each: what a second implementation costs."""
    half = site.kv_heads // 2
    if not half or variant.fidelity != "exact":
        return None
    parts = [tuple(range(half)), tuple(range(half, site.kv_heads))]
    target = Target.current(site.device)
    if not all(variant.takes(of_heads(site, heads), target) for heads in parts):
        return None
    return ByHeads([(heads, variant.build(of_heads(site, heads), config)) for heads in parts])


def _built(variant: Variant, site: AttentionSite, config: Config) -> Implementation:
    implementation = variant.build(site, config)
    if isinstance(implementation, nn.Module):
        implementation.to(torch.device(site.device))
    return implementation


def _choices(
    region: Region, original: float, built: list[Candidate], refused: dict[str, str], split: float | None
) -> SiteChoices:
    exact = min((c for c in built if c.exact), key=lambda c: c.cost, default=None)
    if exact is not None and exact.cost > WORTH_IT * original:
        refused[exact.variant.name] = f"no gain here: {exact.cost / original:.2f} of the original's cost"
    floor = min(original, exact.cost) if exact is not None else original
    others = [c for c in built if not c.exact and c.cost <= WORTH_IT * floor]
    for name in {c.variant.name for c in built if not c.exact} - {c.variant.name for c in others}:
        cheapest = min(c.cost for c in built if c.variant.name == name)
        refused[name] = f"no gain here: {cheapest / floor:.2f} of the best exact cost at this size"
    return SiteChoices(region, region.match.site, original, exact, others, built, refused, split)
