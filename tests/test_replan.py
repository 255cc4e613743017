"""Searches that go on where an earlier one was stopped, and plans that are applied elsewhere."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import rewriter
from rewriter.errors import CalibrationError, GuardError, PlanError
from rewriter.guard import error
from rewriter.mixture import ByHeads
from rewriter.plan import Plan
from rewriter.tune import record, whole
from rewriter.tune.measure import SiteBench
from rewriter.tune.scores import Scores
from rewriter.tune.tuning import Tuning

LENGTH = 1100


class Net(nn.Module):
    """One causal attention with two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(32, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.project(x).unflatten(-1, (2, -1)).transpose(1, 2) for _ in range(3))
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return x + ((q @ k.mT).masked_fill(hidden, float("-inf")).softmax(-1) @ v).transpose(1, 2).flatten(2)


def data(seed: int) -> Tensor:
    return torch.randn(1, LENGTH, 32, generator=torch.Generator().manual_seed(seed))


BATCHES = [data(seed) for seed in range(24)]


@pytest.fixture(autouse=True)
def times(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """The original costs 100, `sdpa` 50, narrower windows less and less."""
    table = {"result": 60.0, "site": 1.0}

    def compare(self: SiteBench, implementations: Any, *, goal: str, budget: float) -> list[float]:
        costs = [51.0 if isinstance(each, ByHeads) else 50.0 - 10 * n for n, each in enumerate(implementations)]
        return [100.0, *(table["site"] * cost for cost in costs)]

    def alternate(functions: Any, **options: Any) -> Any:
        return [[0.1], [table["result"] / 1000], [0.09]][: len(functions)]

    monkeypatch.setattr(SiteBench, "compare", compare)
    monkeypatch.setattr(whole, "alternate", alternate)
    return table


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], Any]:
    """A cache that lasts for one test."""
    table: dict[tuple[str, str], Any] = {}
    monkeypatch.setattr(record, "recall", lambda kind, place: copy.deepcopy(table.get((kind, place))))
    monkeypatch.setattr(record, "remember", lambda kind, place, value: table.update({(kind, place): value}))
    return table


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was measured, one word each."""
    words: list[str] = []

    def counting(owner: Any, name: str, word: str) -> None:
        real = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            words.append(word)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapped)

    counting(SiteBench, "compare", "site")
    from rewriter.tune import predict, scores

    counting(predict, "gradients", "effects")
    counting(scores, "evaluate", "metric")
    return words


def searched(**options: Any) -> Plan:
    torch.manual_seed(1)
    model = rewriter.optimize(Net().eval(), BATCHES, metric="cosine", **({"max_drop": 0.5} | options))
    plan = rewriter.plan_of(model)
    assert plan is not None and plan.search is not None
    return plan


def decided(plan: Plan) -> list[Any]:
    return [decision.to_json() for decision in plan.decisions]


def test_a_second_search_measures_nothing_again(kept: Any, counted: list[str]) -> None:
    first = searched()
    assert {"site", "effects", "metric"} <= set(counted) and kept
    spent = len(counted)
    again = searched()
    assert len(counted) == spent and again.search is not None and again.search["evaluations"] == 0
    assert decided(again) == decided(first) and again.guard == first.guard
    searched(resume=False)
    assert len(counted) == 2 * spent


def test_the_same_cache_gives_the_same_plan(kept: Any, times: dict[str, float]) -> None:
    """Though the machine has become slower for the result, which decides whether it is taken."""
    first = searched()
    assert first.fidelity == "approximate"
    times["result"] = 200.0
    assert decided(searched()) == decided(first)
    assert searched(resume=False).fidelity == "exact"


def test_a_stopped_search_goes_on_where_it_was(kept: Any, counted: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = decided(searched())
    spent, tables = len(counted), dict(kept)
    kept.clear()
    counted.clear()

    class Killed(BaseException):
        pass

    def killed(self: Scores, *_: Any) -> Any:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Scores, "of", killed)
        with pytest.raises(Killed):
            searched()
    before = len(counted)
    assert 0 < before < spent
    assert decided(searched()) == whole and len(counted) == spent and kept.keys() == tables.keys()


def test_what_a_metric_of_ones_own_depends_on_is_not_known(kept: Any) -> None:
    calls: list[int] = []

    def metric(model: nn.Module, batch: Tensor) -> float:
        calls.append(1)
        return 1.0

    for spent in (1, 2):
        rewriter.optimize(Net().eval(), BATCHES, metric=(metric, "higher"))
        assert len(calls) % spent == 0 and len(calls) > 24 * spent


def test_an_interrupted_search_gives_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    real, trials = Scores.of, list[Any]()

    def interrupted(self: Scores, plan: Any, *lost: Any) -> Any:
        trials.append(plan)
        if len(trials) == 1:
            raise KeyboardInterrupt
        return real(self, plan, *lost)

    monkeypatch.setattr(Scores, "of", interrupted)
    model = rewriter.optimize(Net().eval(), BATCHES, metric="cosine", max_drop=1e-3)
    report = rewriter.report_of(model)
    assert report is not None and any("stopped by hand" in note for note in report.notes)
    assert report.verdict is not None and report.verdict.held and len(trials) >= 2
    # Before anything is known there is nothing to give.
    model = Net().eval()
    monkeypatch.setattr(Tuning, "capture", interrupted_at_once)
    with pytest.raises(KeyboardInterrupt):
        rewriter.optimize(model, BATCHES)
    assert rewriter.plan_of(model) is None and model._compiled_call_impl is None


@pytest.mark.parametrize("stage", ["check on held-out data", "measure end to end"])
def test_an_interrupted_check_gives_what_is_known_to_hold(stage: str) -> None:
    def interrupted(said: str, done: int, total: int | None) -> None:
        if said == stage:
            raise KeyboardInterrupt

    model = rewriter.optimize(Net().eval(), BATCHES, metric="cosine", max_drop=0.5, progress=interrupted)
    report, plan = rewriter.report_of(model), rewriter.plan_of(model)
    assert report is not None and plan is not None
    assert any("stopped by hand" in note for note in report.notes)
    if stage == "measure end to end":
        assert report.verdict is not None and report.verdict.held and plan.fidelity == "approximate"
    else:
        assert report.verdict is None and plan.fidelity == "exact"
    assert model(BATCHES[0]).isfinite().all() and rewriter.restore(model) is model


def interrupted_at_once(*args: Any) -> Any:
    raise KeyboardInterrupt


def test_a_plan_says_how_it_was_found(tmp_path: Path) -> None:
    plan = searched(pareto=True)
    search = plan.search
    assert search is not None and search["metric"] == "cosine" and search["bound"] == 0.5
    assert [stage["stage"] for stage in search["timeline"]][:3] == ["capture", "measure the original", "measure sites"]
    assert 0 < sum(stage["seconds"] for stage in search["timeline"]) <= search["seconds"]
    assert search["effects"] == "gradients" and search["pairs"] == len(plan.decisions[0].tried)
    front = search["front"]
    assert [point["cost"] for point in front] == sorted(point["cost"] for point in front)
    assert sum(point["chosen"] for point in front) == 1 and all(point["measured"] is not None for point in front)
    plan.save(tmp_path)
    assert Plan.load(tmp_path) == plan


def test_predictions_of_effects_are_close_where_they_are_small() -> None:
    """Of windows that hide little, alone: within a factor of four of what was measured."""
    plan = searched(pareto=True, max_drop=1e-3)
    assert plan.search is not None
    pairs = [(p["predicted"], p["measured"]) for p in plan.search["front"] if p["predicted"] and p["measured"]]
    assert pairs and all(1 / 4 < predicted / measured < 4 for predicted, measured in pairs if 1e-9 < measured < 1e-2)


# --- plans elsewhere -------------------------------------------------------------------------------------------------


def elsewhere(plan: Plan) -> Plan:
    return dataclasses.replace(plan, target={**plan.target, "torch": "1.0"})


def test_a_plan_of_another_machine_is_timed_again(times: dict[str, float], counted: list[str]) -> None:
    plan = searched()
    counted.clear()
    torch.manual_seed(1)
    model = rewriter.apply(Net().eval(), plan)
    model(data(0))
    assert not counted
    rewriter.restore(model)
    rewriter.apply(model, elsewhere(plan))
    windowed = model(data(0))
    report = rewriter.report_of(model)
    assert counted and report is not None and any("torch differ" in note for note in report.notes)
    rewriter.restore(model)
    expected = model(data(0))
    assert error(windowed, expected) > 1e-3
    times["site"] = 11.0
    rewriter.apply(model, elsewhere(plan))
    assert torch.equal(model(data(0)), expected)
    report = rewriter.report_of(model)
    assert report is not None and any("took 5.50 of" in note for note in report.notes)


def test_a_plan_for_other_weights_is_measured_or_refused() -> None:
    plan = searched()
    torch.manual_seed(2)
    other = Net().eval()
    with pytest.raises(PlanError, match=r"other weights.*project.weight has other values"):
        rewriter.apply(other, plan)
    expected = other(data(0))
    rewriter.optimize(other, BATCHES, plan=plan, metric="cosine", max_drop=0.9)
    report = rewriter.report_of(other)
    assert report is not None and report.verdict is not None and report.verdict.held
    assert report.verdict.samples == len(BATCHES) and error(other(data(0)), expected) > 1e-3
    rewriter.restore(other)
    with pytest.raises(GuardError, match="does not keep the bound"):
        rewriter.optimize(other, BATCHES, plan=plan, metric="cosine", max_drop=1e-9)
    assert rewriter.plan_of(other) is None and torch.equal(other(data(0)), expected)
    with pytest.raises(PlanError, match=r"another model.*project.weight is missing; #.project.weight is new"):
        rewriter.optimize(nn.Sequential(Net()).eval(), BATCHES, plan=plan)


def test_an_edited_plan_is_measured_or_refused(tmp_path: Path) -> None:
    plan = searched()
    file = plan.save(tmp_path)
    raw = json.loads(file.read_text())
    raw["decisions"][0]["config"]["window"] *= 2
    file.write_text(json.dumps(raw))
    torch.manual_seed(1)
    model = Net().eval()
    for attempt in (rewriter.apply, lambda model, file: rewriter.optimize(model, plan=file)):
        with pytest.raises(PlanError, match="edited by hand"):
            attempt(model, file)
    with pytest.raises(BackendCompilerFailed, match="edited by hand"):
        torch.compile(model, backend="rewriter", options={"plan": file, "inner": "eager"})(data(0))
    torch._dynamo.reset()
    rewriter.optimize(model, BATCHES, plan=file, metric="cosine", max_drop=0.9)
    measured = rewriter.plan_of(model)
    assert measured is not None and measured.decisions[0].config == raw["decisions"][0]["config"]
    assert measured.guard is not None and measured.guard["held"] and measured.search == plan.search
    rewriter.restore(model)
    rewriter.apply(model, measured.save(tmp_path / "again.json"))
    rewriter.restore(model)
    refused = dataclasses.replace(measured, guard={**measured.guard, "held": False})
    with pytest.raises(PlanError, match="within its bound"):
        rewriter.apply(model, refused)
    rewriter.optimize(model, BATCHES, plan=refused, metric="cosine", max_drop=0.9)


def test_a_replayed_plan_keeps_what_is_known_of_it(tmp_path: Path) -> None:
    plan = elsewhere(searched())
    torch.manual_seed(1)
    model = rewriter.apply(Net().eval(), plan)
    model(data(0))
    again = rewriter.plan_of(model)
    assert again == plan and again.search is not None and again.timings, "also the machine, of which all this is"
    assert again.save(tmp_path) and Plan.load(tmp_path) == plan
    torch.manual_seed(2)
    other = rewriter.apply(Net().eval(), plan, check_weights=False)
    unmeasured = rewriter.plan_of(other)
    assert unmeasured is not None and unmeasured.guard is None, "the guard has not seen these weights"


class Counting(Net):
    """It writes into one of its buffers with every call, and multiplies by another."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("gain", torch.ones(32))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x * self.gain)


