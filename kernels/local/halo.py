"""Blocks with a halo: the queries of a block of the grid see the block and what is around it.

Scaling Local Self-Attention, HaloNet (Vaswani et al. 2021, arXiv:2103.12731, section 2), as a mask of a pretrained
softmax, without the learned relative positions. With blocks of b and a halo of h, a query at i of an axis of L sees

    border "mask":   start - h <= j < start + b + h, with start = i // b * b, as far as there are tokens
    border "shift":  as many keys at every border, the window of b + 2h moved inward (all of the axis if it is shorter)
    border "zero":   the keys of "mask", and one of zeros for each place of the window that is outside of the grid

With "shift", it is neighborhood attention with stride b and window b + 2h. "zero" is how the paper is read by
timm.layers.HaloAttn, which pads keys and values after their projections: each such place has the score 0 (so has its
softcap; nothing is added to it) and no value, so that a query at a border sees less of what is there. Models that are
trained so need it; of another it is the worst of the three, and no search offers it: it has to be named.

Tokens around the grid see all of its tokens and are seen by all. Exact where one block covers each axis (but for "zero"
with a halo). Calls of other lengths than the grid's are the site's own attention, exactly. Work is
O(N * (b + 2h)^axes), memory O(N).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from rewriter.codegen.gridded import built_on_grid, defined_on_grid, formula_on_grid
from rewriter.codegen.layout import Place, Rules, layout_of, numbers, plane_of, sparing
from rewriter.errors import OptionError
from rewriter.site import AttentionSite, Causal, Dense, Full, Padding, Refusal
from rewriter.target import Target
from rewriter.variant import Case, Config, Variant

_BLOCKS: tuple[Config, ...] = (
    {"block": 16, "halo": 8, "border": "mask"},
    {"block": 8, "halo": 4, "border": "mask"},
    {"block": 8, "halo": 0, "border": "mask"},
)


@dataclass(frozen=True)
class Halo:
    """A block of one axis, with its halo."""

    block: int
    halo: int
    shift: bool = False
    dilation: int = 1

    def window(self, query: Place) -> tuple[Any, int]:
        """Where it starts, and its length."""
        return query.at // self.block * self.block - self.halo, self.block + 2 * self.halo

    def sees(self, query: Place, key: Place, size: int) -> Any:
        """Of one axis."""
        start, window = self.window(query)
        if self.shift:
            start = start.clamp(0, max(size - window, 0))
        return (key.at >= start) & (key.at < start + window)


@dataclass(frozen=True)
class ZeroHalo(Halo):
    """The same, with zeros for what is outside of the axis."""

    def reach(self, query: Place, size: int) -> tuple[Any, int]:
        """How many places of the axis a query sees, and how many with those outside of it."""
        start, window = self.window(query)
        return ((start + window).clamp(max=size) - start.clamp(min=0)).clamp(min=0), window


def rules(site: AttentionSite, config: Config) -> Rules:
    """Of each axis. `block` and `halo` are written "8x8", or as one number for all; `border` is one of three words."""
    rank = len(plane_of(site).sides)
    blocks, halos = numbers(config, "block", rank), numbers(config, "halo", rank)
    border = config.get("border")
    if border not in ("mask", "shift", "zero"):
        raise OptionError(f"the border is {border!r}; it is 'mask', 'shift' or 'zero'")
    if min(blocks) < 1:
        raise OptionError(f"a block of {config['block']} tokens")
    if border == "zero":
        return tuple(ZeroHalo(block, halo) for block, halo in zip(blocks, halos, strict=True))
    return tuple(Halo(block, halo, border == "shift") for block, halo in zip(blocks, halos, strict=True))


def applies(site: AttentionSite, target: Target) -> bool | Refusal:
    """Grids that see all of themselves, and in which blocks hide more than half."""
    layout = layout_of(site)
    if isinstance(layout, Refusal):
        return layout
    reason = "a sequence that is causal has no halo on both sides" if layout.endless else ""
    if not reason and not configs(site, target):
        reason = f"a grid of {layout} tokens is too small for blocks that hide more than half of it"
    return Refusal(reason, site.path, site.source) if reason else True


def configs(site: AttentionSite, target: Target) -> list[Config]:
    """The largest blocks first."""
    layout = layout_of(site)
    return [] if isinstance(layout, Refusal) or layout.endless else sparing(site, rules, _BLOCKS)


_SITE = AttentionSite(
    path="case", heads=4, kv_heads=2, head_dim=16, v_head_dim=16, dtype="float32", scale=0.25, mask=Full(),
    batch=2, q_len=577, kv_len=577, tokens="24x24+1",
)  # fmt: skip
_LONG = replace(_SITE, tokens="7x90", q_len=630, kv_len=630, v_head_dim=8)

VARIANT = Variant(
    name="halo",
    paper="arXiv:2103.12731, section 2",
    fidelity="approximate",
    reference=defined_on_grid(rules),
    applies=applies,
    configs=configs,
    build=built_on_grid(rules),
    formula=formula_on_grid(rules),
    elements=frozenset({"bias", "softcap", "sink"}),
    cases=[
        Case(site=_SITE, configs=[{"block": 8, "halo": 3, "border": "mask"}]),
        Case(
            site=replace(_SITE, dtype="bfloat16", mask=Padding() & Full()),
            configs=[{"block": "5x6", "halo": 2, "border": "shift"}],
        ),
        Case(site=_LONG, configs=[{"block": "3x8", "halo": "2x3", "border": "shift"}]),
        Case(site=replace(_SITE, bias="dense", sink="learned"), configs=[{"block": 8, "halo": 3, "border": "shift"}]),
        Case(site=replace(_SITE, softcap=2.0), configs=[{"block": 8, "halo": 3, "border": "shift"}]),
        Case(site=replace(_SITE, softcap=2.0), configs=[{"block": 8, "halo": 3, "border": "zero"}]),
        Case(
            site=replace(_SITE, dtype="bfloat16", mask=Padding() & Full()),
            configs=[{"block": "5x6", "halo": 2, "border": "zero"}],
        ),
        Case(site=_LONG, configs=[{"block": "3x8", "halo": "2x3", "border": "zero"}]),
        Case(site=replace(_SITE, bias="dense", sink="learned"), configs=[{"block": 8, "halo": 3, "border": "zero"}]),
    ],
    near_misses=[
        replace(_SITE, dropout_p=0.1),
        replace(_SITE, mask=Dense()),
        replace(_SITE, tokens=None),
        replace(_SITE, kv_len=576),
        replace(_SITE, mask=Causal()),
        replace(_SITE, mask=Causal(), tokens="577"),
        replace(_SITE, tokens="8x8+1", q_len=65, kv_len=65),
    ],
)
