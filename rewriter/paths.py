"""Many module paths as one: what repeats in a model is printed once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


def grouped(items: Iterable[T], key: Callable[[T], object]) -> list[list[T]]:
    """The items with equal keys together, in the order of their first appearance."""
    groups: dict[object, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def shape_of(path: str) -> tuple[str, ...]:
    """A path without its numbers: equal for the same place in every layer."""
    return tuple("#" if part.isdigit() else part for part in path.split("."))


def joined(paths: Sequence[str]) -> str:
    """Paths of one shape as one: `layers.{0..29}.attention`. Others are listed."""
    distinct = list(dict.fromkeys(paths))
    if len(distinct) == 1 or len({shape_of(path) for path in distinct}) > 1:
        return ", ".join(path or "<root>" for path in distinct)
    columns = [list(dict.fromkeys(column)) for column in zip(*(path.split(".") for path in distinct), strict=True)]
    return ".".join(column[0] if len(column) == 1 else _numbers(sorted(map(int, column))) for column in columns)


def _numbers(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "{" + ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}..{r[-1]}" for r in runs) + "}"
