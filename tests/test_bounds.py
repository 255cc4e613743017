"""Confidence limits: their coverage by simulation, and known values."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from rewriter.bounds import FEWEST, none_found_needed, samples_needed, share_limits, upper_limit

Draw = Callable[[np.random.Generator, int], np.ndarray]
RUNS = 3000


def coverage(draw: Draw, mean: float, count: int, confidence: float = 0.95, slack: float = 1.0) -> float:
    """How often the mean is below the limit times `slack`."""
    rng = np.random.default_rng(0)
    return float(np.mean([slack * upper_limit(draw(rng, count), confidence) >= mean for _ in range(RUNS)]))


@pytest.mark.parametrize("count", [FEWEST, 8, 40])
def test_coverage_of_symmetric_values(count: int) -> None:
    assert coverage(lambda rng, n: rng.normal(1, 1, n), 1, count) == pytest.approx(0.955, abs=0.02)
    assert coverage(lambda rng, n: rng.normal(1, 1, n), 1, count, 0.99) == pytest.approx(0.99, abs=0.01)


@pytest.mark.parametrize(
    ("draw", "mean", "least"),
    [
        (lambda rng, n: rng.exponential(1, n), 1.0, (0.87, 0.90, 0.92)),
        (lambda rng, n: rng.gamma(0.5, 2, n), 1.0, (0.82, 0.89, 0.92)),
        (lambda rng, n: rng.lognormal(0, 1, n), math.exp(0.5), (0.82, 0.85, 0.90)),
        (lambda rng, n: -rng.exponential(1, n), -1.0, (0.95, 0.95, 0.95)),
    ],
)
def test_coverage_of_skewed_values(draw: Draw, mean: float, least: tuple[float, ...]) -> None:
    """Below what is stated where values are skewed to the right, and far better than Student's t. The mean exceeds the
    limit by more than half in few cases.
    """
    for count, lowest in zip((FEWEST, 8, 40), least, strict=True):
        assert coverage(draw, mean, count) >= lowest
    if mean > 0:
        assert coverage(draw, mean, 8, slack=1.5) >= 0.96


def test_it_is_never_below_students_t() -> None:
    rng = np.random.default_rng(1)
    for count in (3, 5, 30):
        for values in (rng.normal(size=count), rng.exponential(size=count), -rng.exponential(size=count)):
            plain = values.mean() + stats.t.ppf(0.95, count - 1) * stats.sem(values)
            assert upper_limit(values, 0.95) >= plain - 1e-12
    symmetric = [1.0, 2.0, 3.0, 4.0]
    assert upper_limit(symmetric, 0.95) == pytest.approx(2.5 + stats.t.ppf(0.95, 3) * stats.sem(symmetric))


def test_degenerate_samples() -> None:
    assert upper_limit([0.5] * 4, 0.95) == 0.5
    with pytest.raises(ValueError, match="at least 3"):
        upper_limit([1.0, 2.0], 0.95)


def test_shares() -> None:
    for count, total in ((0, 100), (3, 100), (100, 100), (0, 1), (2.5, 10)):
        lower, upper = share_limits(count, total, 0.95)
        assert 0 <= lower <= count / total <= upper <= 1
    assert share_limits(0, 1000, 0.95)[1] == pytest.approx(3 / 1000, rel=0.01)
    assert share_limits(3, 20, 0.95)[1] == pytest.approx(stats.beta.ppf(0.95, 4, 17))
    assert share_limits(3, 20, 0.95)[0] == pytest.approx(stats.beta.ppf(0.05, 3, 18))
    rng = np.random.default_rng(0)
    found = [share_limits(rng.binomial(50, 0.03), 50, 0.95)[1] >= 0.03 for _ in range(RUNS)]
    assert np.mean(found) >= 0.95


def test_how_much_data_one_would_need() -> None:
    needed = samples_needed(0.5, 1.0, 1.0, 0.95)
    assert needed == 13
    assert 0.5 + stats.t.ppf(0.95, 12) / math.sqrt(13) <= 1 < 0.5 + stats.t.ppf(0.95, 11) / math.sqrt(12)
    assert samples_needed(1.0, 1.0, 1.0, 0.95) is None and samples_needed(0.0, 0.0, 1.0, 0.95) == FEWEST
    assert 1e6 < (samples_needed(0.0, 1.0, 1e-3, 0.95) or 0) < 1e7
    assert none_found_needed(0.01, 0.95) == 299 and none_found_needed(0.0, 0.95) is None
    assert share_limits(0, 299, 0.95)[1] <= 0.01 < share_limits(0, 298, 0.95)[1]
