"""What a plan says, ready to be shown: read with a sentence where it is nonsense, and derived from nothing else."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, TypeVar

from rewriter.errors import PlanError
from rewriter.plan import Decision, Plan, Tried, called
from rewriter.plan_check import check_judged
from rewriter.report import Timing
from rewriter.site import AttentionSite, Causal, Chunked, Mask, PrefixCausal, SlidingWindow
from rewriter.tune.record import Point, Stage, Trial
from rewriter.verdict import Check, Verdict

T = TypeVar("T")

_SQUARES = 32
_MOST_TOKENS = 2048
"""Drawn of a mask; more would take seconds."""


@dataclass(frozen=True)
class Drawn:
    """A mask as squares: `seen[i][j]` is whether query `i * step` of `tokens` sees key `j * step`."""

    seen: tuple[tuple[bool, ...], ...]
    tokens: int
    step: int
    reaches_farther: bool = False

    @property
    def path(self) -> str:
        """The visible squares as the path of an SVG, a rectangle for each run in a row."""
        found = []
        for i, row in enumerate(self.seen):
            ends = [j for j, (a, b) in enumerate(zip((False, *row), (*row, False), strict=True)) if a != b]
            found += [f"M{a} {i}h{b - a}v1h{a - b}z" for a, b in zip(ends[::2], ends[1::2], strict=True)]
        return "".join(found)


@lru_cache(maxsize=64)
def drawn(mask: Mask) -> Drawn | None:
    """The positional factors of a mask, at a size that shows their bounds; None where there are none."""
    bounds = []
    for part in mask.positional.parts():
        if isinstance(part, Causal):
            bounds.append(abs(part.offset))
        elif isinstance(part, SlidingWindow):
            bounds += [abs(bound) for bound in (part.left, part.right) if bound is not None]
        elif isinstance(part, Chunked):
            bounds.append(2 * part.size)
        elif isinstance(part, PrefixCausal):
            bounds.append(part.length)
    if mask.positional == Mask.parse("full") and mask != mask.positional:
        return None
    wanted = max(_SQUARES, 2 * max(bounds, default=0))
    step = math.ceil(min(wanted, _MOST_TOKENS) / _SQUARES)
    tokens = step * _SQUARES
    try:
        seen = mask.visible(tokens, tokens)[::step, ::step].tolist()
    except (RuntimeError, OverflowError):  # a bound that is no 64-bit number
        return None
    return Drawn(tuple(map(tuple, seen)), tokens, step, wanted > _MOST_TOKENS)


@dataclass(frozen=True)
class Facts:
    """A plan with the parts that its reader leaves open read as well."""

    plan: Plan
    verdict: Verdict | None
    timings: tuple[Timing, ...]
    front: tuple[Point, ...]
    timeline: tuple[Stage, ...]
    trials: tuple[Trial, ...]
    search: Mapping[str, Any]

    @staticmethod
    def of(plan: Plan) -> Facts:
        """Raises PlanError where guard, timings or search are not what is written there, or not of these decisions."""
        search = plan.search or {}
        for decision in plan.decisions:
            numbers = [value for t in decision.tried for value in (t.cost, t.error, t.effect) if value is not None]
            for value in (*numbers, *decision.evidence.values()):
                _number(value, f"what was measured at {decision.path or '<root>':.40}")
        facts = Facts(
            plan=plan,
            verdict=_verdict(plan.guard) if plan.guard is not None else None,
            timings=tuple(_made(Timing, t, "timings", given={"ratio"}) for t in plan.timings if _measured(t)),
            front=_each(Point, search, "front"),
            timeline=_each(Stage, search, "timeline"),
            trials=_each(Trial, search, "trials"),
            search={name: _number(value, name) for name, value in search.items() if name in _NUMBERS}
            | {name: str(value) for name, value in search.items() if name in ("metric", "effects")},
        )
        check_judged(plan)
        return facts

    @property
    def unit(self) -> str:
        """Of all costs."""
        return "bytes" if self.plan.goal == "memory" else "ms"

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Every candidate that was measured somewhere, in the order of the plan."""
        return tuple(dict.fromkeys(called(t.variant, t.config) for d in self.plan.decisions for t in d.tried))

    def original(self, decision: Decision) -> float | None:
        """The cost of a site as it was."""
        return _positive(decision.evidence.get(f"original_{self.unit}"))

    def gain(self, decision: Decision, tried: Tried) -> float | None:
        """How many times cheaper a candidate is than the original, where both were measured."""
        original, cost = self.original(decision), _positive(tried.cost)
        return original / cost if original is not None and cost is not None else None

    def chosen(self, decision: Decision) -> frozenset[str]:
        """What runs at a site, as `columns` name it."""
        own = tuple(called(g.variant, g.config) for g in decision.heads)
        return frozenset(own or (called(decision.variant, decision.config),))

    def compared(self, decision: Decision, tried: Tried) -> str:
        """A candidate beside what was chosen, in words."""
        cost, own = _positive(tried.cost), self.chosen(decision)
        if called(tried.variant, tried.config) in own:
            return "chosen" if not decision.heads else "chosen for some heads"
        chosen = [_positive(t.cost) for t in decision.tried if called(t.variant, t.config) in own]
        taken = decision.evidence.get(f"candidate_{self.unit}") or (chosen[0] if chosen else self.original(decision))
        if cost is None or taken is None:
            return "not chosen"
        more, less = ("takes more memory", "takes less memory") if self.unit == "bytes" else ("slower", "faster")
        if cost == taken:
            return "no better than what was chosen"
        if cost > taken:
            return f"{more} than what was chosen"
        changes = f", but changes what the site computes by {tried.error:.2g}" if _finite(tried.error) else ""
        return f"{less} than what was chosen{changes}"


