"""The guard: tolerances, metrics against plain computations, calibration data of every form."""

from __future__ import annotations

import math
from collections import UserDict
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rewriter import calibration as data
from rewriter import guard, metrics
from rewriter.errors import CalibrationError, GuardError, MetricError, OptionError
from rewriter.metrics import Batch, Metric

VOCAB = 11


class Toy(nn.Module):
    """A causal LM of one table: the next token depends on this one. Counts its calls."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(VOCAB, VOCAB, generator=generator))
        self.drop = nn.Dropout(0.5)
        self.calls = 0

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Any:
        self.calls += 1
        return SimpleNamespace(logits=self.drop(self.table[input_ids]))


class Echo(nn.Module):
    """Returns what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def score(name: str, model: nn.Module, original: nn.Module, batches: list[Any]) -> float:
    metric, found = metrics.BUILT_IN[name], data.batches_from(batches)
    _, references = guard.measure_original(metric, original, found)
    return guard.evaluate(metric, model, found, references).value


# --- bounds ----------------------------------------------------------------------------------------------------------


def test_tolerances_grow_with_coarser_types() -> None:
    found = [guard.tolerance(d) for d in (torch.float64, torch.float32, torch.float16, torch.bfloat16)]
    assert found == sorted(found) and found[1] == 1e-5
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.finfo(dtype).eps < guard.tolerance(dtype) < 4 * torch.finfo(dtype).eps
        assert 0 < guard.resolution(dtype) < guard.tolerance(dtype)
    with pytest.raises(OptionError, match="int32"):
        guard.tolerance(torch.int32)


def test_error_is_relative_to_the_largest_magnitude() -> None:
    expected = torch.tensor([1.0, -4.0])
    assert guard.error(torch.tensor([1.5, -4.0]), expected) == pytest.approx(0.125)
    assert guard.error(expected, expected) == 0.0
    assert guard.error(torch.zeros(3), torch.zeros(3)) == 0.0
    assert guard.error(torch.ones(1), torch.zeros(1)) > 1e30
    assert guard.error(torch.zeros(0), torch.zeros(0)) == 0.0


def test_error_does_not_compare_where_nan_is_expected() -> None:
    nan, inf = math.nan, math.inf
    assert guard.error(torch.tensor([7.0, 2.0]), torch.tensor([nan, 2.0])) == 0.0
    assert guard.error(torch.tensor([nan, 2.0]), torch.tensor([nan, 2.0])) == 0.0
    assert guard.error(torch.tensor([nan, 2.0]), torch.tensor([1.0, 2.0])) == inf
    assert guard.error(torch.tensor([inf, 2.0]), torch.tensor([1.0, 2.0])) == inf
    assert guard.error(torch.tensor([-inf, 3.0]), torch.tensor([-inf, 2.0])) == 0.5
    assert guard.error(torch.tensor([1.0, 2.0]), torch.tensor([-inf, 2.0])) == inf
    assert guard.error(torch.zeros(2), torch.zeros(1, 2)) == inf


def test_error_of_half_types_is_computed_in_float32() -> None:
    expected = torch.full((4,), 60000.0, dtype=torch.float16)
    assert guard.error(-expected, expected) == pytest.approx(2.0)
    assert guard.error(torch.tensor([1], dtype=torch.int64), torch.tensor([2], dtype=torch.int64)) == 0.5


def test_relative_rms() -> None:
    expected = torch.tensor([3.0, 4.0, math.nan])
    assert guard.relative_rms(torch.tensor([3.0, 5.0, 1.0]), expected) == pytest.approx(0.2)
    assert guard.relative_rms(torch.tensor([math.nan, 5.0, 1.0]), expected) == math.inf


@pytest.mark.parametrize(
    ("given_value", "expected"),
    [(0, 0.0), (0.01, 0.01), ("1%", 0.01), (" 0.5 % ", 0.005), ("0.01", 0.01), ("1e-2", 0.01), (Fraction(1, 4), 0.25)],
)
def test_max_drop_is_read(given_value: Any, expected: float) -> None:
    assert guard.check_max_drop(given_value) == pytest.approx(expected)


