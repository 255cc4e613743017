"""Inputs of very different lengths: what suits a long one need not suit a short one, whose bound is its own too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rewriter.calibration import leading
from rewriter.metrics import Batch
from rewriter.tune.request import Request
from rewriter.tune.tuning import size_of
from rewriter.variant import variants

_APART = 4
"""An input that is so many times shorter than the longest of a class is in the next one. A window that is cheap at some
length is so at half of it too, and what it costs in accuracy is less there.
"""
_FEWEST = 8
"""Batches of a class: a third of them guide its search, and the guard decides on the rest."""

Lengths = Mapping[str, tuple[int, int]]
"""(fewest, most) keys of the calls of each site, by path."""


def by_length(batches: Sequence[Batch], request: Request) -> list[list[Batch]]:
    """The batches by the length of their rows, in classes that are searched by themselves, the longest first.

    One class where the largest site alone counts (memory), or where parameters are to be fitted, which serve all calls.
    """
    learned = any(variants()[name].fidelity == "learned" for name in request.allowed or ())
    if request.goal == "memory" or learned:
        return [list(batches)]
    return [[batches[n] for n in sorted(each)] for each in _classes([size_of(b) / leading(b) for b in batches])]


def _classes(sizes: Sequence[float]) -> list[list[int]]:
    groups: list[list[int]] = []
    for n in sorted(range(len(sizes)), key=lambda n: -sizes[n]):
        if not groups or sizes[n] * _APART <= sizes[groups[-1][0]]:
            groups.append([])
        groups[-1].append(n)
    found = groups[:1]
    for group in groups[1:]:
        if len(found[-1]) < _FEWEST or len(group) < _FEWEST:  # too few are searched with those that are longer
            found[-1] += group
        else:
            found.append(group)
    return found


def told_apart(classes: Iterable[Lengths]) -> bool:
    """Is every call of a site in a shorter class shorter than all of that site in the longer ones?"""
    least: dict[str, int] = {}
    for lengths in classes:
        if any(most >= least.get(path, most + 1) for path, (_, most) in lengths.items()):
            return False
        least |= {path: fewest for path, (fewest, _) in lengths.items()}
    return True
