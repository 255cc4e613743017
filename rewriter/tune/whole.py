"""A whole model, end to end: original and result in alternation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from rewriter.backend import GraphRewriter
from rewriter.capture import compiled
from rewriter.guard import evaluating
from rewriter.metrics import Batch
from rewriter.report import Timing
from rewriter.select import Selector
from rewriter.session import rerouted
from rewriter.tune.measure import alternate, medians, peak_memory
from rewriter.tune.request import Request

SECONDS = 20.0
"""For all that is compared, where there is no less time left."""


def runs_of(model: nn.Module, batch: Batch) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """(original, result) as functions of nothing."""

    def original() -> Any:
        return model._call_impl(*batch.args, **batch.kwargs)

    def result() -> Any:
        return model(*batch.args, **batch.kwargs)

    return original, result


def timing_of(model: nn.Module, batch: Batch, request: Request) -> Timing:
    """Original and result end to end, in alternation."""
    with evaluating(model):
        return timed(batch, request, costs_of(runs_of(model, batch), request))


def timed(batch: Batch, request: Request, costs: Sequence[float]) -> Timing:
    return Timing(_described(batch), costs[0], costs[1], "bytes" if request.goal == "memory" else "ms")


def costs_of(runs: Sequence[Callable[[], Any]], request: Request) -> list[float]:
    if request.goal == "memory":
        for run in runs:
            run()
        return [peak_memory(run) for run in runs]
    budget = min(SECONDS, max(request.deadline.left, 0.0))
    return medians(alternate(runs, repeats=5, budget=budget))


def _described(batch: Batch) -> str:
    """The shapes of a batch."""
    values = [*(("", v) for v in batch.args), *batch.kwargs.items()]
    shapes = [f"{n} {'x'.join(map(str, v.shape))}".strip() for n, v in values if isinstance(v, torch.Tensor)]
    return ", ".join(shapes) or "one batch"


def compared(model: nn.Module, batch: Batch, request: Request, rivals: Sequence[Selector]) -> list[float]:
    """The costs of the original, the result, and what the result has to be better than: it is worth its change of the
    model's answers only if it is.
    """
    request.progress("measure end to end", 0, None)
    original, result = runs_of(model, batch)

    def rival(selector: Selector) -> Callable[[], Any]:
        other = compiled(model, GraphRewriter(selector, inner=request.inner), dynamic=request.dynamic)

        def run() -> Any:
            with rerouted(model, other):
                return result()

        return run

    with evaluating(model):
        return costs_of([original, result, *map(rival, rivals)], request)