@pytest.mark.parametrize(
    "given_value", [-0.01, "-1%", math.nan, math.inf, True, None, "nan", "one", "", "1%%", "1_0", [0.1], 1j]
)
def test_max_drop_is_refused(given_value: Any) -> None:
    with pytest.raises(OptionError, match="max_drop"):
        guard.check_max_drop(given_value)


# --- perplexity ------------------------------------------------------------------------------------------------------


def test_perplexity_is_the_plain_computation() -> None:
    model, batches = Toy(), [ids(2, 9), ids(3, 5, seed=1)]
    losses = [
        F.cross_entropy(model.table[b[:, :-1]].flatten(0, 1), b[:, 1:].flatten(), reduction="sum") for b in batches
    ]
    expected = math.exp(sum(loss.item() for loss in losses) / (2 * 8 + 3 * 4))
    for form in (batches, [{"input_ids": b} for b in batches], [(b,) for b in batches]):
        assert score("perplexity", model, model, form) == pytest.approx(expected, rel=1e-6)


def test_perplexity_agrees_with_the_loss_of_a_real_model(tiny_lm: Any) -> None:
    model = tiny_lm()
    batch = {"input_ids": ids(2, 16)}
    with torch.no_grad():
        loss = model(**batch, labels=batch["input_ids"]).loss.item()
    expected = math.exp(loss)
    assert score("perplexity", model, model, [batch]) == pytest.approx(expected, rel=1e-5)
    assert score("perplexity", model, model, [batch | {"labels": batch["input_ids"]}]) == pytest.approx(
        expected, rel=1e-5
    )


@pytest.mark.parametrize("name", list(metrics.BUILT_IN))
def test_chunks_do_not_change_the_score(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [{"input_ids": ids(3, 7), "attention_mask": torch.ones(3, 7)}]
    whole = score(name, Toy(1), Toy(), batches)
    for size in (1, 2 * VOCAB, 5 * VOCAB + 3):
        monkeypatch.setattr(metrics, "CHUNK_ELEMENTS", size)
        assert score(name, Toy(1), Toy(), batches) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", list(metrics.BUILT_IN))
def test_padding_is_not_scored(name: str, side: str) -> None:
    class Dirty(Toy):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Any = None) -> Any:
            logits = super().forward(input_ids).logits
            hole = torch.nan if attention_mask is not None else 0.0
            return (
                {"logits": logits}
                if attention_mask is None
                else {"logits": logits.masked_fill(attention_mask[..., None] == 0, hole)}
            )

    tokens, pad = ids(2, 6), torch.full((2, 4), 3)
    order = (pad, tokens) if side == "left" else (tokens, pad)
    mask = torch.cat([torch.full_like(p, int(p is tokens)) for p in order], 1)
    padded = {"input_ids": torch.cat(order, 1), "attention_mask": mask}
    expected = score(name, Dirty(1), Dirty(), [{"input_ids": tokens}])
    assert math.isfinite(expected)
    assert score(name, Dirty(1), Dirty(), [padded]) == pytest.approx(expected, rel=1e-12)


def test_ignored_labels_are_not_scored() -> None:
    model, tokens = Toy(), ids(2, 8)
    labels = tokens.clone()
    labels[:, :5] = -100
    rows = model.table[tokens[:, 4:-1]].flatten(0, 1)
    expected = math.exp(F.cross_entropy(rows, tokens[:, 5:].flatten()).item())
    assert score("perplexity", model, model, [{"input_ids": tokens, "labels": labels}]) == pytest.approx(
        expected, rel=1e-6
    )


def test_labels_that_are_not_the_ids_stand_where_they_are_predicted() -> None:
    model, tokens = Toy(), ids(2, 8)
    shifted = F.pad(tokens[:, 1:], (0, 1), value=-100)
    plain = score("perplexity", model, model, [tokens])
    assert score("perplexity", model, model, [{"input_ids": tokens, "labels": shifted}]) == pytest.approx(plain)


def test_batches_are_weighted_by_their_tokens() -> None:
    model = Toy()
    short, long = ids(1, 3), ids(1, 40, seed=2)
    metric = metrics.BUILT_IN["perplexity"]
    found = guard.evaluate(metric, model, data.batches_from([short, long]))
    assert [weight for _, weight in found.samples] == [2, 39]
    assert found.value == pytest.approx(math.exp(sum(s for s, _ in found.samples) / 41))


