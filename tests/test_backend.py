"""The pass as a torch.compile backend: by its name alone in a fresh process, and function by function in this one."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import rewriter
from rewriter import exact, select
from rewriter.errors import OptionError, PlanError
from rewriter.guard import error, tolerance
from rewriter.site import Dense
from rewriter.tune.measure import SiteBench

backend = importlib.import_module("rewriter.backend")  # The package has a function of that name.

SCRIPT = """
import json, sys, warnings
warnings.simplefilter("error")
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
    def forward(self, x):
        query, key, value = self.mix(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        weights = (query @ key.transpose(-2, -1) / 8**0.5).masked_fill(hidden, float("-inf")).softmax(-1)
        return self.out((weights @ value).transpose(1, 2).flatten(2))

class Plain(nn.Module):
    def forward(self, x):
        return x.relu()

def worst(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()

def compiled(module, **options):
    torch.compiler.reset()
    return torch.compile(module, backend="rewriter", options={"inner": "eager"} | options)

def told(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"

torch.manual_seed(0)
net, x, facts = Net().eval(), torch.randn(2, 24, 16), {}
"""
CHECKS = """
facts["imported before"] = "rewriter" in sys.modules
import contextlib, io, os
os.environ["REWRITER_DEBUG"] = "1"
for inner in ("eager", "aot_eager"):
    with contextlib.redirect_stderr(io.StringIO()) as log:
        facts[inner] = worst(compiled(net, inner=inner)(x), net(x))
    facts[inner + " log"] = log.getvalue()
del os.environ["REWRITER_DEBUG"]
facts["imported after"] = "rewriter" in sys.modules

trained = Net().train()
trained.load_state_dict(net.state_dict())
for inner in ("eager", "aot_eager"):
    trained.zero_grad()
    compiled(trained, inner=inner)(x).square().sum().backward()
    actual = [p.grad.clone() for p in trained.parameters()]
    trained.zero_grad()
    trained(x).square().sum().backward()
    facts["gradients " + inner] = max(worst(a, p.grad) for a, p in zip(actual, trained.parameters()))

fast = compiled(net)
facts["lengths"] = {n: worst(fast(y), net(y)) for n in (24, 7, 300, 1) for y in [torch.randn(2, n, 16)]}
facts["no attention"] = torch.equal(compiled(Plain())(x), x.relu())
facts["unknown option"] = told(lambda: compiled(net, inn="eager")(x))
facts["unknown inner"] = told(lambda: compiled(net, inner="swift")(x))
facts["unknown variant"] = told(lambda: compiled(net, variants=["flash"])(x))
facts["no plan"] = told(lambda: compiled(net, plan="/nowhere/plan.json")(x))
print(json.dumps(facts))
"""
INDUCTOR = """
facts["inductor"] = worst(torch.compile(net, backend="rewriter")(x), net(x))
print(json.dumps(facts))
"""


def in_a_fresh_process(code: str, cwd: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT + code],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    # Elsewhere, so that the package is found as installed and not beside the process.
    return in_a_fresh_process(CHECKS, tmp_path_factory.mktemp("elsewhere"))


def test_the_name_is_enough(facts: dict[str, Any]) -> None:
    assert not facts["imported before"] and facts["imported after"]


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_results_and_gradients_are_the_same(facts: dict[str, Any], inner: str) -> None:
    assert facts[inner] <= tolerance(torch.float32)
    assert facts[f"gradients {inner}"] <= tolerance(torch.float32)
    assert "causal(0)" in facts[f"{inner} log"], "the attention was found"


def test_many_lengths(facts: dict[str, Any]) -> None:
    assert list(facts["lengths"]) == ["24", "7", "300", "1"]
    assert max(facts["lengths"].values()) <= tolerance(torch.float32)


def test_a_graph_without_attention_passes_through(facts: dict[str, Any]) -> None:
    assert facts["no attention"]


def test_mistakes_are_named(facts: dict[str, Any]) -> None:
    assert "unknown options ['inn']; known: inner, plan, goal, variants" in facts["unknown option"]
    assert "no inner backend is called 'swift'" in facts["unknown inner"] and "inductor" in facts["unknown inner"]
    assert "no variant is called flash" in facts["unknown variant"]
    assert "/nowhere/plan.json cannot be read" in facts["no plan"]


@pytest.mark.slow
def test_inductor_is_the_default(tmp_path: Path) -> None:
    assert in_a_fresh_process(INDUCTOR, tmp_path)["inductor"] <= tolerance(torch.float32)


# --- in this process -------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Two attentions, one of them in a submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Attention()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool).triu(1)
        return (x @ x.transpose(-2, -1)).masked_fill(hidden, float("-inf")).softmax(-1) @ x


def data(length: int = 24) -> Tensor:
    return torch.randn(1, 2, length, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads on a busy machine wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SiteBench, "compare", lambda self, found, **options: [1.0] + [0.5] * len(found))
    monkeypatch.setattr(exact, "_MEASURED", {})


@pytest.fixture
def graphs() -> list[fx.GraphModule]:
    return []


@pytest.fixture
def keep(graphs: list[fx.GraphModule]) -> Callable[[fx.GraphModule, Sequence[Any]], Any]:
    """An inner backend that keeps what it is given."""

    def inner(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        graphs.append(gm)
        return gm.forward

    return inner


def calls(gm: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in gm.graph.nodes if node.op.startswith("call")]


def test_exact_variants_are_placed(keep: Any, graphs: list[fx.GraphModule]) -> None:
    net = Net()
    fast = torch.compile(net, backend="rewriter", options={"inner": keep})
    assert error(fast(data()), net(data())) <= tolerance(torch.float32)
    (gm,) = graphs
    assert [name for name in calls(gm) if "attention" in name] == ["attention_0", "attention_1"]
    assert not any("softmax" in name for name in calls(gm))


def test_variants_and_goal_are_heeded(keep: Any, graphs: list[fx.GraphModule], monkeypatch: pytest.MonkeyPatch) -> None:
    goals: list[str] = []

    def compare(self: SiteBench, found: Sequence[Any], *, goal: str, budget: float) -> list[float]:
        goals.append(goal)
        return [1.0] + [0.5] * len(found)

    monkeypatch.setattr(SiteBench, "compare", compare)
    torch.compile(Net(), backend="rewriter", options={"inner": keep, "variants": ["linear"]})(data())
    assert not goals and any("softmax" in name for name in calls(graphs[-1]))
    torch.compiler.reset()
    torch.compile(Net(), backend="rewriter", options={"inner": keep, "goal": "memory"})(data())
    assert set(goals) == {"memory"} and "attention_0" in calls(graphs[-1])


def test_what_stays_as_it_is_is_handed_on_as_it_came(keep: Any, graphs: list[fx.GraphModule]) -> None:
    """Not even re-traced: dynamo's own graph, with its Python functions."""
    torch.compile(Attention(), backend="rewriter", options={"inner": keep, "variants": []})(data())
    torch.compiler.reset()
    torch.compile(nn.ReLU(), backend="rewriter", options={"inner": keep})(data())
    assert [any("aten" in name for name in calls(gm)) for gm in graphs] == [False, False]


@pytest.mark.parametrize("form", ["object", "path", "folder"])
def test_a_plan_is_followed(form: str, keep: Any, graphs: list[fx.GraphModule], tmp_path: Path) -> None:
    net = Net().eval()
    plan = rewriter.plan_of(rewriter.optimize(Net().eval(), example=data(600)))
    assert plan is not None and [d.path for d in plan.decisions] == ["first", ""]
    window = {"variant": "sliding_window", "fidelity": "approximate", "config": {"window": 128, "sinks": 4}}
    plan = dataclasses.replace(plan, decisions=(dataclasses.replace(plan.decisions[0], **window),))
    file = plan.save(tmp_path / "rewriter_plan.json")
    given = {"object": plan, "path": str(file), "folder": tmp_path}[form]
    fast = torch.compile(net, backend="rewriter", options={"inner": keep, "plan": given})
    assert error(fast(data(600)), net(data(600))) > 1e-4
    # The second attention is not in the plan.
    assert [name for name in calls(graphs[-1]) if "attention" in name] == [
        "attention_0", "aten.scaled_dot_product_attention.default",
    ]  # fmt: skip


def test_a_plan_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = rewriter.plan_of(rewriter.optimize(Net().eval(), example=data()))

    def forbidden(*args: Any, **options: Any) -> Any:
        raise AssertionError("something was measured")

    monkeypatch.setattr(SiteBench, "__init__", forbidden)
    fast = torch.compile(Net(), backend="rewriter", options={"inner": "eager", "plan": plan})
    assert error(fast(data(30)), Net()(data(30))) <= tolerance(torch.float32)


def test_a_graph_that_cannot_be_retraced_runs_as_it_is(keep: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: Any, **options: Any) -> Any:
        raise RuntimeError("no such luck\nand more")

    monkeypatch.setattr(backend, "captured", failing)
    seen = backend.GraphRewriter(select.Selector(), inner=keep)
    net = Net()
    assert torch.equal(torch.compile(net, backend=seen)(data()), net(data()))
    assert seen.graphs == 1 and not seen.sites
    assert [str(refusal) for refusal in seen.refusals] == [
        "a graph could not be re-traced (no such luck), so it runs as it is"
    ]


def test_what_was_seen_is_remembered() -> None:
    seen = backend.GraphRewriter(select.Selector())
    fast = torch.compile(Net(), backend=seen)
    fast(data())
    fast(data(30))
    assert seen.graphs == 2 and list(seen.sites) == ["first", ""]
    assert seen.sites["first"].q_len == 24, "as first seen"
    assert set(seen.seconds) >= {"capture", "detect"} and min(seen.seconds.values()) >= 0


BAD: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "unknown": (OptionError, "known: inner, plan, goal, variants", {"seed": 1}),
    "inner": (OptionError, "no inner backend is called 'x'", {"inner": "x"}),
    "inner of another type": (OptionError, "not 3", {"inner": 3}),
    "goal": (OptionError, "latency, memory", {"goal": "x"}),
    "variants": (OptionError, "no variant is called x", {"variants": ["x"]}),
    "variants as text": (OptionError, "list of names", {"variants": "sdpa"}),
    "plan of another type": (OptionError, "not a dict", {"plan": {}}),
    "plan is missing": (PlanError, "cannot be read", {"plan": "/nowhere"}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options(case: str) -> None:
    kind, words, options = BAD[case]
    with pytest.raises(kind, match=words) as told:
        backend.backend(fx.symbolic_trace(nn.ReLU()), [data()], options=options)
    assert "\n" not in str(told.value)


def test_inner_backends_by_name() -> None:
    gm = fx.symbolic_trace(nn.ReLU())
    assert backend.inner_compiler("eager")(gm, [data()]) == gm.forward
    assert callable(backend.inner_compiler("aot_eager"))
    assert backend.inner_compiler(len) is len  # type: ignore[arg-type, comparison-overlap]


def test_flex_attention_is_recognised_and_runs_as_it_is() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    def model(q: Any, k: Any, v: Any) -> Any:
        return flex_attention(q, k, v, score_mod=lambda score, b, h, i, j: score + (j - i))

    q, k, v = (torch.randn(1, 2, 16, 8) for _ in range(3))
    expected = torch.compile(model, backend="eager")(q, k, v)
    torch.compiler.reset()
    actual = torch.compile(model, backend="rewriter", options={"inner": "eager"})(q, k, v)
    assert torch.equal(actual, expected)

    class Both(nn.Module):
        """Beside a call that is read."""

        def forward(self, q: Any, k: Any, v: Any) -> Any:
            return model(q, k, v) + (q @ k.mT).softmax(-1) @ v

    torch.compiler.reset()
    report = rewriter.explain(Both(), q, k, v)
    flex, eager = report.sites
    assert (flex.spelling, flex.edits, flex.mask, flex.heads) == ("flex", ("score_function",), Dense(), 2)
    assert (eager.spelling, eager.edits) == ("eager", ())
    torch.compiler.reset()
    whole = torch.compile(Both(), backend="rewriter", options={"inner": "eager"})(q, k, v)
    assert torch.allclose(whole, expected + (q @ k.mT).softmax(-1) @ v, atol=1e-6)
