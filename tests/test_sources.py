"""What others computed is not believed: other sources, other types of numbers, less time."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import rewriter
from rewriter import cache, sources
from rewriter.kernels.local.sliding_window import VARIANT as WINDOW
from rewriter.tune import record
from rewriter.tune.measure import SiteBench
from tests.test_tune import BATCHES, Net

CODE = "def configs(site, target):\n    return [{'window': 64, 'sinks': 4}]  # %s\n"


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that is believed."""
    monkeypatch.setenv("REWRITER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(record, "recall", cache.recall)
    monkeypatch.setattr(record, "remember", cache.remember)


@pytest.fixture
def module(tmp_path: Path) -> Iterator[ModuleType]:
    """A module that is no part of the library, with a part of a variant in it."""
    file = tmp_path / "outside_of_the_library.py"
    file.write_text(CODE % "first")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = made
    spec.loader.exec_module(made)
    rewriter.register(dataclasses.replace(WINDOW, name="outside", configs=made.configs))
    yield made
    rewriter.unregister("outside")
    del sys.modules[file.stem]


def test_a_variant_of_ones_own_that_is_changed_is_another(module: ModuleType) -> None:
    first = sources.version()
    assert sources.version() == first
    assert module.__file__ is not None
    Path(module.__file__).write_text(CODE % "second")
    assert sources.version() != first


def test_what_was_typed_is_known_in_its_process_only(monkeypatch: pytest.MonkeyPatch) -> None:
    before = sources.version()
    typed: dict[str, Any] = {"__name__": "typed"}
    exec("def build(site, config): ...", typed)
    rewriter.register(dataclasses.replace(WINDOW, name="typed", build=typed["build"]))
    try:
        here = sources.version()
        assert here == sources.version() != before
        monkeypatch.setattr(sources, "_PROCESS", "another")
        assert sources.version() != here
    finally:
        rewriter.unregister("typed")
    assert sources.version() == before


def evaluations(model: torch.nn.Module, batches: Any) -> int:
    plan = rewriter.plan_of(rewriter.optimize(model, batches, metric="cosine", max_drop=0.5))
    assert plan is not None and plan.search is not None
    found: int = plan.search["evaluations"]
    return found


def test_a_model_of_another_type_is_another(cached: None) -> None:
    """Weights that are whole in bfloat16, whose model answers nearly alike in both."""
    model = Net().eval()
    model.load_state_dict({name: value.bfloat16().float() for name, value in model.state_dict().items()})
    assert evaluations(model, BATCHES) > 0
    assert evaluations(model, BATCHES) == 0, "the same once more"
    rewriter.restore(model)
    assert evaluations(model.to(torch.bfloat16), [batch.bfloat16() for batch in BATCHES]) > 0


def test_what_was_measured_in_haste_is_measured_again(cached: None, monkeypatch: pytest.MonkeyPatch) -> None:
    budgets: list[float] = []
    compare = SiteBench.compare

    def watched(self: SiteBench, implementations: Any, *, goal: str, budget: float) -> list[float]:
        budgets.append(budget)
        return compare(self, implementations, goal=goal, budget=budget)

    monkeypatch.setattr(SiteBench, "compare", watched)
    for seconds in (1e-3, None, None):
        rewriter.optimize(Net().eval(), BATCHES, metric="cosine", max_drop=0.0, time_budget=seconds)
    assert len(budgets) == 2 and budgets[0] == 0.0 < budgets[1]
