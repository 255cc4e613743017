"""The public functions on real modules: same object, same results, nothing else touched, and a way back."""

from __future__ import annotations

import copy
import dataclasses
import gc
import io
import json
import pickle
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewriter
from rewriter import exact
from rewriter.errors import CalibrationError, CaptureError, MetricError, NoAttentionError, OptionError, PlanError
from rewriter.guard import error, tolerance
from rewriter.kernels.exact.sdpa import VARIANT as SDPA
from rewriter.plan import Plan
from rewriter.report.candidates import candidates
from rewriter.tune import measure, whole
from rewriter.tune.measure import SiteBench
from rewriter.variant import Variant, variants

WIDTH = 16


class Attention(nn.Module):
    """One attention with two heads, as people write it; causal, with dropout of the weights in training."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, 3 * WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.mix(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-2, -1) / (WIDTH / 2) ** 0.5
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        weights = self.dropout(scores.masked_fill(hidden, float("-inf")).softmax(-1))
        return (weights @ value).transpose(1, 2).flatten(2)


class Net(nn.Module):
    """Two of them with batch statistics, which any run in training mode would change."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention(dropout) for _ in range(2))
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        out: Tensor = self.norm(x.transpose(1, 2)).transpose(1, 2)
        return out


class Plain(nn.Module):
    """No attention."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x).relu()
        return out


class Hidden(nn.Module):
    """Nothing of this can be captured."""

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        return (x @ x.transpose(-2, -1)).softmax(-1) @ x


def data(length: int = 24, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(1))


def tokens(length: int = 24, batch: int = 2) -> Tensor:
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(1))


def names(model: nn.Module) -> dict[str, str]:
    plan = rewriter.plan_of(model)
    assert plan is not None
    return {decision.path: decision.variant for decision in plan.decisions}


def state_of(model: nn.Module) -> dict[str, Any]:
    """What an owner of the model can see."""
    return {
        "modules": [(name, id(module), module.training) for name, module in model.named_modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "call": model._compiled_call_impl,
        "tensors": [(n, id(t), t.clone()) for n, t in (*model.named_parameters(), *model.named_buffers())],
        "grads": [None if p.grad is None else (id(p.grad), p.grad.clone()) for p in model.parameters()],
        "random": torch.get_rng_state(),
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads on a busy machine wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def costs(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, float], None]:
    """Whatever the machine says, candidates cost half of the original, at each site and end to end."""

    def cost(site: float, end_to_end: float) -> None:
        def compare(self: SiteBench, implementations: Sequence[Any], *, goal: str, budget: float) -> list[float]:
            return [1.0] + [site] * len(implementations)

        monkeypatch.setattr(SiteBench, "compare", compare)
        monkeypatch.setattr(whole, "alternate", lambda functions, **options: [[1.0], [end_to_end]])
        monkeypatch.setattr(exact, "_MEASURED", {})

    cost(0.5, 0.5)
    return cost


@pytest.fixture
def no_measuring(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and from then on every measurement fails."""

    def forbidden(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("something was measured")

    def forbid() -> None:
        monkeypatch.setattr(SiteBench, "__init__", forbidden)
        for module in (measure, whole):
            monkeypatch.setattr(module, "alternate", forbidden)
            monkeypatch.setattr(module, "peak_memory", forbidden)

    return forbid


# --- a language model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["eager", "sdpa"])
def test_a_language_model_computes_the_same(tiny_lm: Any, impl: str) -> None:
    layers = 2 if impl == "eager" else 1
    original, model = (tiny_lm(impl, num_hidden_layers=layers) for _ in range(2))
    assert rewriter.optimize(model) is model
    assert names(model) == {f"model.layers.{i}.self_attn": "sdpa" for i in range(layers)}
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    for given in ({}, {"attention_mask": mask}):
        with torch.no_grad():
            expected, actual = original(ids, **given).logits, model(ids, **given).logits
        real = mask.bool() if given else slice(None)
        assert error(actual[real], expected[real]) <= tolerance(torch.float32)


def test_a_language_model_trains_the_same(tiny_lm: Any) -> None:
    original, model = (tiny_lm("eager", num_hidden_layers=1).train() for _ in range(2))
    rewriter.optimize(model)
    ids = tokens()
    for each in (original, model):
        loss = each(ids, labels=ids).loss
        loss.backward()
    for (name, expected), actual in zip(original.named_parameters(), model.parameters(), strict=True):
        assert expected.grad is not None and actual.grad is not None and expected.grad.abs().max() > 0
        assert error(actual.grad, expected.grad) <= tolerance(torch.float32), name


def test_a_language_model_generates_the_same(tiny_lm: Any) -> None:
    original, model = (tiny_lm("eager", num_hidden_layers=1) for _ in range(2))
    rewriter.optimize(model)
    ids = tokens(9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    padded = ids.masked_fill(mask == 0, 0)
    for given in ({"input_ids": ids}, {"input_ids": padded, "attention_mask": mask}):
        options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
        assert torch.equal(model.generate(**given, **options), original.generate(**given, **options))
    report = rewriter.report_of(model)
    assert report is not None and report.graphs >= 3


def test_a_checkpoint_of_a_rewritten_model_is_that_of_the_original(tiny_lm: Any, tmp_path: Path) -> None:
    original, model = (tiny_lm("eager", num_hidden_layers=1) for _ in range(2))
    rewriter.optimize(model)
    assert list(model.state_dict()) == list(original.state_dict())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in original.named_parameters()]
    model.save_pretrained(tmp_path)
    read = type(model).from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert rewriter.plan_of(read) is None
    with torch.no_grad():
        assert torch.equal(read(tokens()).logits, original(tokens()).logits)


# --- the same object, otherwise unchanged ----------------------------------------------------------------------------


def test_nothing_else_changes_and_restore_gives_all_back() -> None:
    model = Net(dropout=0.1).train()
    model.layers[1].eval()
    model(data()).sum().backward()
    before = state_of(model)
    rewriter.optimize(model, example=data())
    now = state_of(model)
    assert now["call"] is not None
    for key in ("modules", "tensors", "grads", "random"):
        assert same(before[key], now[key]), key
    model.eval()
    expected = copy.deepcopy(model)(data())
    model.train()
    model.layers[1].eval()
    assert rewriter.restore(model) is model
    assert same(before, state_of(model))
    assert rewriter.plan_of(model) is None and rewriter.report_of(model) is None
    assert torch.equal(model.eval()(data()), expected)


def test_a_model_that_draws_numbers_or_counts_in_its_buffers_is_left_alone() -> None:
    class Noisy(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x) + 1e-9 * torch.rand(())

    model = Noisy().eval()
    before = state_of(model)
    rewriter.optimize(model, example=data())
    rewriter.restore(model)
    assert same(before, state_of(model))
    rewriter.explain(model, data())
    assert same(before, state_of(model))


def test_copies_of_a_rewritten_model_are_originals() -> None:
    model = rewriter.optimize(Net().eval(), example=data())
    expected = rewriter.restore(copy.deepcopy(model))(data())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    for each in copies:
        assert each._compiled_call_impl is None and rewriter.plan_of(each) is None
        assert torch.equal(each(data()), expected)
    assert rewriter.plan_of(model) is not None


def test_hooks_that_come_and_go_are_seen() -> None:
    model = rewriter.optimize(Net().eval(), example=data())
    seen: list[str] = []
    for module, name in ((model, "root"), (model.layers[0], "layer"), (model.layers[0].mix, "linear")):
        handle = module.register_forward_hook(lambda *_, name=name: seen.append(name))
        model(data())
        handle.remove()
        model(data())
    assert seen == ["root", "layer", "linear"]


def test_twice_is_once() -> None:
    model = Net().eval()
    expected = model(data())
    rewriter.optimize(model, example=data())
    first = names(model)
    rewriter.optimize(model, example=data())
    assert names(model) == first == {"layers.0": "sdpa", "layers.1": "sdpa"}
    assert error(model(data()), expected) <= tolerance(torch.float32)
    rewriter.restore(model)
    assert model._compiled_call_impl is None and torch.equal(model(data()), expected)


def test_a_model_that_is_compiled_already() -> None:
    original = Net().eval()
    expected = original(data())
    wrapped = torch.compile(original, backend="eager")
    assert rewriter.optimize(wrapped, example=data()) is wrapped
    assert list(names(wrapped).values()) == ["sdpa", "sdpa"]
    assert error(wrapped(data()), expected) <= tolerance(torch.float32)
    assert original._compiled_call_impl is None
    rewriter.restore(wrapped)
    assert torch.equal(wrapped(data()), expected)

    in_place = Net().eval()
    in_place.compile(backend="eager")
    call = in_place._compiled_call_impl
    rewriter.optimize(in_place, example=data())
    assert in_place._compiled_call_impl is not call and rewriter.plan_of(in_place) is not None
    assert rewriter.restore(in_place)._compiled_call_impl is call
    plain = Plain()
    plain.compile(backend="eager")
    call = plain._compiled_call_impl
    with pytest.raises(NoAttentionError):
        rewriter.optimize(plain, example=data())
    assert plain._compiled_call_impl is call


def test_an_outer_compile_goes_around() -> None:
    model = Net().eval()
    expected = model(data())
    rewriter.optimize(model, example=data())
    assert error(torch.compile(model, backend="eager")(data()), expected) <= tolerance(torch.float32)


def test_a_part_of_a_model() -> None:
    model = Net().eval()
    expected = model(data())
    rewriter.optimize(model.layers[0], example=data())
    assert names(model.layers[0]) == {"": "sdpa"} and rewriter.plan_of(model) is None
    assert error(model(data()), expected) <= tolerance(torch.float32)
    rewriter.optimize(model, example=data())
    assert error(model(data()), expected) <= tolerance(torch.float32)
    rewriter.restore(model)
    assert rewriter.plan_of(model.layers[0]) is not None


def test_a_rewritten_model_is_freed() -> None:
    model = rewriter.optimize(Net().eval(), example=data())
    model(data())
    alive = [weakref.ref(model), weakref.ref(model.layers[0].mix.weight)]
    del model
    gc.collect()
    assert [each() for each in alive] == [None, None]


# --- what is decided, and when ---------------------------------------------------------------------------------------


def test_without_example_inputs_sites_are_decided_at_the_first_call() -> None:
    model = rewriter.optimize(Net().eval())
    assert names(model) == {}
    report = rewriter.report_of(model)
    assert report is not None and "first call" in report.notes[0] and not report.sites
    expected = rewriter.restore(copy.deepcopy(model))(data())
    assert error(model(data()), expected) <= tolerance(torch.float32)
    assert names(model) == {"layers.0": "sdpa", "layers.1": "sdpa"}
    report = rewriter.report_of(model)
    assert report is not None and [site.path for site in report.sites] == ["layers.0", "layers.1"]


def test_a_first_call_in_training_does_not_decide_for_evaluation() -> None:
    model = rewriter.optimize(Net(dropout=0.5).train())
    model(data())
    assert set(names(model).values()) == {"original"}
    model.eval()
    model(data())
    assert set(names(model).values()) == {"sdpa"}
    model.train()
    model(data(25))
    assert set(names(model).values()) == {"sdpa"}
    report = rewriter.report_of(model)
    assert report is not None and any("sdpa does not apply here" in note for note in report.notes)


def test_example_times_the_whole_model_and_dummy_inputs_do_not() -> None:
    report = rewriter.report_of(rewriter.optimize(Net().eval(), example=data()))
    assert report is not None and [timing.what for timing in report.timings] == ["2x24x16"]
    model = Net().eval()
    model.dummy_inputs = {"x": data()}
    report = rewriter.report_of(rewriter.optimize(model))
    assert report is not None and len(report.sites) == 2 and not report.timings
    model = Net().eval()
    model.dummy_inputs = {"ids": data()}  # out of date
    assert names(rewriter.optimize(model)) == {}


def test_no_gain_at_the_sites(costs: Any) -> None:
    costs(1.5, 0.5)
    model = rewriter.optimize(Net().eval(), example=data())
    plan = rewriter.plan_of(model)
    assert plan is not None and set(names(model).values()) == {"original"}
    assert all("no gain" in d.reason and d.evidence["candidate_ms"] == 1.5 for d in plan.decisions)


def test_no_gain_of_the_whole(costs: Any) -> None:
    costs(0.5, 1.5)
    model = Net().eval()
    expected = model(data())
    rewriter.optimize(model, example=data())
    assert set(names(model).values()) == {"original"} and torch.equal(model(data()), expected)
    report = rewriter.report_of(model)
    assert report is not None and any("no gain" in note for note in report.notes)
    assert [site.path for site in report.sites] == ["layers.0", "layers.1"] and report.graphs >= 1


def test_the_goal_can_be_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(exact, "_MEASURED", {})
    model = rewriter.optimize(Net().eval(), example=data(1024, 1), goal="memory")
    plan, report = rewriter.plan_of(model), rewriter.report_of(model)
    assert plan is not None and report is not None and plan.goal == "memory"
    for decision in plan.decisions:
        assert decision.variant == "sdpa"
        # The scores alone: 2 heads in float32.
        assert decision.evidence["original_bytes"] >= 2 * 1024 * 1024 * 4 > decision.evidence["candidate_bytes"] > 0
    (timing,) = report.timings
    assert timing.unit == "bytes" and timing.original > timing.result > 0


def test_variants_are_chosen_among_those_named() -> None:
    assert set(names(rewriter.optimize(Net().eval(), example=data(), variants=["sdpa"])).values()) == {"sdpa"}
    model = rewriter.optimize(Net().eval(), example=data(), variants=["sliding_window", "linear"])
    assert set(names(model).values()) == {"original"}
    plan = rewriter.plan_of(model)
    assert plan is not None
    assert "calibration" in plan.decisions[0].refused["sliding_window"] and "sdpa" in plan.decisions[0].refused
    assert set(names(rewriter.optimize(Net().eval(), example=data(), variants=[])).values()) == {"original"}


@pytest.fixture
def registered() -> Iterator[Callable[[Callable[..., Tensor]], None]]:
    """Add a variant named "new" that claims to be exact and computes a given function."""

    def register(function: Callable[..., Tensor]) -> None:
        rewriter.register(dataclasses.replace(SDPA, name="new", build=lambda site, config: function))

    yield register
    rewriter.unregister("new")


def test_a_variant_that_is_wrong_or_fails_is_never_timed(registered: Any, costs: Any) -> None:
    def wrong(query: Tensor, key: Tensor, value: Tensor, mask: Any, padding: Any) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=False)

    def nan(query: Tensor, *others: Any) -> Tensor:
        return torch.full_like(query, float("nan"))

    def failing(*tensors: Any) -> Tensor:
        raise RuntimeError("out of luck\nand of words")

    for function, reason in ((wrong, "not exact"), (nan, "not exact"), (failing, "out of luck")):
        registered(function)
        plan = rewriter.plan_of(rewriter.optimize(Net().eval(), example=data(), variants=["new"]))
        assert plan is not None and {d.variant for d in plan.decisions} == {"original"}
        assert reason in plan.decisions[0].refused["new"] and "\n" not in plan.decisions[0].refused["new"]
        rewriter.unregister("new")


