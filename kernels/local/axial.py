"""Axial attention: a query sees the tokens of a grid that differ from it along one axis only.

Axial Attention in Multidimensional Transformers (Ho et al. 2019, arXiv:1912.12180, section 3.1), as a mask of a joint
attention that is there already:

    out_i = softmax over {j : coordinates equal those of i but on `axis`} of scale * q_i k_j

With `causal`, key positions on the axis are at most the query's. There each layer has one axis and its own projections,
and layers follow one another; here each site has a config of its own, so that a plan may let axes take turns, and the
joint softmax is over one axis only, which is an approximation.

With `axis` "all", each axis has a softmax of its own, and out_i is the mean of their results. Models that are made so
(the package axial-attention, `sum_axial_out`) add them up, as each axis has its own projections; a site has one set,
with which a sum would be as many times too large.

Tokens around the grid see all and are seen by all. Exact along an axis where the others have length 1. Calls of other
lengths than the grid's are the site's own attention, exactly. Work is O(N * length of the axis), in boxes that are
lines of the grid, memory O(N).

A causal site is refused, so that none can leak: what the paper makes causal in the order of rows is a stack of layers,
by shifts of what goes into them, which is a matter of the model and not of a site.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rewriter.codegen.either import Either, pairs
from rewriter.codegen.formula import Formula
from rewriter.codegen.gridded import built_on_grid, defined_on_grid, fits, formula_on_grid
from rewriter.codegen.layout import Place, Rules, layout_of, plane_of, share, sparing
from rewriter.errors import OptionError
from rewriter.site import AttentionSite, Causal, Dense, Full, Padding, Refusal
from rewriter.target import Target
from rewriter.variant import Case, Config, Implementation, Variant

ALL = "all"
"""In place of an axis: each has its softmax."""


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


@dataclass(frozen=True)
class Mean:
    """What several attentions give, on average."""

    parts: Sequence[Implementation]

    def __call__(self, *given: Any) -> Tensor:
        """(B, H, tokens, Dv)."""
        return torch.stack([part(*given) for part in self.parts]).mean(0)

    def pairs(self, *given: Any) -> int:
        """How many pairs of a query and a key are shown, in all of them."""
        return sum(pairs(part, *given) or 0 for part in self.parts)


def each_axis(site: AttentionSite, config: Config) -> list[Config]:
    """The config of each softmax."""
    if config["axis"] != ALL:
        return [config]
    return [{**config, "axis": axis} for axis in range(len(plane_of(site).sides))]


def rules(site: AttentionSite, config: Config) -> Rules:
    """Of one softmax. `axis` counts from 0, in the order in which the grid is written."""
    rank, axis = len(plane_of(site).sides), config["axis"]
    if axis not in range(rank):
        raise OptionError(f"axis {axis} is none of the {rank} of the tokens")
    return tuple(Along(bool(config.get("causal", False))) if each == axis else Across() for each in range(rank))


def reference(*given: Any) -> Tensor:
    """The mean over the axes of the config."""
    *tensors, site, config = given
    each = [defined_on_grid(rules)(*tensors, site, one) for one in each_axis(site, config)]
    return torch.stack(each).mean(0)


def build(site: AttentionSite, config: Config) -> Implementation:
    """The implementation of each axis, of calls that hold the grid."""
    parts = [built_on_grid(rules)(site, each) for each in each_axis(site, config)]
    layout = plane_of(site)
    return parts[0] if len(parts) == 1 else Either(Mean(parts), parts[0], lambda query, key: fits(layout, query, key))


def formula(site: AttentionSite, config: Config) -> Formula | None:
    """That of an axis; all of them have no common softmax."""
    return None if config["axis"] == ALL else formula_on_grid(rules)(site, config)


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
    """One axis, the longest first: it keeps most. Then all of them."""
    layout = layout_of(site)
    if isinstance(layout, Refusal) or len(layout.sides) == 1:
        return []
    longest = sorted(range(len(layout.sides)), key=lambda axis: -layout.sides[axis])
    found = sparing(site, rules, [{"axis": axis} for axis in longest if layout.sides[axis] > 1])
    together: Config = {"axis": ALL}
    visited = sum(share(layout, rules(site, each)) for each in each_axis(site, together))
    return [*found, together] if visited < 0.5 and min(layout.sides) > 1 else found


_SITE = AttentionSite(
    path="case", heads=4, kv_heads=2, head_dim=16, v_head_dim=16, dtype="float32", scale=0.25, mask=Full(),
    batch=2, q_len=577, kv_len=577, tokens="24x24+1",
)  # fmt: skip
_VOLUME = replace(_SITE, tokens="5x9x13", q_len=585, kv_len=585, v_head_dim=8)

VARIANT = Variant(
    name="axial",
    paper="arXiv:1912.12180, section 3.1",
    fidelity="approximate",
    reference=reference,
    applies=applies,
    configs=configs,
    build=build,
    formula=formula,
    elements=frozenset({"bias", "softcap", "sink"}),
    cases=[
        Case(site=_SITE, configs=[{"axis": 0}]),
        Case(
            site=replace(_SITE, dtype="bfloat16", mask=Padding() & Full()),
            configs=[{"axis": 1, "causal": True}, {"axis": ALL}],
        ),
        Case(site=_VOLUME, configs=[{"axis": 1}, {"axis": ALL, "causal": True}]),
        Case(site=replace(_SITE, bias="dense", sink="learned"), configs=[{"axis": 1}, {"axis": ALL}]),
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
