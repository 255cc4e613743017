"""What a rewritten model carries: its plan, its report, and the way back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from rewriter.backend import GraphRewriter
from rewriter.capture import capture_errors, compiled, module_names
from rewriter.errors import OptionError
from rewriter.plan import Plan, fingerprint
from rewriter.report import Report
from rewriter.select import module_name
from rewriter.target import Target

SUBMODULE = "rewriter"
"""Where the parameters of learned variants live in the user's model."""
_MOST_GRAPHS = 64
"""Graphs of one model before dynamo gives up: prefill and decode, several lengths, with and without gradients."""

_SESSIONS: WeakKeyDictionary[nn.Module, Session] = WeakKeyDictionary()


@dataclass
class Session:
    """One rewritten model. Holds no reference to the model, whose life it must not prolong."""

    rewriter: GraphRewriter
    goal: str
    guard: dict[str, Any] | None = None
    report: Report = field(default_factory=Report)
    fingerprint: dict[str, Any] = field(default_factory=dict)

    def plan(self) -> Plan:
        """The plan as it stands, with the learned parameters as they are now."""
        selector = self.rewriter.choose
        assert selector is not None
        device = next(iter(self.rewriter.sites.values())).device if self.rewriter.sites else "cpu"
        state = {
            f"{module_name(path)}.{name}": value
            for path, module in selector.modules.items()
            for name, value in module.state_dict().items()
        }
        return Plan(
            decisions=tuple(selector.decisions.values()),
            target=Target.current(device).to_json(),
            model=self.fingerprint,
            goal=self.goal,
            guard=self.guard,
            state=state,
        )

    def current_report(self) -> Report:
        """The report, with what was captured since."""
        selector = self.rewriter.choose
        assert selector is not None
        return dataclasses.replace(
            self.report,
            sites=list(self.rewriter.sites.values()),
            refusals=list(self.rewriter.refusals),
            graphs=self.rewriter.graphs,
            plan=self.plan(),
            notes=[*self.report.notes, *selector.notes],
        )


def session_of(model: nn.Module) -> Session | None:
    """The session of a rewritten model."""
    return _SESSIONS.get(model)


def install(model: nn.Module, session: Session, *, dynamic: bool | None = None) -> None:
    """Make calls of the model run the rewritten graphs. The model must be as its author left it."""
    if hasattr(model, SUBMODULE):
        raise OptionError(f"the model has an attribute {SUBMODULE!r} of its own, where learned parameters would live")
    selector = session.rewriter.choose
    assert selector is not None
    session.rewriter.names = module_names(model)
    learned = {d.path: selector.learned(d) for d in selector.decisions.values() if d.fidelity == "learned"}
    if learned:
        model.add_module(SUBMODULE, nn.ModuleDict({module_name(path): module for path, module in learned.items()}))
    route(model, compiled(model, session.rewriter, dynamic=dynamic))
    _SESSIONS[model] = session


def route(model: nn.Module, call: Callable[..., Any] | None) -> None:
    """Send calls of the module to `call`; None sends them to its own forward again."""
    if call is None:
        model._compiled_call_impl = None
        return

    def limited(*args: Any, **kwargs: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=_MOST_GRAPHS), capture_errors():
            return call(*args, **kwargs)

    model._compiled_call_impl = limited


def uninstall(model: nn.Module) -> Session | None:
    """Give the model back as it was. Returns the session that it had."""
    session = _SESSIONS.pop(model, None)
    if session is not None:
        route(model, None)
        model._modules.pop(SUBMODULE, None)
    return session


def new_session(model: nn.Module, rewriter: GraphRewriter, goal: str) -> Session:
    """A session that is not installed yet."""
    return Session(rewriter=rewriter, goal=goal, fingerprint=fingerprint(model))
