"""Search for the fastest (or smallest) plan that the guard accepts.

Every candidate is timed at its site, and its effect on the metric is predicted. A mixed-integer program makes the
cheapest plan whose predicted drop is within the bound; the plan is assembled and measured on the search part of the
data, the prediction is corrected by what was seen, and solved again. Whether a plan holds is decided on the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from rewriter.candidates import WORTH_IT
from rewriter.guard import Measurement, drop
from rewriter.tune.assemble import Assembled
from rewriter.tune.record import Trial
from rewriter.tune.scores import Scores
from rewriter.tune.solve import Solution, cost_of, effect_of
from rewriter.tune.tuning import Tuning

MARGIN = 0.8
"""The part of the bound that the search may use on its data: the rest is not the same data."""
_CLOSE = 0.9
"""A plan that uses this part of its margin is as good as the next one."""
_MOST_SOLVED, _MOST_REVERTED = 8, 8
MOST_TRIALS = _MOST_SOLVED + _MOST_REVERTED
"""Plans that are measured: solutions of the program, and those of the last resort."""
_WORTH_A_TRIAL = WORTH_IT
"""The search ends where the next plan would cost more than this part of the best one."""


def search(tuning: Tuning, scores: Scores, original: Measurement, bound: float) -> None:
    """Find plans that keep the metric within the bound on the search part, into `tuning.accepted`.

    Ends early where time is over.
    """
    _Search(tuning, scores, original, MARGIN * bound).run()


def tries(tuning: Tuning) -> list[Assembled]:
    """Plans in the order in which to try them on held-out data, the best first; the exact one is always the last.

    At most two before it: each look at held-out data costs confidence.
    """
    exact = tuning.exact()
    best = min(tuning.accepted, key=lambda each: each.cost, default=exact)
    if best.solution == exact.solution:
        return [exact]
    gentler = tuning.solved(tuning.assembled(best.solution).predicted / 3)
    found = [best]
    if gentler.solution not in (best.solution, exact.solution) and gentler.cost < exact.cost * _WORTH_A_TRIAL:
        found.append(gentler)
    return [*found, exact]


@dataclass
class _Search:
    """`original` is what the metric says of the model as it was, and `margin` what may be lost of that."""

    tuning: Tuning
    scores: Scores
    original: Measurement
    margin: float
    failed: list[Assembled] = field(default_factory=list)

    @property
    def accepted(self) -> list[Assembled]:
        return self.tuning.accepted

    @property
    def best(self) -> Assembled:
        return min(self.accepted, key=lambda each: each.cost)

    def predicted(self, plan: Assembled) -> float:
        """Its drop, by what is known now."""
        return self.tuning.assembled(plan.solution).predicted

    def is_late(self) -> bool:
        return self.tuning.deadline.over(self.tuning.reserve(self.scores))

    def run(self) -> None:
        self.accepted.append(self.tuning.exact())
        budget = self.margin
        while len(self.accepted) + len(self.failed) <= _MOST_SOLVED:
            plan = self.tuning.solved(budget)
            if plan.solution in {each.solution for each in self.accepted + self.failed}:
                break
            if plan.cost > _WORTH_A_TRIAL * self.best.cost or self.is_late():
                break
            plan = self.tried(plan)
            assert plan.measured is not None
            (self.accepted if plan.measured <= self.margin else self.failed).append(plan)
            if _CLOSE * self.margin <= plan.measured <= self.margin:
                break
            budget = self.next_budget()
        best = self.best
        if best.measured is not None:
            self.correct(self.predicted(best), best.measured)
        # By what is known of the best one these should have held: their sites do not add up.
        hoped = [
            each
            for each in self.failed
            if each.cost <= _WORTH_A_TRIAL * best.cost
            and (best.measured is None or self.predicted(each) <= self.margin)
        ]
        if hoped:
            for plan in self.reverted(min(hoped, key=lambda each: each.cost), best):
                self.accepted.append(plan)  # one by one: a search that is stopped keeps what it has

    def tried(self, plan: Assembled) -> Assembled:
        """Assemble and measure a plan, and correct the prediction by what is seen."""
        tuning, original = self.tuning, self.original
        tuning.progress("search", len(tuning.record.trials), MOST_TRIALS)
        tuning.place(plan.solution)

        def lost(part: Measurement) -> bool:
            """Is it beyond the margin even if the rest is as good as the original?"""
            rest = original.samples[len(part.samples) :]
            return drop(part.metric, original, Measurement(part.metric, (*part.samples, *rest))) > self.margin

        found = self.scores.of(tuning.named(plan.solution), lost)
        measured = math.inf
        if found is not None:
            measured = drop(found.metric, Measurement(found.metric, original.samples[: len(found.samples)]), found)
        if tuning.recall is not None and measured <= self.margin:
            measured = max(measured, tuning.recall.drop(tuning.named(plan.solution)))
        tuning.record.trials.append(Trial(plan.cost, plan.predicted, measured, measured <= self.margin))
        self.correct(plan.predicted, measured)
        return Assembled(plan.solution, plan.cost, plan.predicted, measured)

    def correct(self, predicted: float, measured: float) -> None:
        """What is better than the original says little of how errors add up, as does what crashed."""
        if predicted > 0:
            self.tuning.scale *= min(max(measured / predicted, 1 / 16), 16.0)

    def next_budget(self) -> float:
        """The margin as it is predicted now, between the plans that were tried."""
        low = max(map(self.predicted, self.accepted))
        high = min(map(self.predicted, self.failed), default=math.inf)
        if low < self.margin < high:
            return self.margin
        return math.sqrt(max(low, high / 16) * high) if high < math.inf else 4 * max(low, self.margin)

    def reverted(self, plan: Assembled, base: Assembled) -> Iterator[Assembled]:
        """The last resort, where sites do not add up: as much of a plan that failed as holds beside `base`, which does.
        Sites are ranked by the accuracy that they are predicted to cost for what they gain. The first that is one too
        many, which bisection finds, is reverted, and the rest is tried without it.
        """
        tables, stands = self.tuning.tables(), base.solution
        gains = [
            cost_of(table, before) - cost_of(table, after)
            for table, before, after in zip(tables, base.solution, plan.solution, strict=True)
        ]
        left = [n for n, gain in enumerate(gains) if gain > 0]
        left.sort(key=lambda n: effect_of(tables[n], plan.solution[n]) / gains[n])

        def taken(count: int) -> Solution:
            new = set(left[:count])
            return tuple(plan.solution[n] if n in new else choice for n, choice in enumerate(stands))

        holds, fails = 0, len(left) if taken(len(left)) == plan.solution else len(left) + 1
        for _ in range(_MOST_REVERTED):
            if fails - holds == 1:
                stands, left = taken(holds), left[holds + 1 :]
                holds, fails = 0, len(left) + 1  # of the rest nothing is known
            if not left or self.is_late():
                return
            count = len(left) if fails > len(left) else (holds + fails) // 2
            tried = self.tried(self.tuning.assembled(taken(count)))
            if tried.measured is not None and tried.measured <= self.margin:
                yield tried
                holds = count
            else:
                fails = count
