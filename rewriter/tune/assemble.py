"""From what the solver chose to what stands at a site, and to the decision that says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rewriter.mixture import ByHeads, of_heads
from rewriter.plan import MIXED, Decision, HeadGroup, named_heads
from rewriter.site import AttentionSite
from rewriter.tune.choices import Candidate, SiteChoices
from rewriter.tune.solve import Choice, Solution, Table
from rewriter.variant import ORIGINAL, Implementation

Groups = Sequence[tuple[tuple[int, ...], Candidate]]
"""Groups of key/value heads with what they run; none where the original code stays."""


@dataclass(frozen=True)
class Assembled:
    """A plan in the terms of the search: what stands at each site, in their order; its cost, and its drop."""

    solution: Solution
    cost: float
    predicted: float
    measured: float | None = None


def groups_of(choices: SiteChoices, table: Table, choice: Choice) -> Groups:
    heads = tuple(range(choices.site.kv_heads))
    if choice.whole is not None:
        return [] if choice.whole == 0 else [(heads, choices.whole[choice.whole - 1])]
    exact = choices.exact if table.groups > 1 else choices.base
    columns = [c for c in choices.columns if not c.exact or c is exact]
    if table.groups == 1:
        return [(heads, columns[choice.columns[0]])]
    numbers = dict.fromkeys(choice.columns)
    if choices.base is None and all(columns[n].exact for n in numbers):
        return []
    return [(tuple(h for h in heads if choice.columns[h] == n), columns[n]) for n in numbers]


def implementation_of(site: AttentionSite, groups: Groups) -> Implementation:
    if len(groups) == 1:
        return groups[0][1].implementation
    return ByHeads([(heads, c.variant.build(of_heads(site, heads), c.config)) for heads, c in groups])


def distinct(candidates: Sequence[Candidate]) -> list[Candidate]:
    return list({id(candidate): candidate for candidate in candidates}.values())


def decision_of(
    choices: SiteChoices,
    groups: Groups,
    cost: float,
    unit: str,
    lengths: tuple[int, int] | None,
) -> Decision:
    site = choices.site
    facts: dict[str, Any] = {
        "path": site.path,
        "site": site.key(),
        "refused": choices.refused,
        "tried": tuple(c.tried() for c in choices.measured),
    }
    if not groups:
        return Decision(
            **facts, variant=ORIGINAL, fidelity="exact", evidence={f"original_{unit}": choices.original},
            reason="no gain within the bound here, left as it is",
        )  # fmt: skip
    candidates = [candidate for _, candidate in groups]
    inexact = [c for c in candidates if not c.exact]
    evidence = {f"original_{unit}": choices.original, f"candidate_{unit}": cost}
    if inexact:
        shares = [sum(c.effects[h] for h in heads) for heads, c in groups if c.effects is not None]
        evidence |= {"local_error": max(c.error or 0.0 for c in inexact), "predicted_effect": sum(shares)}
    part = f"{cost / choices.original:.2f} of the original's {unit}"
    base: dict[str, Any] = {**facts, "evidence": evidence, "lengths": lengths}
    if inexact and choices.base is not None:
        base["otherwise"] = choices.base.variant.name
    said = ", ".join(f"{named_heads(heads)} {c.variant.name}" for heads, c in groups)
    if len(groups) == 1:
        chosen = candidates[0]
        return Decision(
            **base, variant=chosen.variant.name, config=chosen.config, fidelity=chosen.variant.fidelity,
            reason=f"cheapest within the bound: {part}",
        )  # fmt: skip
    return Decision(
        **base, variant=MIXED, fidelity="approximate",
        heads=tuple(HeadGroup(heads=heads, variant=c.variant.name, config=c.config) for heads, c in groups),
        reason=f"heads differ in what they need ({said}): {part}",
    )  # fmt: skip
