"""Choosing what stands at each site of a model, with calibration data and without."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from rewriter import probes
from rewriter.backend import GraphRewriter, Inner
from rewriter.calibration import batches_from, check_batches, split, with_rows
from rewriter.capture import compiled
from rewriter.errors import CalibrationError, GuardError
from rewriter.fingerprint import fingerprint
from rewriter.guard import (
    Measurement,
    check_repeats,
    evaluate,
    evaluating,
    measure_original,
    model_tolerance,
    outputs_of,
    relative_rms,
)
from rewriter.instances import Names
from rewriter.metrics import Batch, Metric, is_built_in, predicts_ids, primary, resolve_metric, with_drop_type
from rewriter.plan import Plan
from rewriter.report import Timing
from rewriter.select import Selector, brief
from rewriter.session import Session, install, new_session, rerouted, route, uninstall, unrouted
from rewriter.site import AttentionSite, Causal
from rewriter.sources import version
from rewriter.target import Target
from rewriter.tune.assemble import Assembled
from rewriter.tune.choices import Workbench
from rewriter.tune.deadline import Deadline
from rewriter.tune.measure import alternate, medians, peak_memory
from rewriter.tune.record import Ledger, Progress, Record, digest_of
from rewriter.tune.scores import Scores
from rewriter.tune.search import Recall, Tuning, no_attention, size_of
from rewriter.tune.slots import SlotRewriter
from rewriter.variant import ORIGINAL
from rewriter.verdict import Check, Limits, Verdict, judge

_SECONDS_END_TO_END = 20.0


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user asked for: the arguments of `optimize`, checked."""

    goal: str
    allowed: frozenset[str] | None
    inner: Inner
    dynamic: bool | None
    progress: Progress
    limits: Limits
    metric: Any
    seed: int
    deadline: Deadline
    fresh: bool = False
    pareto: bool = False
    begin: float = field(default_factory=time.perf_counter)

    @property
    def max_drop(self) -> float:
        """The bound on the metric."""
        return self.limits.max_drop

    def installed(self, model: nn.Module, selector: Selector) -> Session:
        """The model with a selector's choices in place."""
        session = new_session(model, GraphRewriter(selector, inner=self.inner), self.goal, self.dynamic)
        install(model, session)
        return session

    def finished(self, session: Session, verdict: Verdict | None = None, timing: Timing | None = None) -> Session:
        """The session with its report filled in."""
        session.report.verdict = verdict
        session.guard = verdict.to_json() if verdict is not None else None
        session.report.timings = session.timings = [timing] if timing is not None else []
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
    planted: Sequence[Batch] | None

    def scores_on(self, batches: Sequence[Batch], metric: Metric | None = None) -> Scores:
        """A metric, or that of the search, on some batches."""
        model, about = self.tuning.model, self.tuning.about
        return Scores(
            metric or self.metric, model, batches, about, original=partial(unrouted, model), record=self.record,
            fresh=self.request.fresh, kept=metric is not None or None,
        )  # fmt: skip

    def recall(self, plan: Any) -> Check | None:
        """Whether what the model runs now, which `plan` names in plain values, recalls what the original does; None
        where nothing is to be probed.
        """
        bound = self.request.limits.recall_drop
        if not self.planted:
            return None if self.planted is None else probes.said(bound, probes.TOO_SHORT)
        self.request.progress("probe recall", 0, None)
        return probes.judged(self._on_planted.original(), self._on_planted.of(plan), bound)

    @cached_property
    def _on_planted(self) -> Scores:
        """One for all plans, so that the original is measured once even where no cache is believed."""
        return self.scores_on(self.planted or (), probes.RECALL)

    def compared(self, plans: Sequence[Any], batch: Batch, measure: Callable[[], list[float]]) -> Sequence[float]:
        """What plans cost end to end, which are named in plain values. As all that decides, it is remembered; what a
        compiler of the user's own makes of them is not known.
        """
        inner, tuning = self.request.inner, self.tuning
        if not isinstance(inner, str):
            return measure()
        what = [tuning.about, digest_of(batch), self.request.goal, inner, self.request.dynamic, plans]
        unhurried = self.request.deadline.left > _SECONDS_END_TO_END
        found: list[float] = tuning.workbench.ledger(self.device).measured("end to end", what, measure, keep=unhurried)
        return found


