"""One part of the demonstration: a model before and after, with everything that was measured in this run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from rich.console import Console
from rich.markup import escape
from torch import nn

import rewriter
from rewriter.errors import OptionError
from rewriter.guard import evaluating
from rewriter.report import Report, Timing
from rewriter.report.tables import outcome, plan_table, site_table, timing_table
from rewriter.terminal import Advance
from rewriter.tune.measure import alternate, medians

Working = Callable[[], AbstractContextManager[Advance]]


@dataclass(frozen=True)
class Accuracy:
    """A quality on data that neither the search nor the guard has seen."""

    what: str
    original: float
    result: float

    def __str__(self) -> str:
        change = f" ({self.result / self.original - 1:+.2%})" if self.original else ""
        return f"{self.what}: {self.original:.4g} -> {self.result:.4g}{change}"


@dataclass(frozen=True)
class Part:
    """What was done with one model, and what came of it.

    seconds is how long `optimize` took.
    """

    title: str
    report: Report
    seconds: float
    timings: Sequence[Timing] = ()
    accuracy: Sequence[Accuracy] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values; `timings` and `accuracy` are the demonstration's own measurements."""
        return {
            "title": self.title,
            "optimize_seconds": self.seconds,
            "outcome": outcome(self.report),
            "timings": [timing.to_json() for timing in self.timings],
            "accuracy": [dataclasses.asdict(each) for each in self.accuracy],
            "report": self.report.to_json(),
            **self.extra,
        }

    def show(self, console: Console) -> None:
        """The same for a person."""
        console.print(f"\n[bold]{escape(self.title)}[/]", highlight=False)
        console.print(site_table(self.report.sites))
        if self.report.plan is not None:
            console.print(f"\nplan, made in {self.seconds:.1f} s", highlight=False)
            console.print(plan_table(self.report.plan))
        console.print("\nmeasured now, in alternation", highlight=False)
        console.print(timing_table(self.timings))
        for each in self.accuracy:
            console.print(escape(str(each)), highlight=False)
        verdict = self.report.verdict
        console.print(f"guard: {verdict or 'no calibration data, so only exact variants'}", highlight=False)
        for note in self.report.notes:
            console.print(f"note: {escape(note)}", highlight=False)


REPEATS = 9


def compared(
    original: nn.Module, result: nn.Module, calls: Mapping[str, Mapping[str, Any]], budget: float
) -> list[Timing]:
    """Both models on each of the named calls, in alternation for at most `budget` seconds a call; medians."""
    found = []
    with evaluating(original), evaluating(result):
        for what, kwargs in calls.items():
            times = alternate([partial(original, **kwargs), partial(result, **kwargs)], repeats=REPEATS, budget=budget)
            before, after = medians(times)
            found.append(Timing(what, before, after))
    return found


def report_on(model: nn.Module) -> Report:
    """The report that `optimize` left on the model."""
    report = rewriter.report_of(model)
    if report is None:
        raise OptionError("the model carries no report: call rewriter.optimize on it first")
    return report
