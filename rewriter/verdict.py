"""The verdict: does a candidate hold its bounds on data that nobody has seen? Asked of a sample, with confidence.

The drop on held-out data is an estimate, and the plan with the luckiest estimate is the one that is offered. So what is
compared with the bound is a one-sided confidence limit, from samples paired between original and candidate.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rewriter.bounds import FEWEST, none_found_needed, samples_needed, share_limits, upper_limit
from rewriter.errors import MetricError, OptionError
from rewriter.guard import Measurement, check_max_drop, drop, drop_between, resolution

CONFIDENCE = 0.95
_WORST = 3.0
"""Times max_drop. Where the mean is within the bound with confidence, it is near 0.6 of it; were drops spread like
exponential ones around that, which is much, the worst of 64 samples would stay below 3.
"""
RECALL_DROP = 0.1
"""A plan that loses the heads which copy from afar loses nearly all of the gain, one that spares them next to none of
it: anything between decides alike, and a tenth is far from both and from the noise of the probe.
"""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much worse a model may become. All are fractions as `check_max_drop` gives them.

    max_drop     of the metric on average
    drop_type    "relative" to the original's value or "absolute"; None takes the metric's own, relative for all but kl
    worst_drop   on the worst single sample; None is three times `max_drop`
    recall_drop  of what a planted pair adds to the log-probability of its recall (`rewriter/probes.py`); from 1 on it
                 is not probed
    """

    max_drop: float
    drop_type: str | None = None
    worst_drop: float | None = None
    recall_drop: float = RECALL_DROP

    @classmethod
    def checked(cls, max_drop: Any, drop_type: Any, worst_drop: Any, recall_drop: Any) -> Limits:
        """From what a user gave. Raises OptionError."""
        if drop_type not in (None, "relative", "absolute"):
            raise OptionError(f'drop_type is "relative" or "absolute", not {drop_type!r:.40}')
        return cls(
            max_drop=check_max_drop(max_drop),
            drop_type=drop_type,
            worst_drop=None if worst_drop is None else check_max_drop(worst_drop, "worst_drop"),
            recall_drop=RECALL_DROP if recall_drop is None else check_max_drop(recall_drop, "recall_drop"),
        )