def prepared(model: nn.Module, calibration: Iterable[Any], request: Request) -> Prepared:
    """What a search starts from; nothing is measured yet. The model's calls go where its author sent them."""
    batches = batches_from(calibration)
    check_batches(model, batches)
    search_part, held_out = split(with_rows(model, batches), request.seed)
    record = Record(bound=request.max_drop, unit="bytes" if request.goal == "memory" else "ms")
    request = dataclasses.replace(request, progress=record.watched(request.progress))
    slots = SlotRewriter(None, names=Names.of(model))
    workbench = Workbench(request.goal, request.allowed, request.fresh)
    tuning = Tuning(model, slots, request.goal, workbench, request.deadline, request.progress, record)
    outputs = outputs_of(model, search_part[0], 0)
    through_slots = compiled(model, slots)
    route(model, through_slots)
    tuning.capture(search_part)
    route(model, None)
    causal = any(site.mask.has(Causal) for site in slots.sites.values())
    metric = resolve_metric(request.metric, search_part[0], outputs, causal=causal)
    metric = with_drop_type(metric, request.limits.drop_type)
    tuning.about, record.metric = [version(), fingerprint(model), *_machine(model, outputs)], metric.name
    is_language_model = causal and predicts_ids(search_part[0], outputs)
    at = Prepared(
        request=request, record=record, tuning=tuning, through_slots=through_slots, metric=metric,
        dtype=primary(outputs).dtype, device=str(primary(outputs).device), search_part=search_part, held_out=held_out,
        planted=_planted(held_out, is_language_model, request),
    )  # fmt: skip
    limits = request.limits
    if limits.recall_drop > 0 and (texts := _planted(search_part, is_language_model, request)):
        tuning.recall = Recall(at.scores_on(texts, probes.RECALL), limits.max_drop / limits.recall_drop)
    return at


def _planted(batches: Sequence[Batch], is_language_model: bool, request: Request) -> list[Batch] | None:
    """What recall is probed on; None where it is not."""
    wanted = is_language_model and request.limits.recall_drop < 1
    return probes.planted(batches, request.seed) if wanted else None


def tuned(model: nn.Module, calibration: Iterable[Any], request: Request) -> Session:
    """All training-free variants, and the learned ones that were asked for, under the guard."""
    at = prepared(model, calibration, request)
    request, record, tuning = at.request, at.record, at.tuning
    metric, dtype, search_part = at.metric, at.dtype, at.search_part

    def repeats() -> bool:
        check_repeats(metric, model, search_part[0], dtype)
        return True

    Ledger(tuning.about, request.fresh, kept=is_built_in(metric)).measured("repeats", metric.name, repeats)
    request.progress("measure the original", 0, None)
    on_search, on_held_out = at.scores_on(search_part), at.scores_on(at.held_out)
    original, reference = on_search.original(), on_held_out.original()

    route(model, at.through_slots)
    notes = []
    try:
        tuning.measure_sites()
        if request.max_drop > 0 and any(c.others for c in tuning.choices.values()) and not request.deadline.over():
            tuning.measure_effects(metric, search_part, request.seed)
            tuning.search(on_search, original, request.max_drop)
    except KeyboardInterrupt:
        request.deadline.stop()
        notes.append("the search was stopped by hand; this is the best that it had found")
    route(model, None)
    session, verdict, timing = _best(at, on_search, original, on_held_out, reference, notes)
    session.search = record.to_json()
    session.report.notes += notes
    return request.finished(session, verdict, timing)


def _best(
    at: Prepared,
    on_search: Scores,
    original: Measurement,
    on_held_out: Scores,
    reference: Measurement,
    notes: list[str],
) -> tuple[Session, Verdict | None, Timing | None]:
    """The best plan that holds on held-out data and is faster as a whole, in place; else the original."""
    request, tuning, slots, model = at.request, at.tuning, at.tuning.slots, at.tuning.model
    tries, exact = tuning.tries(), tuning.solved(0.0)
    reason, tried = "nothing within the bound was faster", 0
    standing: tuple[Session, Verdict] | None = None
    try:
        for number, plan in enumerate(tries):
            request.progress("check on held-out data", number, len(tries))
            selector = _selector(tuning, plan, request)
            if not (_changes(selector) or slots.sampled):
                continue
            session, inexact = request.installed(model, selector), tuning.inexact(plan.solution)
            found = on_held_out.of(tuning.named(plan.solution))
            rules = {"worst_drop": request.limits.worst_drop, "tried": tried} if inexact else {"exact": at.dtype}
            verdict = judge(reference, found, request.max_drop, **rules) if found else None
            if verdict is not None and verdict.held and inexact:
                verdict = verdict.checked(at.recall(tuning.named(plan.solution)))
            tried += inexact
            if verdict is not None and not verdict.held:
                reason = verdict.reason or reason
                if inexact:
                    notes.append(f"refused on held-out data: {verdict}")
            elif verdict is not None:
                standing = session, verdict
                batch, plans = max(at.held_out, key=size_of), [plan, exact] if inexact else [plan]
                rivals = [_selector(tuning, rival, request) for rival in plans[1:]]
                names = [tuning.named(each.solution) for each in plans]
                costs = at.compared(names, batch, partial(_compared, model, batch, request, rivals))
                if min(costs) == costs[1]:
                    with evaluating(model):  # where the times are an earlier search's, nothing has run yet
                        _runs(model, batch)[1]()
                    if request.pareto or inexact:
                        with rerouted(model, at.through_slots):
                            measured_on = (on_search, original) if request.pareto else (None, None)
                            tuning.draw_front(request.max_drop, plan.solution, *measured_on)
                    return session, verdict, _timed(batch, request, costs)
                reason, standing = "faster site by site, but not as a whole", None
            uninstall(model)
    except KeyboardInterrupt:
        if standing is not None:
            notes.append("stopped by hand before it was timed as a whole; the plan holds its bounds on held-out data")
            return *standing, None
        notes.append("stopped by hand before a plan was checked on held-out data: only what is exact stands")
        uninstall(model)
        selector = _selector(tuning, exact, request)
        if tuning.inexact(exact.solution):  # something changed nothing on the data of the search
            session = _given_up(model, request, selector, "nothing was checked")
        else:
            session = request.installed(model, selector)
        return session, None, None
    selector = _selector(tuning, exact, request)
    selector.allowed = frozenset()
    session = _given_up(model, request, selector, f"no gain here: {reason}")
    _still_found(session, slots)
    again = measure_original(at.metric, model, at.held_out)[0] if at.metric.score is None else reference
    verdict = judge(reference, again, request.max_drop, exact=at.dtype)
    if not verdict.held:
        raise GuardError(f"the metric does not repeat itself on the original model ({verdict}): make it deterministic")
    return session, verdict, None


