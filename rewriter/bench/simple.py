"""The plan of the search beside two that a person would make first, at the same bound and from the same measurements.

Rank and revert: everywhere the cheapest, then back to what is exact at the sites that cost the most accuracy for what
they gain, as few of them as will do. One setting: the same variant with the same config at every site that takes it.
A plan is one that keeps the metric within the search's margin on the data that guide it; recall is not probed, and none
is cut back by the guard.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from rewriter.bench.guarded import Hosts, Loaded, once
from rewriter.bench.hosts import Host
from rewriter.guard import Measurement, drop, evaluating
from rewriter.metrics import BUILT_IN
from rewriter.session import rerouted, unrouted
from rewriter.terminal import Advance
from rewriter.tune.assemble import groups_of
from rewriter.tune.choices import SiteChoices
from rewriter.tune.deadline import Deadline
from rewriter.tune.measure import alternate
from rewriter.tune.prepare import Prepared, prepared
from rewriter.tune.request import Request
from rewriter.tune.scores import Scores
from rewriter.tune.search import MARGIN, search, tries
from rewriter.tune.solve import Choice, Solution, Table, cost_of, effect_of
from rewriter.tune.tuning import Tuning, size_of
from rewriter.verdict import Limits

_ROUNDS, _SECONDS = 25, 60.0


@dataclass(frozen=True)
class Compared:
    """One plan.

    how        "exact", "search", "rank and revert" or "one setting"
    setting    which one, of the last
    predicted  the original's time end to end over what the sums of the sites' times make of it
    measured   over the measured time, round by round, median
    searched   the drop on the data that guide the search, and `fresh` on others
    tried      plans that were measured to find this one
    """

    model: str
    bound: float
    how: str
    setting: str
    predicted: float
    measured: float
    searched: float
    fresh: float
    tried: int

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def comparisons(
    hosts: Sequence[Host], among: Hosts, *, fresh: bool = False, progress: Advance = lambda *_: None
) -> Iterator[Compared]:
    """The plans on each model at one of its bounds, each model once."""
    for host in hosts:
        bound = host.bounds[len(host.bounds) // 2]

        def compare(host: Host = host, bound: float = bound) -> list[dict[str, Any]]:
            return [asdict(plan) for plan in compared(among.loaded(host), bound, 0, progress)]

        for plan in once("compared plans", host, among.settings, [bound], fresh, compare):
            yield Compared(**plan)


def compared(loaded: Loaded, bound: float, seed: int, progress: Advance) -> list[Compared]:
    """The plans on one model, all timed in alternation. The model stays as it is."""
    calibration, numbers = loaded.divided(seed)
    request = Request(
        goal="latency", allowed=frozenset(loaded.settings.variants), inner="eager", dynamic=None, progress=progress,
        limits=Limits.checked(bound, None, None, 1.0), metric=loaded.host.metric, seed=seed, deadline=Deadline(None),
    )  # fmt: skip
    try:
        (at,) = prepared(loaded.model, calibration, request)  # all pieces are of one length
        with rerouted(loaded.model, at.through_slots):
            return list(_compared(at, loaded, bound, numbers))
    finally:
        torch.compiler.reset()


def _compared(at: Prepared, loaded: Loaded, bound: float, numbers: Sequence[int]) -> Iterator[Compared]:
    tuning, progress = at.tuning, at.request.progress
    scores, on_fresh = at.scores_on(at.search_part), at.scores_on([loaded.batches[n] for n in numbers])
    original = scores.original()
    tuning.measure_sites()
    tuning.measure_effects(at.metric, at.search_part, at.request.seed)
    simple = Simple(tuning, scores, original, MARGIN * bound)
    # Before the search, which corrects what is predicted by what it sees.
    progress("rank and revert", 0, None)
    reverted, tried_reverting = simple.rank_and_revert()
    progress("one setting", 0, None)
    setting, uniform, tried_settings = simple.one_setting()
    search(tuning, scores, original, bound)
    plans = {
        "exact": ("", simple.exact, 0),
        "search": ("", tries(tuning)[0].solution, len(tuning.record.trials)),
        "rank and revert": ("", reverted, tried_reverting),
        "one setting": (setting, uniform, tried_settings),
    }
    progress("measure end to end", 0, None)
    times = _times(at, [solution for _, solution, _ in plans.values()])
    whole = statistics.median(times[0]) * 1e3
    # Sites that are timed alone may take longer than in the model, but nothing else takes less than no time.
    rest = max(whole - sum(choices.original for choices in tuning.choices.values()), 0.0)
    before = on_fresh.original()
    for (how, (setting, solution, tried)), taken in zip(plans.items(), times[1:], strict=True):
        progress("measure fresh data", 0, None)
        tuning.place(solution)
        yield Compared(
            model=loaded.host.name,
            bound=bound,
            how=how,
            setting=setting,
            predicted=whole / (rest + tuning.assembled(solution).cost),
            measured=statistics.median(first / own for first, own in zip(times[0], taken, strict=True)),
            searched=simple.drop_of(solution),
            fresh=_drop(on_fresh, before, tuning.named(solution)),
            tried=tried,
        )


def _times(at: Prepared, solutions: Sequence[Solution]) -> list[list[float]]:
    """Seconds of the original, and of each plan, in turn; implementations are built before."""
    model, tuning = at.tuning.model, at.tuning
    batch = max(at.search_part, key=size_of)  # the size at which sites are timed
    active = []
    for solution in solutions:
        tuning.place(solution)
        active.append(tuning.switches.active)

    def call() -> Any:
        return model(*batch.args, **batch.kwargs)

    def first() -> Any:
        with unrouted(model):
            return call()

    def run(number: int) -> Callable[[], Any]:
        def placed() -> Any:
            tuning.switches.active = active[number]
            return call()

        return placed

    with evaluating(model):
        return alternate([first, *map(run, range(len(active)))], repeats=_ROUNDS, budget=_SECONDS)


def _drop(scores: Scores, original: Measurement, named: Any) -> float:
    found = scores.of(named)
    return drop(BUILT_IN[scores.metric.name], original, found) if found is not None else float("inf")


class Simple:
    """Plans that are made of whole sites. A plan keeps the metric where its measured drop is within `margin`."""

    def __init__(self, tuning: Tuning, scores: Scores, original: Measurement, margin: float) -> None:
        self._tuning, self._scores, self._original, self._margin = tuning, scores, original, margin
        self._tables = tuning.tables()
        self.exact: Solution = tuning.exact().solution
        self._whole = [
            whole_choices(choices, table) for choices, table in zip(tuning.choices.values(), self._tables, strict=True)
        ]

    def drop_of(self, solution: Solution) -> float:
        """Measured on the data of the search."""
        self._tuning.place(solution)
        return _drop(self._scores, self._original, self._tuning.named(solution))

    def rank_and_revert(self) -> tuple[Solution, int]:
        """The plan, and how many were measured. The number of sites to revert is found by bisection."""
        places = zip(self._whole, self.exact, self._tables, strict=True)
        cheapest = [min((*choices.values(), exact), key=partial(cost_of, table)) for choices, exact, table in places]
        changed = [n for n, choice in enumerate(cheapest) if choice != self.exact[n]]
        ranked = sorted(changed, key=lambda n: self._worth(n, cheapest[n]))

        def kept(count: int) -> Solution:
            stays = set(ranked[:count])
            return tuple(cheapest[n] if n in stays else choice for n, choice in enumerate(self.exact))

        low, high, tried = 0, len(ranked), 0  # so many sites may stay; more than so many may not
        while low < high:
            middle = high if tried == 0 else (low + high + 1) // 2
            tried += 1
            if self.drop_of(kept(middle)) <= self._margin:
                low = middle
            else:
                high = middle - 1
        return kept(low), tried

    def one_setting(self) -> tuple[str, Solution, int]:
        """Its name, the plan, and how many were measured: the cheapest that keeps the metric, or the exact plan."""
        names = dict.fromkeys(name for choices in self._whole for name in choices)
        plans = {
            name: tuple(choices.get(name, exact) for choices, exact in zip(self._whole, self.exact, strict=True))
            for name in names
        }
        ordered = sorted(plans, key=lambda name: self._tuning.assembled(plans[name]).cost)
        for tried, name in enumerate(ordered, 1):
            if self.drop_of(plans[name]) <= self._margin:
                return name, plans[name], tried
        return "", self.exact, len(ordered)

    def _worth(self, site: int, choice: Choice) -> float:
        """The predicted drop for what is gained."""
        table = self._tables[site]
        gain = cost_of(table, self.exact[site]) - cost_of(table, choice)
        return effect_of(table, choice) / max(gain, 1e-12)


def whole_choices(choices: SiteChoices, table: Table) -> dict[str, Choice]:
    """What changes the result and can stand for all heads of a site, by variant and config."""
    every = [Choice(n) for n in range(len(table.whole))]
    every += [Choice(None, (n,) * table.groups) for n in range(len(table.columns))]
    found = {}
    for choice in every:
        groups = groups_of(choices, table, choice)
        if groups and not groups[0][1].exact:
            candidate = groups[0][1]
            found[f"{candidate.variant.name} {json.dumps(dict(candidate.config), sort_keys=True)}"] = choice
    return found
