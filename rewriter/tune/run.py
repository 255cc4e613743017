"""Choosing what stands at each site of a model, with calibration data and without."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from rewriter.capture import compiled, module_names
from rewriter.errors import CalibrationError, GuardError
from rewriter.guard import (
    Verdict, batches_from, check_batches, error, evaluate, evaluating, judge, measure_original, resolution, split,
)  # fmt: skip
from rewriter.metrics import Batch, primary, resolve_metric
from rewriter.report import Timing
from rewriter.select import Selector
from rewriter.session import Session, install, route, uninstall
from rewriter.site import Causal
from rewriter.tune.measure import alternate, medians, peak_memory
from rewriter.tune.search import Deadline, Progress, Tuning, no_attention
from rewriter.tune.slots import SlotRewriter
from rewriter.variant import ORIGINAL

_SECONDS_END_TO_END = 20.0
NewSession = Callable[[Selector], Session]


def untuned(
    model: nn.Module,
    example: Any,
    goal: str,
    allowed: frozenset[str] | None,
    progress: Progress,
    session_for: NewSession,
    *,
    dynamic: bool | None,
) -> Session:
    """Exact variants only. With an example, or the model's own dummy inputs, the result is checked and timed at once;
    without, every site is decided when its graph is first captured."""
    start = time.perf_counter()
    session = session_for(Selector(goal=goal, allowed=allowed))
    selector = session.rewriter.choose
    assert selector is not None
    batch = _example(model, example)
    install(model, session, dynamic=dynamic)
    if batch is None:
        session.report.notes.append(
            "there are no example inputs, so sites are found and decided at the first call of each kind"
        )
        return session
    progress("capture", 0, None)
    original, result = _runs(model, batch)
    with evaluating(model):
        expected = primary(original())
        actual = primary(result())
        if not session.rewriter.sites:
            raise no_attention(session.rewriter)
        difference = error(actual, expected)
        if not difference <= resolution(expected.dtype):
            _give_up(session, f"the result differed by {difference:.3g} of the largest output, which is not exact")
            install_again(model, session, dynamic)
        elif any(d.variant != ORIGINAL for d in selector.decisions.values()):
            progress("measure end to end", 0, None)
            session.report.timings = [_timing(model, batch, goal, None)]
    session.report.seconds = {"optimize": time.perf_counter() - start}
    return session


def tuned(
    model: nn.Module,
    calibration: Iterable[Any],
    bound: float,
    metric: Any,
    goal: str,
    allowed: frozenset[str] | None,
    seed: int,
    deadline: Deadline,
    progress: Progress,
    session_for: NewSession,
    *,
    dynamic: bool | None,
) -> Session:
    """All training-free variants, and the learned ones that were asked for, under the guard."""
    begin = time.perf_counter()
    batches = batches_from(calibration)
    check_batches(model, batches)
    search_half, held_out = split(batches, seed)
    slots = SlotRewriter(None, names=module_names(model))
    tuning = Tuning(model, slots, goal, allowed, deadline, progress)
    route(model, compiled(model, slots))
    tuning.capture(search_half[:1])
    causal = any(site.mask.has(Causal) for site in slots.sites.values())
    route(model, None)
    with evaluating(model):
        outputs = model(*search_half[0].args, **search_half[0].kwargs)
    chosen = resolve_metric(metric, search_half[0], outputs, causal=causal)
    dtype = primary(outputs).dtype
    del outputs
    progress("measure the original", 0, None)
    on_search, search_references = measure_original(chosen, model, search_half)
    on_held_out, held_out_references = measure_original(chosen, model, held_out)

    route(model, compiled(model, slots))
    tuning.capture(search_half)
    tuning.measure_sites()
    thresholds = [0.0]
    if bound > 0 and any(choices.others for choices in tuning.choices.values()) and not deadline.over():
        tuning.measure_errors(search_half)
        thresholds = tuning.search(chosen, on_search, search_half, search_references, bound)
    route(model, None)

    for number, threshold in enumerate(thresholds):
        progress("check on held-out data", number, len(thresholds))
        decisions = tuning.decisions(threshold)
        session = session_for(Selector({d.path: d for d in decisions}, True, goal, allowed))
        selector = session.rewriter.choose
        assert selector is not None
        selector.modules = tuning.modules(threshold)
        install(model, session, dynamic=dynamic)
        exact = all(d.fidelity == "exact" for d in decisions)
        found = evaluate(chosen, model, held_out, held_out_references)
        verdict = judge(on_held_out, found, bound, exact=dtype if exact else None)
        changed = any(d.variant != ORIGINAL for d in decisions)
        timing = _timing(model, held_out[0], goal, deadline) if verdict.held and changed else None
        if verdict.held and (timing is None or timing.result <= timing.original):
            return _finished(session, verdict, timing, begin)
        if verdict.held and timing is not None:
            session.report.notes.append("no gain here, left as it is: faster site by site, but not end to end")
        uninstall(model)
    return _original(model, session_for, tuning, on_held_out, chosen, held_out, held_out_references, bound, begin, dynamic)


def _finished(session: Session, verdict: Verdict, timing: Timing | None, begin: float) -> Session:
    session.report.verdict = verdict
    session.guard = verdict.to_json()
    session.report.timings = [timing] if timing is not None else []
    if timing is None:
        session.report.notes.append("no gain here, left as it is: nothing was faster than the original within the bound")
    session.report.seconds = {"optimize": time.perf_counter() - begin}
    return session


def _original(
    model: nn.Module,
    session_for: NewSession,
    tuning: Tuning,
    measured: Any,
    metric: Any,
    held_out: Sequence[Batch],
    references: Sequence[Any],
    bound: float,
    begin: float,
    dynamic: bool | None,
) -> Session:
    """Nothing held or nothing was faster: the original, which meets its own bound."""
    session = session_for(Selector({}, True, tuning.goal, frozenset()))
    _give_up_all(session, tuning)
    install(model, session, dynamic=dynamic)
    verdict = judge(measured, evaluate(metric, model, held_out, references), bound, exact=torch.float32)
    if not verdict.held:
        raise GuardError(
            f"the metric {metric.name!r} does not repeat itself on the original model ({verdict}); make it deterministic"
        )
    return _finished(session, verdict, None, begin)


def _give_up(session: Session, reason: str) -> None:
    selector = session.rewriter.choose
    assert selector is not None
    selector.decisions = {
        path: dataclasses.replace(d, variant=ORIGINAL, config={}, fidelity="exact", reason=f"left as it is: {reason}")
        for path, d in selector.decisions.items()
    }
    session.report.notes.append(f"left as it is: {reason}")


def _give_up_all(session: Session, tuning: Tuning) -> None:
    selector = session.rewriter.choose
    assert selector is not None
    for choices in tuning.choices.values():
        choices.others, choices.exact = [], None
    selector.decisions = {d.path: d for d in tuning.decisions(0.0)}


def install_again(model: nn.Module, session: Session, dynamic: bool | None) -> None:
    """The same session with other decisions: the graphs must be made anew."""
    uninstall(model)
    install(model, session, dynamic=dynamic)


def _example(model: nn.Module, example: Any) -> Batch | None:
    """The user's example, or what the model itself offers as `dummy_inputs`, if it runs on them."""
    if example is not None:
        batches = batches_from([example])
        check_batches(model, batches)
        with evaluating(model):
            try:
                model(*batches[0].args, **batches[0].kwargs)
            except Exception as cause:
                raise CalibrationError(f"the model fails on the example ({cause})") from cause
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


def _timing(model: nn.Module, batch: Batch, goal: str, deadline: Deadline | None) -> Timing:
    """Original and result end to end, in alternation."""
    runs = _runs(model, batch)
    with evaluating(model):
        if goal == "memory":
            for run in runs:
                run()
            costs = [peak_memory(run) for run in runs]
        else:
            left = _SECONDS_END_TO_END if deadline is None else min(_SECONDS_END_TO_END, max(deadline.left, 0.0))
            costs = medians(alternate(runs, repeats=5, budget=left))
    return Timing(_described(batch), costs[0], costs[1], "bytes" if goal == "memory" else "ms")


def _described(batch: Batch) -> str:
    """The shapes of a batch."""
    values = [*(("", v) for v in batch.args), *batch.kwargs.items()]
    shapes = [f"{n} {'x'.join(map(str, v.shape))}".strip() for n, v in values if isinstance(v, torch.Tensor)]
    return ", ".join(shapes) or "one batch"

