"""One plan of what was found for inputs of several classes of length, each by a search of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import nn

from rewriter.guard import evaluating
from rewriter.plan import Decision
from rewriter.select import Selector
from rewriter.session import Session
from rewriter.tune.prepare import Prepared
from rewriter.tune.request import Request
from rewriter.tune.tuning import size_of
from rewriter.tune.whole import runs_of
from rewriter.verdict import Check, Verdict

_COUNTED = ("evaluations", "needed", "guarding", "exhaustive", "exhaustive_by_heads", "pairs")
"""What a search counts, and several searches together."""


def together(model: nn.Module, request: Request, found: Sequence[tuple[Prepared, Session]], left: int) -> Session:
    """The sessions' choices in place at once, the longest class first; `left` others had no time.

    Their calls are told apart by the number of keys, so that what each guard has measured is what such calls run.
    """
    (longest, first), *others = found
    selector = _selector(longest, first)
    names = [_name(at) for at, _ in found]
    for at, session in others:
        _add(selector, at, _selector(at, session))
    if any(_selector(at, session).allowed != frozenset() for at, session in found):
        selector.allowed = request.allowed
    result = request.installed(model, selector)
    with evaluating(model):  # so that the report knows of all graphs
        for at, _ in found:
            runs_of(model, max(at.held_out, key=size_of))[1]()
    result.search = _searches([session.search or {} for _, session in found], [at.record.begin for at, _ in found])
    for name, (_, session) in zip(names, found, strict=True):
        result.report.notes += [f"{name}: {note}" for note in session.report.notes]
    if left:
        result.report.notes.append("there was no time for the shorter calls, which run what is exact")
    verdict = first.report.verdict
    for name, (_, session) in zip(names[1:], others, strict=True):
        verdict = _joined(verdict, name, session.report.verdict)
    return request.finished(result, verdict, *(timing for _, session in found for timing in session.timings))


def _selector(at: Prepared, session: Session) -> Selector:
    selector = session.rewriter.choose
    assert isinstance(selector, Selector)
    return selector


def _most(at: Prepared) -> int:
    """Keys of the longest call of the class."""
    return max(most for _, most in at.tuning.switches.lengths.values())


def _name(at: Prepared) -> str:
    return f"calls with up to {_most(at):,} keys"


def _add(selector: Selector, at: Prepared, shorter: Selector) -> None:
    """Take in what a shorter class runs where it is something else."""
    for path, (_, most) in at.tuning.switches.lengths.items():
        own, longer = shorter.decisions.get(path), selector.decisions.get(path)
        if own is None:
            continue
        if longer is None:
            selector.decisions[path] = own
        elif not (own.fidelity == longer.fidelity == "exact" and _what(own) == _what(longer)):
            ranged = own if own.lengths is not None else dataclasses.replace(own, lengths=(1, most))
            selector.shorter.setdefault(path, []).append(ranged)


def _what(decision: Decision) -> Any:
    return decision.variant, dict(decision.config), decision.heads


def _joined(verdict: Verdict | None, name: str, other: Verdict | None) -> Verdict | None:
    """One verdict, whose further conditions are what the guard says of shorter calls."""
    if verdict is None or other is None:
        return verdict or other
    found = verdict.checked(
        Check(
            name=f"{other.metric}, {name}", bound=max(other.max_drop, other.rounding), drop=other.drop,
            upper=other.upper, held=other.held, note=f"{other.samples} samples",
        )
    )  # fmt: skip
    for check in other.checks:
        found = found.checked(dataclasses.replace(check, name=f"{check.name}, {name}"))
    return found


def _searches(found: Sequence[Any], begins: Sequence[float]) -> dict[str, Any]:
    """One record: counts of all, stages one after the other; trials and front are those of the longest inputs."""
    first = dict(found[0])
    for each, begin in zip(found[1:], begins[1:], strict=True):
        late = begin - begins[0]
        first |= {name: first[name] + each[name] for name in _COUNTED}
        stages = [*first["timeline"], *({**stage, "begin": stage["begin"] + late} for stage in each["timeline"])]
        first["timeline"] = sorted(stages, key=lambda stage: stage["begin"])
        first["seconds"] = max(first["seconds"], late + each["seconds"])
    return first
