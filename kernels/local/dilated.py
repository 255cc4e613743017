"""Local and global scope of D-Former: a query sees its block of the grid, or the tokens at its place in all blocks.

D-Former (Wu et al. 2022, arXiv:2201.00462, section 3.2), for one to three axes. With groups of G tokens along an axis
of L, I = ceil(L / G) of them:

    local:  i // G == j // G
    global: i mod I == j mod I

and softmax(scale * q k^T) v over the keys that every axis shows. The two alternate over layers there; here each site
has a scope of its own. Where a group does not divide an axis, the last are smaller: no token is hidden from its own
group, and nothing is padded. Where G divides L, local scope is strided neighborhood attention, and global scope
dilated. Tokens around the grid see all and are seen by all. Exact where each group is its whole axis. Calls of
other lengths than the grid's are the site's own attention, exactly. Work is O(N * tokens of a group), memory O(N).
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

_GROUPS = {1: (64,), 2: (8, 8), 3: (2, 8, 8)}  # by the number of axes; of three as in the paper


@dataclass(frozen=True)
class Local:
    """The tokens of the same block."""

    group: int
    dilation: int = 1

    def sees(self, query: Place, key: Place, size: int) -> Any:
        """Of one axis."""
        return query.at // self.group == key.at // self.group


@dataclass(frozen=True)
class Global:
    """The tokens at the same place in all blocks, which are `dilation` long."""

    dilation: int

    def sees(self, query: Place, key: Place, size: int) -> Any:
        """Of one axis."""
        # What has one residue is all that is seen; without others there is nothing to compare.
        return query.residue == key.residue if self.dilation > 1 else (key.at >= 0) & (query.at >= 0)


def rules(site: AttentionSite, config: Config) -> Rules:
    """Of each axis. `group` is written "8x8", or as one number for all; `scope` is "local" or "global"."""
    layout = plane_of(site)
    groups = numbers(config, "group", len(layout.sides))
    if config.get("scope") not in ("local", "global"):
        raise OptionError(f"the scope is {config.get('scope')!r}; it is 'local' or 'global'")
    if min(groups) < 1:
        raise OptionError(f"a group of {config['group']} tokens")
    if config["scope"] == "local":
        return tuple(Local(group) for group in groups)
    return tuple(Global(-(-size // group)) for size, group in zip(layout.sides, groups, strict=True))


def applies(site: AttentionSite, target: Target) -> bool | Refusal:
    """Grids that see all of themselves, and in which groups hide more than half."""
    layout = layout_of(site)
    if isinstance(layout, Refusal):
        return layout
    reason = "a sequence that is causal and grows has no groups" if layout.endless else ""
    if not reason and not configs(site, target):
        reason = f"a grid of {layout} tokens is too small for groups that hide more than half of the blocks"
    return Refusal(reason, site.path, site.source) if reason else True


def configs(site: AttentionSite, target: Target) -> list[Config]:
    """Both scopes, of the paper's groups."""
    layout = layout_of(site)
    if isinstance(layout, Refusal) or layout.endless:
        return []
    group = "x".join(str(min(each, size)) for each, size in zip(_GROUPS[len(layout.sides)], layout.sides, strict=True))
    return sparing(site, rules, [{"scope": scope, "group": group} for scope in ("local", "global")])


_SITE = AttentionSite(
    path="case", heads=4, kv_heads=2, head_dim=16, v_head_dim=16, dtype="float32", scale=0.25, mask=Full(),
    batch=2, q_len=577, kv_len=577, tokens="24x24+1",
)  # fmt: skip
_VOLUME = replace(_SITE, tokens="6x9x13", q_len=702, kv_len=702, v_head_dim=8)

VARIANT = Variant(
    name="dilated",
    paper="arXiv:2201.00462, section 3.2",
    fidelity="approximate",
    reference=defined_on_grid(rules),
    applies=applies,
    configs=configs,
    build=built_on_grid(rules),
    formula=formula_on_grid(rules),
    elements=frozenset({"bias", "softcap", "sink"}),
    cases=[
        Case(site=_SITE),
        Case(site=replace(_SITE, dtype="bfloat16", mask=Padding() & Full()), configs=[{"scope": "global", "group": 5}]),
        Case(site=_VOLUME, configs=[{"scope": "local", "group": "2x4x7"}, {"scope": "global", "group": "2x4x5"}]),
        Case(site=replace(_SITE, bias="dense", sink="learned"), configs=[{"scope": "local", "group": 7}]),
        Case(site=replace(_SITE, softcap=2.0), configs=[{"scope": "local", "group": 7}]),
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
