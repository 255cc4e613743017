"""Every model of tests/zoo: all its attentions are found, nothing else is, and exact rewrites keep its outputs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from rewriter.bench.detect import look
from rewriter.bench.entries import load

ZOO: list[Any] = load(Path(__file__).parent / "zoo")

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's libraries


class NotRun:
    """How many models were left out because their library is not installed: counted, never silently left out."""

    def __init__(self) -> None:
        self.missing: Counter[str] = Counter()

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for name, number in sorted(self.missing.items()):
            terminalreporter.write_line(f"zoo: {number} models not run (library missing: {name})", yellow=True)


@pytest.fixture(scope="session")
def not_run(request: pytest.FixtureRequest) -> Counter[str]:
    plugin = NotRun()
    request.config.pluginmanager.register(plugin)
    return plugin.missing


def marked(entry: Any) -> Any:
    return pytest.param(entry, id=entry.name, marks=() if entry.fast else pytest.mark.slow)


@pytest.mark.parametrize("entry", [marked(entry) for entry in ZOO])
def test_a_model_of_the_zoo(entry: Any, not_run: Counter[str]) -> None:
    try:
        model, args, kwargs = entry.build()
    except ModuleNotFoundError as error:
        not_run[str(error.name)] += 1
        pytest.skip(f"library missing: {error.name}")
    with torch.set_grad_enabled(entry.grad):
        seen = look(model, args, kwargs)
    assert seen.found == entry.sites, seen.refused
    assert seen.change <= 1
    if entry.masks is not None:
        assert {str(site.mask) for site in seen.sites} == entry.masks


def test_the_fast_ones_are_of_every_library() -> None:
    fast = [entry for entry in ZOO if entry.fast]
    assert {entry.library for entry in fast} == {entry.library for entry in ZOO}
    assert sum(entry.sites == 0 for entry in fast) >= 3
