"""One plan for short and long inputs: each class is searched by itself, and the guard asks each."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewriter
from rewriter.calibration import batches_from
from rewriter.errors import PlanError
from rewriter.guard import error, tolerance
from rewriter.plan import Plan, decided
from rewriter.report.facts import Facts
from rewriter.report.page import page
from rewriter.report.tables import render
from rewriter.tune.deadline import Deadline
from rewriter.tune.lengths import by_length, told_apart
from rewriter.tune.rehearsal import rehearsed
from rewriter.tune.request import Request
from rewriter.verdict import Limits
from tests.test_tune import LENGTH, Net, costs, data, one_thread, placed  # noqa: F401

LONG = 5 * LENGTH
BOUND = 0.01
"""A window of 128 tokens costs nothing where attention is local, and more than this where it is not."""


def far(seed: int, length: int) -> Tensor:
    """Data whose values turn round once, so that those nearby say little of the rest."""
    content = data(seed, length)
    turned = torch.arange(length) * 2 * math.pi / length
    content[..., 8::4] += 8 * turned.sin()[:, None]
    content[..., 9::4] += 8 * turned.cos()[:, None]
    return content


FAR = [far(seed, LENGTH) for seed in range(8)]
LOCAL = [placed(seed, LENGTH) for seed in range(8)]
LONG_FAR = [far(seed, LONG) for seed in range(8)]
LONG_LOCAL = [placed(seed, LONG) for seed in range(8)]


def tuned(batches: list[Tensor], **options: Any) -> nn.Module:
    model = Net().eval()
    nn.init.eye_(model.layers[0].weight)  # type: ignore[arg-type]  # what attention finds is half of the output
    rewriter.optimize(model, batches, max_drop=BOUND, metric="cosine", variants=["sdpa", "sliding_window"], **options)
    return model


def request(**facts: Any) -> Request:
    known: dict[str, Any] = {
        "goal": "latency", "allowed": None, "inner": "eager", "dynamic": None, "progress": lambda *_: None,
        "limits": Limits(max_drop=0.1), "metric": None, "seed": 0, "deadline": Deadline(None),
    }  # fmt: skip
    return Request(**known | facts)


def plan_of(model: nn.Module) -> Plan:
    plan = rewriter.plan_of(model)
    assert plan is not None
    return plan


def test_classes_are_far_apart_and_large_enough() -> None:
    def sizes(*lengths: int, **facts: Any) -> list[list[int]]:
        batches = batches_from([torch.zeros(2, n) for n in lengths])
        return [[b.args[0].shape[1] for b in each] for each in by_length(batches, request(**facts))]

    assert sizes(*[100] * 8, *[4000, 300] * 4, *[1000] * 8) == [[4000, 300] * 4 + [1000] * 8, [100] * 8]
    assert sizes(*[60] * 8, *[4000] * 8, *[200] * 8) == [[4000] * 8, [60] * 8 + [200] * 8]
    assert sizes(*[50] * 8, *[4000] * 8, *[200] * 8) == [[4000] * 8, [200] * 8, [50] * 8]
    assert sizes(*[1024] * 8, *[257] * 8) == [[1024] * 8 + [257] * 8]
    assert sizes(*[1024] * 8, *[256] * 8) == [[1024] * 8, [256] * 8]
    assert sizes(*[256] * 7, *[1024] * 8) == [[256] * 7 + [1024] * 8]
    assert sizes(*[1024] * 7, *[256] * 9) == [[1024] * 7 + [256] * 9]
    assert sizes(*[1024] * 8, *[256] * 8, goal="memory") == [[1024] * 8 + [256] * 8]
    assert sizes(*[1024] * 8, *[256] * 8, allowed=frozenset({"routing"})) == [[1024] * 8 + [256] * 8]


def test_what_is_no_longer_in_long_inputs_does_not_tell_them_apart() -> None:
    assert told_apart([{"a": (500, 900)}])
    assert told_apart([{"a": (500, 900), "b": (7, 7)}, {"a": (100, 499)}, {"a": (9, 99), "c": (7, 7)}])
    assert not told_apart([{"a": (500, 900), "b": (7, 7)}, {"a": (100, 499), "b": (7, 7)}])
    assert not told_apart([{"a": (500, 900)}, {"a": (100, 500)}])


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize(
    ("short", "long", "expected"),
    [
        (FAR, LONG_LOCAL, {"longer": "sliding_window", "shorter": "sdpa"}),
        (LOCAL, LONG_FAR, {"longer": "sdpa", "shorter": "sliding_window"}),
    ],
)
def test_short_and_long_inputs_have_decisions_of_their_own(
    short: list[Tensor], long: list[Tensor], expected: dict[str, str], dynamic: bool | None, tmp_path: Path
) -> None:
    model = tuned([*short, *long], dynamic=dynamic)
    plan = plan_of(model)
    longer, shorter = plan.decisions
    assert plan.decision_for("") is longer
    assert {"longer": longer.variant, "shorter": shorter.variant} == expected
    assert shorter.lengths is not None and shorter.lengths[1] == LENGTH and plan.sites == 1
    assert longer.lengths == ((LENGTH + 1, LONG) if longer.variant == "sliding_window" else None)
    within = {LENGTH + 1, LONG} if longer.variant == "sliding_window" else {LENGTH - 5, LENGTH}
    # Weights are random: those of the model that was tuned.
    reference = rewriter.restore(copy.deepcopy(model))

    def windowed(model: nn.Module) -> set[int]:
        inputs = {length: far(3, length) for length in (LENGTH - 5, LENGTH, LENGTH + 1, LONG, LONG + 1)}
        return {length for length, x in inputs.items() if error(model(x), reference(x)) > 10 * tolerance(torch.float32)}

    assert windowed(model) == within
    plan.save(tmp_path)
    again = rewriter.apply(copy.deepcopy(reference), Plan.load(tmp_path), dynamic=dynamic)
    assert windowed(again) == within
    assert plan_of(again).decisions == plan.decisions
    report = rewriter.report_of(model)
    assert report is not None and report.verdict is not None and report.verdict.held
    checks = {check.name: check for check in report.verdict.checks}
    assert checks[f"cosine, calls with up to {LENGTH} keys"].bound >= BOUND
    assert [t.what for t in report.timings] == [f"1x{LONG}x16", f"1x{LENGTH}x16"]
    shown = render(report)
    assert plan.keys_of(longer) == ("longer" if longer.lengths is None else f"{LENGTH + 1} to {LONG:,} keys")
    assert all(plan.keys_of(each).removesuffix(" keys") in shown for each in plan.decisions)
    written = page(Facts.of(Plan.load(tmp_path)))
    assert plan.search is not None and f"to {LENGTH} keys)" in written
    assert ("those of the longest inputs" in written) == bool(plan.search["front"])


def test_one_decision_where_both_are_exact() -> None:
    plan = plan_of(tuned([*FAR, *LONG_FAR]))
    assert [(d.variant, d.lengths) for d in plan.decisions] == [("sdpa", None)]


def test_inputs_that_are_not_told_apart_share_a_search() -> None:
    class Fixed(nn.Module):
        """Attends to as many keys whatever the length of the input."""

        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.net(x[:, -LENGTH:])
            return out

    model = rewriter.optimize(Fixed().eval(), [*LOCAL, *LONG_LOCAL], max_drop=0.01, metric="cosine")
    plan = plan_of(model)
    assert len(plan.decisions) == 1 and len(plan.timings) == 1


def test_a_rehearsal_counts_both() -> None:
    options: dict[str, Any] = {"metric": "cosine", "variants": ["sdpa", "sliding_window"]}
    both = rehearsed(Net().eval(), [*LOCAL, *LONG_LOCAL], **options)
    one, other = (rehearsed(Net().eval(), each, **options) for each in (LOCAL, LONG_LOCAL))
    assert both.sites == 1 and both.calls == one.calls + other.calls
    assert both.pairs == one.pairs + other.pairs and both.exhaustive == one.exhaustive + other.exhaustive
    search = plan_of(tuned([*LOCAL, *LONG_LOCAL])).search
    assert search is not None and search["evaluations"] <= both.calls and search["exhaustive"] == both.exhaustive
    assert [s["begin"] for s in search["timeline"]] == sorted(s["begin"] for s in search["timeline"])


def test_time_that_is_over_leaves_short_calls_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Deadline, "over", lambda self, needed=0.0: self.parts == 1)

    def share(self: Deadline, parts: int) -> None:
        self.parts = parts  # type: ignore[attr-defined]

    monkeypatch.setattr(Deadline, "parts", 0, raising=False)
    monkeypatch.setattr(Deadline, "share", share)
    model = tuned([*LOCAL, *LONG_LOCAL])
    (decision,) = plan_of(model).decisions
    assert decision.variant == "sliding_window" and decision.lengths == (LENGTH + 1, LONG)
    report = rewriter.report_of(model)
    assert report is not None and any("no time for the shorter calls" in note for note in report.notes)


def test_equal_parts_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("rewriter.tune.deadline.time.monotonic", lambda: now[0])
    deadline = Deadline(60)
    deadline.share(3)
    assert deadline.left == 20
    now[0] = 30.0
    assert deadline.over()
    deadline.share(2)
    assert deadline.left == 15
    deadline.share(1)
    assert deadline.left == 30
    deadline.stop()
    deadline.share(1)
    assert deadline.over()
    endless = Deadline(None)
    endless.share(2)
    assert endless.left == float("inf")


def test_decisions_that_overlap_are_refused(tmp_path: Path) -> None:
    plan = plan_of(tuned([*LOCAL, *LONG_FAR]))
    longer, shorter = plan.decisions
    assert longer.lengths is None and shorter.lengths is not None
    for wrong in (
        (longer, dataclasses.replace(shorter, lengths=None)),
        (shorter, dataclasses.replace(shorter, lengths=(LENGTH, LENGTH + 9))),
    ):
        changed = dataclasses.replace(plan, decisions=wrong, judged=decided(wrong))
        with pytest.raises(PlanError, match="more than once on <root> for calls of one length"):
            rewriter.apply(Net().eval(), changed)
        changed.save(tmp_path)
        with pytest.raises(PlanError, match="more than once on <root> for calls of one length"):
            Plan.load(tmp_path)