def test_a_hopeless_model_has_a_finite_perplexity() -> None:
    class Wrong(Toy):
        def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
            return SimpleNamespace(logits=1e4 * F.one_hot((input_ids + 1) % VOCAB, VOCAB).float())

    assert 1e300 < score("perplexity", Wrong(), Wrong(), [torch.zeros(1, 4, dtype=torch.int64)]) < math.inf


# --- the other metrics -----------------------------------------------------------------------------------------------


def test_the_original_scores_perfectly() -> None:
    batches = [ids(2, 6)]
    assert score("cosine", Toy(), Toy(), batches) == pytest.approx(1.0, abs=1e-12)
    assert score("kl", Toy(), Toy(), batches) == 0.0
    assert score("top1", Toy(), Toy(), batches) == 1.0


def test_cosine_kl_and_agreement_are_the_plain_computations() -> None:
    tokens = ids(2, 6)
    ours, theirs = Toy(1).table[tokens].detach(), Toy().table[tokens].detach()
    cosine = F.cosine_similarity(ours, theirs, dim=-1).mean().item()
    kl = F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean().item()
    assert score("cosine", Toy(1), Toy(), [tokens]) == pytest.approx(cosine, rel=1e-5)
    assert score("kl", Toy(1), Toy(), [tokens]) == pytest.approx(kl, rel=1e-5)
    agreement = (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item()
    assert score("top1", Toy(1), Toy(), [tokens]) == pytest.approx(agreement)


def test_top1_with_labels_is_accuracy() -> None:
    class Classes(nn.Module):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
            return x

    x, labels = torch.eye(4), torch.tensor([0, 1, 0, -100])
    assert score("top1", Classes(), Classes(), [{"x": x, "labels": labels}]) == pytest.approx(2 / 3)
    tokens = ids(2, 8)
    right = (Toy().table[tokens[:, :-1]].argmax(-1) == tokens[:, 1:]).float().mean().item()
    assert score("top1", Toy(), Toy(), [{"input_ids": tokens, "labels": tokens}]) == pytest.approx(right)


def test_kl_allows_for_classes_that_are_ruled_out() -> None:
    x = torch.tensor([[0.0, 1.0, -math.inf]])
    assert score("kl", Echo(), Echo(), [x]) == 0.0


def test_zero_vectors_agree_only_with_each_other() -> None:
    class Scaled(Echo):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.tensor([[1.0, 0.0], [0.0, 0.0]])

    x = torch.zeros(2, 2)
    assert score("cosine", Echo(), Echo(), [x]) == 1.0
    assert score("cosine", Scaled(), Echo(), [x]) == 0.5


@pytest.mark.parametrize("name", ["cosine", "kl", "top1"])
def test_another_shape_is_said(name: str) -> None:
    class Cut(Echo):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, 1:]

    with pytest.raises(MetricError, match=rf"{name}.*batch 0.*shape"):
        score(name, Cut(), Echo(), [torch.ones(2, 4, 3)])


def test_the_judged_output() -> None:
    loss, hidden, logits = torch.tensor(1.0), torch.ones(2, 3), torch.ones(2, 3, 4)
    assert metrics.primary({"loss": loss, "logits": hidden, "x": logits}) is hidden
    assert metrics.primary((loss, hidden, logits)) is hidden
    assert metrics.logits_of((loss, hidden, logits)) is logits
    assert metrics.primary((ids(2, 2), [torch.ones(3), hidden])) is hidden
    with pytest.raises(MetricError, match="no floating tensor"):
        metrics.primary((ids(2, 2), loss))


# --- which metric ----------------------------------------------------------------------------------------------------


def test_the_default_metric() -> None:
    tokens = ids(2, 6)
    outputs = Toy()(tokens)

    def pick(batch: Batch, outputs: Any, causal: bool = True) -> str:
        return metrics.resolve_metric(None, batch, outputs, causal=causal).name

    assert pick(Batch((tokens,)), outputs) == "perplexity"
    assert pick(Batch(kwargs={"input_ids": tokens}), outputs) == "perplexity"
    assert pick(Batch((tokens,)), outputs, causal=False) == "cosine"
    assert pick(Batch((torch.ones(2, 6),)), outputs) == "cosine"
    assert pick(Batch((ids(2, 7),)), outputs) == "cosine"
    assert pick(Batch((tokens + VOCAB,)), outputs) == "cosine"
    assert pick(Batch((tokens,)), torch.ones(2, 6)) == "cosine"
    for useless in (torch.ones(2, 1), ids(2, 2)):
        with pytest.raises(MetricError, match="give metric="):
            pick(Batch((tokens,)), useless)


