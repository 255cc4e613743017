"""What a search did: stages with their times, trials, the front. And what it measured, kept for the next one."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from rewriter.cache import recall, remember
from rewriter.metrics import Batch

Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class Stage:
    """A part of a search; seconds since its beginning, and how long it took."""

    stage: str
    begin: float
    seconds: float
    detail: str = ""


@dataclass(frozen=True)
class Point:
    """A plan on the front: the cost of all sites together, and the drop of the metric, predicted and measured."""

    cost: float
    predicted: float | None
    measured: float | None = None
    chosen: bool = False


@dataclass(frozen=True)
class Trial:
    """A plan that was assembled and measured on the search part."""

    cost: float
    predicted: float
    measured: float | None
    within: bool


@dataclass
class Record:
    """How a plan was found.

    evaluations  calls of the model that were spent on measuring accuracy; a backward pass counts as two
    needed       the same with those that an earlier run has made, which the cache remembers
    guarding     those of them that are of held-out data: the guard, and not the search
    exhaustive   calls that it would take to try each pair that changes the result end to end, on the data of the search
    exhaustive_by_heads  the same for each head by itself, which is what the search decides
    pairs        (site, candidate) pairs that were measured
    effects      how the effect of a candidate was predicted: "gradients", or "local errors"
    """

    metric: str = ""
    bound: float = 0.0
    unit: str = "ms"
    evaluations: int = 0
    needed: int = 0
    guarding: int = 0
    exhaustive: int = 0
    exhaustive_by_heads: int = 0
    pairs: int = 0
    effects: str = ""
    timeline: list[Stage] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    front: list[Point] = field(default_factory=list)
    begin: float = field(default_factory=time.perf_counter)

    def to_json(self) -> dict[str, Any]:
        """Plain values, as of now."""
        self.end_stage()
        facts = {k: v for k, v in vars(self).items() if k not in ("timeline", "trials", "front", "begin")}
        lists = {k: [asdict(each) for each in getattr(self, k)] for k in ("timeline", "trials", "front")}
        return {**facts, **lists, "seconds": time.perf_counter() - self.begin}

    def watched(self, progress: Progress) -> Progress:
        """Tells of progress, and writes the timeline."""

        def say(stage: str, done: int, total: int | None) -> None:
            now = time.perf_counter() - self.begin
            self.end_stage(now)
            if not self.timeline or self.timeline[-1].stage != stage:
                self.timeline.append(Stage(stage, now, 0.0))
            progress(stage, done, total)

        return say

    def end_stage(self, now: float | None = None) -> None:
        """The last stage has lasted until now."""
        if self.timeline:
            last = self.timeline[-1]
            until = time.perf_counter() - self.begin if now is None else now
            self.timeline[-1] = Stage(last.stage, last.begin, until - last.begin, last.detail)


@dataclass(frozen=True)
class Ledger:
    """Measurements by what was measured: those of an earlier run, finished or killed, are not made again.

    `about` says what all of them depend on. With `fresh` nothing is believed that was measured before this run; where
    `kept` is False nothing is left for the next one. What it knows is found by kind and place, as in the cache.
    """

    about: Sequence[Any]
    fresh: bool = False
    kept: bool = True
    known: dict[tuple[str, str], Any] = field(default_factory=dict)

    def knows(self, kind: str, what: Any) -> bool:
        """Was it asked for before in this run?"""
        return self._place(kind, what) in self.known

    def _place(self, kind: str, what: Any) -> tuple[str, str]:
        return kind, digest([kind, *self.about, what])

    def measured(self, kind: str, what: Any, make: Callable[[], Any], *, keep: bool = True) -> Any:
        """The remembered value, plain as JSON is, or a new one, which is left for the next run only if `keep`."""
        place = self._place(kind, what)
        if place not in self.known:
            found = None if self.fresh or not self.kept else recall(*place)
            if found is None:
                found = make()
                if self.kept and keep:
                    remember(*place, found)
            self.known[place] = found
        return self.known[place]


def digest(value: Any) -> str:
    """A short name for plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def digest_of(batch: Batch) -> str:
    """A short name for what a batch holds."""
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            found.update(f"{value.dtype}{tuple(value.shape)}".encode())
            found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, Mapping):
            for name in sorted(value, key=str):
                found.update(str(name).encode())
                add(value[name])
        elif isinstance(value, (tuple, list)):
            for each in value:
                add(each)
        else:
            found.update(repr(value).encode())

    add((batch.args, dict(batch.kwargs), batch.rows))
    return found.hexdigest()[:32]
