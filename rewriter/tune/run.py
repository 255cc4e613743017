"""Choosing what stands at each site of a model, with calibration data and without."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from rewriter.backend import GraphRewriter
from rewriter.calibration import batches_from, check_batches, with_rows
from rewriter.errors import CalibrationError, GuardError, brief
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
from rewriter.metrics import Batch, is_built_in, predicts_ids, primary, resolve_metric, with_drop_type
from rewriter.plan import Plan
from rewriter.report import Timing
from rewriter.select import Selector
from rewriter.session import Session, rerouted, route, uninstall
from rewriter.site import AttentionSite, Causal
from rewriter.tune.assemble import Assembled
from rewriter.tune.prepare import Prepared, prepared, probe_on
from rewriter.tune.record import Ledger, Record
from rewriter.tune.request import Request
from rewriter.tune.scores import Scores
from rewriter.tune.search import search, tries
from rewriter.tune.together import together
from rewriter.tune.tuning import Tuning, no_attention, size_of
from rewriter.tune.whole import compared, runs_of, timed, timing_of
from rewriter.variant import ORIGINAL
from rewriter.verdict import Verdict, judge


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
    original, result = runs_of(model, batch)
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
        timing = timing_of(model, batch, request)
    if timing.ratio < 1:
        return _given_up(model, request, selector, "no gain here: faster site by site, but not as a whole", timing)
    return request.finished(session, None, timing)


def tuned(model: nn.Module, calibration: Iterable[Any], request: Request) -> Session:
    """All training-free variants, and the learned ones that were asked for, under the guard. Inputs of very different
    lengths are searched one class after the other, with equal parts of the time, and share a plan.
    """
    found: list[tuple[Prepared, Session]] = []
    classes = prepared(model, calibration, request)
    for number, at in enumerate(classes):
        request.deadline.share(len(classes) - number)
        if number and request.deadline.over():
            break
        uninstall(model)
        found.append((at, _searched(at)))
    if len(classes) == 1:
        return found[0][1]
    uninstall(model)
    return together(model, request, found, len(classes) - len(found))


def _searched(at: Prepared) -> Session:
    """The best plan for one class of inputs, in place."""
    request, record, tuning, model = at.request, at.record, at.tuning, at.tuning.model
    metric, dtype, search_part = at.metric, at.dtype, at.search_part

    def repeats() -> bool:
        check_repeats(metric, model, search_part[0], dtype)
        record.evaluations += 2
        return True

    record.needed += 2
    Ledger(tuning.about, request.fresh, kept=is_built_in(metric)).measured("repeats", metric.name, repeats)
    request.progress("measure the original", 0, None)
    on_search, on_held_out = at.scores_on(search_part), at.scores_on(at.held_out, guarding=True)
    original, reference = on_search.original(), on_held_out.original()

    route(model, at.through_slots)
    notes = []
    try:
        tuning.measure_sites()
        record.exhaustive = len(search_part) * tuning.changing()
        record.exhaustive_by_heads = len(search_part) * tuning.changing(by_heads=True)
        if request.max_drop > 0 and any(c.others for c in tuning.choices.values()) and not request.deadline.over():
            tuning.measure_effects(metric, search_part, request.seed)
            search(tuning, on_search, original, request.max_drop)
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
    plans, exact = tries(tuning), tuning.exact()
    reason, tried = "nothing within the bound was faster", 0
    standing: tuple[Session, Verdict] | None = None
    try:
        for number, plan in enumerate(plans):
            request.progress("check on held-out data", number, len(plans))
            selector = _selector(tuning, plan, request)
            if not (_changes(selector) or slots.sampled):
                continue
            session, inexact = request.installed(model, selector), tuning.inexact(plan.solution)
            found = on_held_out.of(tuning.named(plan.solution))
            rules = {"worst_drop": request.limits.worst_drop, "tried": tried} if inexact else {"exact": at.dtype}
            verdict = judge(reference, found, request.max_drop, **rules) if found else None
            if verdict is not None and verdict.held and inexact and at.probe is not None:
                verdict = verdict.checked(at.probe.of(tuning.named(plan.solution)))
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
                costs = at.compared(names, batch, partial(compared, model, batch, request, rivals))
                if min(costs) == costs[1]:
                    with evaluating(model):  # where the times are an earlier search's, nothing has run yet
                        runs_of(model, batch)[1]()
                    if request.pareto or inexact:
                        with rerouted(model, at.through_slots):
                            measured_on = (on_search, original) if request.pareto else (None, None)
                            tuning.draw_front(request.max_drop, plan.solution, *measured_on)
                    return session, verdict, timed(batch, request, costs)
                reason, standing = "faster site by site, but not as a whole", None
            uninstall(model)
    except KeyboardInterrupt:
        if standing is not None:
            notes.append("stopped by hand before it was timed as a whole; the plan holds its bounds on held-out data")
            return *standing, None
        notes.append("stopped by hand before a plan was checked on held-out data: only what is exact stands")
        uninstall(model)
        return request.installed(model, _selector(tuning, exact, request)), None, None
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
    probed = not exact and causal and predicts_ids(batches[0], outputs)
    probe = probe_on(batches, model, request, None, Record(), guarding=True) if probed else None
    session = request.installed(model, Selector.replaying(plan))
    request.progress("check on held-out data", 0, None)
    rules = {"exact": primary(outputs).dtype} if exact else {"worst_drop": request.limits.worst_drop}
    verdict = judge(reference, evaluate(metric, model, batches, kept), request.max_drop, **rules)
    if probe is not None:
        verdict = verdict.checked(probe.of(None))
    if not verdict.held:
        raise GuardError(f"the plan does not keep the bound on this model ({verdict}); tune it: optimize without plan")
    return request.finished(session, verdict, timing_of(model, max(batches, key=size_of), request))


def _selector(tuning: Tuning, plan: Assembled, request: Request) -> Selector:
    decisions = tuning.decisions(plan.solution)
    selector = Selector({d.path: d for d in decisions}, True, request.goal, request.allowed)
    selector.modules = tuning.modules(plan.solution)
    return selector


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