@dataclass(frozen=True, kw_only=True)
class Check:
    """A further condition with a bound of its own, for what an average hides. `drop` and `upper` (a confidence limit)
    are None where nothing could be measured; `note` says why, or what was.
    """

    name: str
    bound: float
    drop: float | None = None
    upper: float | None = None
    held: bool = True
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values; what is infinite is null."""
        return {**vars(self), "drop": _plain(self.drop), "upper": _plain(self.upper)}

    def __str__(self) -> str:
        if self.drop is None:
            return f"{self.name}: {self.note}"
        most = f", at most {self.upper:.3g}" if self.upper is not None else ""
        note = f"; {self.note}" if self.note else ""
        return f"{self.name} {self.drop:+.3g}{most} (bound {self.bound:.3g}{note}): {_held(self.held)}"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the guard says of a candidate on held-out data.

    drop        as measured, and `upper`: what it is below on all data of that kind, with this `confidence`; both None
                for an exact plan, whose drop is rounding
    samples     independent ones that were measured
    rounding    the allowance of an exact plan, else 0
    checks      what else must hold
    reason      why it does not hold, if it does not
    """

    metric: str
    direction: str
    absolute: bool
    max_drop: float
    original: float
    candidate: float
    drop: float
    upper: float | None
    confidence: float | None
    samples: int
    rounding: float
    held: bool
    checks: tuple[Check, ...] = ()
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values; what is infinite is null."""
        checks = [check.to_json() for check in self.checks]
        return {**vars(self), "drop": _plain(self.drop), "upper": _plain(self.upper), "checks": checks}

    def __str__(self) -> str:
        def unit(x: float) -> str:
            return f"{x:.3g}" if self.absolute or math.isinf(x) else f"{100 * x:.3g}%"

        # The sign of the change, not of the drop: what went down is shown going down.
        sign = 1 if self.direction == "lower" else -1
        signed = f"{sign * self.drop:+.2g}" if self.absolute or math.isinf(self.drop) else f"{sign * self.drop:+.2%}"
        limit = ""
        if self.upper is not None and self.confidence is not None and math.isfinite(self.upper):
            limit = f"a drop of at most {unit(self.upper)} with {100 * self.confidence:.3g}% confidence, "
        rounding = f" or {unit(self.rounding)} by rounding" if self.rounding > self.max_drop else ""
        return (
            f"{self.metric} {self.original:#.4g} -> {self.candidate:#.4g} ({signed}, {limit}"
            f"bound {unit(self.max_drop)}{rounding}): {_held(self.held)}{': ' if self.reason else ''}{self.reason}"
        )

    def checked(self, check: Check | None) -> Verdict:
        """This verdict with one more condition, if there is one."""
        if check is None:
            return self
        reason = self.reason if check.held or self.reason else str(check)
        checks, held = (*self.checks, check), self.held and check.held
        return dataclasses.replace(self, checks=checks, held=held, reason=reason)


def _plain(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _held(held: bool) -> str:
    return "held" if held else "not held"


def judge(
    original: Measurement,
    candidate: Measurement,
    max_drop: float,
    *,
    exact: torch.dtype | None = None,
    worst_drop: float | None = None,
    tried: int = 0,
) -> Verdict:
    """The verdict on a candidate measured on the same batches as the original.

    `exact` is the model's type when only exact variants were placed: the metric may then move by `resolution`, and the
    measured drop itself is judged. For others it is the upper confidence limit, which the number of plans that were
    `tried` on the same data before makes higher: all of them together mislead in at most 5% of cases, since each has
    four fifths of what was left. `worst_drop` as in `Limits`.
    """
    metric = original.metric
    if len(original.samples) != len(candidate.samples) or candidate.metric.name != metric.name:
        raise MetricError("original and candidate were not measured by one metric on the same batches; measure again")
    worse, rounding = drop(metric, original, candidate), 0.0
    confidence = upper = None
    reason, checks = "", []
    if exact is not None:
        rounding = resolution(exact)
        held = worse <= max(max_drop, rounding)
    else:
        confidence = 1 - (1 - CONFIDENCE) * 0.8 * 0.2**tried
        original, candidate = _scored(original, candidate)
        upper, reason = _limit(original, candidate, worse, max_drop, confidence)
        held = upper <= max_drop
        reason = reason if not held and worse <= max_drop else ""
        checks = [_worst(original, candidate, _WORST * max_drop if worst_drop is None else worst_drop)]
    found = Verdict(
        metric=metric.name,
        direction="higher" if metric.higher_is_better else "lower",
        absolute=metric.absolute,
        max_drop=max_drop,
        original=original.value,
        candidate=candidate.value,
        drop=worse,
        upper=upper,
        confidence=confidence,
        samples=len(original.samples),
        rounding=rounding,
        held=held,
        reason=reason,
    )
    for check in checks:
        found = found.checked(check)
    return found


def _scored(original: Measurement, candidate: Measurement) -> tuple[Measurement, Measurement]:
    """Both without the samples that hold nothing to score."""
    pairs = [p for p in zip(original.samples, candidate.samples, strict=True) if p[0][1] + p[1][1] > 0]
    before, after = zip(*pairs, strict=True)
    return Measurement(original.metric, before), Measurement(original.metric, after)


def _limit(
    original: Measurement, candidate: Measurement, worse: float, max_drop: float, confidence: float
) -> tuple[float, str]:
    """The upper confidence limit of the drop, and what to say where only that is beyond the bound."""
    metric, count = original.metric, len(original.samples)
    more = "; give more batches"
    if count < FEWEST:
        few = f"{count} held-out sample{'s' if count != 1 else ''}"
        return math.inf, f"too little data: {few}, and of fewer than {FEWEST} nothing can be said{more}"
    found = pseudovalues(original, candidate)
    if not all(abs(value) < 1e100 for value in found):
        return math.inf, ""
    # The mean of the pseudo-values is the drop without its bias, which is of the next order.
    upper = worse + upper_limit(found, confidence) - float(np.mean(found))
    spread = float(np.std(found, ddof=1))
    needed = samples_needed(worse, spread, max_drop, confidence)
    if metric.counts or spread <= 1e-12 * max(1.0, abs(worse)):
        # No spread is no certainty: where not one of N answers moved, a share of 3 / N may. Where answers are not
        # right or wrong, one that moves is taken to lose all that it was worth.
        answers = sum(weight for _, weight in original.samples)
        lost = min(max(original.mean - candidate.mean, 0.0) * answers, answers) if metric.counts else 0.0
        worth = 1.0 if metric.counts or original.value == 0 else abs(original.value)
        worth /= 1.0 if metric.absolute or original.value == 0 else abs(original.value)
        before = 0.0 if metric.counts else worse
        share = before + worth * share_limits(lost, answers, confidence)[1]
        if share > upper:
            upper = share
            answers_needed = none_found_needed((max_drop - max(worse, 0.0)) / worth, confidence)
            needed = math.ceil(answers_needed * count / answers) if answers_needed is not None else None
    about = f", about {needed:,} would decide" if needed is not None and needed > count else ""
    return upper, f"too little data to be sure: {count} held-out samples{about}{more}"


def pseudovalues(original: Measurement, candidate: Measurement) -> list[float]:
    """One value a sample, whose mean is the drop and whose spread tells the drop's: the jackknife, that serves ratios
    and logarithms of means alike (Miller, Biometrika 61, 1974). Not finite where the drop is not.
    """
    metric, count = original.metric, len(original.samples)
    worse = drop(metric, original, candidate)
    if not math.isfinite(worse):
        return [worse] * count
    sums = [[math.fsum(pair[k] for pair in m.samples) for k in (0, 1)] for m in (original, candidate)]
    found = []
    for pairs in zip(original.samples, candidate.samples, strict=True):
        before, after = (
            metric.finish((s - x) / (w - v)) if w > v else math.nan for (s, w), (x, v) in zip(sums, pairs, strict=True)
        )
        found.append(count * worse - (count - 1) * drop_between(metric, before, after))
    return found


def _worst(original: Measurement, candidate: Measurement, bound: float) -> Check:
    """The drop there would be if all data moved as the worst sample did. Of answers that are right or wrong a sample
    may hold so few that one of them is all: there the part of the drop counts that is not chance.
    """
    metric, count = original.metric, len(original.samples)
    chance = (1 - CONFIDENCE) / count
    worst = -math.inf
    for (s, w), (x, v) in zip(original.samples, candidate.samples, strict=True):
        if w <= 0 or v <= 0:
            continue
        moved = x / v - s / w
        if metric.counts and moved < 0:
            moved = -share_limits(min(-moved * w, w), w, 1 - chance)[0]
        worst = max(worst, drop_between(metric, original.value, metric.finish(original.mean + moved)))
    return Check(name="worst sample", bound=bound, drop=worst, held=worst <= bound)
