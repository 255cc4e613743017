"""Choosing what stands at each site of a model, with calibration data and without."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from rewriter.backend import GraphRewriter, Inner
from rewriter.calibration import batches_from, check_batches, split
from rewriter.capture import compiled, module_names
from rewriter.errors import CalibrationError, GuardError
from rewriter.guard import (
    Verdict,
    evaluate,
    evaluating,
    judge,
    measure_original,
    model_tolerance,
    outputs_of,
    relative_rms,
)
from rewriter.metrics import Batch, primary, resolve_metric
from rewriter.report import Timing
from rewriter.select import Selector, brief
from rewriter.session import Session, install, new_session, route, uninstall
from rewriter.site import Causal
from rewriter.tune.measure import alternate, medians, peak_memory
from rewriter.tune.search import Deadline, Progress, Tuning, measured, no_attention, size_of
from rewriter.tune.slots import SlotRewriter
from rewriter.variant import ORIGINAL

_SECONDS_END_TO_END = 20.0


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user asked for: the arguments of `optimize`, checked."""

    goal: str
    allowed: frozenset[str] | None
    inner: Inner
    dynamic: bool | None
    progress: Progress
    max_drop: float
    metric: Any
    seed: int
    deadline: Deadline
    begin: float = field(default_factory=time.perf_counter)

    def installed(self, model: nn.Module, selector: Selector) -> Session:
        """The model with a selector's choices in place."""
        session = new_session(model, GraphRewriter(selector, inner=self.inner), self.goal, self.dynamic)
        install(model, session)
        return session

    def finished(self, session: Session, verdict: Verdict | None = None, timing: Timing | None = None) -> Session:
        """The session with its report filled in."""
        session.report.verdict = verdict
        session.guard = verdict.to_json() if verdict is not None else None
        session.report.timings = [timing] if timing is not None else []
        session.report.seconds = {"optimize": time.perf_counter() - self.begin}
        return session


def untuned(model: nn.Module, example: Any, request: Request) -> Session:
    """Exact variants only. With an example, or the model's own dummy inputs, the result is checked at once; without,
    every site is decided when its graph is first captured."""
    batch = _example(model, example)
    selector = Selector(goal=request.goal, allowed=request.allowed)
    session = request.installed(model, selector)
    if batch is None:
        session.report.notes.append(
            "there are no example inputs, so sites are found and decided at the first call of each kind"
        )
        return request.finished(session)
    request.progress("capture", 0, None)
    original, result = _runs(model, batch)
    with evaluating(model):
        expected, actual = primary(original()), primary(result())
        if not session.rewriter.replaceable:
            raise no_attention(session.rewriter)
        difference = relative_rms(actual, expected)
        if not difference <= model_tolerance(expected.dtype):
            return _given_up(model, request, selector, f"the outputs differed by {difference:.3g}, which is not exact")
        if example is None:
            session.report.notes.append("timed site by site only: give example= to have the whole model timed as well")
            return request.finished(session)
        if not _changes(selector):
            return request.finished(session)
        request.progress("measure end to end", 0, None)
        timing = _timing(model, batch, request)
    if timing.ratio < 1:
        return _given_up(model, request, selector, "no gain here: faster site by site, but not as a whole", timing)
    return request.finished(session, None, timing)


