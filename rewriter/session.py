"""What a rewritten model carries: its plan, its report, and the way back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from rewriter.backend import GraphRewriter
from rewriter.capture import capture_errors, compiled
from rewriter.errors import CaptureError, OptionError
from rewriter.fingerprint import fingerprint
from rewriter.instances import Names
from rewriter.plan import Plan, decided, module_name
from rewriter.report import Report, Timing
from rewriter.target import Target

SUBMODULE = "rewriter"
"""Where the parameters of learned variants live in the user's model."""
_DYNAMO = {"recompile_limit": 64, "skip_nnmodule_hook_guards": False}
"""Graphs of one model before dynamo gives up (prefill and decode, several lengths, with and without gradients), and
whether it overlooks hooks that come and go."""
_CALL = "_compiled_call_impl"
"""Where `nn.Module.__call__` looks for something to run instead of the module's own forward; it is never pickled."""

_SESSIONS: WeakKeyDictionary[nn.Module, Session] = WeakKeyDictionary()


class Learned(nn.ModuleDict):
    """The parameters of a model's learned variants. A class of our own, so that nobody else's are ever taken away."""


@dataclass
class Session:
    """One rewritten model. Holds no reference to the model, whose life it must not prolong.

    While it is `strict` a call that cannot be captured raises; later it runs the original, and the report says so.
    A `given` plan that is only replayed stays what it was, with its machine and all that was measured there.
    """

    rewriter: GraphRewriter
    goal: str
    guard: dict[str, Any] | None = None
    search: Mapping[str, Any] | None = None
    timings: Sequence[Timing] = ()
    given: Plan | None = None
    report: Report = field(default_factory=Report)
    fingerprint: dict[str, Any] = field(default_factory=dict)
    dynamic: bool | None = None
    strict: bool = True
    in_place: bool = True

    def plan(self) -> Plan:
        """The plan as it stands, with the learned parameters as they are now."""
        selector = self.rewriter.choose
        assert selector is not None
        device = next(iter(self.rewriter.sites.values())).device if self.rewriter.sites else "cpu"
        state = {
            f"{module_name(path)}.{name}": value.clone()
            for path, module in selector.modules.items()
            for name, value in module.state_dict().items()
        }
        decisions = selector.every
        if self.given is not None:
            return dataclasses.replace(self.given, decisions=decisions, model=self.fingerprint, state=state)
        return Plan(
            decisions=decisions,
            target=Target.current(device).to_json(),
            model=self.fingerprint,
            goal=self.goal,
            guard=self.guard,
            judged=decided(decisions) if self.guard is not None else "",
            search=self.search,
            timings=tuple(timing.to_json() for timing in self.timings),
            state=state,
        )

    def current_report(self) -> Report:
        """The report, with what was captured since."""
        selector = self.rewriter.choose
        assert selector is not None
        return dataclasses.replace(
            self.report,
            sites=list(self.rewriter.sites.values()),
            sampled=list(self.rewriter.sampled.values()),
            refusals=list(self.rewriter.refusals),
            graphs=self.rewriter.graphs,
            plan=self.plan(),
            notes=[*self.report.notes, *selector.said],
        )


def session_of(model: nn.Module) -> Session | None:
    """The session of a rewritten model."""
    return _SESSIONS.get(model)


def install(model: nn.Module, session: Session) -> None:
    """Make calls of the model run the rewritten graphs. The model must be as its author left it."""
    selector = session.rewriter.choose
    assert selector is not None
    session.rewriter.names = Names.of(model)
    learned = {d.path: selector.learned(d) for d in selector.decisions.values() if d.fidelity == "learned"}
    if learned and hasattr(model, SUBMODULE):
        raise OptionError(f"the model has an attribute {SUBMODULE!r} of its own, where learned parameters would live")
    call = compiled(model, session.rewriter, dynamic=session.dynamic)
    if learned:
        model.add_module(SUBMODULE, Learned({module_name(path): module for path, module in learned.items()}))
    route(model, call, session)
    _SESSIONS[model] = session


def adopt(module: nn.Module, session: Session) -> None:
    """Let a module that was made by the rewriting carry its session. It has no earlier form to go back to."""
    session.in_place = False
    _SESSIONS[module] = session


def route(model: nn.Module, call: Callable[..., Any] | None, session: Session | None = None) -> None:
    """Send calls of the module to `call`; None sends them where its author did (`model.compile()` uses this too)."""
    facts = vars(model)
    own = facts.get(_CALL)
    own = getattr(own, "rewriter_instead_of", own)
    if call is None:
        facts[_CALL] = own
        if own is None:
            del facts[_CALL]
        return

    def routed(*args: Any, **kwargs: Any) -> Any:
        try:
            # Hooks that come or go later must be seen, and each length may need a graph.
            with torch._dynamo.config.patch(_DYNAMO), capture_errors():
                return call(*args, **kwargs)
        except CaptureError as error:
            if session is None or session.strict:
                raise
            session.rewriter.choose.note(f"a call ran the original code: {error}")  # type: ignore[union-attr]
            # Also where the mistake is in the arguments, so that it is reported as it always was.
            return (own or model._call_impl)(*args, **kwargs)

    # An outer torch.compile goes around this call instead of into it.
    entry: Any = torch.compiler.disable(routed, reason="rewriter has compiled this module")
    entry.rewriter_instead_of = own
    facts[_CALL] = entry


@contextmanager
def rerouted(model: nn.Module, call: Callable[..., Any] | None) -> Iterator[None]:
    """For a while calls of the module go to `call`; None for where its author sent them."""
    facts = vars(model)
    before = facts.get(_CALL)
    route(model, call)
    try:
        yield
    finally:
        if before is not None:
            facts[_CALL] = before
        else:
            facts.pop(_CALL, None)


def unrouted(model: nn.Module) -> AbstractContextManager[None]:
    """For a while the module runs what its author wrote."""
    return rerouted(model, None)


def uninstall(model: nn.Module) -> Session | None:
    """Give the model back as it was. Returns the session that it had; a copy has none, but learned parameters."""
    session = _SESSIONS.pop(model, None)
    if session is not None:
        route(model, None)
    if isinstance(getattr(model, SUBMODULE, None), Learned):
        del model._modules[SUBMODULE]
    return session


def new_session(model: nn.Module, rewriter: GraphRewriter, goal: str, dynamic: bool | None = None) -> Session:
    """A session that is not installed yet."""
    return Session(rewriter=rewriter, goal=goal, fingerprint=fingerprint(model), dynamic=dynamic)
