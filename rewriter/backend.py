"""The pass as a torch.compile backend: `torch.compile(model, backend="rewriter", options={...})`.

Every graph is captured, its attentions detected and rewritten, and handed on to an inner backend. A graph without
attention, or one that cannot be re-traced, goes on as it came.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from rewriter import debug
from rewriter.capture import Graph
from rewriter.checkpointed import runnable
from rewriter.errors import OptionError, RewriterError
from rewriter.instances import Frames, Inputs, Names, Run, served
from rewriter.passes import Rewrite, captured, rewritten
from rewriter.plan import GOALS
from rewriter.plan_check import check_guard, read_plan
from rewriter.select import Selector
from rewriter.site import AttentionSite, Refusal
from rewriter.variant import variants

Inner = str | Callable[[Graph, Sequence[Any]], Callable[..., Any]]


def inner_compiler(inner: Inner) -> Callable[[Graph, Sequence[Any]], Callable[..., Any]]:
    """The backend that compiles what is left: "eager" runs the graph as it is; any of torch's; or a callable."""
    if callable(inner):
        return inner
    if not isinstance(inner, str):
        raise OptionError(f"inner is the name of a backend or a function, not {inner!r}")
    if inner == "eager":
        return lambda gm, example_inputs: runnable(gm).forward
    import torch._dynamo

    try:
        found: Any = torch._dynamo.lookup_backend(inner)
    except torch._dynamo.exc.InvalidBackend as error:
        known = ", ".join(["eager", *torch._dynamo.list_backends()])
        raise OptionError(f"no inner backend is called {inner!r}; known: {known}") from error
    compile_with: Callable[[Graph, Sequence[Any]], Callable[..., Any]] = found
    return compile_with


@dataclass(repr=False)
class GraphRewriter:
    """A dynamo backend with a memory: what it saw is in `sites`, `sampled` and `refusals`, in the order of capture."""

    choose: Selector | None
    inner: Inner = "eager"
    names: Names = field(default_factory=Names)
    sites: dict[str, AttentionSite] = field(default_factory=dict)
    sampled: dict[str, AttentionSite] = field(default_factory=dict)
    refusals: list[Refusal] = field(default_factory=list)
    graphs: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    frames: Frames = field(default_factory=Frames)

    def __call__(self, gm: Graph, example_inputs: Sequence[Any]) -> Run:
        self.graphs += 1
        return served(gm, example_inputs, self.names, self.made)

    def made(self, gm: Graph, inputs: Inputs, names: Names) -> Run:
        """What runs in place of a graph of dynamo's."""
        compile_inner = inner_compiler(self.inner)
        work = self.look(gm, inputs, names)
        graph = None
        if work is not None and self.choose is not None:
            graph = rewritten(work, self.choose.choose)
            self._add_seconds(work)
        run = compile_inner(gm if graph is None else graph, inputs.to_compile)
        return run if self.choose is None else self.choose.counted(run)

    def look(self, gm: Graph, inputs: Inputs, names: Names) -> Rewrite | None:
        """Capture and detect; None where there is nothing to rewrite. Notes what was seen."""
        try:
            # Another compiler traces what is left, and a traced graph cannot ask what a tensor holds.
            work = captured(gm, inputs.values, names.modules, inputs.fakes, observe=self.inner == "eager")
        except RewriterError:
            raise
        except Exception as error:  # Whatever stands in the way of re-tracing, the model itself must go on.
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self.refusals.append(Refusal(f"a graph could not be re-traced ({first}), so it runs as it is"))
            debug.say(1, str(self.refusals[-1]))
            return None
        self.frames.number(work.graph, work.detection)
        self.note(work)
        return work if work.detection.matches or work.detection.sampled else None

    @property
    def replaceable(self) -> bool:
        """Was there an attention that is not only recognised?"""
        return bool(self.sampled) or any(not site.edits for site in self.sites.values())

    def note(self, work: Rewrite) -> None:
        """Remember what a graph holds."""
        self._add_seconds(work)
        for site in work.detection.sites:
            self.sites.setdefault(site.path, site)
        for match in work.detection.sampled:
            self.sampled.setdefault(match.site.path, match.site)
        self.refusals += [refusal for refusal in work.detection.refusals if refusal not in self.refusals]

    def _add_seconds(self, work: Rewrite) -> None:
        """Of the passes since the last time."""
        for name, seconds in work.seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        work.seconds.clear()


def backend(gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: Any = None, **_: Any) -> Callable[..., Any]:
    """What torch.compile calls. Options: `inner` (default "inductor"), `plan` (a Plan or a path), `goal`, `variants`.

    Without a plan only exact variants are placed, chosen by measurement. Raises OptionError on other options.
    """
    given = dict(options or {})
    unknown = set(given) - {"inner", "plan", "goal", "variants"}
    if unknown:
        raise OptionError(f"unknown options {sorted(unknown)}; known: inner, plan, goal, variants")
    if given.get("plan") is not None:
        plan = read_plan(given["plan"])
        check_guard(plan)
        chooser = Selector.replaying(plan)
    else:
        goal, allowed = check_goal(given.get("goal", "latency")), check_variants(given.get("variants"))
        chooser = Selector(goal=goal, allowed=allowed)
    return GraphRewriter(chooser, inner=given.get("inner", "inductor"))(gm, example_inputs)


def check_goal(goal: Any) -> str:
    """What is to be made small."""
    if goal not in GOALS:
        raise OptionError(f"goal is one of {', '.join(GOALS)}, not {goal!r}")
    return str(goal)


def check_variants(names: Any) -> frozenset[str] | None:
    """The names of the variants to choose among, None for all."""
    if names is None:
        return None
    if isinstance(names, str):
        raise OptionError(f"variants is a list of names; write variants=[{names!r}]")
    if not isinstance(names, Iterable):
        raise OptionError(f"variants is a list of names, not {names!r}")
    allowed = frozenset(names)
    unknown = sorted(map(str, allowed - set(variants())))
    if unknown:
        raise OptionError(f"no variant is called {', '.join(unknown)}; known: {', '.join(variants())}")
    return allowed