def test_a_plan_is_for_the_buffers_that_calls_do_not_write() -> None:
    torch.manual_seed(1)
    model = rewriter.optimize(Counting().eval(), BATCHES, metric="cosine", max_drop=0.5)
    plan = rewriter.plan_of(model)
    assert plan is not None and plan.fidelity == "approximate" and plan.model["written"] == ["calls"]
    torch.manual_seed(1)
    other = Counting().eval()
    other(data(0))
    rewriter.apply(other, plan)
    again = rewriter.plan_of(other)
    assert again is not None and again.model == plan.model
    rewriter.restore(other).gain[3] = 2.0
    with pytest.raises(PlanError, match=r"other weights.*gain has other values"):
        rewriter.apply(other, plan)


def test_a_plan_with_an_example_tells_what_fits() -> None:
    plan = searched()
    torch.manual_seed(1)
    model = rewriter.optimize(Net().eval(), plan=plan, example=data(0))
    report = rewriter.report_of(model)
    assert report is not None and report.graphs == 1 and len(report.sites) == 1 and not report.notes
    for kept in (None, plan):
        if kept is None:
            rewriter.restore(model)
        else:
            rewriter.apply(model, plan)
        with pytest.raises(CalibrationError):
            rewriter.optimize(model, plan=dataclasses.replace(plan, guard=None), example=data(0)[..., 1:])
        assert rewriter.plan_of(model) == kept
