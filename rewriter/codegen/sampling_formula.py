"""What a kernel of attention to places in maps computes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SamplingFormula:
    """The places in each map: `points` of (4, 4, 4) are four in each of three. See `rewriter.sampling`."""

    points: tuple[int, ...]
