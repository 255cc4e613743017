"""Time and memory, measured on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rewriter.raising import Operands
from rewriter.region import Region, Sizes
from rewriter.variant import Implementation

Run = Callable[[], object]

_BETWEEN = 32 << 20
"""Bytes that are written between two calls of a site: between two attentions a model reads weights, and what a kernel
has left in the caches is gone. ViT-S at 325 tokens: a kernel that is 6% faster right after itself is not in the model.
"""


def synchronize() -> None:
    """Wait for the device, where there is one that works ahead."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def alternate(
    functions: Sequence[Run], *, repeats: int = 5, budget: float | None = None, before: Run = lambda: None
) -> list[list[float]]:
    """Seconds of each function, run in turn (a b a b ...) so that the machine's drift meets all alike.

    One untimed round comes first, and `before` each call, untimed too. After `budget` seconds the round in progress is
    the last; there is at least one.
    """
    for function in functions:
        function()
    times: list[list[float]] = [[] for _ in functions]
    begin = time.perf_counter()
    for _ in range(repeats):
        for function, taken in zip(functions, times, strict=True):
            before()
            synchronize()
            start = time.perf_counter()
            function()
            synchronize()
            taken.append(time.perf_counter() - start)
        if budget is not None and time.perf_counter() - begin > budget:
            break
    return times


def medians(times: Sequence[Sequence[float]]) -> list[float]:
    """The median of each list, in milliseconds."""
    return [statistics.median(taken) * 1e3 for taken in times]


def peak_memory(function: Run) -> float:
    """Bytes that were in use at once at the worst moment of a call, beyond what was in use before it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_allocated() - before)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = profile.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    used = peak = 0
    for _, change in changes:
        used += change
        peak = max(peak, used)
    return float(peak)


class SiteBench:
    """One region with its original code and inputs, against which implementations are compared."""

    def __init__(self, region: Region, sizes: Sizes) -> None:
        self._region = region
        self._original = region.module(sizes)
        self._values = region.values(sizes)
        self._operands = region.operands(self._values, sizes, keep_mask=False)
        self.site = region.match.site

    def original(self) -> Any:
        """Run the model's own code once."""
        with torch.no_grad():
            return self._original(*(self._values[node] for node in self._region.match.inputs))

    def runner(self, implementation: Implementation) -> Run:
        """A call of an implementation on the same inputs."""
        operands: Operands = self._operands

        def run() -> object:
            with torch.no_grad():
                return implementation(*operands.given)

        return run

    def compare(self, implementations: Sequence[Implementation], *, goal: str, budget: float) -> list[float]:
        """Original first: median milliseconds, or peak bytes where the goal is memory."""
        runs = [self.original, *(self.runner(implementation) for implementation in implementations)]
        if goal == "memory":
            return [peak_memory(run) for run in runs]
        others = torch.zeros(_BETWEEN // 4, device=self.site.device)
        return medians(alternate(runs, repeats=7, budget=budget, before=lambda: others.add_(1.0)))
