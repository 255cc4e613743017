"""Neighborhood attention on a grid: each query sees a window around it, along each axis apart.

Faster Neighborhood Attention (Hassani et al. 2024, arXiv:2403.04690): window, dilation and causality of each axis.
Generalized Neighborhood Attention (Hassani et al. 2025, arXiv:2504.16922): `stride` neighbours share one window.
Along an axis of L tokens, with window w, stride s and dilation D, a query sees keys of its own residue modulo D. Among
these, L' of them, the query at i is led by l = min(i // s * s + s // 2, L' - 1) and sees [c - w // 2, c - w // 2 + w),
where c is l, moved inward until the window lies inside: w keys at any border. Along a causal axis the leader is
min(i // s * s + s - 1, L' - 1), and the window [max(l - w + 1, 0), i + 1).

A causal site is a sequence, one causal axis that has no end: no leader is cut short, so that what a query sees does not
change while a cache grows. Tokens around a grid see all and are seen by all. Exact where each window is its whole
axis. Calls of other lengths than the grid's are the site's own attention, exactly. Work is O(N * product of windows),
in boxes of 64 tokens, memory O(N).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch

from rewriter.codegen.gridded import built_on_grid, defined_on_grid, formula_on_grid
from rewriter.codegen.layout import BOX, Place, Rules, layout_of, numbers, plane_of, sparing
from rewriter.codegen.simulate import axes_of, bound, search, shapes
from rewriter.errors import OptionError
from rewriter.site import AttentionSite, Causal, Dense, Full, Padding, Refusal, SlidingWindow
from rewriter.target import Target
from rewriter.variant import Case, Config, Variant

_KEPT = (1 / 2, 1 / 4, 1 / 8)  # of the keys of a grid
_NEAR = 0.9  # of the highest bound on the speed
_WINDOWS, _STRIDE = (1024, 512, 256), 64  # of a sequence; a stride of a block leaves one that has to be masked


@dataclass(frozen=True)
class Window:
    """The keys that are seen along one axis."""

    window: int
    stride: int = 1
    dilation: int = 1
    causal: bool = False

    def sees(self, query: Place, key: Place, size: int) -> Any:
        """Of one axis."""
        i, j, last = query.step, key.step, size // self.dilation - 1
        if size % self.dilation:  # the residues are not all as frequent
            last = (size - 1 - query.residue) // self.dilation
        leader = i // self.stride * self.stride + (self.stride - 1 if self.causal else self.stride // 2)
        if self.causal:
            seen = (j > _lesser(leader, last) - self.window) & (j <= i)
        else:
            left, right = self.window // 2, (self.window - 1) // 2
            start = _lesser(leader, last - right).clamp(min=left) - left
            seen = (j >= start) & (j < start + self.window)
        return seen if self.dilation == 1 else seen & (query.residue == key.residue)


def _lesser(x: Any, most: Any) -> Any:
    return x.clamp(max=most) if isinstance(most, int) else torch.minimum(x, most)


def rules(site: AttentionSite, config: Config) -> Rules:
    """Of each axis; numbers are written "7x7", and one serves all axes. The only axis of a causal site is causal."""
    layout = plane_of(site)
    each = partial(numbers, config, rank=len(layout.sides))
    settings = (
        each("window"),
        each("stride", default=1),
        each("dilation", default=1),
        each("causal", default=int(layout.endless)),
    )
    for size, window, stride, dilation in zip(layout.sides, *settings[:3], strict=True):
        if not (1 <= stride <= window and dilation >= 1 and window * dilation <= size):
            raise OptionError(
                f"a window of {window} with stride {stride} and dilation {dilation} on an axis of {size}: a stride is "
                "at most the window, and the dilated window fits"
            )
    return tuple(Window(w, s, d, bool(c)) for w, s, d, c in zip(*settings, strict=True))


def applies(site: AttentionSite, target: Target) -> bool | Refusal:
    """Sequences that are causal, and grids that see all of themselves, where a window would hide more than half."""
    layout = layout_of(site)
    if isinstance(layout, Refusal):
        return layout
    if configs(site, target):
        return True
    size = f"{site.kv_len} keys" if layout.endless else f"a grid of {layout} tokens"
    return Refusal(f"{size}: too few for a window that hides more than half of the blocks", site.path, site.source)


def configs(site: AttentionSite, target: Target) -> list[Config]:
    """The widest window first, with the stride that the simulator finds; none that would visit half of the boxes."""
    layout = layout_of(site)
    if isinstance(layout, Refusal):
        return []
    if layout.endless:
        return [{"window": w, "stride": _STRIDE} for w in _WINDOWS if site.kv_len is None or 2 * w < site.kv_len]
    rank = sum(size > 1 for size in layout.sides) or 1
    windows = dict.fromkeys(tuple(_part(size, kept ** (1 / rank)) for size in layout.sides) for kept in _KEPT)
    offered: list[Config] = [{"window": _words(w), "stride": _words(strides(layout.sides, w))} for w in windows]
    return sparing(site, rules, offered)


@cache
def strides(sides: tuple[int, ...], windows: tuple[int, ...]) -> tuple[int, ...]:
    """Those of the highest bound for boxes of `BOX` tokens; none where each query's own window comes near it."""
    axes = axes_of(sides, windows)
    best = search(axes, BOX, BOX, alike=True)
    own = max(bound(axes, tile, tile).speedup for tile in shapes(BOX, len(sides)))
    return (1,) * len(sides) if own > _NEAR * best.speedup else best.stride


