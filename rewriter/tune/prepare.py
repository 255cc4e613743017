"""What a search starts from: what was asked for, the model captured with slots, the data split, the metric known."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rewriter import probes
from rewriter.calibration import batches_from, check_batches, split, with_rows
from rewriter.capture import compiled
from rewriter.fingerprint import fingerprint
from rewriter.guard import outputs_of
from rewriter.instances import Names
from rewriter.metrics import Batch, Metric, predicts_ids, primary, resolve_metric, with_drop_type
from rewriter.session import route, unrouted
from rewriter.site import Causal
from rewriter.sources import version
from rewriter.target import Target
from rewriter.tune.choices import Workbench
from rewriter.tune.lengths import by_length, told_apart
from rewriter.tune.record import Progress, Record, digest_of
from rewriter.tune.request import Request
from rewriter.tune.scores import Scores
from rewriter.tune.slots import SlotRewriter
from rewriter.tune.tuning import Recall, Tuning, size_of
from rewriter.tune.whole import SECONDS
from rewriter.verdict import Check


@dataclass(frozen=True)
class Probe:
    """What recall is asked on, and how much of it may be lost."""

    scores: Scores
    bound: float
    progress: Progress

    def of(self, plan: Any) -> Check:
        """Whether what the model runs now, which `plan` names in plain values, recalls what the original does."""
        if not self.scores.batches:
            return probes.said(self.bound, probes.TOO_SHORT)
        self.progress("probe recall", 0, None)
        return probes.judged(self.scores.original(), self.scores.of(plan), self.bound)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A model before its search: captured with slots, the data read and split, the metric known."""

    request: Request
    record: Record
    tuning: Tuning
    through_slots: Callable[..., Any]
    metric: Metric
    dtype: torch.dtype
    device: str
    search_part: Sequence[Batch]
    held_out: Sequence[Batch]
    probe: Probe | None

    def scores_on(self, batches: Sequence[Batch], *, guarding: bool = False) -> Scores:
        """The metric of the search on some batches, which are held out or not."""
        tuning = self.tuning
        return Scores(
            self.metric, tuning.model, batches, tuning.about, original=partial(unrouted, tuning.model),
            record=self.record, fresh=self.request.fresh, guarding=guarding,
        )  # fmt: skip

    def compared(self, plans: Sequence[Any], batch: Batch, measure: Callable[[], list[float]]) -> Sequence[float]:
        """What plans cost end to end, which are named in plain values. As all that decides, it is remembered; what a
        compiler of the user's own makes of them is not known.
        """
        inner, tuning = self.request.inner, self.tuning
        if not isinstance(inner, str):
            return measure()
        what = [tuning.about, digest_of(batch), self.request.goal, inner, self.request.dynamic, plans]
        unhurried = self.request.deadline.left > SECONDS
        found: list[float] = tuning.workbench.ledger(self.device).measured("end to end", what, measure, keep=unhurried)
        return found


def prepared(model: nn.Module, calibration: Iterable[Any], request: Request) -> list[Prepared]:
    """What searches start from, that of the longest inputs first: mostly one, or one for each class of lengths where
    the attentions tell them apart. Nothing is measured yet. The model's calls go where its author sent them.
    """
    batches = batches_from(calibration)
    check_batches(model, batches)
    batches = with_rows(model, batches)
    found = [_prepared(model, each, request) for each in by_length(batches, request)]
    if not told_apart([at.tuning.switches.lengths for at in found]):
        found = [_prepared(model, batches, request)]
    floor: dict[str, int] = {}
    for at in reversed(found):
        at.tuning.floor = dict(floor)
        floor |= {path: most + 1 for path, (_, most) in at.tuning.switches.lengths.items()}
    return found


def _prepared(model: nn.Module, batches: Sequence[Batch], request: Request) -> Prepared:
    search_part, held_out = split(batches, request.seed)
    record = Record(bound=request.max_drop, unit="bytes" if request.goal == "memory" else "ms")
    request = dataclasses.replace(request, progress=record.watched(request.progress))
    slots = SlotRewriter(None, names=Names.of(model))
    workbench = Workbench(request.goal, request.allowed, request.fresh)
    tuning = Tuning(model, slots, request.goal, workbench, request.deadline, request.progress, record)
    outputs = outputs_of(model, search_part[0], 0)
    through_slots = compiled(model, slots)
    route(model, through_slots)
    tuning.capture([*search_part, max(batches, key=size_of)])  # so that sites are known at the size of the longest call
    route(model, None)
    causal = any(site.mask.has(Causal) for site in slots.sites.values())
    metric = resolve_metric(request.metric, search_part[0], outputs, causal=causal)
    metric = with_drop_type(metric, request.limits.drop_type)
    tuning.about, record.metric = [version(), fingerprint(model), *_machine(model, outputs)], metric.name
    on_held_out = None
    if causal and predicts_ids(search_part[0], outputs):
        guiding, on_held_out = (
            probe_on(part, model, request, tuning.about, record, guarding=part is held_out)
            for part in (search_part, held_out)
        )
        if guiding is not None and guiding.scores.batches and guiding.bound > 0:
            tuning.recall = Recall(guiding.scores, request.max_drop / guiding.bound)
    return Prepared(
        request=request, record=record, tuning=tuning, through_slots=through_slots, metric=metric,
        dtype=primary(outputs).dtype, device=str(primary(outputs).device), search_part=search_part, held_out=held_out,
        probe=on_held_out,
    )  # fmt: skip


def probe_on(
    batches: Sequence[Batch],
    model: nn.Module,
    request: Request,
    about: Sequence[Any] | None,
    record: Record,
    *,
    guarding: bool,
) -> Probe | None:
    """How a causal language model is asked, in texts of these batches; None where it is not to be. Without `about`
    nothing of it is kept for another run.
    """
    bound = request.limits.recall_drop
    if bound >= 1:
        return None
    scores = Scores(
        probes.RECALL, model, probes.planted(batches, request.seed), about or (), original=partial(unrouted, model),
        record=record, fresh=request.fresh, kept=about is not None, guarding=guarding,
    )  # fmt: skip
    return Probe(scores, bound, request.progress)


def _machine(model: nn.Module, outputs: Any) -> list[Any]:
    """What an answer depends on beside weights: their types, the device, versions, and what else only outputs show."""
    types: dict[str, int] = {}
    for parameter in model.parameters():
        types[str(parameter.dtype)] = types.get(str(parameter.dtype), 0) + 1
    output = primary(outputs)
    target = Target.current(output.device).to_json()
    del target["threads"]  # in how many parts a sum is taken is rounding
    return [types, str(output.dtype), target, _glance(output)]


def _glance(output: Tensor) -> list[float]:
    """A few numbers that another output would not have: what a model computes depends on more than its weights."""
    flat = output.detach().double().flatten().nan_to_num(posinf=0.0, neginf=0.0)
    wave = torch.arange(flat.numel(), device=flat.device, dtype=torch.float64).sin()
    return [float(f"{value.item():.3g}") for value in (flat.norm(), flat.abs().mean(), (flat * wave).abs().sum())]
