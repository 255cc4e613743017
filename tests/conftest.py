"""What every test starts from: no network, a fixed seed, an empty cache of its own, and a small model to work on."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

# Before anything imports transformers, and inherited by the subprocesses that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"
# Threads that spin while they wait take the cores from each other on a busy machine. Read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
_CACHE = tempfile.TemporaryDirectory(prefix="rewriter-cache-")
os.environ["REWRITER_CACHE"] = _CACHE.name

import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

# Torch compiles at the first example of a property, so a deadline would time the compiler.
settings.register_profile("rewriter", deadline=None, derandomize=True)
settings.load_profile("rewriter")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers in every test, whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_measured_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search measures by itself, and does not believe what another test left in the cache."""
    from rewriter.tune import record

    monkeypatch.setattr(record, "recall", lambda kind, place: None)
    monkeypatch.setattr(record, "remember", lambda kind, place, value: None)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """No compiled code left over: dynamo counts recompilations for the whole process."""
    yield
    torch.compiler.reset()


@pytest.fixture(scope="session")
def tiny_lm() -> Callable[..., torch.nn.Module]:
    """`tiny_lm(impl, **overrides)`: a new two-layer causal LM with grouped-query attention, the same weights each time.

    `impl` is "eager" or "sdpa"; `overrides` go to its configuration.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    def build(impl: Literal["eager", "sdpa"] = "eager", **overrides: Any) -> torch.nn.Module:
        facts: dict[str, Any] = {
            "vocab_size": 128,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
        config = LlamaConfig(**(facts | overrides), attn_implementation=impl)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return LlamaForCausalLM(config).eval()

    return build


class Function(torch.nn.Module):
    """A function as a module, for what takes modules only."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


@dataclass
class Rewritten:
    """What became of a model: `sites` in the order of capture, `matches` those of them that can be rewritten and `kept`
    the others, `graphs` as they went to the inner backend.
    """

    run: Any = None
    out: Any = None
    sites: list[Any] = field(default_factory=list)
    matches: list[Any] = field(default_factory=list)
    kept: list[Any] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    graphs: list[torch.fx.GraphModule] = field(default_factory=list)


@pytest.fixture(scope="session")
def rewrite() -> Callable[..., Rewritten]:
    """`rewrite(model or function, *args, variant="original", dynamic=None, **kwargs)`: call it with each attention
    replaced by this variant (by the original where its scores have elements that this variant does not compute), or
    looked at only where `variant` is None. Further calls: `result.run(...)`; without arguments there is no first one.
    """
    from rewriter.capture import compiled, module_names
    from rewriter.passes import captured, rewritten
    from rewriter.variant import variants

    def chosen(variant: str, site: Any) -> Any:
        return variants()[variant if site.elements <= variants()[variant].elements else "original"]

    def rewrite(model: Any, *args: Any, variant: str | None = "original", dynamic: Any = None, **kwargs: Any) -> Any:
        module = model if isinstance(model, torch.nn.Module) else Function(model)
        names, result = module_names(module), Rewritten()

        def backend(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
            work = captured(gm, example_inputs, names)
            result.sites += work.detection.sites
            result.matches += work.detection.matches
            result.kept += work.detection.kept
            result.refusals += map(str, work.detection.refusals)
            graph = rewritten(work, lambda match: variant and chosen(variant, match.site).build(match.site, {}))
            result.graphs.append(work.graph if graph is None else graph)
            return result.graphs[-1].forward

        result.run = compiled(module, backend, dynamic=dynamic)
        result.out = result.run(*args, **kwargs) if args or kwargs else None
        return result

    return rewrite


# --- tests for a GPU are counted, never silently left out ------------------------------------------------------------

_gpu_tests: set[str] = set()
_gpu_tests_run: set[str] = set()
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_itemcollected(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        _gpu_tests.add(item.nodeid)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.nodeid in _gpu_tests and not torch.cuda.is_available() and not _INTERPRETED:
        pytest.skip("no CUDA device")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    # With more than one process, this one collects nothing: it knows the tests of the others by their reports.
    if "gpu" in report.keywords:
        _gpu_tests.add(report.nodeid)
        if report.when == "call" and not report.skipped:
            _gpu_tests_run.add(report.nodeid)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    left = len(_gpu_tests - _gpu_tests_run)
    if _INTERPRETED and _gpu_tests_run:
        terminalreporter.write_line(f"gpu: {len(_gpu_tests_run)} tests run by Triton's interpreter, 0 on a device")
    if left:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
        terminalreporter.write_line(f"gpu: {left} of {len(_gpu_tests)} tests not run ({device})", yellow=True)


def pytest_unconfigure() -> None:
    _CACHE.cleanup()
