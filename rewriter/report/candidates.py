"""Which variants could stand at a site, and why not the others: what `explain` can say without measuring."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from rewriter.paths import grouped, joined, shape_of
from rewriter.site import AttentionSite
from rewriter.target import Target
from rewriter.variant import ORIGINAL, variants


@dataclass(frozen=True)
class Candidate:
    """One variant at one group of equal sites; `reason` says why it does not apply, where it does not."""

    sites: str
    variant: str
    fidelity: str
    applies: bool
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def candidates(sites: Iterable[AttentionSite]) -> list[Candidate]:
    """Every variant but the original at every group of sites with equal facts."""
    found = []
    for group in grouped(sites, lambda site: (shape_of(site.path), site.key(), site.edits)):
        site, paths = group[0], joined([each.path for each in group])
        target = Target.current(site.device)
        for name, variant in variants().items():
            if name != ORIGINAL and variant.concerns(site):
                answer = variant.takes(site, target)
                reason = "" if answer else getattr(answer, "reason", "it does not apply here")
                found.append(Candidate(paths, name, variant.fidelity, bool(answer), reason))
    return found