def _part(size: int, share: float) -> int:
    unit = 4 if size >= 16 else 1  # of which boxes are multiples
    return min(max(round(size * share / unit) * unit, 2), size)


def _words(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))


_SITE = AttentionSite(
    path="case", heads=4, kv_heads=2, head_dim=16, v_head_dim=16, dtype="float32", scale=0.25, mask=Full(),
    batch=2, q_len=577, kv_len=577, tokens="24x24+1",
)  # fmt: skip
_SEQUENCE = replace(_SITE, mask=Causal(), q_len=520, kv_len=520, tokens=None)


def _grid(tokens: str, length: int, **other: Any) -> AttentionSite:
    return replace(_SITE, tokens=tokens, q_len=length, kv_len=length, **other)


VARIANT = Variant(
    name="neighborhood",
    paper="arXiv:2403.04690, section 3; arXiv:2504.16922, section 3",
    fidelity="approximate",
    reference=defined_on_grid(rules),
    applies=applies,
    configs=configs,
    build=built_on_grid(rules),
    formula=formula_on_grid(rules),
    elements=frozenset({"bias", "softcap", "sink"}),
    cases=[
        Case(site=_SEQUENCE, configs=[{"window": 30, "stride": 7}, {"window": 20, "dilation": 3}]),
        Case(site=replace(_SEQUENCE, mask=Causal() & Padding(), q_len=130), configs=[{"window": 64, "stride": 64}]),
        Case(site=_SITE, configs=[{"window": "8x5", "stride": "4x1"}]),
        Case(site=replace(_SITE, dtype="bfloat16", mask=Padding() & Full())),
        Case(site=_grid("17x34", 578), configs=[{"window": "4x7", "dilation": "3x2", "causal": "0x1"}]),
        Case(site=_grid("5x9x13", 585, v_head_dim=8), configs=[{"window": "2x3x4", "stride": "2x1x3"}]),
        Case(site=_grid("640", 640), configs=[{"window": 31, "stride": 6, "dilation": 2}]),
        Case(site=replace(_SITE, bias="dense", sink="learned"), configs=[{"window": "8x5"}]),
        Case(site=replace(_SITE, softcap=2.0), configs=[{"window": "8x5"}]),
    ],
    near_misses=[
        replace(_SITE, dropout_p=0.1),
        replace(_SITE, mask=Dense()),
        replace(_SITE, tokens=None),
        replace(_SITE, kv_len=576),
        replace(_SITE, mask=Causal()),
        replace(_SITE, mask=SlidingWindow(9, 9)),
        replace(_SEQUENCE, q_len=512, kv_len=512),
        _grid("7x7+1", 50),
    ],
)
