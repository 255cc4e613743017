"""The public functions: `optimize`, `explain`, `apply`, `restore`, `plan_of`, `report_of`."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.export import ExportedProgram

from rewriter.backend import GraphRewriter, Inner, check_goal, check_variants, inner_compiler
from rewriter.calibration import batches_from, check_batches
from rewriter.capture import capture_errors, compiled, exported, graph_breaks
from rewriter.detect import detect
from rewriter.errors import OptionError
from rewriter.fingerprint import fingerprint
from rewriter.guard import outputs_of
from rewriter.instances import Names
from rewriter.metrics import Metric
from rewriter.passes import Rewrite, rewritten
from rewriter.plan import Plan
from rewriter.plan_check import check_guard, check_model, read_plan
from rewriter.report import Report
from rewriter.select import Selector
from rewriter.session import Session, adopt, install, new_session, route, session_of, uninstall
from rewriter.tune.deadline import Deadline
from rewriter.tune.record import Progress
from rewriter.tune.request import Request
from rewriter.tune.run import tuned, untuned, validated
from rewriter.tune.tuning import no_attention
from rewriter.verdict import Limits

M = TypeVar("M", bound=nn.Module)


def optimize(
    model: Any,
    calibration: Iterable[Any] | None = None,
    *,
    example: Any = None,
    max_drop: float = 0.01,
    drop_type: str | None = None,
    worst_drop: float | None = None,
    recall_drop: float | None = None,
    metric: str | Metric | tuple[Callable[..., Any], str] | None = None,
    goal: str = "latency",
    time_budget: float | None = None,
    plan: Plan | str | os.PathLike[str] | None = None,
    variants: Iterable[str] | None = None,
    seed: int = 0,
    resume: bool = True,
    pareto: bool = False,
    inner: Inner = "eager",
    dynamic: bool | None = None,
    progress: Progress | None = None,
) -> Any:
    """Find every attention in `model`, replace it by the best variant that the bound allows, return the same object.

    Without `calibration` only exact variants are candidates. With it, approximate ones are too: a third of the batches
    guides the search, and the result is measured against the original on the rest. A confidence limit of the drop there
    (95%, one-sided) must meet the bound, or the plan is cut back until it does; too little data is a refusal. Speed is
    measured end to end in alternation; where nothing is gained the model stays as it is, and the report says so.

    model        a module, rewritten in place; or a `torch.export.ExportedProgram`, whose rewritten module is returned
    calibration  batches: dicts of keyword arguments, tuples of arguments, or tensors; at least two. Where some are four
                 times longer than others, and there are 8 of each, both have decisions of their own
    example      one batch for capture and timing where there is no calibration data
    max_drop     how much worse the metric may become (0.01 is 1%)
    drop_type    "relative" to the original's value, or "absolute"; None is relative for all metrics but kl
    worst_drop   the same for the worst single sample, a row or a batch; None is three times `max_drop`
    recall_drop  how much of what a causal language model gains from a pair of tokens far before it may be lost at any
                 distance; None is 0.1, and with 1 or more it is not probed
    metric       "perplexity", "cosine", "top1", "kl", or (fn, "higher" | "lower") with fn(model, batch) -> float;
                 None picks perplexity for causal language models and cosine otherwise
    goal         "latency" or "memory" (peak, of intermediate results)
    time_budget  seconds; when they are over, the best plan so far is taken
    plan         a plan or its file, to be applied without any search; with calibration data it is measured on all of
                 them first, and refused where it does not keep the bound (for a plan that is for other weights)
    resume       believe what earlier runs measured on this machine, this model and these data, finished or stopped
    pareto       measure the whole front of speed against accuracy, not only the plan that is taken
    variants     names to choose among; learned variants take part only when they are named
    inner        what runs or compiles the rest of the graph: "eager", "inductor", ... or a backend function
    dynamic      as in torch.compile
    progress     called with (stage, done, total or None)

    Raises a `RewriterError` with one sentence on bad input, and then the model is left exactly as it was.
    """
    limits = Limits.checked(max_drop, drop_type, worst_drop, recall_drop)
    goal, allowed = check_goal(goal), check_variants(variants)
    _check_options(time_budget, inner, dynamic, progress)
    if isinstance(model, ExportedProgram):
        if calibration is not None or plan is not None:
            raise OptionError("an exported program is rewritten exactly; to tune, give optimize() the module itself")
        return _optimize_exported(model, goal, allowed)
    if not isinstance(model, nn.Module):
        raise OptionError(f"optimize takes a torch.nn.Module or an ExportedProgram, not {type(model).__name__}")
    if plan is not None and calibration is None:
        return _replayed(model, plan, example, inner=inner, dynamic=dynamic)
    request = Request(
        goal=goal,
        allowed=allowed,
        inner=inner,
        dynamic=dynamic,
        progress=progress or (lambda stage, done, total: None),
        limits=limits,
        metric=metric,
        seed=seed,
        deadline=Deadline(time_budget),
        fresh=not resume,
        pareto=pareto,
    )
    before = uninstall(model)
    try:
        with _unchanged(model) as written:
            if plan is not None and calibration is not None:
                given = read_plan(plan)
                check_model(given, model, check_weights=False)
                session = validated(model, given, calibration, request)
                session.search = given.search
            elif calibration is not None:
                session = tuned(model, calibration, request)
            else:
                session = untuned(model, example, request)
        if written:
            session.fingerprint = fingerprint(model, written)
    except BaseException:
        uninstall(model)
        route(model, None)
        if before is not None:
            install(model, before)
        raise
    session.strict = False
    return model


def _check_options(time_budget: Any, inner: Any, dynamic: Any, progress: Any) -> None:
    if time_budget is not None and not (isinstance(time_budget, (int, float)) and time_budget > 0):
        raise OptionError(f"time_budget is a positive number of seconds, not {time_budget!r}")
    if dynamic not in (None, True, False):
        raise OptionError(f"dynamic is True, False or None, as in torch.compile, not {dynamic!r}")
    if progress is not None and not callable(progress):
        raise OptionError(f"progress is a function (stage, done, total), not a {type(progress).__name__}")
    inner_compiler(inner)


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[list[str]]:
    """Random state, modes and buffers (running statistics, caches) are afterwards what they were. The list then names
    the buffers that were not.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    modes = {module: module.training for module in model.modules()}
    buffers = [
        (f"{prefix}.{name}" if prefix else name, module._buffers, name, buffer, buffer.clone())
        for prefix, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and not buffer.is_meta and buffer.layout == torch.strided
    ]
    written: list[str] = []
    try:
        with torch.random.fork_rng(devices):
            yield written
    finally:
        for module, training in modes.items():
            module.training = training
        with torch.no_grad():
            for full, held, name, buffer, content in buffers:
                # Only where needed: a write makes autograd refuse what it saved before.
                changed = not torch.equal(buffer, content)
                if changed or held.get(name) is not buffer:
                    written.append(full)
                held[name] = buffer
                if changed:
                    buffer.copy_(content)