def test_a_metric_of_ones_own_needs_a_direction() -> None:
    def quality(model: nn.Module, batch: Any) -> float:
        return 1.0

    resolved = metrics.resolve_metric((quality, "higher"), Batch(), None, causal=False)
    assert (resolved.name, resolved.higher_is_better) == ("quality", True)
    assert metrics.resolve_metric(resolved, Batch(), None, causal=False) is resolved
    with pytest.raises(MetricError, match=r'metric=\(fn, "higher"\)'):
        metrics.resolve_metric(quality, Batch(), None, causal=False)
    for wrong in ((quality, "up"), (quality,), 3, ("cosine", "higher")):
        with pytest.raises(MetricError, match="a metric is one of"):
            metrics.resolve_metric(wrong, Batch(), None, causal=False)
    with pytest.raises(MetricError, match="perplexity, top1, cosine, kl"):
        metrics.resolve_metric("bleu", Batch(), None, causal=False)
    with pytest.raises(MetricError, match="either"):
        Metric(name="both", higher_is_better=True)


def test_a_metric_of_ones_own_gets_the_batch_as_written() -> None:
    seen: list[Any] = []

    def length(model: nn.Module, batch: Any) -> Tensor:
        seen.append(batch)
        return torch.tensor(float(len(seen)))

    given_batches = [{"input_ids": ids(1, 2)}, ids(1, 3), (ids(1, 4),)]
    metric = metrics.resolve_metric((length, "lower"), Batch(), None, causal=False)
    measured = guard.evaluate(metric, Toy(), data.batches_from(given_batches))
    assert all(a is b for a, b in zip(seen, given_batches, strict=True))
    assert measured.value == 2.0
    assert Batch((1,)).given == 1 and Batch((1,), {"a": 2}).given == ((1,), {"a": 2}) and Batch().given == {}


# --- measuring -------------------------------------------------------------------------------------------------------


def test_measuring_leaves_the_model_as_it_was() -> None:
    class Nested(Toy):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            assert not self.training and not self.drop.training
            assert not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
            return super().forward(*args, **kwargs)

    model = Nested()
    model.train()
    model.drop.eval()
    score("perplexity", model, model, [ids(1, 4)])
    assert model.training and not model.drop.training
    model.table.data[0] = math.nan
    with pytest.raises(MetricError):
        score("perplexity", model, model, [torch.zeros(1, 4, dtype=torch.int64)])
    assert model.training and not model.drop.training and torch.is_grad_enabled()


def test_the_original_is_run_once_a_batch() -> None:
    model = Toy()
    measured, references = guard.measure_original(
        metrics.BUILT_IN["kl"], model, data.batches_from([ids(1, 4), ids(1, 5)])
    )
    assert model.calls == 2 and len(references) == 2 and measured.value == 0.0
    assert guard.measure_original(metrics.BUILT_IN["perplexity"], model, data.batches_from([ids(1, 4)]))[1] == []


@pytest.mark.parametrize("value", [math.nan, math.inf, torch.tensor(math.nan)])
def test_a_metric_that_gives_no_number(value: Any) -> None:
    calls: list[int] = []

    def odd(model: nn.Module, batch: Any) -> Any:
        calls.append(1)
        return 1.0 if len(calls) == 1 else value

    metric = Metric(name="odd", higher_is_better=True, fn=odd)
    with pytest.raises(MetricError, match=r"'odd' gave (nan|inf) on batch 1; "):
        guard.evaluate(metric, Toy(), data.batches_from([ids(1, 4)] * 3))


@pytest.mark.parametrize("fault", ["raise", "text", "none"])
def test_a_metric_that_fails(fault: str) -> None:
    def bad(model: nn.Module, batch: Any) -> Any:
        if fault == "raise":
            raise KeyError("a long story\nwith details")
        return "much" if fault == "text" else None

    metric = Metric(name="bad", higher_is_better=True, fn=bad)
    with pytest.raises(MetricError, match=r"'bad' failed on batch 0: \w+Error: .*; mend it") as caught:
        guard.evaluate(metric, Toy(), data.batches_from([ids(1, 4)]))
    assert "\n" not in str(caught.value)


