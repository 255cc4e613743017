"""One-sided confidence limits, and how much data one would need.

Plain Student's t promises too much of small skewed samples, and drops are skewed: most texts lose nothing, some much.
So the limit for a mean is that of Hall's transformation (J. R. Statist. Soc. B 54, 1992), which corrects t for the
sample's skewness, wherever it is the higher one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import special

FEWEST = 3
"""Samples below which nothing is said: skewness cannot be seen in two, and t alone then misses far too often."""


def upper_limit(values: Sequence[float], confidence: float) -> float:
    """What the mean of the population is below, with this confidence; `values` is a sample of it, of at least FEWEST.

    Coverage is as stated for symmetric values; for exponential ones, 8 of them, 95% are really 92% (Student's t: 86%).
    """
    found = np.asarray(values, dtype=np.float64)
    count, mean, spread = len(found), float(found.mean()), float(found.std(ddof=1))
    if count < FEWEST:
        raise ValueError(f"a limit needs at least {FEWEST} values, not {count}")
    if not math.isfinite(spread) or spread == 0:
        return mean if spread == 0 else math.inf
    step = _t(count - 1, confidence) / math.sqrt(count)
    skewness = float((((found - mean) / spread) ** 3).sum()) * count / ((count - 1) * (count - 2))
    if skewness > 1e-6:
        corrected = 3 / skewness * (1 - np.cbrt(1 - skewness * (step + skewness / (6 * count))))
        step = max(step, float(corrected))
    return mean + step * spread


def share_limits(count: float, total: float, confidence: float) -> tuple[float, float]:
    """(lower, upper), each with this confidence: the share of a population, of which `count` in `total` were found.

    Clopper and Pearson (Biometrika 26, 1934); with none found the upper one is about 3 / total at 95%.
    """
    lower = special.betaincinv(count, total - count + 1, 1 - confidence) if count > 0 else 0.0
    upper = special.betaincinv(count + 1, total - count, confidence) if count < total else 1.0
    return float(lower), float(upper)


def samples_needed(mean: float, spread: float, limit: float, confidence: float) -> int | None:
    """How many samples with this mean and standard deviation would have their upper limit at `limit`, by Student's t;
    None where no number would.
    """
    if not mean < limit or not math.isfinite(spread):
        return None
    count = FEWEST
    while mean + _t(count - 1, confidence) * spread / math.sqrt(count) > limit:
        count = max(count + 1, count * 21 // 20)
    return count


def none_found_needed(share: float, confidence: float) -> int | None:
    """How many must be looked at, none of them found, for the upper limit of `share_limits` to be this share; None
    where no number would.
    """
    if share <= 0:
        return None
    return 1 if share >= confidence else math.ceil(math.log1p(-confidence) / math.log1p(-share))


def _t(degrees: int, confidence: float) -> float:
    return float(special.stdtrit(degrees, confidence))