def site_of(decision: Decision) -> AttentionSite | None:
    """The facts of the site, None where this version cannot read them."""
    try:
        return AttentionSite.parse(decision.site, decision.path)
    except ValueError:
        return None


_NUMBERS = (
    "bound", "evaluations", "needed", "guarding", "exhaustive", "exhaustive_by_heads", "pairs", "seconds"
)  # fmt: skip
_KINDS: dict[str, tuple[type, ...]] = {
    "float": (int, float), "str": (str,), "bool": (bool,), "int": (int,), "float | None": (int, float, type(None))
}  # fmt: skip


def _finite(value: Any) -> bool:
    # A whole number of JSON can be larger than any float.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 < value < 1e300


def _positive(value: Any) -> float | None:
    return float(value) if _finite(value) and value > 1e-300 else None


def _number(value: Any, name: str) -> float:
    if not _finite(value):
        raise PlanError(f"{name!r} in the plan is not a number that can be shown")
    return float(value)


def _measured(timing: Mapping[str, Any]) -> bool:
    """What is not finite was written as null."""
    return all(name in timing and timing[name] is not None for name in ("original", "result"))


def _each(kind: type[T], search: Mapping[str, Any], name: str) -> tuple[T, ...]:
    listed = search.get(name, [])
    if not isinstance(listed, list):
        raise PlanError(f"{name!r} in the search of the plan is not a list")
    return tuple(_made(kind, each, name) for each in listed)


def _made(kind: type[T], raw: Any, name: str, given: set[str] | None = None) -> T:
    """A dataclass of plain values from what its fields were written as."""
    values = {k: v for k, v in raw.items() if k not in (given or ())} if isinstance(raw, Mapping) else {}
    types = {f.name: str(f.type) for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key, value in values.items():
        numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
        fits = isinstance(value, _KINDS.get(types.get(key, ""), (object,)))
        if not fits or (isinstance(value, bool) and types[key] != "bool") or (numeric and not _finite(value)):
            raise PlanError(f"{key!r:.40} in {name!r} of the plan is {value!r:.40}")
    try:
        found = kind(**values)
    except TypeError as cause:
        raise PlanError(f"an entry of {name!r} in the plan is not what is written there ({cause})") from None
    if isinstance(found, Timing) and (found.original <= 0 or found.result <= 0):
        raise PlanError(f"a timing in the plan is {min(found.original, found.result)!r:.40}, which nothing takes")
    return found


def _verdict(raw: Mapping[str, Any]) -> Verdict:
    checks = raw.get("checks", [])
    if not isinstance(checks, list):
        raise PlanError("'checks' in the guard of the plan are not a list")
    facts = {k: v for k, v in raw.items() if k != "checks"}
    if facts.get("drop") is None:
        facts["drop"] = 0.0  # stands in until all else is known to be right: what is infinite was written as null
    found = _made(Verdict, facts, "guard")
    made = tuple(_made(Check, check, "checks") for check in checks)
    return dataclasses.replace(found, checks=made, drop=math.inf if raw.get("drop") is None else found.drop)