def test_a_new_variant_counts_at_once(registered: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(names(rewriter.optimize(Net().eval(), example=data())).values()) == {"sdpa"}  # and remembered

    def same_thing(query: Tensor, key: Tensor, value: Tensor, mask: Any, padding: Any) -> Tensor:
        assert mask is None and padding is None
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)

    registered(same_thing)
    assert set(names(rewriter.optimize(Net().eval(), example=data(), variants=["new"])).values()) == {"new"}
    # In the order of `variants()`, where what was registered comes last.
    monkeypatch.setattr(SiteBench, "compare", lambda self, implementations, **options: [3.0, 2.0, 1.0])
    assert set(names(rewriter.optimize(Net().eval(), example=data())).values()) == {"new"}


def test_inner_compiles_what_is_left() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def inner(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        graphs.append(gm)
        return gm.forward

    model = Net().eval()
    expected = model(data())
    rewriter.optimize(model, example=data(), inner=inner)
    assert error(model(data()), expected) <= tolerance(torch.float32)
    assert graphs and all("softmax" not in str(gm.graph) for gm in graphs)


def test_progress_is_told() -> None:
    told: list[tuple[str, int, int | None]] = []
    rewriter.optimize(Net().eval(), example=data(), progress=lambda *step: told.append(step))
    assert told and all(isinstance(stage, str) and isinstance(done, int) for stage, done, _ in told)


def test_later_calls_that_cannot_be_captured_run_the_original() -> None:
    class Branching(Net):
        def forward(self, x: Tensor, bad: bool = False) -> Tensor:
            x = super().forward(x)
            if bad and torch.compiler.is_compiling():
                torch.cond(x.sum() > 0, lambda x: x, lambda x: x.sum(), (x,))
            return x

    model = Branching().eval()
    expected = model(data())
    rewriter.optimize(model, example=data())
    assert torch.equal(model(data(), bad=True), expected)
    report = rewriter.report_of(model)
    assert report is not None and any("original code" in note for note in report.notes)
    assert error(model(data()), expected) <= tolerance(torch.float32)


def test_mistakes_in_a_call_are_told_as_before() -> None:
    model = Net().eval()
    with pytest.raises(RuntimeError) as before:
        model(data()[..., 1:])
    rewriter.optimize(model, example=data())
    with pytest.raises(RuntimeError) as after:
        model(data()[..., 1:])
    assert type(after.value) is type(before.value) and str(after.value) == str(before.value)
    with pytest.raises(TypeError, match="unexpected keyword"):
        model(data(), nothing=1)


# --- explain ---------------------------------------------------------------------------------------------------------


def test_explain_changes_nothing() -> None:
    model = Net(dropout=0.1).train()
    model.layers[0].eval()
    before = state_of(model)
    report = rewriter.explain(model, data())
    assert same(before, state_of(model))
    assert [site.path for site in report.sites] == ["layers.0", "layers.1"]
    assert [site.dropout_p for site in report.sites] == [0.0, 0.1]
    assert "causal" in str(report.sites[0]) and "layers.0" in str(report.sites[0])
    assert report.plan is None and rewriter.plan_of(model) is None


def test_explain_tells_what_was_not_taken() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            weights = (x @ x.transpose(-2, -1)).softmax(-1)
            return weights.sort(-1).values @ x

    report = rewriter.explain(Odd(), data())
    assert not report.sites and len(report.refusals) == 1
    (refusal,) = report.refusals
    assert refusal.reason and "test_api.py" in refusal.source
    facts = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert facts["refusals"][0]["reason"] == refusal.reason and facts["sites"] == []
    with pytest.raises(NoAttentionError, match="explain"):
        rewriter.optimize(Odd(), example=data())


def test_explain_tells_of_what_is_not_captured() -> None:
    class Ragged(nn.Module):
        """Each sequence alone, without its empty tokens: in a loop dynamo cannot take up the graph again."""

        def forward(self, x: Tensor) -> Tensor:
            pooled = []
            for row in x:
                full = row[torch.nonzero(row[:, 0] > 0).flatten()]
                pooled.append(((full @ full.mT).softmax(-1) @ full).mean(0))
            return torch.stack(pooled)

    report = rewriter.explain(Ragged(), data())
    assert not report.sites
    (note,) = report.notes
    assert note.startswith("torch.compile breaks the graph") and "nonzero" in note
    assert not rewriter.explain(Net(), data()).notes


class Beyond(nn.Module):
    """One attention whose scores go through more than scale, mask and softmax."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.learned = kind, nn.Parameter(torch.linspace(-1, 1, 2))

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (2, -1)).transpose(1, 2)
        scores = heads @ heads.transpose(-2, -1) / 3
        learned = self.learned[:, None, None]
        if self.kind == "softcap":
            weights = (2 * (scores / 2).tanh()).softmax(-1)
        elif self.kind == "sink":
            weights = torch.cat([scores, learned.expand(*scores.shape[:-1], 1)], -1).softmax(-1)[..., :-1]
        elif self.kind == "sigmoid":
            weights = (scores - 2.0).sigmoid()
        else:
            weights = (scores * learned).softmax(-1)
        return (weights @ heads).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("kind", ["softcap", "sink", "sigmoid", "factor"])
def test_a_variant_that_computes_more_than_softmax(kind: str, calibrated: bool) -> None:
    """It is checked against the definition, timed, placed, and replayed from its plan; others are told to be unfit."""
    model, mine = Beyond(kind).eval(), dataclasses.replace(variants()["original"], name="mine")
    less = dataclasses.replace(variants()["sdpa"], name="less", elements=frozenset())
    expected = model(data())
    rewriter.register(mine)
    rewriter.register(less)
    try:
        arguments = {"calibration": [data(), data()]} if calibrated else {"example": data()}
        rewriter.optimize(model, **arguments, variants=["mine", "less"] if kind != "factor" else ["mine"])
        assert names(model) == {"": "mine"}
        assert error(model(data()), expected) <= tolerance(torch.float32)
        plan = rewriter.plan_of(model)
        assert plan is not None
        assert ("does not compute" in plan.decisions[0].refused.get("less", "")) == (kind != "factor")
        again = rewriter.apply(Beyond(kind).eval(), plan, check_weights=False)
        assert error(again(data()), expected) <= tolerance(torch.float32) and names(again) == {"": "mine"}
    finally:
        rewriter.unregister("mine")
        rewriter.unregister("less")


def test_what_is_recognised_and_stays_as_it_is() -> None:
    class Edited(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x @ x.transpose(-2, -1)).softmax(-1).square() @ x

    model, x = Edited(), data()
    expected = model(x)
    report = rewriter.explain(model, x)
    (site,) = report.sites
    assert site.edits == ("squared",) and not report.refusals
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["sites"][0]["edits"] == ["squared"]
    assert "squared" in str(report)
    assert {(c.applies, "squared" in c.reason) for c in candidates(report.sites)} == {(False, True)}
    with pytest.raises(PlanError, match="squared"):
        Plan.for_model(model, {site: "sdpa"})
    for call in (
        lambda: rewriter.optimize(model, example=x),
        lambda: rewriter.optimize(model, [data(), data()]),
        lambda: rewriter.optimize(torch.export.export(model, (x,))),
    ):
        with pytest.raises(NoAttentionError, match=r"stays as it is \(squared\)"):
            call()
    assert rewriter.plan_of(model) is None and torch.equal(model(x), expected)


def test_reports_are_json() -> None:
    model = rewriter.optimize(Net().eval(), example=data())
    for report in (rewriter.explain(model, data()), rewriter.report_of(model)):
        assert report is not None
        facts = json.loads(json.dumps(report.to_json(), allow_nan=False))
        assert [site["path"] for site in facts["sites"]] == ["layers.0", "layers.1"]
        assert facts["sites"][0]["mask"] == "causal(0)" and facts["sites"][0]["heads"] == 2
        assert "layers" in str(report)
    assert facts["plan"]["decisions"][0]["variant"] == "sdpa" and facts["timings"][0]["ratio"] == 2.0


def test_explain_of_a_rewritten_model_shows_the_original() -> None:
    model = rewriter.optimize(Net().eval(), example=data())
    plan = rewriter.plan_of(model)
    assert [site.spelling for site in rewriter.explain(model, data()).sites] == ["eager", "eager"]
    assert names(model) == {d.path: d.variant for d in plan.decisions} if plan else False


# --- exported programs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True])
def test_an_exported_program(dynamic: bool) -> None:
    model = Net(dropout=0.1).eval()
    sizes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("length")},) if dynamic else None
    program = torch.export.export(model, (data(),), dynamic_shapes=sizes)
    before = str(program.graph)
    report = rewriter.explain(program)
    assert [site.path for site in report.sites] == ["layers.0", "layers.1"]
    assert {site.q_len for site in report.sites} == {None if dynamic else 24}

    module = rewriter.optimize(program)
    assert names(module) == {"layers.0": "sdpa", "layers.1": "sdpa"}
    assert str(program.graph) == before
    for length, batch in ((24, 2), *([(7, 3), (300, 1)] if dynamic else [])):
        x = data(length, batch)
        assert error(module(x), model(x)) <= tolerance(torch.float32)
    assert "softmax" not in str(module.graph)
    with pytest.raises(OptionError, match="exported program"):
        rewriter.restore(module)
    report_after = rewriter.report_of(module)
    assert report_after is not None and len(report_after.sites) == 2
    with pytest.raises(OptionError, match="exported program"):
        rewriter.optimize(program, [data(), data()])


def test_an_exported_program_without_attention() -> None:
    with pytest.raises(NoAttentionError, match="no attention"):
        rewriter.optimize(torch.export.export(Plain(), (data(),)))


# --- plans -----------------------------------------------------------------------------------------------------------


def test_a_plan_is_replayed_without_measuring(tmp_path: Path, no_measuring: Any) -> None:
    model = Net().eval()
    fresh, another = copy.deepcopy(model), copy.deepcopy(model)
    expected = model(data())
    rewriter.optimize(model, example=data())
    plan = rewriter.plan_of(model)
    assert plan is not None
    plan.save(tmp_path / "plan.json")
    no_measuring()
    assert rewriter.apply(fresh, Plan.load(tmp_path / "plan.json")) is fresh
    assert torch.equal(fresh(data()), model(data())) and not torch.equal(fresh(data()), expected)
    assert rewriter.optimize(another, plan=tmp_path / "plan.json") is another
    assert torch.equal(another(data()), model(data()))
    for each in (fresh, another):
        made = rewriter.plan_of(each)
        assert made is not None and made.decisions == plan.decisions


def test_a_plan_for_another_model_is_refused() -> None:
    plan = rewriter.plan_of(rewriter.optimize(Net().eval(), example=data()))
    assert plan is not None
    other = Plain()
    before = state_of(other)
    with pytest.raises(PlanError, match="another model"):
        rewriter.apply(other, plan)
    assert same(before, state_of(other))

    inexact = dataclasses.replace(
        plan,
        decisions=tuple(
            dataclasses.replace(d, variant="sliding_window", fidelity="approximate", config={"window": 8, "sinks": 0})
            for d in plan.decisions
        ),
    )
    stranger = Net().eval()
    with pytest.raises(PlanError, match="other weights"):
        rewriter.apply(stranger, inexact)
    assert stranger._compiled_call_impl is None
    rewriter.apply(stranger, plan)
    rewriter.apply(stranger, inexact, check_weights=False)
    assert set(names(stranger).values()) == {"sliding_window"}


def test_a_plan_that_fails_leaves_the_present_one() -> None:
    model = rewriter.optimize(Net().eval(), example=data())
    call, present = model._compiled_call_impl, names(model)
    expected = model(data())
    plan = rewriter.plan_of(model)
    assert plan is not None
    with pytest.raises(PlanError):
        rewriter.apply(model, dataclasses.replace(plan, model={**plan.model, "structure": "x"}))
    with pytest.raises(OptionError):
        rewriter.optimize(model, example=data(), goal="fame")
    with pytest.raises(CalibrationError):
        rewriter.optimize(model, [])
    assert model._compiled_call_impl is not None and call is not None
    assert names(model) == present and torch.equal(model(data()), expected)


def test_a_site_that_the_plan_does_not_fit_runs_its_original_code() -> None:
    model = Net().eval()
    expected = model(data(600))
    plan = rewriter.plan_of(rewriter.optimize(copy.deepcopy(model), example=data()))
    assert plan is not None
    first, second = plan.decisions
    window = {"variant": "sliding_window", "fidelity": "approximate", "config": {"window": 128, "sinks": 4}}
    fitting = dataclasses.replace(first, **window)
    foreign = dataclasses.replace(second, **window, site=second.site.replace("causal(0)", "full"))
    rewriter.apply(model, dataclasses.replace(plan, decisions=(foreign,)))
    assert torch.equal(model(data(600)), expected)
    report = rewriter.report_of(model)
    assert report is not None and len(report.notes) == 2
    assert any("layers.0" in note and "not in the plan" in note for note in report.notes)
    assert any("layers.1" in note and "full" in note for note in report.notes)

    rewriter.apply(model, dataclasses.replace(plan, decisions=(fitting, second)))
    assert error(model(data(600)), expected) > 1e-3
    report = rewriter.report_of(model)
    assert report is not None and not report.notes
    # Too short for a window is no mistake, but the report says that there is none.
    rewriter.apply(model, dataclasses.replace(plan, decisions=(fitting, second)))
    assert error(model(data(20)), rewriter.restore(copy.deepcopy(model))(data(20))) <= tolerance(torch.float32)
    report = rewriter.report_of(model)
    assert report is not None and any("sliding_window does not apply" in note for note in report.notes)


def test_a_plan_that_names_what_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net().eval()
    plan = rewriter.plan_of(rewriter.optimize(copy.deepcopy(model), example=data()))
    assert plan is not None
    first, second = plan.decisions
    before = state_of(model)
    cases = {
        "not installed": dataclasses.replace(first, variant="unheard"),
        "calls sliding_window": dataclasses.replace(first, variant="sliding_window"),  # and exact
        "'nonsense', which is no attention": dataclasses.replace(first, site="nonsense"),
        "sliding_window has no window of 'wide'": dataclasses.replace(
            first, variant="sliding_window", fidelity="approximate", config={"window": "wide", "sinks": 4}
        ),
    }
    for words, decision in cases.items():
        with pytest.raises(PlanError, match=words) as told:
            rewriter.apply(model, dataclasses.replace(plan, decisions=(decision, second)))
        assert "\n" not in str(told.value) and same(before, state_of(model))
    # Settings that fit the variant and not this site are told at the call.
    monkeypatch.setattr(Variant, "takes", lambda self, site, target: True)
    odd = dataclasses.replace(
        first, variant="halo", fidelity="approximate", config={"block": "3x8", "halo": "2x3", "border": "shift"}
    )
    rewriter.apply(model, dataclasses.replace(plan, decisions=(odd, second)))
    model(data(600))
    report = rewriter.report_of(model)
    assert report is not None and any("cannot be built" in note for note in report.notes)


def test_a_plan_keeps_the_numbers_it_was_made_with() -> None:
    model = rewriter.optimize(Net().eval(), example=data())
    plan = rewriter.plan_of(model)
    assert plan is not None and plan.target["device"] == "cpu" and plan.goal == "latency" and plan.fidelity == "exact"
    assert all(d.evidence == {"original_ms": 1.0, "candidate_ms": 0.5} for d in plan.decisions)


def test_a_model_may_have_an_attribute_of_our_name() -> None:
    class Named(Net):
        def __init__(self) -> None:
            super().__init__()
            self.rewriter = nn.Linear(2, 2)

    model = Named().eval()
    rewriter.optimize(model, example=data())
    assert rewriter.restore(model).rewriter.weight.shape == (2, 2)


# --- bad input -------------------------------------------------------------------------------------------------------


def _damaged(tmp_path: Path, damage: Callable[[str], str]) -> Path:
    plan = rewriter.plan_of(rewriter.optimize(Net().eval(), example=data()))
    assert plan is not None
    file = plan.save(tmp_path / "plan.json")
    file.write_text(damage(file.read_text()))
    return file


def _raising(model: nn.Module, batch: Any) -> float:
    raise KeyError("labels\nand more")


BATCHES = [data() + i for i in range(4)]
LM = [{"input_ids": tokens() + i} for i in range(4)]
BAD: dict[str, tuple[type[Exception], str, Callable[[Path], dict[str, Any]]]] = {
    "calibration is empty": (CalibrationError, "empty", lambda _: {"calibration": []}),
    "one batch": (CalibrationError, "at least two", lambda _: {"calibration": [data()]}),
    "no list": (CalibrationError, "list of batches", lambda _: {"calibration": data()}),
    "wrong keys": (CalibrationError, "'ids'", lambda _: {"calibration": [{"ids": data()}] * 2}),
    "wrong shape": (CalibrationError, "failed on calibration batch", lambda _: {"calibration": [data()[..., 1:]] * 2}),
    "NaN data": (CalibrationError, "NaN", lambda _: {"calibration": [data() * float("nan")] * 2}),
    "NaN outputs": (MetricError, "nan", lambda _: {"calibration": [data() * 1e38] * 2}),
    "metric raises": (
        MetricError, "labels", lambda _: {"calibration": BATCHES, "metric": (_raising, "higher")},
    ),
    "metric is NaN": (
        MetricError, "nan", lambda _: {"calibration": BATCHES, "metric": (lambda m, b: float("nan"), "lower")},
    ),
    "metric without direction": (
        MetricError, "direction", lambda _: {"calibration": BATCHES, "metric": lambda m, b: 1.0},
    ),
    "unknown metric": (MetricError, "no metric 'bleu'", lambda _: {"calibration": BATCHES, "metric": "bleu"}),
    "negative bound": (OptionError, "negative", lambda _: {"max_drop": -0.01}),
    "NaN bound": (OptionError, "number", lambda _: {"max_drop": float("nan")}),
    "no number": (OptionError, "number", lambda _: {"max_drop": "little"}),
    "no bound": (OptionError, "number", lambda _: {"max_drop": None}),
    "goal": (OptionError, "latency, memory", lambda _: {"goal": "fame"}),
    "variant": (OptionError, "flash; known: ", lambda _: {"variants": ["flash"]}),
    "variants as text": (OptionError, r"\['sdpa'\]", lambda _: {"variants": "sdpa"}),
    "variants as number": (OptionError, "list of names", lambda _: {"variants": 3}),
    "variants of numbers": (OptionError, "called 3", lambda _: {"variants": [3]}),
    "inner": (OptionError, "called 'none'", lambda _: {"inner": "none"}),
    "inner as number": (OptionError, "not 3", lambda _: {"inner": 3}),
    "time": (OptionError, "time_budget", lambda _: {"time_budget": 0}),
    "time as text": (OptionError, "time_budget", lambda _: {"time_budget": "1 s"}),
    "dynamic": (OptionError, "dynamic", lambda _: {"dynamic": "yes"}),
    "progress": (OptionError, "progress", lambda _: {"progress": 1}),
    "example fails": (CalibrationError, "example", lambda _: {"example": data()[..., 1:]}),
    "example keys": (CalibrationError, "'ids'", lambda _: {"example": {"ids": data()}}),
    "plan is no plan": (OptionError, "Plan", lambda _: {"plan": 3}),
    "plan is not there": (PlanError, "cannot be read", lambda path: {"plan": path / "plan.json"}),
    "plan is cut off": (PlanError, "cut off", lambda path: {"plan": _damaged(path, lambda text: text[:-99])}),
    "plan format": (
        PlanError, "format", lambda path: {"plan": _damaged(path, lambda t: t.replace('"format": 3', '"format": 99'))},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_leaves_the_model(case: str, tmp_path: Path) -> None:
    kind, words, given = BAD[case]
    model = Net().train()
    model.layers[0].eval()
    arguments = given(tmp_path)
    before = state_of(model)
    with pytest.raises(kind, match=words) as told:
        rewriter.optimize(model, **arguments)
    assert str(told.value).strip() and "\n" not in str(told.value)
    assert same(before, state_of(model)) and rewriter.plan_of(model) is None
    model.eval()
    assert model(data()).isfinite().all()


@pytest.mark.parametrize("make", [Plain, Hidden])
@pytest.mark.parametrize("given", [{"example": data()}, {"calibration": BATCHES}], ids=["example", "calibration"])
def test_a_model_without_anything_to_do(make: type[nn.Module], given: dict[str, Any]) -> None:
    model = make().eval()
    before, expected = state_of(model), model(data())
    with pytest.raises((NoAttentionError, CaptureError)) as told:
        rewriter.optimize(model, **given)
    assert isinstance(told.value, CaptureError) == (make is Hidden) and "\n" not in str(told.value)
    assert same(before, state_of(model)) and torch.equal(model(data()), expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
def test_torchscript_cannot_be_captured() -> None:
    model = torch.jit.script(Plain())
    expected = model(data())
    with pytest.raises(CaptureError, match="TorchScript"):
        rewriter.optimize(model, example=data())
    assert torch.equal(model(data()), expected)


def test_a_model_that_torch_compile_fails_on() -> None:
    class Impossible(Net):
        def forward(self, x: Tensor) -> Tensor:
            if torch.compiler.is_compiling():
                torch.cond(x.sum() > 0, lambda x: x, lambda x: x.sum(), (x,))
            return super().forward(x)

    for given in ({"example": data()}, {"calibration": BATCHES}):
        model = Impossible().eval()
        before, expected = state_of(model), model(data())
        with pytest.raises(CaptureError, match=r"torch\.compile") as told:
            rewriter.optimize(model, **given)  # type: ignore[arg-type]
        assert "\n" not in str(told.value)
        assert same(before, state_of(model)) and torch.equal(model(data()), expected)
    with pytest.raises(CaptureError):
        rewriter.explain(model, data())
    assert same(before, state_of(model))


def test_what_is_no_model_is_refused() -> None:
    for call in (rewriter.optimize, rewriter.explain, rewriter.restore, lambda m: rewriter.apply(m, "plan.json")):
        with pytest.raises(OptionError, match="int"):
            call(3)  # type: ignore[operator]
