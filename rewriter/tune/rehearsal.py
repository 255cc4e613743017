"""What a search would measure, without measuring."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from rewriter import probes
from rewriter.backend import check_goal, check_variants
from rewriter.calibration import batches_from, check_batches, split, with_rows
from rewriter.capture import compiled
from rewriter.guard import outputs_of
from rewriter.instances import Names
from rewriter.metrics import predicts_ids, resolve_metric
from rewriter.session import rerouted
from rewriter.site import Causal
from rewriter.tune.choices import Workbench
from rewriter.tune.deadline import Deadline
from rewriter.tune.predict import CALLS_A_BATCH, MOST_PLANTED, sampled
from rewriter.tune.record import Progress, Record
from rewriter.tune.search import MOST_TRIALS
from rewriter.tune.slots import SlotRewriter
from rewriter.tune.tuning import Tuning


@dataclass(frozen=True)
class Rehearsal:
    """The size of a search.

    kinds     of sites: each is measured once
    pairs     (site, candidate) pairs, and how many of them are `changing` the result
    calls     of the model at most, to measure accuracy; a backward pass counts as two
    """

    sites: int
    kinds: int
    pairs: int
    changing: int
    searched: int
    held_out: int
    calls: int

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.sites} attentions of {self.kinds} kinds, {self.pairs} candidates at all of them together. "
            f"{self.searched} batches guide the search and {self.held_out} decide: at most {self.calls} calls of the "
            "model to measure accuracy; to try each that changes the result end to end would take "
            f"{self.changing * self.searched} to search alone. Nothing was measured."
        )


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
    batches = batches_from(calibration)
    check_batches(model, batches)
    searched, held_out = split(with_rows(model, batches), seed)
    slots, workbench = SlotRewriter(None, names=Names.of(model)), Workbench(goal, allowed)
    tuning = Tuning(model, slots, goal, workbench, Deadline(None), progress, Record())
    with rerouted(model, compiled(model, slots)):
        tuning.capture(searched)
    causal = any(site.mask.has(Causal) for site in slots.sites.values())
    outputs = outputs_of(model, searched[0], 0)
    resolve_metric(metric, searched[0], outputs, causal=causal)
    found = [workbench.candidates(region)[0] for region in slots.regions.values()]
    original = 2 + len(searched) + len(held_out)  # twice on one, to see whether it repeats itself
    effects = CALLS_A_BATCH * len(sampled(searched))
    is_language_model = causal and predicts_ids(searched[0], outputs)
    planted = [len(probes.planted(part, seed)) if is_language_model else 0 for part in (searched, held_out)]
    recall = (1 + MOST_TRIALS) * planted[0] + CALLS_A_BATCH * min(planted[0] // 2, MOST_PLANTED) + 3 * planted[1]
    return Rehearsal(
        sites=len(found),
        kinds=len({region.identity() for region in slots.regions.values()}),
        pairs=sum(map(len, found)),
        changing=sum(variant.fidelity != "exact" for pairs in found for variant, _ in pairs),
        searched=len(searched),
        held_out=len(held_out),
        calls=original + effects + MOST_TRIALS * len(searched) + 3 * len(held_out) + recall,
    )
