"""Does the bound hold on data that neither the search nor the guard has seen? Many guarded searches, and a count.

Each run shuffles the pieces of a model's data by its seed, calibrates `optimize` with some of them, and measures the
model that comes back on the others, by the same metric. What a search measures is in the cache, and so is each run that
is over: a run that was killed goes on where it was, and searches share what they measured of the same sites and plans.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count, islice
from statistics import median
from typing import Any

import torch
from torch import nn

import rewriter
from rewriter.bench.hosts import Host
from rewriter.calibration import batches_from
from rewriter.errors import OptionError
from rewriter.guard import Measurement, drop, evaluate, measure_original
from rewriter.metrics import BUILT_IN, Batch
from rewriter.session import unrouted
from rewriter.sources import version
from rewriter.target import Target
from rewriter.terminal import Advance
from rewriter.tune.record import Ledger
from rewriter.variant import ORIGINAL

MOST_EXCEEDED = 0.05
"""The part of the runs that may exceed their bound: the guard is 95% sure."""
MOST_TIMES = 1.5
"""How many times its bound the drop may be in any run."""


@dataclass(frozen=True)
class Settings:
    """Of all runs. `tokens` None is each model's own; `budget`: seconds for one search."""

    tokens: int | None = None
    calibration: int = 24
    fresh: int = 40
    variants: tuple[str, ...] = ("sdpa", "sliding_window", "s2", "block_sparse")
    budget: float | None = None


@dataclass(frozen=True)
class Run:
    """One guarded search.

    outcome  "original" where the model came back as it was, "exact" where only the same mathematics was placed, else
             "approximate"
    drop     on fresh data, and `guarded` on the held-out data of the guard
    faster   the original's time over the result's, end to end; 1 where the model came back as it was
    calls    of the model to search, without a cache; a backward pass counts as two
    all      calls to try each (head, candidate) pair that the search decides on end to end, on the same data
    """

    model: str
    tokens: int
    bound: float
    seed: int
    outcome: str
    drop: float
    guarded: float
    fresh: int
    faster: float
    calls: int
    all: int
    seconds: float

    @property
    def times(self) -> float:
        """The drop in bounds."""
        return self.drop / self.bound

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"times": self.times}


@dataclass(frozen=True)
class Summary:
    """The runs on one model, or on all. `worst` is the largest drop in bounds; `faster` and `spared` (all calls over
    those that a search needs) are medians.
    """

    model: str
    runs: int
    approximate: int
    original: int
    exceeded: int
    worst: float
    faster: float
    spared: float

    @property
    def holds(self) -> bool:
        """Is what was promised kept?"""
        return self.exceeded <= MOST_EXCEEDED * self.runs and self.worst <= MOST_TIMES

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"holds": self.holds}


