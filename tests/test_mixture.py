"""Sites whose heads differ, and calls that are longer than what was measured."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewriter
from rewriter.errors import PlanError
from rewriter.guard import error, tolerance
from rewriter.mixture import ByHeads, of_heads
from rewriter.plan import MIXED, HeadGroup, Plan
from rewriter.site import AttentionSite, Causal, Dense, Padding
from rewriter.target import Target
from rewriter.testing import inputs
from rewriter.tune.choices import serves_all_heads
from rewriter.variant import variants

SITE = AttentionSite(
    path="a", heads=6, kv_heads=3, head_dim=8, v_head_dim=8, dtype="float32", scale=0.3, mask=Causal() & Padding(),
    batch=2, q_len=40, kv_len=40,
)  # fmt: skip


@pytest.mark.parametrize(
    "site",
    [SITE, dataclasses.replace(SITE, mask=Causal() & Dense(), bias="dense"), dataclasses.replace(SITE, sink="learned")],
)
@pytest.mark.parametrize("groups", [[(0, 1, 2)], [(0, 1), (2,)], [(0, 2), (1,)], [(2,), (1,), (0,)]])
def test_parts_make_the_whole(site: AttentionSite, groups: list[tuple[int, ...]]) -> None:
    tensors = [t.requires_grad_() if t is not None and t.is_floating_point() else t for t in inputs(site, seed=0)]
    build = variants()["original"].build
    mixed = ByHeads([(heads, build(of_heads(site, heads), {})) for heads in groups])
    out, expected = mixed(*tensors), build(site, {})(*tensors)  # type: ignore[arg-type]
    assert error(out, expected) <= tolerance(torch.float32)
    leaves = [t for t in tensors if t is not None and t.requires_grad]
    for got, wanted in zip(*(torch.autograd.grad(o.square().sum(), leaves) for o in (out, expected)), strict=True):
        assert error(got, wanted) <= tolerance(torch.float32)


@pytest.mark.parametrize(
    ("name", "together"), [("sliding_window", False), ("s2", True), ("sale", False), ("linear", True)]
)
def test_patterns_that_differ_by_heads_are_for_all_of_them(name: str, together: bool) -> None:
    variant, site = variants()[name], dataclasses.replace(SITE, kv_heads=2, heads=4, q_len=4096, kv_len=4096)
    config = next(iter(variant.configs(site, Target.current())))
    assert serves_all_heads(variant, site, config) == together


class Net(nn.Module):
    """One causal attention with two heads."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in x.chunk(3, -1))
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return (q @ k.mT / 3).masked_fill(hidden, float("-inf")).softmax(-1) @ v


def data(length: int) -> Tensor:
    return torch.randn(1, length, 48, generator=torch.Generator().manual_seed(length))


def planned(**facts: Any) -> Plan:
    """A plan for `Net` with a window, and what else is said."""
    plan = rewriter.plan_of(rewriter.optimize(Net(), example=data(300)))
    assert plan is not None
    known: dict[str, Any] = {
        "variant": "sliding_window", "config": {"window": 16, "sinks": 2}, "fidelity": "approximate",
    }  # fmt: skip
    return dataclasses.replace(plan, decisions=(dataclasses.replace(plan.decisions[0], **(known | facts)),))


def test_a_plan_says_what_each_head_runs(tmp_path: Any) -> None:
    heads = (
        HeadGroup(heads=(1,), variant="sliding_window", config={"window": 16, "sinks": 2}),
        HeadGroup(heads=(0,), variant="sdpa"),
    )
    plan = planned(variant=MIXED, config={}, heads=heads)
    plan.save(tmp_path)
    model, x = rewriter.apply(Net(), Plan.load(tmp_path)), data(300)
    whole, out = Net()(x), model(x)
    assert error(out[:, 0], whole[:, 0]) <= tolerance(torch.float32)
    assert error(out[:, 1], whole[:, 1]) > 0.01
    windowed = rewriter.apply(Net(), planned())
    assert error(out[:, 1], windowed(x)[:, 1]) <= tolerance(torch.float32)


@pytest.mark.parametrize("otherwise", ["original", "sdpa"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_calls_of_other_lengths_are_exact_and_counted(otherwise: str, dynamic: bool) -> None:
    model = rewriter.apply(Net(), planned(lengths=(280, 320), otherwise=otherwise), dynamic=dynamic)
    for length, exact in ((300, False), (310, False), (270, True), (330, True), (340, True), (320, False)):
        difference = error(model(data(length)), Net()(data(length)))
        assert (difference <= tolerance(torch.float32)) == exact, length
    report = rewriter.report_of(model)
    assert report is not None
    assert [note for note in report.notes if "2 calls were longer" in note and "340 keys" in note]


def test_another_kind_of_call_runs_what_is_exact() -> None:
    model = rewriter.apply(Net(), planned(otherwise="sdpa"))
    x = data(300).double()
    for _ in range(3):
        assert error(model(x), Net()(x)) <= tolerance(torch.float64)
    assert error(model(data(300)), Net()(data(300))) > 0.01
    report = rewriter.report_of(model)
    assert report is not None and any(note.endswith("it runs sdpa (3 calls)") for note in report.notes)


def test_a_call_that_no_decision_of_a_path_is_for_is_counted_once() -> None:
    plan = planned(lengths=(1, 200), otherwise="sdpa")
    longer = dataclasses.replace(plan.decisions[0], lengths=(201, 400))
    model = rewriter.apply(Net(), dataclasses.replace(plan, decisions=(longer, *plan.decisions)), dynamic=True)
    x = data(300).double()
    assert error(model(x), Net()(x)) <= tolerance(torch.float64)
    assert error(model(x), Net()(x)) <= tolerance(torch.float64)
    report = rewriter.report_of(model)
    assert report is not None and any(note.endswith("it runs sdpa (2 calls)") for note in report.notes)


def test_what_runs_otherwise_must_be_exact() -> None:
    with pytest.raises(PlanError, match=r"sliding_window at .* where nothing was measured"):
        rewriter.apply(Net(), planned(lengths=(1, 9), otherwise="sliding_window"))
