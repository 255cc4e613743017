"""The verdict: drops, limits against the bound, too little data, and checks of their own."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from rewriter import guard, metrics
from rewriter.errors import MetricError, OptionError
from rewriter.guard import Measurement
from rewriter.metrics import BUILT_IN, Metric
from rewriter.verdict import Check, Limits, Verdict, judge, pseudovalues


def measured(
    value: float, name: str = "user", *, higher: bool = False, absolute: bool = False, spread: float = 0.0
) -> Measurement:
    """Eight samples around a value."""
    metric = Metric(name=name, higher_is_better=higher, absolute=absolute, fn=lambda model, batch: 0.0)
    return Measurement(metric, tuple((value + spread * (-1) ** i, 1.0) for i in range(8)))


def pair(name: str, before: Any, after: Any, weight: float = 100.0) -> tuple[Measurement, Measurement]:
    """Of a built-in metric, from the means of its samples."""
    metric = BUILT_IN[name]
    return tuple(Measurement(metric, tuple((m * weight, weight) for m in means)) for means in (before, after))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("original", "candidate", "higher", "absolute", "expected"),
    [
        (20.0, 21.0, False, False, 0.05),
        (20.0, 19.0, False, False, -0.05),
        (0.8, 0.6, True, False, 0.25),
        (-2.0, -2.5, True, False, 0.25),
        (-2.0, -1.0, False, False, 0.5),
        (0.0, 0.003, False, True, 0.003),
        (0.0, 0.0, False, False, 0.0),
        (0.0, 1.0, True, False, 0.0),
        (0.0, 1.0, False, False, math.inf),
    ],
)
def test_drop(original: float, candidate: float, higher: bool, absolute: bool, expected: float) -> None:
    a, b = (measured(v, higher=higher, absolute=absolute) for v in (original, candidate))
    assert guard.drop(a.metric, a, b) == pytest.approx(expected)


def test_the_verdict_is_a_sentence() -> None:
    held = judge(measured(25.62, "perplexity"), measured(25.70, "perplexity", spread=0.05), 0.01)
    assert str(held) == (
        "perplexity 25.62 -> 25.70 (+0.31%, a drop of at most 0.463% with 96% confidence, bound 1%): held"
    )
    fell = judge(measured(1.0, "cosine", higher=True), measured(0.98, "cosine", higher=True, spread=0.001), 0.01)
    assert str(fell) == (
        "cosine 1.000 -> 0.9800 (-2.00%, a drop of at most 2.08% with 96% confidence, bound 1%): not held"
    )
    apart = judge(measured(0.0, "kl", absolute=True), measured(0.0031, "kl", absolute=True, spread=0.001), 0.01)
    assert "(+0.0031, a drop of at most 0.00387 with 96% confidence, bound 0.01): held" in str(apart)
    assert held.samples == 8 and held.held and not fell.held
    assert json.loads(json.dumps(held.to_json(), allow_nan=False))["drop"] == pytest.approx(0.08 / 25.62)
    lost = judge(measured(0.0), measured(1.0), 1.0)
    assert not lost.held and lost.to_json()["drop"] is None and lost.to_json()["upper"] is None and "+inf" in str(lost)


def test_rounding_is_allowed_to_exact_plans_only() -> None:
    before, after = measured(20.0), measured(20.00004)
    assert not judge(before, after, 0.0).held
    exact = judge(before, after, 0.0, exact=torch.float32)
    assert exact.held and "or 0.00025% by rounding" in str(exact)
    assert exact.upper is None and exact.confidence is None and exact.checks == ()
    assert not judge(before, measured(21.0), 0.0, exact=torch.bfloat16).held
    assert "rounding" not in str(judge(before, after, 0.01, exact=torch.float32))


def test_measurements_must_be_of_one_kind() -> None:
    with pytest.raises(MetricError, match="measure again"):
        judge(measured(1.0, "a"), measured(1.0, "b"), 0.1)


# --- confidence ------------------------------------------------------------------------------------------------------


def test_the_limit_decides_and_not_the_estimate() -> None:
    """The same drop of 0.5% with little and with much spread between samples."""
    calm = judge(measured(20.0), measured(20.1, spread=0.02), 0.01)
    wild = judge(measured(20.0), measured(20.1, spread=0.3), 0.01)
    assert calm.drop == pytest.approx(wild.drop) and calm.held and not wild.held
    assert calm.upper is not None and wild.upper is not None and calm.drop < calm.upper <= 0.01 < wild.upper
    assert "too little data to be sure: 8 held-out samples, about 34 would decide; give more batches" in str(wild)
    # With as many as it says, it does.
    metric = measured(0.0).metric
    more = [Measurement(metric, tuple((20.0 + 0.1 * k + 0.3 * k * (-1) ** i, 1.0) for i in range(34))) for k in (0, 1)]
    assert judge(*more, 0.01).held
    assert not judge(*more, 0.01, tried=1).held  # a second look at the same data costs confidence


def test_it_is_paired() -> None:
    """Texts differ far more from each other than original and candidate do."""
    rng = np.random.default_rng(0)
    before = rng.normal(3.0, 0.5, 16)
    verdict = judge(*pair("perplexity", before, before + rng.normal(0.002, 0.001, 16)), 0.01)
    assert verdict.held and verdict.upper is not None and verdict.upper < 0.004


@pytest.mark.parametrize("samples", [1, 2])
def test_of_too_few_samples_nothing_is_said(samples: int) -> None:
    verdict = judge(*pair("perplexity", [3.0] * samples, [3.0 + 1e-6] * samples), 0.5)
    assert not verdict.held and f"{samples} held-out sample" in verdict.reason and "fewer than 3" in verdict.reason
    assert verdict.to_json()["upper"] is None and "inf" not in str(verdict)
    # Rows without anything to score are no samples.
    empty = [Measurement(m.metric, (*m.samples, (0.0, 0.0), (0.0, 0.0))) for m in pair("kl", [0.0], [1e-6])]
    assert judge(*empty, 0.5).samples == 1 and not judge(*empty, 0.5).held


def test_the_pseudovalues_are_a_jackknife() -> None:
    """Of a mean they are the values themselves; of a ratio their spread is what the linearised ratio has."""
    rng = np.random.default_rng(0)
    drops = rng.exponential(0.01, 12)
    before, after = pair("kl", np.zeros(12), drops)
    assert pseudovalues(before, after) == pytest.approx(list(drops))
    values, weights = rng.normal(3, 0.3, 200), rng.integers(50, 150, 200)
    shifts = rng.normal(0.004, 0.002, 200)
    metric = BUILT_IN["perplexity"]
    before, after = (
        Measurement(metric, tuple(zip(weights * means, map(float, weights), strict=True)))
        for means in (values, values + shifts)
    )
    mean = np.average(shifts, weights=weights)
    linear = np.exp(mean) - 1 + np.exp(mean) * weights / weights.mean() * (shifts - mean)
    assert np.std(pseudovalues(before, after)) == pytest.approx(np.std(linear), rel=0.02)
    assert np.mean(pseudovalues(before, after)) == pytest.approx(guard.drop(metric, before, after), rel=0.01)


@pytest.mark.parametrize("name", ["perplexity", "kl", "cosine"])
def test_coverage_of_the_whole_decision(name: str) -> None:
    """Plans whose true drop is just beyond the bound are accepted in few of many runs, though most texts lose nothing
    and some much; plans with a fifth of it pass in most.
    """
    rng = np.random.default_rng(0)
    bound, accepted = 0.01, {1.05: 0, 0.2: 0}
    for factor in accepted:
        for _ in range(400):
            lost = rng.exponential(factor * bound, 16)
            before = rng.normal(3, 0.5, 16) if name == "perplexity" else np.full(16, float(name == "cosine"))
            after = before - lost if name == "cosine" else before + lost
            accepted[factor] += judge(*pair(name, before, after), bound).held
    assert accepted[1.05] <= 0.07 * 400 and accepted[0.2] >= 0.9 * 400


def test_no_spread_is_no_certainty() -> None:
    same = judge(*pair("top1", [1.0] * 8, [1.0] * 8, weight=1.0), 0.01)
    assert not same.held and same.drop == 0 and same.upper == pytest.approx(1 - 0.04 ** (1 / 8))
    assert "about 321 would decide" in same.reason
    assert judge(*pair("top1", [1.0] * 8, [1.0] * 8, weight=100.0), 0.01).held
    lost = judge(*pair("top1", [1.0] * 8, [0.99] * 8, weight=100.0), 0.02)
    assert lost.upper is not None and 0.01 < lost.upper < 0.02
    assert judge(*pair("perplexity", [3.0] * 8, [3.0] * 8, weight=512.0), 0.01).held
    assert not judge(*pair("cosine", [1.0] * 8, [1.0] * 8, weight=1.0), 0.01).held
    own = judge(measured(0.7, higher=True), measured(0.7, higher=True), 0.01)
    assert not own.held and "about 321 would decide" in own.reason
    assert judge(measured(0.7), measured(0.7), 0.4).held
    # Accuracy that is low already: a lost answer is a larger part of it.
    low = judge(*pair("top1", [0.25] * 8, [0.25] * 8, weight=100.0), 0.01)
    assert low.upper is not None and low.upper == pytest.approx(4 * (1 - 0.04 ** (1 / 800)))


def test_absolute_and_relative_drops() -> None:
    relative = BUILT_IN["perplexity"]
    assert metrics.with_drop_type(relative, None) is relative is metrics.with_drop_type(relative, "relative")
    absolute = metrics.with_drop_type(relative, "absolute")
    assert absolute.absolute and not metrics.with_drop_type(BUILT_IN["kl"], "relative").absolute
    means = [3.0, 3.1, 2.9, 3.05], [3.001, 3.1015, 2.9005, 3.051]
    before, after = (Measurement(absolute, tuple((100 * m, 100.0) for m in each)) for each in means)
    found = judge(before, after, 0.05)
    assert found.drop == pytest.approx(after.value - before.value) and found.absolute and found.held
    assert found.upper is not None and found.drop < found.upper < 0.05


# --- checks of their own ---------------------------------------------------------------------------------------------


def test_the_worst_sample_has_a_bound_of_its_own() -> None:
    before = [3.0] * 40
    after = [3.0005 + 1e-5 * i for i in range(39)] + [3.05]
    verdict = judge(*pair("perplexity", before, after), 0.01)
    assert verdict.upper is not None and verdict.upper <= 0.01 and not verdict.held
    (check,) = verdict.checks
    assert check.drop == pytest.approx(math.expm1(0.05)) and check.bound == pytest.approx(0.03) and not check.held
    assert verdict.reason == "worst sample +0.0513 (bound 0.03): not held" and str(verdict).endswith(verdict.reason)
    assert judge(*pair("perplexity", before, after), 0.01, worst_drop=0.06).held
    json.dumps(verdict.to_json(), allow_nan=False)


def test_one_answer_of_few_is_chance_and_many_are_not() -> None:
    right = [1.0] * 1000
    assert judge(*pair("top1", right, [0.0, *right[1:]], weight=1.0), 0.01).held
    found = judge(*pair("top1", right, [0.5, *right[1:]], weight=100.0), 0.01)
    assert found.upper is not None and found.upper <= 0.01 and not found.held and "worst sample" in found.reason


def test_a_verdict_takes_more_checks() -> None:
    verdict = judge(measured(20.0), measured(20.1, spread=0.02), 0.01)
    abstains = Check(name="recall", bound=0.1, note="the original cannot do it")
    assert verdict.checked(abstains).held and str(abstains) == "recall: the original cannot do it"
    lost = Check(name="recall", bound=0.1, drop=0.5, upper=0.7, held=False)
    worse = verdict.checked(lost)
    assert not worse.held and worse.reason == "recall +0.5, at most 0.7 (bound 0.1): not held"
    assert isinstance(worse, Verdict) and len(worse.checks) == 2


def test_limits_are_read() -> None:
    found = Limits.checked("2%", "absolute", None, "5%")
    assert (found.max_drop, found.drop_type, found.worst_drop, found.recall_drop) == (0.02, "absolute", None, 0.05)
    assert Limits.checked(0.01, None, 0.1, None).recall_drop == 0.1
    with pytest.raises(OptionError, match='drop_type is "relative" or "absolute"'):
        Limits.checked(0.01, "percent", None, None)
    with pytest.raises(OptionError, match=r"worst_drop must not be negative, but is -1$"):
        Limits.checked(0.01, None, -1, None)
    with pytest.raises(OptionError, match="recall_drop must be a number"):
        Limits.checked(0.01, None, None, "some")
