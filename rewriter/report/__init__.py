"""What the compiler did, for people and for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rewriter.plan import Plan
from rewriter.site import AttentionSite, Refusal
from rewriter.verdict import Verdict


@dataclass(frozen=True)
class Timing:
    """One end-to-end comparison, taken in alternation; medians. Milliseconds, or bytes where `unit` says so."""

    what: str
    original: float
    result: float
    unit: str = "ms"

    @property
    def ratio(self) -> float:
        """How many times faster (or smaller) the result is; above 1 is better."""
        return self.original / self.result

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "what": self.what,
            "original": self.original,
            "result": self.result,
            "unit": self.unit,
            "ratio": self.ratio,
        }


@dataclass
class Report:
    """What was found, what was done about it, and what was measured.

    sites      every attention that was recognised, in the order of the graph
    sampled    those without scores of queries and keys, to places in maps (`AttentionSite.samples`)
    refusals   attention-like code that was not taken, with a sentence each
    graphs     how many graphs were captured
    plan       what was decided (None from `explain`)
    verdict    what the guard measured on held-out data (None without calibration data)
    timings    end-to-end comparisons of the original and the result
    notes      sentences about what a user would not expect
    seconds    how long each stage took
    """

    sites: list[AttentionSite] = field(default_factory=list)
    sampled: list[AttentionSite] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    graphs: int = 0
    plan: Plan | None = None
    verdict: Verdict | None = None
    timings: Sequence[Timing] = ()
    notes: list[str] = field(default_factory=list)
    seconds: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values, ready for `json.dumps`."""
        return {
            "graphs": self.graphs,
            "sites": [site.to_json() for site in self.sites],
            "sampled": [site.to_json() for site in self.sampled],
            "refusals": [{"path": r.path, "source": r.source, "reason": r.reason} for r in self.refusals],
            "plan": self.plan.to_json() if self.plan else None,
            "guard": self.verdict.to_json() if self.verdict else None,
            "timings": [t.to_json() for t in self.timings],
            "notes": list(self.notes),
            "seconds": dict(self.seconds),
        }

    def __str__(self) -> str:
        from rewriter.report.tables import render

        return render(self)
