"""What every test starts from: no network, a fixed seed, an empty cache of its own, and a small model to work on."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

# Before anything imports transformers, and inherited by the subprocesses that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"
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


# --- tests for a GPU are counted, never silently left out ------------------------------------------------------------

_gpu_tests: set[str] = set()
_gpu_tests_run: set[str] = set()


def pytest_itemcollected(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        _gpu_tests.add(item.nodeid)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.nodeid in _gpu_tests and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and not report.skipped and report.nodeid in _gpu_tests:
        _gpu_tests_run.add(report.nodeid)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    left = len(_gpu_tests - _gpu_tests_run)
    if left:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
        terminalreporter.write_line(f"gpu: {left} of {len(_gpu_tests)} tests not run ({device})", yellow=True)


def pytest_unconfigure() -> None:
    _CACHE.cleanup()
