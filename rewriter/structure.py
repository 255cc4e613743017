"""The mask that a bool tensor is, from its values alone."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from rewriter.site import Causal, Chunked, Full, Mask, PrefixCausal, SlidingWindow, Window2d, Window3d


def classify(visible: Tensor) -> Mask | None:
    """The positional mask with these values, bool[Sq, Skv]; None if it is of no kind that is known."""
    if bool(visible.all()):
        return Full()
    if visible.dim() != 2 or not bool(visible.any()):
        return None
    return _band(visible) or _others(visible)


def _band(visible: Tensor) -> Mask | None:
    """A band of ages."""
    q_len, kv_len = visible.shape
    count = visible.sum(-1)
    shown = count > 0
    # Row by row, because a table of ages would take eight times the memory of the mask.
    first, last = _first(visible), kv_len - 1 - _first(visible.flip(-1))
    place = torch.arange(q_len, device=visible.device) + (kv_len - q_len)
    high, low = int((place - first)[shown].max()), int((place - last)[shown].min())
    begin, end = (place - high).clamp(min=0), (place - low).clamp(max=kv_len - 1)
    is_band = torch.where(begin <= end, (first == begin) & (last == end) & (count == end - begin + 1), ~shown)
    if not bool(is_band.all()):
        return None
    youngest, oldest = int(kv_len - q_len) - (kv_len - 1), kv_len - 1
    right = -low if low > youngest else 0 if q_len == 1 else None
    left = high if high < oldest else None
    if left is None:
        return Full() if right is None else Causal(right)
    return SlidingWindow(left, right)


def _first(visible: Tensor) -> Tensor:
    return visible.to(torch.uint8).argmax(-1)


def _others(visible: Tensor) -> Mask | None:
    q_len, kv_len = visible.shape
    for mask in _candidates(visible):
        if torch.equal(mask.visible(q_len, kv_len, visible.device), visible):
            return mask
    return None


def _candidates(visible: Tensor) -> Iterator[Mask]:
    """The only masks of these kinds that it can be."""
    shown = visible.any(-1)
    starts = sorted(set(_first(visible)[shown].tolist()) - {0})
    if starts:  # Blocks begin at multiples of their size.
        size = math.gcd(*starts)
        yield Causal() & Chunked(size)
        yield Chunked(size)
    yield PrefixCausal(int(visible[0].sum()))


def windows(visible: Tensor) -> Mask | None:
    """The mask of rolled windows with these values, bool[windows, N, N], or None. Of several the most even one."""
    number, tokens = visible.shape[0], visible.shape[-1]
    if number < 2 or visible.shape[-2] != tokens or bool(visible.all()):
        return None
    last, device = visible[-1], visible.device
    for axes in (2, 3):
        for window in _factorised(tokens, axes):
            shift = _shift(last[0], window)
            # The last window stands at the seams of all axes.
            if not any(shift) or not torch.equal(_rolled(window, (1,) * axes, shift, device)[0], last):
                continue
            for grid in _factorised(number, axes):
                if torch.equal(_rolled(window, grid, shift, device), visible):
                    return Window2d(*window, *shift) if axes == 2 else Window3d(*window, *shift)
    return None


def _factorised(number: int, count: int) -> list[tuple[int, ...]]:
    """All ways to write a number as an ordered product, the most even first."""
    if count == 1:
        return [(number,)]
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    ways = [(d, *rest) for d in divisors for rest in _factorised(number // d, count - 1)]
    return sorted(ways, key=lambda way: (max(way), way))


def _shift(first: Tensor, window: tuple[int, ...]) -> tuple[int, ...]:
    """How far the grid was rolled, from what the first token of the last window sees: bool[N]."""
    seen = first.reshape(window)
    shift = []
    for axis, size in enumerate(window):
        line = seen[tuple(slice(None) if each == axis else 0 for each in range(len(window)))]
        hidden = (~line).nonzero()
        shift.append(size - int(hidden[0]) if len(hidden) else 0)
    return tuple(shift)


def _rolled(window: tuple[int, ...], grid: tuple[int, ...], shift: tuple[int, ...], device: torch.device) -> Tensor:
    """bool[windows, N, N]: where the last window of an axis holds both ends of the grid, it is cut at the seam."""
    region = torch.zeros(1, 1, dtype=torch.long, device=device)
    for size, count, roll in zip(window, grid, shift, strict=True):
        place = torch.arange(size * count, device=device)
        own = (place >= size * count - roll).long().reshape(count, size)
        region = (region[:, None, :, None] * 2 + own[None, :, None, :]).reshape(len(region) * count, -1)
    return region[:, :, None] == region[:, None, :]


def aligned(segments: Tensor, q_len: int) -> Tensor:
    """bool[..., q_len, Skv]: are query and key of one segment, int64[..., Skv]? The last two are aligned."""
    return segments[..., -q_len:, None] == segments[..., None, :]


def components(visible: Tensor) -> Tensor:
    """int64[..., S]: the smallest token with which each is connected by what sees what, bool[..., Sq, S]."""
    q_len, kv_len = visible.shape[-2:]
    own = torch.arange(kv_len, device=visible.device)
    label = own.expand(*visible.shape[:-2], kv_len)
    if q_len > kv_len:
        return label
    while True:
        # Each takes the smallest label among its neighbours in both directions.
        rows = torch.where(visible, label[..., None, :], kv_len).amin(-1)
        columns = torch.where(visible, label[..., kv_len - q_len :, None], kv_len).amin(-2)
        least = torch.minimum(label, columns)
        least[..., kv_len - q_len :] = torch.minimum(least[..., kv_len - q_len :], rows)
        if torch.equal(least, label):
            return label
        label = least