def test_a_model_that_fails() -> None:
    with pytest.raises(CalibrationError, match=r"batch 1 \(arguments input_ids\): IndexError"):
        score("perplexity", Toy(), Toy(), [{"input_ids": ids(1, 4)}, {"input_ids": ids(1, 4) + VOCAB}])


def test_nothing_to_score() -> None:
    with pytest.raises(MetricError, match="nothing to score"):
        score("perplexity", Toy(), Toy(), [ids(2, 1)])
    with pytest.raises(MetricError, match="no labels and no token ids"):
        score("perplexity", Echo(), Echo(), [torch.ones(1, 2, 3)])
    with pytest.raises(MetricError, match="do not fit the logits"):
        score("perplexity", Toy(), Toy(), [{"input_ids": ids(2, 4), "labels": ids(2, 5)}])
    with pytest.raises(MetricError, match="no logits of shape"):
        score("perplexity", Echo(), Echo(), [torch.ones(2, 3)])
    with pytest.raises(MetricError, match="width 1"):
        score("cosine", Echo(), Echo(), [torch.ones(2, 1)])
    with pytest.raises(MetricError, match="give one a batch"):
        guard.evaluate(metrics.BUILT_IN["kl"], Toy(), data.batches_from([ids(1, 4)]))


# --- calibration data ------------------------------------------------------------------------------------------------


def test_every_form_of_calibration_data() -> None:
    x = torch.ones(2)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(4, 3)), batch_size=2)
    assert [len(b.args) for b in data.batches_from(loader)] == [1, 1]
    assert len(data.batches_from(x for _ in range(3))) == 3
    mixed = data.batches_from([x, {"a": x}, UserDict(a=x), (x, x), [x], ((x,), {"a": x}), Batch((x,))])
    assert [(len(b.args), list(b.kwargs)) for b in mixed] == [
        (1, []), (0, ["a"]), (0, ["a"]), (2, []), (1, []), (1, ["a"]), (1, []),
    ]  # fmt: skip


def failing() -> Any:
    yield torch.ones(1)
    raise OSError("disk gone")


@pytest.mark.parametrize(
    ("calibration", "sentence"),
    [
        ([], "is empty"),
        (iter(()), "is empty"),
        ("text.txt", "single str"),
        (None, "single NoneType"),
        ({"input_ids": torch.ones(1)}, "single dict; give a list"),
        (torch.ones(2, 2), "single Tensor; give a list"),
        (["hello", "world"], "batch 0 is a str"),
        ([torch.ones(1), 3], "batch 1 is a int"),
        ([{"input_ids": [1, 2]}], "batch 0 holds no tensor"),
        ([()], "batch 0 holds no tensor"),
        ([{0: torch.ones(1)}], "batch 0 is a dict"),
        (failing(), "raised at batch 1: OSError: disk gone"),
    ],
)
def test_calibration_data_that_is_refused(calibration: Any, sentence: str) -> None:
    with pytest.raises(CalibrationError, match=sentence):
        data.batches_from(calibration)


def test_batches_must_fit_the_model() -> None:
    good = data.batches_from([ids(1, 4), {"input_ids": ids(1, 4), "labels": ids(1, 4)}])
    data.check_batches(Toy(), good)
    cases = [
        ({"input_idz": ids(1, 4)}, "batch 2 has 'input_idz', .*takes input_ids, attention_mask, labels"),
        ({"labels": ids(1, 4)}, "missing a required argument: 'input_ids'"),
        ((ids(1, 4),) * 4, "too many positional"),
        ({"input_ids": ids(1, 4).to("meta")}, "input_ids of .* batch 2 is on meta and the model on cpu; move"),
        ({"input_ids": ids(1, 4), "labels": torch.tensor([math.nan])}, "labels of .* batch 2 has NaN"),
    ]
    for batch, sentence in cases:
        with pytest.raises(CalibrationError, match=sentence):
            data.check_batches(Toy(), [*good, *data.batches_from([batch])])


