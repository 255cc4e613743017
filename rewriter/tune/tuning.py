"""One search on one model: what was measured, what it predicts, and the plans that can be made of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from rewriter import probes
from rewriter.backend import GraphRewriter
from rewriter.errors import CaptureError, NoAttentionError
from rewriter.guard import Measurement, drop, evaluating
from rewriter.metrics import Batch, Metric, tensors
from rewriter.plan import Decision
from rewriter.tune.assemble import Assembled, Groups, decision_of, distinct, groups_of, implementation_of
from rewriter.tune.choices import SiteChoices, Workbench
from rewriter.tune.deadline import Deadline
from rewriter.tune.predict import Predictor
from rewriter.tune.record import Ledger, Point, Progress, Record
from rewriter.tune.scores import Scores
from rewriter.tune.slots import SlotRewriter, Switches
from rewriter.tune.solve import Choice, Solution, Table, cost_of, effect_of, front, solve

_MOST_COLUMNS = 20_000
"""More cells than this, and heads are not told apart."""
_FRONT = [10 ** (power / 3) for power in range(-6, 7)]
"""Budgets of the front, in multiples of the bound."""


@dataclass(frozen=True)
class Recall:
    """What a search may lose of it. `weight` makes of a part of the gain what it is worth of the metric's drop: the one
    bound over the other.
    """

    scores: Scores
    weight: float

    @property
    def gain(self) -> float:
        """Nats of the original."""
        return probes.gain(self.scores.original())

    def drop(self, plan: Any) -> float:
        """What a plan, which the model runs now, loses, in the metric's drop."""
        lost = probes.judged(self.scores.original(), self.scores.of(plan), math.inf).drop
        return 0.0 if lost is None else self.weight * lost