def explain(model: Any, *args: Any, **kwargs: Any) -> Report:
    """What is in the model: its sites, and what looked like attention and was not taken. Changes nothing.

    Runs the model once on the given inputs, in its present mode. An exported program needs none.
    """
    start = time.perf_counter()
    if isinstance(model, ExportedProgram):
        found = detect(exported(model))
        seconds = {"capture and detect": time.perf_counter() - start}
        sampled = [match.site for match in found.sampled]
        return Report(sites=found.sites, sampled=sampled, refusals=found.refusals, graphs=1, seconds=seconds)
    if not isinstance(model, nn.Module):
        raise OptionError(f"explain takes a torch.nn.Module or an ExportedProgram, not {type(model).__name__}")
    seen = GraphRewriter(None, names=Names.of(model))
    with _unchanged(model), torch.no_grad(), capture_errors(), graph_breaks() as breaks:
        compiled(model, seen)(*args, **kwargs)
    return Report(
        sites=list(seen.sites.values()),
        sampled=list(seen.sampled.values()),
        refusals=seen.refusals,
        graphs=seen.graphs,
        seconds={**seen.seconds, "whole run": time.perf_counter() - start},
        notes=[f"torch.compile breaks the graph, and what runs between is not seen: {reason}" for reason in breaks],
    )


def apply(
    model: M,
    plan: Plan | str | os.PathLike[str],
    *,
    check_weights: bool = True,
    inner: Inner = "eager",
    dynamic: bool | None = None,
) -> M:
    """Rewrite `model` in place as a plan says, without any search. Returns the same object.

    Sites that are not in the plan, and calls that it was not made for, run their original code; the report says so.
    Raises PlanError for a damaged plan, one for another model, (with `check_weights`) an inexact one for other weights,
    and one whose decisions the guard did not measure or did not find within the bound.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"a plan is applied to a torch.nn.Module, not to a {type(model).__name__}")
    _check_options(None, inner, dynamic, None)
    plan = read_plan(plan)
    check_guard(plan)
    before = uninstall(model)
    try:
        found = check_model(plan, model, check_weights=check_weights)
        if found["weights"] != plan.model["weights"]:
            plan = dataclasses.replace(plan, guard=None)  # it measured the answers of other weights
        rewriter = GraphRewriter(Selector.replaying(plan), inner=inner)
        session = Session(rewriter=rewriter, goal=plan.goal, given=plan, fingerprint=found, dynamic=dynamic)
        install(model, session)
    except BaseException:
        if before is not None and session_of(model) is None:
            install(model, before)
        raise
    session.strict = False
    return model


def _replayed(model: M, plan: Plan | str | os.PathLike[str], example: Any, **options: Any) -> M:
    """The plan applied; with an example it runs once, so that the report tells what of the plan fits this model."""
    before = session_of(model)
    apply(model, plan, **options)
    if example is None:
        return model
    try:
        with _unchanged(model):
            (batch,) = batches_from([example])
            check_batches(model, [batch])
            outputs_of(model, batch, 0)
    except BaseException:
        uninstall(model)
        if before is not None:
            install(model, before)
        raise
    return model


def restore(model: M) -> M:
    """Give the model back as it was before `optimize` or `apply`. Learned parameters go. Returns the same object."""
    if not isinstance(model, nn.Module):
        raise OptionError(f"restore takes the module that optimize returned, not a {type(model).__name__}")
    session = session_of(model)
    if session is not None and not session.in_place:
        raise OptionError("this module was made from an exported program, which is unchanged; use that")
    uninstall(model)
    return model


def plan_of(model: nn.Module) -> Plan | None:
    """The plan of a rewritten model, with its learned parameters as they are now; None if it is not rewritten."""
    session = session_of(model)
    return session.plan() if session is not None else None


def report_of(model: nn.Module) -> Report | None:
    """The report of a rewritten model, with what was captured since; None if it is not rewritten."""
    session = session_of(model)
    return session.current_report() if session is not None else None


def _optimize_exported(program: ExportedProgram, goal: str, allowed: frozenset[str] | None) -> nn.Module:
    selector = Selector(goal=goal, allowed=allowed)
    seen = GraphRewriter(selector, graphs=1)
    work = Rewrite(exported(program), {})
    work.detection = work.step("detect", lambda: detect(work.graph))
    seen.note(work)
    if not (work.detection.matches or work.detection.sampled):
        raise no_attention(seen)
    found = rewritten(work, selector.choose) or work.graph
    adopt(found, new_session(found, seen, goal))
    return found
