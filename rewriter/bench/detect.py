"""How many of the attentions in a list of models are found, next to what PyTorch Inductor recognises there.

Each model is called twice through torch.compile in a process of its own; the numbers are the second call's. What is
counted is executions: a graph that runs once for each layer counts each time, as the known numbers do.
"""

from __future__ import annotations

import contextlib
import importlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils._pytree import tree_leaves

from rewriter.bench.entries import Entry, load, spread
from rewriter.bench.isolated import in_child
from rewriter.capture import Graph, compiled, module_names
from rewriter.checkpointed import runnable
from rewriter.errors import RewriterError, brief
from rewriter.guard import model_tolerance, relative_rms
from rewriter.passes import captured, rewritten
from rewriter.raising import Match
from rewriter.site import AttentionSite
from rewriter.target import Target
from rewriter.terminal import calm
from rewriter.variant import ORIGINAL, Implementation, variants

RECOMPILATIONS = 64
"""Layers of different sizes share code: dynamo's own limit would leave the last of them out."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One model.

    known      attentions that a call executes
    found      by detection
    refused    reason -> how many looked like one and were not taken
    nodes      in all its graphs together
    calls      fused calls that the model already makes, as PyTorch operators
    inductor   further ones that Inductor's patterns recognise; None where that was not asked for or failed
    change     largest relative change of an output by exact rewrites, in multiples of what rounding may do
    seconds    of detection; of the whole pass; of a cold compilation by Inductor, where that was asked for
    missing    the library that is not installed, so that nothing was measured
    problem    what went wrong, so that nothing (or for Inductor's number: only that) was measured
    """

    name: str
    library: str
    known: int
    found: int = 0
    refused: Mapping[str, int] = field(default_factory=dict)
    nodes: int = 0
    calls: int = 0
    inductor: int | None = None
    change: float = 0.0
    detect_seconds: float = 0.0
    pass_seconds: float = 0.0
    cold_seconds: float | None = None
    missing: str = ""
    problem: str = ""

    @property
    def hit(self) -> int:
        """Found, and there."""
        return min(self.found, self.known)

    @property
    def extra(self) -> int:
        """Found beyond what is there."""
        return max(0, self.found - self.known)

    @property
    def changed(self) -> bool:
        """Did an exact rewrite change an output by more than rounding?"""
        return not self.change <= 1.0

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure. `overhead`: on how many entries a cold compilation is timed; `timeout`: seconds an entry."""

    library: str | None = None
    limit: int | None = None
    inductor: bool = True
    overhead: int = 0
    timeout: float = 150.0


def chosen(path: Path, options: Options) -> list[Entry]:
    """The entries to measure."""
    entries = [entry for entry in load(path) if options.library in (None, entry.library)]
    return spread(entries, options.limit)


def serve(path: Path, options: Options) -> Iterator[Measured]:
    """Measure every entry, each in a child of this process, which has warmed up for all of them."""
    entries = chosen(path, options)
    timed = {entry.name for entry in spread(entries, options.overhead)} if options.overhead else set()
    with calm():
        _warm_up(entries, options.inductor)
        for entry in entries:
            facts: dict[str, Any] = {"name": entry.name, "library": entry.library, "known": entry.sites}
            try:
                facts |= in_child(_facts, entry, options.inductor, entry.name in timed, timeout=options.timeout)
            except RuntimeError as error:
                facts["problem"] = str(error)
            yield Measured(**facts)


def _warm_up(entries: Sequence[Entry], inductor: bool) -> None:
    """Import what the children share, and do once what is done at the first use only."""
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    for library in dict.fromkeys(entry.library for entry in entries):
        with contextlib.suppress(Exception):  # the children will say what is missing
            importlib.import_module(library.replace("-", "_"))

    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.softmax(x @ x.mT * 0.5, -1) @ x

    model, x = Attention(), torch.randn(1, 2, 5, 4)
    with torch.no_grad():
        look(model, (x,), {})
        if inductor:
            _recognised(model, (x,), {})
    torch.compiler.reset()


def _facts(entry: Entry, inductor: bool, timed: bool) -> dict[str, Any]:
    """The fields of `Measured`, in this process."""
    try:
        model, args, kwargs = entry.build()
    except ModuleNotFoundError as error:
        return {"missing": error.name or str(error)}
    with torch.set_grad_enabled(getattr(entry, "grad", False)):
        seen = look(model, args, kwargs)
        facts: dict[str, Any] = {name: getattr(seen, name) for name in ("found", "calls", "refused", "change", "nodes")}
        facts |= {"detect_seconds": seen.seconds["detect"], "pass_seconds": sum(seen.seconds.values())}
        if inductor:
            try:
                facts["inductor"] = _recognised(model, args, kwargs)
            except Exception as error:  # It is not what is being tested.
                facts["problem"] = f"Inductor: {brief(error)}"
        if timed:
            facts["cold_seconds"] = _cold_compilation(model, args, kwargs)
    return facts


@dataclass
class _Tally:
    """What the executions of one call add up to."""

    found: int = 0
    calls: int = 0
    fused: int = 0
    refused: Counter[str] = field(default_factory=Counter)

    def add(self, here: _Tally) -> None:
        """One more execution."""
        self.found += here.found
        self.calls += here.calls
        self.fused += here.fused
        self.refused.update(here.refused)

    def clear(self) -> None:
        """Start again."""
        self.found = self.calls = self.fused = 0
        self.refused.clear()


@dataclass
class Seen:
    """What one call of a model shows: `found`, `calls` and `refused` by execution, the rest by graph."""

    found: int = 0
    calls: int = 0
    refused: Mapping[str, int] = field(default_factory=dict)
    change: float = 0.0
    nodes: int = 0
    sites: list[AttentionSite] = field(default_factory=list)
    seconds: Counter[str] = field(default_factory=Counter)


def look(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Seen:
    """Find and rewrite exactly; count the second call and compare its outputs with those of the model as it is."""
    names, tally, seen = module_names(model), _Tally(), Seen()

    def backend(gm: Graph, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        try:
            work = captured(gm, example_inputs, names)
        except RewriterError:
            raise
        except Exception as error:  # as the library's backend does: a graph that cannot be re-traced goes on as it came
            seen.nodes += len(gm.graph.nodes)
            return _counted(runnable(gm).forward, tally, _Tally(refused=Counter([f"not re-traced: {brief(error)}"])))
        here = _Tally(
            found=len(work.detection.sites),
            calls=len(work.graph.graph.find_nodes(op="call_function", target=_FUSED)),
            refused=Counter(refusal.reason for refusal in work.detection.refusals),
        )
        seen.nodes += len(work.graph.graph.nodes)
        seen.sites += work.detection.sites
        graph = rewritten(work, _exact)
        seen.seconds.update(work.seconds)
        return _counted(runnable(gm if graph is None else graph).forward, tally, here)

    expected = _called(model, args, kwargs)
    actual = _second_call(model, backend, tally, args, kwargs)
    seen.found, seen.calls, seen.refused = tally.found, tally.calls, dict(tally.refused)
    seen.change = change(actual, expected, {site.torch_dtype for site in seen.sites})
    return seen


_FUSED = torch.ops.aten.scaled_dot_product_attention.default


def _recognised(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """How often the patterns of Inductor match. Its passes on graphs run as usual; nothing is lowered."""
    from torch._dynamo.utils import counters
    from torch._functorch._aot_autograd.utils import make_boxed_func
    from torch._inductor.compile_fx import compile_fx

    tally, counter = _Tally(), counters["inductor"]

    def as_it_is(graph: Graph, example_inputs: Sequence[Any], **_: Any) -> Any:
        return make_boxed_func(graph.forward)

    def backend(gm: Graph, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        before = counter["fuse_attention"]
        run: Any = compile_fx(gm, list(example_inputs), inner_compile=as_it_is)
        return _counted(run, tally, _Tally(fused=counter["fuse_attention"] - before))

    with _no_caches():
        _second_call(model, backend, tally, args, kwargs)
    return tally.fused


def _cold_compilation(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
    """Seconds of the first call through Inductor, with nothing in its caches."""
    from torch._inductor.utils import fresh_inductor_cache

    torch.compiler.reset()
    with fresh_inductor_cache(), _no_caches(), _many_recompilations():
        run = torch.compile(model)
        start = time.perf_counter()
        _called(run, args, kwargs)
        return time.perf_counter() - start


@contextlib.contextmanager
def _no_caches() -> Iterator[None]:
    import torch._functorch.config
    import torch._inductor.config

    inductor: Any = torch._inductor.config
    functorch: Any = torch._functorch.config
    # Workers would be started once in every child.
    with inductor.patch(fx_graph_cache=False, compile_threads=1), functorch.patch(enable_autograd_cache=False):
        yield


@contextlib.contextmanager
def _many_recompilations() -> Iterator[None]:
    import torch._dynamo.config

    dynamo: Any = torch._dynamo.config
    with dynamo.patch(recompile_limit=RECOMPILATIONS):
        yield


def _counted(run: Callable[..., Any], total: _Tally, here: _Tally) -> Callable[..., Any]:
    """`run`, adding to the total whenever it is called."""

    def call(*args: Any) -> Any:
        total.add(here)
        return run(*args)

    return call


def _second_call(
    model: nn.Module, backend: Callable[..., Any], tally: _Tally, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Its outputs; the tally holds what it executed. The first call compiles, and may run graphs while it does."""
    torch.compiler.reset()
    with _many_recompilations():
        run = compiled(model, backend)
        try:
            _called(run, args, kwargs)
            tally.clear()
            return _called(run, args, kwargs)
        except BackendCompilerFailed as error:
            raise error.inner_exception from error


def _called(run: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """With the same random numbers each time."""
    torch.manual_seed(0)
    return run(*args, **kwargs)


@cache
def _target() -> Target:
    return Target.current()


def _exact(match: Match) -> Implementation | None:
    """The first exact variant that applies: another implementation if there is one, the plain definition otherwise."""
    for variant in sorted(variants().values(), key=lambda variant: variant.name == ORIGINAL):
        if variant.fidelity == "exact" and variant.takes(match.site, _target()):
            for config in variant.configs(match.site, _target()):
                return variant.build(match.site, config)
    return None


def change(actual: Any, expected: Any, inner: Iterable[torch.dtype] = ()) -> float:
    """The largest, over all outputs of floating type, as a multiple of what rounding may do in their type and the
    types of the attentions inside.
    """
    after, before = (
        [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        for out in (actual, expected)
    )
    if len(after) != len(before):
        return float("inf")
    bound = max(map(model_tolerance, inner), default=0.0)
    pairs = zip(after, before, strict=True)
    return max((relative_rms(a, b) / max(bound, model_tolerance(b.dtype)) for a, b in pairs), default=0.0)