@dataclass
class Tuning:
    """The state of one search on one model, whose calls run through slots while it lasts."""

    model: nn.Module
    slots: SlotRewriter
    goal: str
    workbench: Workbench
    deadline: Deadline
    progress: Progress
    record: Record
    about: Sequence[Any] = ()
    floor: Mapping[str, int] = field(default_factory=dict)
    """By path the fewest keys for which this search decides, where shorter calls have a search of their own."""
    choices: dict[str, SiteChoices] = field(default_factory=dict)
    scale: float = 1.0
    """Measured drop over predicted drop, of the last plan that was tried, at the end of the best."""
    recall: Recall | None = None
    accepted: list[Assembled] = field(default_factory=list)
    """Plans that kept the metric within the bound on the search part."""

    @property
    def switches(self) -> Switches:
        """What the slots do."""
        return self.slots.switches

    @property
    def largest(self) -> bool:
        """Does the largest site count, instead of the sum?"""
        return self.goal == "memory"

    def changing(self, *, by_heads: bool = False) -> int:
        """How many (site, candidate) pairs change the result; or (head, candidate) pairs, where heads may differ."""
        return sum(
            choices.site.kv_heads if by_heads and choices.split is not None and not each.whole else 1
            for choices in self.choices.values()
            for each in choices.measured
            if not each.exact
        )

    def capture(self, batches: Sequence[Batch]) -> None:
        """Run every kind of batch once, so that all graphs exist and each site is known at its largest size.

        The largest goes first: a later one may run in a graph that was captured for any size, and is not seen.
        """
        with evaluating(self.model):
            kinds = {kind_of(batch): batch for batch in sorted(batches, key=size_of)}
            for number, batch in enumerate(reversed(kinds.values())):
                self.progress("capture", number, len(kinds))
                self.model(*batch.args, **batch.kwargs)
                if number == 0 and not self.slots.replaceable:
                    raise no_attention(self.slots)

    def measure_sites(self) -> None:
        """Time the candidates of every site; equal sites once."""
        for number, (path, region) in enumerate(self.slots.regions.items()):
            self.progress("measure sites", number, len(self.slots.regions))
            self.choices[path] = self.workbench.choices(region, self.deadline.left / 4)
        self.record.pairs = sum(len(choices.measured) for choices in self.choices.values())

    def measure_effects(self, metric: Metric, batches: Sequence[Batch], seed: int) -> None:
        """The local error of what is not exact, and its predicted effect on the metric, and on recall."""
        predictor = self.predictor()
        predictor.run(metric, batches, seed)
        if self.recall is not None and (gain := self.recall.gain) > 0:
            predictor.recall(self.recall.scores.batches[::2], self.recall.weight / gain)

    def predictor(self) -> Predictor:
        """What predicts the effects of the choices as they are now."""
        return Predictor(
            self.model, self.switches, self.choices, self.deadline, self.progress, self.record,
            Ledger(self.about, self.workbench.fresh),
        )  # fmt: skip

    # --- plans -------------------------------------------------------------------------------------------------------

    def tables(self) -> list[Table]:
        """What the solver chooses from, with effects as they are predicted now."""
        cells = sum(c.site.kv_heads * len(c.columns) for c in self.choices.values())
        return [choices.table(self.scale, by_heads=cells <= _MOST_COLUMNS) for choices in self.choices.values()]

    def exact(self) -> Assembled:
        """The cheapest plan that changes nothing. What is predicted to have no effect is in the others."""
        tables = self.tables()
        found = [
            Choice(0) if choices.base is None else Choice(None, (0,) * table.groups)
            for choices, table in zip(self.choices.values(), tables, strict=True)
        ]
        return self.assembled(tuple(found), tables)

    def solved(self, budget: float) -> Assembled:
        """The cheapest plan whose predicted drop is within a budget."""
        tables = self.tables()
        return self.assembled(solve(tables, budget, largest=self.largest), tables)

    def assembled(self, solution: Solution, tables: Sequence[Table] | None = None) -> Assembled:
        """A solution with its cost and its drop as predicted now."""
        pairs = list(zip(self.tables() if tables is None else tables, solution, strict=True))
        costs = [cost_of(*pair) for pair in pairs]
        return Assembled(
            solution,
            (max if self.largest else sum)(costs) if costs else 0.0,
            sum(effect_of(*pair) for pair in pairs),
        )

    def standing(self, solution: Solution) -> Iterator[tuple[SiteChoices, Groups]]:
        """For each site the groups of heads and what they run; no groups where the original code stays."""
        for choices, table, choice in zip(self.choices.values(), self.tables(), solution, strict=True):
            yield choices, groups_of(choices, table, choice)

    def place(self, solution: Solution) -> None:
        """Switch every slot to what a solution chooses."""
        self.switches.active = {
            choices.site.path: implementation_of(choices.site, groups)
            for choices, groups in self.standing(solution)
            if groups
        }

    def named(self, solution: Solution) -> dict[str, Any]:
        """The solution in plain values."""
        return {
            choices.site.path: [[list(heads), c.variant.name, dict(c.config)] for heads, c in groups]
            for choices, groups in self.standing(solution)
            if groups
        }

    def inexact(self, solution: Solution) -> bool:
        """Does anything in it change the result?"""
        return any(not c.exact for _, groups in self.standing(solution) for _, c in groups)

    def reserve(self, scores: Scores) -> float:
        """Seconds that one more trial and what comes after the search will take."""
        planted = self.recall.scores.batches if self.recall is not None else ()
        return 3 * scores.seconds_a_batch * (len(scores.batches) + len(planted))

    def draw_front(self, bound: float, chosen: Solution, scores: Scores | None, original: Measurement | None) -> None:
        """The cheapest plans of rising budgets, and the chosen one; measured where `scores` are given."""
        tables = self.tables()
        budgets = [0.0, *(bound * factor for factor in _FRONT)]
        solutions = [*front(tables, budgets, largest=self.largest)]
        for solution in solutions if chosen in solutions else [*solutions, chosen]:
            plan = self.assembled(solution, tables)
            measured = None
            if scores is not None and original is not None and not self.deadline.over(self.reserve(scores)):
                self.progress("measure the front", len(self.record.front), len(solutions))
                self.place(solution)
                found = scores.of(self.named(solution))
                measured = drop(scores.metric, original, found) if found is not None else None
            self.record.front.append(Point(plan.cost, plan.predicted, measured, solution == chosen))
        self.record.front.sort(key=lambda point: point.cost)

    # --- the result --------------------------------------------------------------------------------------------------

    def decisions(self, solution: Solution) -> list[Decision]:
        """The plan of a solution."""
        unit = "bytes" if self.goal == "memory" else "ms"
        costs = [cost_of(*pair) for pair in zip(self.tables(), solution, strict=True)]
        return [
            decision_of(choices, groups, cost, unit, self._lengths(choices, groups))
            for (choices, groups), cost in zip(self.standing(solution), costs, strict=True)
        ]

    def _lengths(self, choices: SiteChoices, groups: Groups) -> tuple[int, int] | None:
        """The keys for which this was measured to be right and worth it; exact choices are right for all."""
        changed = [candidate for _, candidate in groups if not candidate.exact]
        if not changed:
            return None
        least, most = self.floor.get(choices.site.path, 1), choices.region.lengths[1]
        if self.goal == "memory" or self.deadline.over():
            return least, most
        return max(least, *(self.workbench.shortest(choices, candidate) for candidate in distinct(changed))), most

    def modules(self, solution: Solution) -> dict[str, nn.Module]:
        """The fitted modules that a solution uses, by path."""
        return {
            choices.site.path: candidate.implementation
            for choices, groups in self.standing(solution)
            for _, candidate in groups
            if candidate.variant.fidelity == "learned" and isinstance(candidate.implementation, nn.Module)
        }


def kind_of(batch: Batch) -> str:
    """Equal for batches that run in the same graph: their form with shapes and types in place of the tensors."""
    return repr(
        tree_map(lambda v: (v.dtype, v.shape) if isinstance(v, Tensor) else v, (batch.args, dict(batch.kwargs)))
    )


def size_of(batch: Batch) -> int:
    """How many numbers it holds."""
    return sum(tensor.numel() for tensor in tensors((batch.args, batch.kwargs)))


def no_attention(seen: GraphRewriter) -> CaptureError | NoAttentionError:
    """The error for a model without attention, with the nearest miss; or one that torch.compile sees nothing of."""
    if not seen.graphs:
        return CaptureError(
            "torch.compile captures nothing of this model, which is TorchScript, kept out by torch.compiler.disable, "
            "or computes nothing; give the module as it was written"
        )
    if seen.sites:
        kept = next(iter(seen.sites.values()))
        return NoAttentionError(
            f"no attention in this model can be replaced; the one at {kept.path or '<root>'} is recognised and stays "
            f"as it is ({', '.join(kept.edits)}); see rewriter.explain"
        )
    if seen.refusals:
        return NoAttentionError(
            f"no attention in this model could be taken; the nearest was {seen.refusals[0]}; see rewriter.explain"
        )
    return NoAttentionError("there is no attention in this model, so there is nothing to rewrite")