def test_a_model_with_free_keywords_accepts_any() -> None:
    class Free(nn.Module):
        def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
            return x

    data.check_batches(Free(), data.batches_from([{"x": torch.ones(1), "anything": torch.ones(1)}]))
    with pytest.raises(CalibrationError, match="it takes x"):
        data.check_batches(Free(), data.batches_from([{"anything": torch.ones(1)}]))


@given(count=st.integers(2, 30), seed=st.integers(0, 2**40))
def test_split_keeps_every_batch_once(count: int, seed: int) -> None:
    batches = [Batch((i,)) for i in range(count)]
    search, held_out = data.split(batches, seed)
    assert search and held_out and len(search) == max(1, count // 3)
    assert sorted(b.args[0] for b in search + held_out) == list(range(count))
    assert data.split(batches, seed) == (search, held_out)


def test_split_depends_on_the_seed_and_needs_two() -> None:
    batches = [Batch((i,)) for i in range(20)]
    assert len({str(data.split(batches, seed)[0]) for seed in range(5)}) == 5
    with pytest.raises(CalibrationError, match="at least two"):
        data.split(batches[:1], 0)


# --- rows, repetition ------------------------------------------------------------------------------------------------


class Attentive(nn.Module):
    """Every token becomes the mean of its sequence; the tokens are axis `axis` of (B, S, W) or (S, B, W)."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        return x + x.mean(self.axis, keepdim=True)


def test_rows_count_where_they_do_not_see_each_other() -> None:
    def rows(model: nn.Module, *batches: Any) -> list[int]:
        return [batch.rows for batch in data.with_rows(model, data.batches_from(batches))]

    x = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    assert rows(Attentive(1), x[:1], x, x[:2]) == [1, 3, 2]
    assert rows(Attentive(0), x, x) == [1, 1]
    assert rows(Attentive(1), {"x": x, "other": torch.ones(2, 5)}) == [1]
    assert rows(Toy(), ids(4, 6), ids(2, 6)) == [4, 2]
    mask = torch.tensor([[1, 1, 1], [0, 0, 1]])
    assert rows(Toy(), {"input_ids": ids(2, 3), "attention_mask": mask}) == [2]
    assert rows(Echo(), torch.ones(6)) == [1]

    class Whole(Echo):
        """Takes three rows only."""

        def forward(self, x: Tensor) -> Tensor:
            return x.view(3, 5, 4)

    assert rows(Whole(), x) == [1]


@pytest.mark.parametrize("name", list(metrics.BUILT_IN))
@pytest.mark.parametrize("chunk", [2**23, 3 * VOCAB])
def test_one_sample_a_row(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "CHUNK_ELEMENTS", chunk)
    tokens, mask = ids(3, 8), torch.ones(3, 8, dtype=torch.int64)
    mask[1, 5:] = 0
    metric, original = metrics.BUILT_IN[name], Toy()
    (whole,) = data.with_rows(original, data.batches_from([{"input_ids": tokens, "attention_mask": mask}]))
    single = data.batches_from([{"input_ids": tokens[i : i + 1], "attention_mask": mask[i : i + 1]} for i in range(3)])
    found = []
    for batches in ([whole], single):
        references = guard.measure_original(metric, original, batches)[1]
        found.append(guard.evaluate(metric, Toy(1), batches, references))
    assert len(found[0].samples) == len(found[1].samples) == 3
    for ours, theirs in zip(found[0].samples, found[1].samples, strict=True):
        assert ours == pytest.approx(theirs)
    assert found[0].value == pytest.approx(found[1].value)


def test_what_does_not_repeat_itself_is_told() -> None:
    class Noisy(Toy):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return SimpleNamespace(logits=torch.randn_like(self.table[args[0]]))

    values = iter(float(n) for n in range(1, 99))
    fickle = Metric(name="fickle", higher_is_better=True, fn=lambda model, batch: next(values))
    (batch,) = data.batches_from([ids(1, 6)])
    for metric in metrics.BUILT_IN.values():
        guard.check_repeats(metric, Toy(), batch, torch.float32)
        with pytest.raises(GuardError, match="the model does not repeat itself"):
            guard.check_repeats(metric, Noisy(), batch, torch.float32)
    with pytest.raises(GuardError, match=r"the metric does not repeat itself .*fickle 1\.000, then 2\.000"):
        guard.check_repeats(fickle, Toy(), batch, torch.float32)
