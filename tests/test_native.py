"""Generated C++ against the formula's definition, and the choice between it and plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rewriter.codegen import cpp, native
from rewriter.codegen.blocks import Lists
from rewriter.codegen.formula import Formula, biased, capped, causal, chunked, shown, tokens
from rewriter.codegen.implementation import Generated
from rewriter.errors import OptionError
from rewriter.guard import error, tolerance
from rewriter.site import AttentionSite, Causal, Refusal
from rewriter.variant import variants

pytestmark = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler")


def near(i: Any, j: Any, window: int) -> Any:
    return (i - j < window) & (j <= i)


def segments(b: Any, i: Any, j: Any, segment: Any) -> Any:
    return segment[b, i] == segment[b, j]


def alibi(s: Any, h: Any, i: Any, j: Any, slopes: Any) -> Any:
    return s - slopes[h] * (i - j).abs()


def relative(s: Any, h: Any, i: Any, j: Any, table: Any) -> Any:
    return s + table[h, (i - j).clamp(-5, 5) + 5]


def wavy(s: Any, i: Any, j: Any) -> Any:
    half = torch.sigmoid(s)
    return torch.where((i - j) % 3 == 0, half * half, torch.maximum(s, -s.exp())) + torch.sqrt((i // 2 - j).abs() + 1.0)


CASES: dict[str, tuple[Formula, dict[str, Any], dict[str, Tensor]]] = {
    "every key": (Formula(), {}, {}),
    "causal": (Formula((causal,), numbers={"offset": 0}), {}, {}),
    "one query": (Formula((causal,), numbers={"offset": 0}), {"q_len": 1}, {}),
    "more queries than keys": (Formula((causal,), numbers={"offset": 0}), {"q_len": 150, "kv_len": 90}, {}),
    "window": (Formula((near,), numbers={"window": 20}), {"width": 24, "v_width": 40}, {}),
    "odd head size": (Formula((near,), numbers={"window": 70}), {"width": 33, "v_width": 17}, {}),
    "chunks and a table": (Formula((chunked,), (relative,), {"chunk": 40}), {}, {"table": torch.randn(4, 11)}),
    "alibi and softcap": (
        Formula((near,), (alibi, capped), {"window": 40, "softcap": 5.0}),
        {},
        {"slopes": torch.rand(4)},
    ),
    "all operations": (Formula(scores=(wavy,)), {}, {}),
    "segments": (Formula((segments,)), {}, {"segment": torch.randint(0, 3, (2, 133)).sort(-1).values}),
    "padding": (Formula((tokens,)), {}, {"padding": torch.rand(2, 133) < 0.5}),
    "bool mask": (Formula((shown,)), {}, {"mask": torch.rand(2, 1, 117, 133) < 0.5}),
    "bias": (Formula(scores=(biased,)), {}, {"bias": torch.randn(1, 4, 117, 133)}),
    "bias of keys": (Formula(scores=(biased,)), {}, {"bias": torch.randn(2, 1, 1, 133)}),
    "bias of queries": (Formula(scores=(biased,)), {}, {"bias": torch.randn(2, 1, 117, 1)}),
    "sink": (Formula((near,), numbers={"window": 9}, sink=True), {}, {}),
    "sigmoid": (Formula((near,), numbers={"window": 20}, normaliser="sigmoid"), {}, {}),
    "relu": (Formula((near,), (capped,), {"window": 20, "softcap": 3.0}, "relu"), {}, {}),
    "negative scale": (Formula(), {"scale": -0.3}, {}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_kernels(name: str, dtype: torch.dtype) -> None:
    formula, facts, tensors = CASES[name]
    sizes = {"q_len": 117, "kv_len": 133, "width": 16, "v_width": 16, "scale": 0.3} | facts
    shapes = (4, sizes["q_len"], sizes["width"]), (2, sizes["kv_len"], sizes["width"])
    query, key = (torch.randn(2, *shape).to(dtype) for shape in shapes)
    value = torch.randn(2, 2, sizes["kv_len"], sizes["v_width"]).to(dtype)
    types = tuple((name, tensor.dtype) for name, tensor in tensors.items())
    kernel = cpp.kernel(formula, sizes["width"], sizes["v_width"], dtype, types)
    assert not isinstance(kernel, Refusal), kernel
    runs = Lists(formula)(query, key, tensors, kernel.spec.block_m, kernel.spec.block_n)
    sink = torch.randn(4) if formula.sink else None
    captures = cpp.operands(formula, query, key, tensors)
    out = kernel(query, key, value, runs.first, runs.runs, scale=sizes["scale"], sink=sink, captures=captures)
    wide = {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
    extra = {"sink": sink.double()} if sink is not None else {}
    expected = formula.reference(query.double(), key.double(), value.double(), sizes["scale"], **extra, **wide)
    assert error(out.double(), expected) <= tolerance(dtype)


def test_a_tensor_that_is_too_short_is_a_sentence() -> None:
    query = torch.randn(1, 1, 8, 16)
    with pytest.raises(OptionError, match="padding has 7 places along j, of which there are 8"):
        cpp.operands(Formula((tokens,)), query, query, {"padding": torch.ones(1, 7, dtype=torch.bool)})


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "compiler", lambda: None)
    refusal = native.build("nothing")
    assert isinstance(refusal, Refusal)
    assert "no C++ compiler" in str(refusal)


def test_source_that_does_not_compile_is_a_sentence() -> None:
    refusal = native.load(native.Spec(head_dim=16, v_head_dim=16, mask="unknown(j)"))
    assert isinstance(refusal, Refusal)
    assert "unknown" in str(refusal)


# --- the choice ------------------------------------------------------------------------------------------------------

SITE = AttentionSite(
    path="here", heads=2, kv_heads=2, head_dim=16, v_head_dim=16, dtype="float32", scale=0.25, mask=Causal(), batch=1,
    q_len=64, kv_len=64,
)  # fmt: skip


@pytest.mark.parametrize("winner", ["plain", "generated"])
def test_the_faster_one_runs_and_is_remembered(monkeypatch: pytest.MonkeyPatch, winner: str) -> None:
    asked = []

    def medians(times: Any) -> list[float]:
        asked.append(times)
        return [1.0, 2.0] if winner == "plain" else [2.0, 1.0]

    monkeypatch.setattr("rewriter.tune.measure.medians", medians)
    # Another head size each time: the cache outlives a test.
    width = 24 if winner == "plain" else 40
    query = torch.randn(1, 2, 64, width)
    calls = 0
    built: Any = variants()["sdpa"].build(SITE, {})

    def plain(*given: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return built.plain(*given)

    with torch.no_grad():
        for _ in range(2):  # the second is a new object, as in a later process
            implementation = Generated(built.formula, SITE, plain)
            calls = 0
            out = implementation(query, query, query, None, None)
            before = calls
            assert error(out, built.plain(query, query, query, None, None)) <= tolerance(torch.float32)
            implementation(query, query, query, None, None)
            assert calls - before == (winner == "plain")
    assert len(asked) == 1


def test_a_growing_cache_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("rewriter.tune.measure.medians", lambda times: asked.append(times) or [2.0, 1.0])
    built = variants()["sdpa"].build(SITE, {})
    for length in range(65, 129):
        query, key = torch.randn(1, 2, 20, 56), torch.randn(1, 2, length, 56)
        with torch.no_grad():
            built(query, key, key, None, None)
            built(query[:, :, :1], key, key, None, None)  # a single query is not worth a kernel
    assert len(asked) == 1


def test_gradients_take_the_plain_way() -> None:
    query = torch.randn(1, 2, 64, 16, requires_grad=True)
    built = variants()["sdpa"].build(SITE, {})
    (gradient,) = torch.autograd.grad(built(query, query, query, None, None).square().sum(), query)
    assert gradient.abs().sum() > 0


def test_a_new_function_is_a_kernel_everywhere() -> None:
    """Nothing but a function of indices: its reference, its C++ and its Triton source."""
    from rewriter.codegen.fragments import Blocks, source

    def diagonals(s: Any, i: Any, j: Any, every: int) -> Any:
        return torch.where((i - j) % every == 0, s, s - 3.0)

    formula = Formula(scores=(diagonals,), numbers={"every": 5})
    query = torch.randn(1, 2, 50, 32)
    expected = formula.reference(query, query, query, 0.2)
    spec = cpp.spec_of(formula, head_dim=32, v_head_dim=32, dtype=torch.float32)
    kernel = native.load(spec)
    assert not isinstance(kernel, Refusal)
    runs = Lists(formula)(query, query, {}, spec.block_m, spec.block_n)
    assert error(kernel(query, query, query, runs.first, runs.runs, scale=0.2), expected) <= tolerance(torch.float32)
    text = source(formula, Blocks(), head_dim=32, v_head_dim=32, dtype=torch.float32, kinds={})
    assert "remainder((i - j), 5)" in text or "remainder(t" in text
