"""What was asked for: the arguments of `optimize`, checked."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from rewriter.backend import GraphRewriter, Inner
from rewriter.report import Timing
from rewriter.select import Selector
from rewriter.session import Session, install, new_session
from rewriter.tune.deadline import Deadline
from rewriter.tune.record import Progress
from rewriter.verdict import Limits, Verdict


@dataclass(frozen=True, kw_only=True)
class Request:
    """One call of `optimize`."""

    goal: str
    allowed: frozenset[str] | None
    inner: Inner
    dynamic: bool | None
    progress: Progress
    limits: Limits
    metric: Any
    seed: int
    deadline: Deadline
    fresh: bool = False
    pareto: bool = False
    begin: float = field(default_factory=time.perf_counter)

    @property
    def max_drop(self) -> float:
        """The bound on the metric."""
        return self.limits.max_drop

    def installed(self, model: nn.Module, selector: Selector) -> Session:
        """The model with a selector's choices in place."""
        session = new_session(model, GraphRewriter(selector, inner=self.inner), self.goal, self.dynamic)
        install(model, session)
        return session

    def finished(self, session: Session, verdict: Verdict | None = None, *timings: Timing | None) -> Session:
        """The session with its report filled in."""
        session.report.verdict = verdict
        session.guard = verdict.to_json() if verdict is not None else None
        session.report.timings = session.timings = [each for each in timings if each is not None]
        session.report.seconds = {"optimize": time.perf_counter() - self.begin}
        return session