def tuned(model: nn.Module, calibration: Iterable[Any], request: Request) -> Session:
    """All training-free variants, and the learned ones that were asked for, under the guard."""
    batches = batches_from(calibration)
    check_batches(model, batches)
    search_half, held_out = split(batches, request.seed)
    slots = SlotRewriter(None, names=module_names(model))
    tuning = Tuning(model, slots, request.goal, request.allowed, request.deadline, request.progress)
    outputs = outputs_of(model, search_half[0], 0)
    through_slots = compiled(model, slots)
    route(model, through_slots)
    tuning.capture(search_half)
    route(model, None)
    causal = any(site.mask.has(Causal) for site in slots.sites.values())
    metric = resolve_metric(request.metric, search_half[0], outputs, causal=causal)
    dtype = primary(outputs).dtype
    del outputs
    request.progress("measure the original", 0, None)
    on_search, search_references = measure_original(metric, model, search_half)
    on_held_out, references = measure_original(metric, model, held_out)

    route(model, through_slots)
    tuning.measure_sites()
    thresholds = [0.0]
    if request.max_drop > 0 and any(c.others for c in tuning.choices.values()) and not request.deadline.over():
        tuning.measure_errors(search_half)
        thresholds = tuning.search(metric, on_search, search_half, search_references, request.max_drop)
    route(model, None)

    reason = "nothing within the bound was faster"
    for number, threshold in enumerate(thresholds):
        request.progress("check on held-out data", number, len(thresholds))
        decisions = tuning.decisions(threshold)
        selector = Selector({d.path: d for d in decisions}, True, request.goal, request.allowed)
        selector.modules = tuning.modules(threshold)
        if not _changes(selector):
            continue
        session = request.installed(model, selector)
        exact = all(d.fidelity == "exact" for d in decisions)
        found = measured(metric, model, held_out, references)
        verdict = judge(on_held_out, found, request.max_drop, exact=dtype if exact else None) if found else None
        if verdict is not None and verdict.held:
            timing = _timing(model, max(held_out, key=size_of), request)
            if timing.ratio >= 1:
                return request.finished(session, verdict, timing)
            reason = "faster site by site, but not as a whole"
        uninstall(model)
    selector = Selector({d.path: d for d in tuning.decisions(0.0)}, True, request.goal, frozenset())
    session = _given_up(model, request, selector, f"no gain here: {reason}")
    verdict = judge(on_held_out, evaluate(metric, model, held_out, references), request.max_drop, exact=dtype)
    if not verdict.held:
        raise GuardError(f"the metric does not repeat itself on the original model ({verdict}): make it deterministic")
    return request.finished(session, verdict)


def _changes(selector: Selector) -> bool:
    return any(decision.variant != ORIGINAL for decision in selector.decisions.values())


def _given_up(
    model: nn.Module, request: Request, selector: Selector, reason: str, timing: Timing | None = None
) -> Session:
    """The original at every site, with the reason, and with what was measured as the evidence."""
    kept = {
        path: dataclasses.replace(d, variant=ORIGINAL, config={}, fidelity="exact", reason=f"left as it is: {reason}")
        for path, d in selector.decisions.items()
    }
    before = uninstall(model)
    session = request.installed(model, dataclasses.replace(selector, decisions=kept, modules={}, allowed=frozenset()))
    if before is not None:  # What was found stays found.
        session.rewriter.sites |= before.rewriter.sites
        session.rewriter.refusals += before.rewriter.refusals
        session.rewriter.graphs = before.rewriter.graphs
    session.report.notes.append(f"left as it is: {reason}")
    if timing is not None:
        session.report.notes.append(f"the rewritten model took {timing.result:.4g} {timing.unit}, the original less")
    return request.finished(session)


def _example(model: nn.Module, example: Any) -> Batch | None:
    """The user's example, or what the model itself offers as `dummy_inputs`, if it runs on them."""
    if example is not None:
        batches = batches_from([example])
        check_batches(model, batches)
        try:
            with evaluating(model):
                primary(model(*batches[0].args, **batches[0].kwargs))
        except Exception as cause:
            raise CalibrationError(
                f"the model fails on the example ({brief(cause)}); give inputs that it accepts"
            ) from cause
        return batches[0]
    offered = getattr(model, "dummy_inputs", None)
    if not isinstance(offered, dict):
        return None
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    batch = Batch(kwargs={k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in offered.items()})
    try:
        with evaluating(model):
            primary(model(**batch.kwargs))
    except Exception:
        return None  # What a model offers may be out of date; then it is as if it offered nothing.
    return batch


def _runs(model: nn.Module, batch: Batch) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """(original, result) as functions of nothing."""

    def original() -> Any:
        return model._call_impl(*batch.args, **batch.kwargs)

    def result() -> Any:
        return model(*batch.args, **batch.kwargs)

    return original, result


def _timing(model: nn.Module, batch: Batch, request: Request) -> Timing:
    """Original and result end to end, in alternation."""
    runs = _runs(model, batch)
    with evaluating(model):
        if request.goal == "memory":
            for run in runs:
                run()
            costs = [peak_memory(run) for run in runs]
        else:
            budget = min(_SECONDS_END_TO_END, max(request.deadline.left, 0.0))
            costs = medians(alternate(runs, repeats=5, budget=budget))
    return Timing(_described(batch), costs[0], costs[1], "bytes" if request.goal == "memory" else "ms")


def _described(batch: Batch) -> str:
    """The shapes of a batch."""
    values = [*(("", v) for v in batch.args), *batch.kwargs.items()]
    shapes = [f"{n} {'x'.join(map(str, v.shape))}".strip() for n, v in values if isinstance(v, torch.Tensor)]
    return ", ".join(shapes) or "one batch"