@dataclass
class Loaded:
    """A host in memory, with its data as batches; what the original makes of them is kept."""

    host: Host
    settings: Settings
    model: nn.Module = field(init=False)
    batches: list[Batch] = field(init=False)
    _known: dict[int, tuple[Measurement, list[Any]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.batches = batches_from(self.host.pieces(self.tokens))
        needed = self.settings.calibration + 1
        if len(self.batches) < needed:
            raise OptionError(
                f"the data of {self.host.name} are {len(self.batches)} pieces of {self.tokens} tokens, and "
                f"{needed} are needed: ask for fewer tokens, or less calibration"
            )
        self.model = self.host.load()

    @property
    def tokens(self) -> int:
        """In a piece."""
        return self.host.tokens if self.host.fixed else self.settings.tokens or self.host.tokens

    def divided(self, seed: int) -> tuple[list[Batch], list[int]]:
        """What calibrates a run, and the numbers of the batches that are fresh then."""
        order = list(range(len(self.batches)))
        random.Random(seed).shuffle(order)
        most = self.settings.calibration
        return [self.batches[n] for n in order[:most]], order[most : most + self.settings.fresh]

    def drop_on(self, numbers: Sequence[int]) -> float:
        """How much worse the model is, as it runs now, on these batches."""
        metric = BUILT_IN[self.host.metric]
        before, references = zip(*(self._original(n) for n in numbers), strict=True)
        batches = [self.batches[n] for n in numbers]
        kept = [each for some in references for each in some]
        after = evaluate(metric, self.model, batches, kept or None)
        original = Measurement(metric, tuple(sample for found in before for sample in found.samples))
        return drop(metric, original, after)

    def _original(self, number: int) -> tuple[Measurement, list[Any]]:
        if number not in self._known:
            with unrouted(self.model):
                self._known[number] = measure_original(BUILT_IN[self.host.metric], self.model, [self.batches[number]])
        return self._known[number]


class Hosts:
    """Hosts, each loaded when it is first needed."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._loaded: dict[str, Loaded] = {}

    def loaded(self, host: Host) -> Loaded:
        """The host in memory."""
        if host.name not in self._loaded:
            self._loaded[host.name] = Loaded(host, self.settings)
        return self._loaded[host.name]


def planned(hosts: Sequence[Host], runs: int) -> Iterator[tuple[Host, float, int]]:
    """(model, bound, seed) of so many runs: all models at their first bounds, then the next, then the next seed."""
    rounds = max((len(host.bounds) for host in hosts), default=0)
    every = (
        (host, host.bounds[n], seed)
        for seed in (count() if rounds else ())
        for n in range(rounds)
        for host in hosts
        if n < len(host.bounds)
    )
    return islice(every, runs)


def once(kind: str, host: Host, settings: Settings, what: Sequence[Any], fresh: bool, make: Callable[[], Any]) -> Any:
    """What an earlier bench measured on this machine, from the cache, unless `fresh`; else it is measured."""
    read = [package.requirement for package in host.packages]
    ledger = Ledger([version(), Target.current().to_json(), asdict(settings)], fresh)
    return ledger.measured(kind, [host.name, read, host.metric, host.tokens, *what], make)


def measured(
    hosts: Sequence[Host], runs: int, among: Hosts, *, fresh: bool = False, progress: Advance = lambda *_: None
) -> Iterator[Run]:
    """The runs, each of them once."""
    for host, bound, seed in planned(hosts, runs):

        def run(host: Host = host, bound: float = bound, seed: int = seed) -> dict[str, Any]:
            return asdict(searched(among.loaded(host), bound, seed, progress))

        yield Run(**once("guarded run", host, among.settings, [bound, seed], fresh, run))


def searched(loaded: Loaded, bound: float, seed: int, progress: Advance) -> Run:
    """One run. The model is the original again afterwards."""
    calibration, fresh = loaded.divided(seed)
    settings, host, start = loaded.settings, loaded.host, time.perf_counter()
    result = rewriter.optimize(
        loaded.model, calibration, max_drop=bound, metric=host.metric, seed=seed, variants=settings.variants,
        time_budget=settings.budget, progress=progress,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    try:
        report = rewriter.report_of(result)
        assert report is not None and report.plan is not None and report.verdict is not None
        assert report.plan.search is not None
        changed = any(decision.variant != ORIGINAL for decision in report.plan.decisions)
        progress("measure fresh data", 0, None)
        return Run(
            model=host.name,
            tokens=loaded.tokens,
            bound=bound,
            seed=seed,
            outcome=report.plan.fidelity if changed else ORIGINAL,
            drop=loaded.drop_on(fresh),
            guarded=report.verdict.drop,
            fresh=len(fresh),
            faster=report.timings[0].ratio if changed and report.timings else 1.0,
            calls=report.plan.search["needed"] - report.plan.search["guarding"],
            all=report.plan.search["exhaustive_by_heads"],
            seconds=seconds,
        )
    finally:
        rewriter.restore(loaded.model)
        torch.compiler.reset()  # each search compiles graphs of its own, and dynamo counts them


def summaries(runs: Sequence[Run]) -> list[Summary]:
    """One for each model and, where there are several, one for all."""
    models = list(dict.fromkeys(run.model for run in runs))
    found = [_summary(model, [run for run in runs if run.model == model]) for model in models]
    return found if len(models) < 2 else [*found, _summary("all", runs)]


def _summary(model: str, runs: Sequence[Run]) -> Summary:
    return Summary(
        model=model,
        runs=len(runs),
        approximate=sum(run.outcome not in (ORIGINAL, "exact") for run in runs),
        original=sum(run.outcome == ORIGINAL for run in runs),
        exceeded=sum(run.times > 1 for run in runs),
        worst=max(run.times for run in runs),
        faster=median(run.faster for run in runs),
        spared=median(run.all / run.calls for run in runs),
    )
