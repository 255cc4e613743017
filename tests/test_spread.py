"""Measuring ahead on a real local Ray cluster of two nodes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import rewriter
from rewriter import cache, cli
from rewriter.convert import load_target, read_calibration
from rewriter.errors import OptionError
from rewriter.target import Target
from rewriter.tune import record, spread
from rewriter.tune.deadline import Deadline
from rewriter.tune.record import Ledger
from rewriter.tune.spread import Entries, Order, Worker, measure_ahead
from rewriter.verdict import Limits

pytest.importorskip("ray")

ZOO = """
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as attend

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return attend(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

def attention():
    torch.manual_seed(0)
    return nn.Sequential(Attention(), nn.Tanh(), Attention()), torch.randn(1, 600, 32)

def batches(): return [torch.randn(1, 600, 32) for _ in range(12)]

def both(): return [torch.randn(1, length, 32) for length in (600, 150) for _ in range(12)]
"""
MEASURED = 1 + 12 + 4
"""One kind of site, twelve batches of the original, effects on four of them."""


class Clusters:
    """Nodes of a cluster with as many cores as this process uses."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster()
        self.cluster.add_node(num_cpus=0)
        self.nodes = [self.cluster.add_node(num_cpus=torch.get_num_threads()) for _ in range(2)]
        self.address: str = self.cluster.address


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the model and its data are found by name; the cache is empty and believed."""
    (tmp_path / "spread_zoo.py").write_text(ZOO)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "spread_zoo", raising=False)
    monkeypatch.setenv("REWRITER_CACHE", str(tmp_path / "ours"))
    monkeypatch.setattr(record, "recall", cache.recall)
    monkeypatch.setattr(record, "remember", cache.remember)
    return tmp_path


@pytest.fixture
def cluster(folder: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Clusters]:
    """A head and two nodes, whose workers find this package, and have a cache of their own."""
    monkeypatch.setenv("PYTHONPATH", str(root))
    monkeypatch.setenv("REWRITER_CACHE", str(folder / "theirs"))
    found = Clusters()
    monkeypatch.setenv("REWRITER_CACHE", str(folder / "ours"))
    yield found
    found.cluster.shutdown()


def order(**changes: Any) -> Order:
    facts: dict[str, Any] = {
        "target": "spread_zoo:attention", "calibration": "spread_zoo:batches", "length": None, "dtype": None,
        "device": "cpu", "metric": None, "goal": "latency", "variants": None, "seed": 0,
        "limits": Limits.checked(0.05, None, None, None),
    }  # fmt: skip
    return Order(**(facts | changes))


def silent(stage: str, done: int, total: int | None) -> None:
    pass


def searched(data: str = "spread_zoo:batches") -> dict[str, Any]:
    loaded = load_target("spread_zoo:attention", device="cpu")
    batches, _ = read_calibration(data, loaded)
    plan = rewriter.plan_of(rewriter.optimize(loaded.model, batches, max_drop=0.05))
    assert plan is not None and plan.search is not None
    return plan.search


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What this process measured, (kind, what)."""
    found: list[Any] = []
    real = Ledger.measured

    def measured(self: Ledger, kind: str, what: Any, make: Callable[[], Any], **options: Any) -> Any:
        return real(self, kind, what, lambda: found.append((kind, what)) or make(), **options)

    monkeypatch.setattr(Ledger, "measured", measured)
    return found


def independent(made: list[Any]) -> list[Any]:
    """Without what depends on how the search goes."""
    return [
        each for each in made if each[0] in ("site", "effects") or (each[0] == "metric" and each[1][2] == "original")
    ]


def test_a_worker_measures_short_and_long_inputs(folder: Path, made: list[Any]) -> None:
    worker = Worker(order(calibration="spread_zoo:both"), torch.get_num_threads())
    counts = worker.about()[2]
    assert counts == {"site": 2, "original": 24, "effects": 2 * 4}
    times: Entries = {}
    for kind, count in counts.items():
        for number in range(count):
            entries = worker.measured((kind, number), times)
            times |= entries if kind == "site" else {}
    assert len(independent(made)) == 2 + 24 + 8
    made.clear()
    assert searched("spread_zoo:both")["pairs"] >= 4 and made and not independent(made)


@pytest.mark.slow
def test_the_search_finds_what_the_workers_measured(cluster: Clusters, made: list[Any]) -> None:
    stages = set()
    found = measure_ahead(cluster.address, order(), Deadline(None), lambda *said: stages.add(said[0]))
    assert (found.measured, found.workers, found.notes) == (MEASURED, 2, [])
    assert stages == {"measure on the cluster"}
    assert searched()["pairs"] >= 2 and made and not independent(made)


def test_a_lost_worker_loses_nothing(cluster: Clusters, made: list[Any]) -> None:
    def lose_one(stage: str, done: int, total: int | None) -> None:
        if done >= 2 and len(cluster.nodes) == 2:
            cluster.cluster.remove_node(cluster.nodes.pop(), allow_graceful=False)

    found = measure_ahead(cluster.address, order(), Deadline(None), lose_one)
    assert found.notes == ["a worker was lost"] and len(cluster.nodes) == 1
    assert (found.measured, found.workers) == (MEASURED, 2)
    assert searched()["pairs"] >= 2 and not independent(made)


@pytest.mark.slow
def test_with_all_workers_lost_the_search_measures_by_itself(cluster: Clusters, made: list[Any]) -> None:
    def lose_all(stage: str, done: int, total: int | None) -> None:
        while done >= 2 and cluster.nodes:
            cluster.cluster.remove_node(cluster.nodes.pop(), allow_graceful=False)

    found = measure_ahead(cluster.address, order(), Deadline(None), lose_all)
    assert found.measured < MEASURED and set(found.notes) == {"a worker was lost"}
    assert searched()["pairs"] >= 2 and len(independent(made)) == MEASURED - found.measured


@pytest.mark.slow
def test_times_are_taken_on_machines_of_this_kind_only(cluster: Clusters, monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(Target):
        @staticmethod
        def current(device: Any = "cpu") -> Target:
            here = Target.current(device)
            return Other(**(here.to_json() | {"processor": "another"}))

    monkeypatch.setattr(spread, "Target", Other)
    found = measure_ahead(cluster.address, order(), Deadline(None), silent)
    assert found.measured == 12 and "so times are taken here" in str(found)


@pytest.mark.slow
def test_the_command(cluster: Clusters, capsys: pytest.CaptureFixture[str]) -> None:
    given = (
        "tune",
        "spread_zoo:attention",
        "--calibration",
        "spread_zoo:batches",
        "--device",
        "cpu",
        "--out",
        "p.json",
    )
    status = cli.run((*given, "--ray", cluster.address))
    out = " ".join(capsys.readouterr().out.split())
    assert status == 0 and f"{MEASURED} measurements came from 2 workers" in out and Path("p.json").exists()
    assert cli.run((*given, "--ray", cluster.address, "--calibration", "absent.pt")) == 2
    assert cli.run((*given, "--ray", cluster.address, "--fresh")) == 2
    assert "--fresh does not believe" in capsys.readouterr().err


@pytest.mark.slow
def test_what_no_worker_can_load_is_told(cluster: Clusters) -> None:
    with pytest.raises(OptionError, match=r"can be used: a worker did not start: .*has no absent"):
        measure_ahead(cluster.address, order(target="spread_zoo:absent"), Deadline(None), silent)


def test_ray_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(OptionError, match=r"rewriter\[ray\]"):
        measure_ahead("127.0.0.1:1", order(), Deadline(None), silent)
