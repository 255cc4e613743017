"""Functions of indices that several tests make kernels of."""

from __future__ import annotations

from typing import Any


def near(i: Any, j: Any, window: int) -> Any:
    return (i - j < window) & (j <= i)


def same_segment(b: Any, i: Any, j: Any, segment: Any) -> Any:
    return segment[b, i] == segment[b, j]


def alibi(s: Any, h: Any, i: Any, j: Any, slopes: Any) -> Any:
    return s - slopes[h] * (i - j).abs()
