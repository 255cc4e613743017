"""What a search would measure, without measuring."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from rewriter.backend import check_goal, check_variants
from rewriter.session import unrouted
from rewriter.tune.deadline import Deadline
from rewriter.tune.predict import CALLS_A_BATCH, MOST_PLANTED, sampled
from rewriter.tune.prepare import Prepared, prepared
from rewriter.tune.record import Progress
from rewriter.tune.request import Request
from rewriter.tune.search import MOST_TRIALS
from rewriter.verdict import Limits


@dataclass(frozen=True)
class Rehearsal:
    """The size of a search.

    kinds     of sites: each is measured once
    pairs     (site, candidate) pairs, and how many of them are `changing` the result
    exhaustive  calls of the model to try each that changes the result end to end, to search alone
    calls     of the model at most, to measure accuracy; a backward pass counts as two
    """

    sites: int
    kinds: int
    pairs: int
    changing: int
    searched: int
    held_out: int
    exhaustive: int
    calls: int

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.sites} attentions of {self.kinds} kinds, {self.pairs} candidates at all of them together. "
            f"{self.searched} batches guide the search and {self.held_out} decide: at most {self.calls} calls of the "
            "model to measure accuracy; to try each that changes the result end to end would take "
            f"{self.exhaustive} to search alone. Nothing was measured."
        )


_ADDED = ("kinds", "pairs", "changing", "searched", "held_out", "exhaustive", "calls")
"""What searches of several classes of lengths take together."""


def rehearsed(
    model: nn.Module,
    calibration: Iterable[Any],
    *,
    goal: str = "latency",
    variants: Iterable[str] | None = None,
    metric: Any = None,
    seed: int = 0,
    progress: Progress = lambda stage, done, total: None,
) -> Rehearsal:
    """Capture the model, and count. Raises as `optimize` does on bad input; the model stays as it is."""
    goal, allowed = check_goal(goal), check_variants(variants)
    request = Request(
        goal=goal, allowed=allowed, inner="eager", dynamic=None, progress=progress, limits=Limits(max_drop=0.0),
        metric=metric, seed=seed, deadline=Deadline(None),
    )  # fmt: skip
    with unrouted(model):
        parts = [_rehearsed(at) for at in prepared(model, calibration, request)]
    return Rehearsal(
        sites=max(part.sites for part in parts),
        **{name: sum(getattr(part, name) for part in parts) for name in _ADDED},
    )


def _rehearsed(at: Prepared) -> Rehearsal:
    """For inputs of one class of lengths."""
    regions, workbench = at.tuning.slots.regions, at.tuning.workbench
    found = [workbench.candidates(region)[0] for region in regions.values()]
    searched, held_out = len(at.search_part), len(at.held_out)
    original = 2 + searched + held_out  # twice on one, to see whether it repeats itself
    effects = CALLS_A_BATCH * len(sampled(at.search_part))
    planted = [len(each.scores.batches) if each is not None else 0 for each in (at.tuning.recall, at.probe)]
    recall = (1 + MOST_TRIALS) * planted[0] + CALLS_A_BATCH * min(planted[0] // 2, MOST_PLANTED) + 3 * planted[1]
    changing = sum(variant.fidelity != "exact" for pairs in found for variant, _ in pairs)
    return Rehearsal(
        sites=len(found),
        kinds=len({region.identity() for region in regions.values()}),
        pairs=sum(map(len, found)),
        changing=changing,
        searched=searched,
        held_out=held_out,
        exhaustive=changing * searched,
        calls=original + effects + MOST_TRIALS * searched + 3 * held_out + recall,
    )