def validated(model: nn.Module, plan: Plan, calibration: Iterable[Any], request: Request) -> Session:
    """A plan for other weights or other data: nothing is searched, and the guard decides on all of the data."""
    batches = batches_from(calibration)
    check_batches(model, batches)
    batches = with_rows(model, batches)
    request.progress("measure the original", 0, None)
    outputs = outputs_of(model, batches[0], 0)
    causal = any(AttentionSite.parse(d.site).mask.has(Causal) for d in plan.decisions)
    metric = with_drop_type(
        resolve_metric(request.metric, batches[0], outputs, causal=causal), request.limits.drop_type
    )
    check_repeats(metric, model, batches[0], primary(outputs).dtype)
    reference, kept = measure_original(metric, model, batches)
    exact = plan.fidelity == "exact"
    planted = _planted(batches, not exact and causal and predicts_ids(batches[0], outputs), request)
    recalled = measure_original(probes.RECALL, model, planted)[0] if planted else None
    session = request.installed(model, Selector.replaying(plan))
    request.progress("check on held-out data", 0, None)
    rules = {"exact": primary(outputs).dtype} if exact else {"worst_drop": request.limits.worst_drop}
    verdict = judge(reference, evaluate(metric, model, batches, kept), request.max_drop, **rules)
    if planted and recalled is not None:
        found = evaluate(probes.RECALL, model, planted)
        verdict = verdict.checked(probes.judged(recalled, found, request.limits.recall_drop))
    if not verdict.held:
        raise GuardError(f"the plan does not keep the bound on this model ({verdict}); tune it: optimize without plan")
    return request.finished(session, verdict, _timing(model, max(batches, key=size_of), request))


def _selector(tuning: Tuning, plan: Assembled, request: Request) -> Selector:
    decisions = tuning.decisions(plan.solution)
    selector = Selector({d.path: d for d in decisions}, True, request.goal, request.allowed)
    selector.modules = tuning.modules(plan.solution)
    return selector


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


def _compared(model: nn.Module, batch: Batch, request: Request, rivals: Sequence[Selector]) -> list[float]:
    """The costs of the original, the result, and what the result has to be better than: it is worth its change of the
    model's answers only if it is.
    """
    request.progress("measure end to end", 0, None)
    original, result = _runs(model, batch)

    def rival(selector: Selector) -> Callable[[], Any]:
        other = compiled(model, GraphRewriter(selector, inner=request.inner), dynamic=request.dynamic)

        def run() -> Any:
            with rerouted(model, other):
                return result()

        return run

    with evaluating(model):
        return _costs([original, result, *map(rival, rivals)], request)


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
    if before is not None:
        _still_found(session, before.rewriter)
    session.report.notes.append(f"left as it is: {reason}")
    if timing is not None:
        session.report.notes.append(f"the rewritten model took {timing.result:.4g} {timing.unit}, the original less")
    return request.finished(session)


def _still_found(session: Session, seen: GraphRewriter) -> None:
    """What was found in an earlier form of the model stays found."""
    rewriter = session.rewriter
    rewriter.sites |= seen.sites
    rewriter.sampled |= seen.sampled
    rewriter.refusals += [refusal for refusal in seen.refusals if refusal not in rewriter.refusals]
    rewriter.graphs = max(rewriter.graphs, seen.graphs)


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
    with evaluating(model):
        return _timed(batch, request, _costs(_runs(model, batch), request))


def _timed(batch: Batch, request: Request, costs: Sequence[float]) -> Timing:
    return Timing(_described(batch), costs[0], costs[1], "bytes" if request.goal == "memory" else "ms")


def _costs(runs: Sequence[Callable[[], Any]], request: Request) -> list[float]:
    if request.goal == "memory":
        for run in runs:
            run()
        return [peak_memory(run) for run in runs]
    budget = min(_SECONDS_END_TO_END, max(request.deadline.left, 0.0))
    return medians(alternate(runs, repeats=5, budget=budget))


def _described(batch: Batch) -> str:
    """The shapes of a batch."""
    values = [*(("", v) for v in batch.args), *batch.kwargs.items()]
    shapes = [f"{n} {'x'.join(map(str, v.shape))}".strip() for n, v in values if isinstance(v, torch.Tensor)]
    return ", ".join(shapes) or "one batch"
