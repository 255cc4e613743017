"""Axial attention: a query sees the tokens of a grid that differ from it along one axis only.

Axial Attention in Multidimensional Transformers (Ho et al. 2019, arXiv:1912.12180, section 3.1), as a mask of a joint
attention that is there already:

    out_i = softmax over {j : coordinates equal those of i but on `axis`} of scale * q_i k_j

With `causal`, key positions on the axis are at most the query's. There each layer has one axis and its own projections,
and layers follow one another; here each site has an axis of its own, and the joint softmax is over one axis only, which
is an approximation. Tokens around the grid see all and are seen by all. Exact where the other axes have length 1.
Calls of other lengths than the grid's are the site's own attention, exactly. Work is O(N * length of the axis), in
boxes that are lines of the grid, memory O(N).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from rewriter.codegen.gridded import built_on_grid, defined_on_grid, formula_on_grid
from rewriter.codegen.layout import Place, Rules, layout_of, plane_of, sparing
from rewriter.errors import OptionError
from rewriter.site import AttentionSite, Causal, Dense, Full, Padding, Refusal
from rewriter.target import Target
from rewriter.variant import Case, Config, Variant


@dataclass(frozen=True)
class Along:
    """The axis: all of it, or what is not after the query."""

    causal: bool = False
    dilation: int = 1

    def sees(self, query: Place, key: Place, size: int) -> Any:
        """Of one axis."""
        return key.at <= (query.at if self.causal else size - 1)


@dataclass(frozen=True)
class Across:
    """Another axis: the query's own place on it."""

    dilation: int = 1

    def sees(self, query: Place, key: Place, size: int) -> Any:
        """Of one axis."""
        return query.at == key.at


def rules(site: AttentionSite, config: Config) -> Rules:
    """`axis` counts from 0, in the order in which the grid is written."""
    rank, axis = len(plane_of(site).sides), int(config["axis"])
    if not 0 <= axis < rank:
        raise OptionError(f"axis {axis} is none of the {rank} of the tokens")
    return tuple(Along(bool(config.get("causal", False))) if each == axis else Across() for each in range(rank))


def applies(site: AttentionSite, target: Target) -> bool | Refusal:
    """Grids of two or three axes that see all of themselves, and of which an axis hides more than half."""
    layout = layout_of(site)
    if isinstance(layout, Refusal):
        return layout
    reason = "a sequence has one axis only, which is all of it" if len(layout.sides) == 1 else ""
    if not reason and not configs(site, target):
        reason = f"a grid of {layout} tokens is too small for an axis that hides more than half of the blocks"
    return Refusal(reason, site.path, site.source) if reason else True


def configs(site: AttentionSite, target: Target) -> list[Config]:
    """The axes, the longest first: it keeps most."""
    layout = layout_of(site)
    if isinstance(layout, Refusal) or len(layout.sides) == 1:
        return []
    longest = sorted(range(len(layout.sides)), key=lambda axis: -layout.sides[axis])
    return sparing(site, rules, [{"axis": axis} for axis in longest if layout.sides[axis] > 1])


_SITE = AttentionSite(
    path="case", heads=4, kv_heads=2, head_dim=16, v_head_dim=16, dtype="float32", scale=0.25, mask=Full(),
    batch=2, q_len=577, kv_len=577, tokens="24x24+1",
)  # fmt: skip
_VOLUME = replace(_SITE, tokens="5x9x13", q_len=585, kv_len=585, v_head_dim=8)

VARIANT = Variant(
    name="axial",
    paper="arXiv:1912.12180, section 3.1",
    fidelity="approximate",
    reference=defined_on_grid(rules),
    applies=applies,
    configs=configs,
    build=built_on_grid(rules),
    formula=formula_on_grid(rules),
    elements=frozenset({"bias", "softcap", "sink"}),
    cases=[
        Case(site=_SITE, configs=[{"axis": 0}]),
        Case(site=replace(_SITE, dtype="bfloat16", mask=Padding() & Full()), configs=[{"axis": 1, "causal": True}]),
        Case(site=_VOLUME, configs=[{"axis": 1}]),
        Case(site=replace(_SITE, bias="dense", sink="learned"), configs=[{"axis": 1}]),
        Case(site=replace(_SITE, softcap=2.0), configs=[{"axis": 1}]),
    ],
    near_misses=[
        replace(_SITE, dropout_p=0.1),
        replace(_SITE, mask=Dense()),
        replace(_SITE, tokens=None),
        replace(_SITE, kv_len=576),
        replace(_SITE, mask=Causal()),
        replace(_SITE, tokens="577"),
        replace(_SITE, tokens="8x8+1", q_len=65, kv_len=65),
    ],
)
