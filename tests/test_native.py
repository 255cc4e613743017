"""Generated C++ against the formula's definition, and the choice between it and plain PyTorch."""

from __future__ import annotations

import copy
import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rewriter.bench import kernels
from rewriter.bench.tables import kernels_markdown
from rewriter.codegen import cpp, native
from rewriter.codegen.blocks import Lists
from rewriter.codegen.formula import Formula, biased, capped, causal, chunked, shown, tokens
from rewriter.codegen.gathered import Gathered
from rewriter.codegen.implementation import Generated
from rewriter.errors import OptionError
from rewriter.guard import error, tolerance
from rewriter.site import AttentionSite, Causal, Dense, Full, Refusal, SlidingWindow
from rewriter.variant import variants
from tests.formulas import alibi, near, same_segment, unusual

pytestmark = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler")


def relative(s: Any, h: Any, i: Any, j: Any, table: Any) -> Any:
    return s + table[h, (i - j).clamp(-5, 5) + 5]


def wavy(s: Any, i: Any, j: Any) -> Any:
    half = torch.sigmoid(s)
    return torch.where((i - j) % 3 == 0, half * half, torch.maximum(s, -s.exp())) + torch.sqrt((i // 2 - j).abs() + 1.0)


def striped(s: Any, i: Any, j: Any) -> Any:
    return s + 0.1 * (j // 7 - i // 3).abs()


def on_diagonals(i: Any, j: Any) -> Any:
    return (j % 5 == i % 5) | (j // 7 % 4 < (i // 7).clamp(max=2))


def scattered(i: Any, j: Any, listed: Any) -> Any:
    return listed[i // 16, j // 16]


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
    "divided keys": (Formula((on_diagonals,), (striped,)), {}, {}),
    "all operations": (Formula(scores=(wavy,)), {}, {}),
    "segments": (Formula((same_segment,)), {}, {"segment": torch.randint(0, 3, (2, 133)).sort(-1).values}),
    "padding": (Formula((tokens,)), {}, {"padding": torch.rand(2, 133) < 0.5}),
    "bool mask": (Formula((shown,)), {}, {"mask": torch.rand(2, 1, 117, 133) < 0.5}),
    "bias": (Formula(scores=(biased,)), {}, {"bias": torch.randn(1, 4, 117, 133)}),
    "bias of keys": (Formula(scores=(biased,)), {}, {"bias": torch.randn(2, 1, 1, 133)}),
    "bias of queries": (Formula(scores=(biased,)), {}, {"bias": torch.randn(2, 1, 117, 1)}),
    "sink": (Formula((near,), numbers={"window": 9}, sink=True), {}, {}),
    "sigmoid": (Formula((near,), numbers={"window": 20}, normaliser="sigmoid"), {}, {}),
    "relu": (Formula((near,), (capped,), {"window": 20, "softcap": 3.0}, "relu"), {}, {}),
    "negative scale": (Formula(), {"scale": -0.3}, {}),
    **{name: (formula, {}, tensors) for name, (formula, tensors) in unusual(133).items()},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_kernels(name: str, dtype: torch.dtype) -> None:
    check_kernel(name, dtype)


@pytest.mark.parametrize("name", ["more queries than keys", "window", "odd head size", "sigmoid"])
def test_kernels_of_a_cpu_without_products_in_bfloat16(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They multiply in float32, and are rounded once, at the end."""
    monkeypatch.setattr(native, "multiplies", lambda dtype: False)
    for each in (native.load, cpp.kernel):
        each.cache_clear()
    check_kernel(name, torch.bfloat16)
    for each in (native.load, cpp.kernel):
        each.cache_clear()


def check_kernel(name: str, dtype: torch.dtype) -> None:
    formula, facts, tensors = CASES[name]
    sizes = {"q_len": 117, "kv_len": 133, "width": 16, "v_width": 16, "scale": 0.3} | facts
    shapes = (4, sizes["q_len"], sizes["width"]), (2, sizes["kv_len"], sizes["width"])
    query, key = (torch.randn(2, *shape).to(dtype) for shape in shapes)
    value = torch.randn(2, 2, sizes["kv_len"], sizes["v_width"]).to(dtype)
    types = tuple((name, tensor.dtype) for name, tensor in tensors.items())
    kernel = cpp.kernel(formula, sizes["width"], sizes["v_width"], dtype, types)
    assert not isinstance(kernel, Refusal), kernel
    runs = Lists(formula)(query, key, tensors, kernel.spec.listed, kernel.spec.block_n)
    sink = torch.randn(4) if formula.sink else None
    captures = cpp.operands(formula, query, key, tensors)
    out = kernel(query, key, value, runs.first, runs.runs, scale=sizes["scale"], sink=sink, captures=captures)
    wide = {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
    extra = {"sink": sink.double()} if sink is not None else {}
    expected = formula.reference(query.double(), key.double(), value.double(), sizes["scale"], **extra, **wide)
    assert error(out.double(), expected) <= tolerance(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tokens_that_lie_elsewhere(dtype: torch.dtype) -> None:
    """Queries and keys in an order of their own, with some that lie nowhere: as if they had been sorted before."""
    formula = Formula((on_diagonals, tokens), (striped,), sink=True)
    query, key, value = (torch.randn(2, heads, 150, 24).to(dtype) for heads in (4, 2, 2))
    stand = torch.randperm(150)[:, None] == torch.randperm(190)[None]  # (tokens, places)
    queries = torch.where(stand.any(0), stand.int().argmax(0), -1).int()
    keys = torch.cat([queries.new_full((10,), -1), queries.flip(0)])
    padding, sink = torch.rand(2, 200) < 0.7, torch.randn(4)
    types = (("padding", torch.bool),)
    kernel = cpp.kernel(formula, 24, 24, dtype, types, (32, 64), True)
    assert not isinstance(kernel, Refusal), kernel

    def standing(t: Tensor, places: Tensor) -> Tensor:
        return torch.where(places[:, None] < 0, 0, t[:, :, places.clamp(min=0)])

    out = cpp.Attention(formula, kernel, (queries, keys))(query, key, value, 0.3, sink=sink, padding=padding)
    given = standing(query, queries), standing(key, keys), standing(value, keys)
    expected = formula.reference(*(t.double() for t in given), 0.3, sink=sink.double(), padding=padding)
    real = queries >= 0
    assert out.shape == query.shape
    assert error(out.double()[:, :, queries[real]], expected[:, :, real]) <= tolerance(dtype)
    with pytest.raises(OptionError, match="inside of their tensor"):
        cpp.Attention(formula, kernel, (queries + 1, keys))(query, key, value, 0.3, sink=sink, padding=padding)
    with pytest.raises(OptionError, match="where the spec is ordered"):
        cpp.Attention(formula, kernel)(query, key, value, 0.3, sink=sink, padding=padding[:, :150])


@pytest.mark.parametrize("name", ["padded", "scattered", "relu"])
@pytest.mark.parametrize(("block_m", "block_n", "parts"), [(64, 16, 4), (48, 32, 3), (64, 64, 1), (128, 32, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parts_of_a_block_visit_keys_of_their_own(
    dtype: torch.dtype, block_m: int, block_n: int, parts: int, name: str
) -> None:
    """Also where parts between others have nothing to see, and where some see nothing at all."""
    normaliser: Any = "relu" if name == "relu" else "softmax"
    masks: Any = (scattered,) if name == "scattered" else (near, tokens)
    tensors = {"listed": torch.rand(14, 14) < 0.25} if name == "scattered" else {"padding": torch.rand(2, 217) < 0.7}
    formula = Formula(masks, numbers={"window": 40} if masks[0] is near else {}, normaliser=normaliser)
    query, key, value = (torch.randn(2, heads, 217, 24).to(dtype) for heads in (4, 2, 2))
    types = {name: t.dtype for name, t in tensors.items()}
    spec = cpp.spec_of(formula, head_dim=24, v_head_dim=24, dtype=dtype, tensors=types)
    kernel = native.load(replace(spec, block_m=block_m, block_n=block_n, parts=parts, width=4 * block_n))
    assert not isinstance(kernel, Refusal), kernel
    out = cpp.Attention(formula, kernel)(query, key, value, 0.3, **tensors)
    expected = formula.reference(query.double(), key.double(), value.double(), 0.3, **tensors)
    assert error(out.double(), expected) <= tolerance(dtype)


def test_parts_are_equal() -> None:
    refused = native.load(native.Spec(head_dim=16, v_head_dim=16, block_m=64, parts=3))
    assert isinstance(refused, Refusal)
    assert "3 equal parts" in str(refused)


@pytest.mark.parametrize(("batch", "q_len", "kv_len"), [(0, 40, 40), (2, 0, 40), (2, 40, 0), (2, 0, 0)])
def test_nothing_to_see_or_nobody_to_look(batch: int, q_len: int, kv_len: int) -> None:
    """As a model does whose text is empty: the process went down with a division by zero."""
    query, key = torch.randn(batch, 4, q_len, 16), torch.randn(batch, 2, kv_len, 16)
    for formula in (Formula(), Formula((near,), numbers={"window": 9}, sink=True)):
        made = cpp.attention(formula, query, key, {})
        assert not isinstance(made, Refusal), made
        sink = torch.randn(4) if formula.sink else None
        assert torch.equal(made(query, key, key, 0.25, sink=sink), torch.zeros_like(query))
    with torch.no_grad():
        out = variants()["sdpa"].build(SITE, {})(*(t.repeat(1, 1, 1, 3) for t in (query, key, key)), None, None)
    assert out.shape == (batch, 4, q_len, 48) and not out.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_heads_are_taken_a_few_at_a_time(dtype: torch.dtype) -> None:
    """More than fit into what is packed together."""
    formula = Formula((near,), numbers={"window": 100})
    query, key, value = (torch.randn(2, heads, 2500, 64).to(dtype) for heads in (6, 3, 3))
    made = cpp.attention(formula, query, value, {})
    assert not isinstance(made, Refusal), made
    expected = formula.reference(query.double(), key.double(), value.double(), 0.3)
    assert error(made(query, key, value, 0.3).double(), expected) <= tolerance(dtype)


def test_what_is_divided_of_a_key_alone_is_computed_once() -> None:
    spec = cpp.spec_of(Formula((on_diagonals,), (striped,)), head_dim=16, v_head_dim=16, dtype=torch.float32)
    assert len(spec.keyed) == 3  # j % 5, j // 7 % 4 and j // 7
    for text in (spec.mask, spec.score):
        assert text is not None
        assert "(j" not in text


def test_whole_numbers_are_compared_as_such() -> None:
    spec = cpp.spec_of(Formula((on_diagonals,)), head_dim=16, v_head_dim=16, dtype=torch.float32)
    assert spec.mask is not None
    assert "std::min<int64_t>" in spec.mask
    assert "float" not in spec.mask


def test_a_tensor_that_is_too_short_is_a_sentence() -> None:
    query = torch.randn(1, 1, 8, 16)
    with pytest.raises(OptionError, match="padding has 7 places along j, of which there are 8"):
        cpp.operands(Formula((tokens,)), query, query, {"padding": torch.ones(1, 7, dtype=torch.bool)})


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "compiler", lambda: None)
    refusal = native.build("nothing")
    assert isinstance(refusal, Refusal)
    assert "no C++ compiler" in str(refusal)


def test_a_full_disk_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(native, "stored", full)
    refusal = native.build("// a text that no other test builds")
    assert isinstance(refusal, Refusal)
    assert "No space left on device" in str(refusal)


def test_a_build_does_without_headers_that_were_read_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They are those of another compiler, or no file that any compiler wrote."""
    monkeypatch.setenv("REWRITER_CACHE", str(tmp_path))
    spec = native.Spec(head_dim=16, v_head_dim=16, mask="j % 3 != 1")
    first = native.build(native.source(spec))
    assert isinstance(first, Path), first
    read = [path for path in (tmp_path / "source" / "native").glob("*.h.gch/*") if path.is_file()]
    assert len(read) == 1
    read[0].write_bytes(b"nothing of the kind")
    second = native.build(native.source(replace(spec, mask="j % 3 != 2")))
    assert isinstance(second, Path), second
    assert second != first


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
        return [1.0 if winner == "plain" else 3.0, *[2.0] * (len(times) - 1)]

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
    monkeypatch.setattr("rewriter.tune.measure.medians", lambda times: asked.append(times) or [2.0] * len(times))
    built = variants()["sdpa"].build(SITE, {})
    for length in range(65, 129):
        query, key = torch.randn(1, 2, 20, 56), torch.randn(1, 2, length, 56)
        with torch.no_grad():
            built(query, key, key, None, None)
            built(query[:, :, :1], key, key, None, None)  # a single query is not worth a kernel
    assert len(asked) == 1


def test_times_are_of_one_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """At one site, by two kernels whose texts say their config alone."""
    asked = []
    monkeypatch.setattr("rewriter.tune.measure.medians", lambda times: asked.append(times) or [2.0] * len(times))
    monkeypatch.setattr(Generated, "_on_cpu", lambda self, given, own: iter([("a config", self.plain)]))
    query = torch.randn(1, 2, 64, 48)
    for window in (3, 5, 3):
        built = Generated(Formula((near,), numbers={"window": window}), SITE, lambda *given: given[0])
        with torch.no_grad():
            built(query, query, query, None, None)
    assert len(asked) == 2


def test_tensors_of_a_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Given with a call: to what makes of them what the formula reads, and to the plain way, for gradients."""
    monkeypatch.setattr("rewriter.tune.measure.medians", lambda times: [2.0] + [1.0] * (len(times) - 1))
    formula, names = Formula(scores=(alibi,)), list[str]()

    def reads(query: Tensor, key: Tensor, padding: Tensor | None, *, rate: Tensor) -> dict[str, Tensor]:
        names.append("reads")
        return {"slopes": 2 * rate}

    def plain(query: Tensor, key: Tensor, value: Tensor, *rest: Any, rate: Tensor) -> Tensor:
        names.append("plain")
        return formula.reference(query, key, value, SITE.scale, slopes=2 * rate)

    built, query = Generated(formula, SITE, plain, reads), torch.randn(1, 2, 64, 16)
    rate = torch.rand(2, requires_grad=True)
    expected = formula.reference(query, query, query, SITE.scale, slopes=2 * rate)
    (wanted,) = torch.autograd.grad(expected.square().sum(), rate)
    out = built(query, query, query, None, None, rate=rate)
    assert names == ["plain"] and torch.equal(torch.autograd.grad(out.square().sum(), rate)[0], wanted)
    with torch.no_grad():
        built(query, query, query, None, None, rate=rate)
        names.clear()
        for each in (built, copy.deepcopy(built)):
            assert error(each(query, query, query, None, None, rate=rate), expected) <= tolerance(torch.float32)
    assert set(names) == {"reads"}


def test_what_is_added_and_what_hides_have_kernels_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """One site, whose mask is a bias in one call, and says what is seen in the next."""
    monkeypatch.setattr("rewriter.tune.measure.medians", lambda times: [2.0] + [1.0] * (len(times) - 1))
    built = variants()["sdpa"].build(replace(SITE, mask=Dense()), {})
    query, bias = torch.randn(1, 2, 64, 72), torch.randn(1, 1, 64, 64)
    for mask in (bias, bias < 0, bias):
        with torch.no_grad():
            out = built(query, query, query, mask, None)
        expected = scaled_dot_product_attention(query, query, query, mask, scale=SITE.scale)
        assert error(out, expected) <= tolerance(torch.float32)


def test_gradients_take_the_plain_way() -> None:
    query = torch.randn(1, 2, 64, 16, requires_grad=True)
    built = variants()["sdpa"].build(SITE, {})
    (gradient,) = torch.autograd.grad(built(query, query, query, None, None).square().sum(), query)
    assert gradient.abs().sum() > 0


def test_blocks_follow_the_mask() -> None:
    """Of a narrow window small blocks visit less, of all keys they only cost more."""
    query = torch.randn(1, 8, 4096, 64)
    narrow, *others = cpp.sizes(Formula((near,), numbers={"window": 24}), query, query, {})
    assert narrow == (64, 32)
    assert others
    assert all(min(m, n) < 32 for m, n in others)
    assert cpp.sizes(Formula(), query, query, {}) == [(64, 32)]
    short = query[:, :, :256]
    assert cpp.sizes(Formula((near,), numbers={"window": 24}), short, short, {}) == [(64, 32)], "not worth a build"


def test_the_best_config_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewriter.tune.measure.medians", lambda times: [3.0, 3.0, 1.0, 2.0, 4.0][: len(times)])
    monkeypatch.setattr(cpp, "_WORTH", 0)
    formula = Formula((near,), numbers={"window": 24})
    run = []
    kernel = native.Kernel.__call__
    monkeypatch.setattr(native.Kernel, "__call__", lambda self, *a, **k: run.append(self.spec) or kernel(self, *a, **k))
    query = torch.randn(1, 2, 512, 48)
    expected = formula.reference(query, query, query, SITE.scale)
    with torch.no_grad():
        out = Generated(formula, SITE, lambda *given: expected)(query, query, query, None, None)
    _, second, *_ = cpp.sizes(formula, query, query, {})
    assert (run[-1].block_m, run[-1].block_n) == second
    assert error(out, expected) <= tolerance(torch.float32)


@pytest.mark.parametrize("compiler", [True, False])
def test_copies_of_keys_compete_where_most_is_hidden(monkeypatch: pytest.MonkeyPatch, compiler: bool) -> None:
    """Without a compiler, a local mask would else have PyTorch's dense kernel alone."""
    if not compiler:
        monkeypatch.setattr(cpp, "attention", lambda *given: Refusal("there is no compiler"))
    monkeypatch.setattr("rewriter.tune.measure.medians", lambda times: [2.0] * (len(times) - 1) + [1.0])
    run = []
    gathered = Gathered.__call__
    monkeypatch.setattr(Gathered, "__call__", lambda self, *given: run.append(1) or gathered(self, *given))
    query = torch.randn(1, 2, 512, 88 if compiler else 104)
    for mask, taken in ((Causal() & SlidingWindow(30, None), True), (Causal(), False)):
        built = variants()["sdpa"].build(replace(SITE, mask=mask), {})
        run.clear()
        with torch.no_grad():
            out = built(query, query, query, None, None)
        assert bool(run) == taken
        assert error(out, built.plain(query, query, query, None, None)) <= tolerance(torch.float32)


# --- other ways to be called -----------------------------------------------------------------------------------------


class Local(torch.nn.Module):
    """Attention of four heads over keys at most 40 back, spelled out."""

    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(64, 192)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (t.unflatten(-1, (4, 16)).transpose(1, 2) for t in self.project(x).chunk(3, -1))
        i = torch.arange(x.shape[1])
        seen = (i[:, None] >= i) & (i[:, None] - i <= 40)
        weights = (query @ key.mT / 4).masked_fill(~seen, float("-inf")).softmax(-1)
        return (weights @ value).transpose(1, 2).flatten(2)


def test_a_compiled_graph_calls_what_is_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another compiler sees one node: the generated kernel runs in its code, too."""
    calls = []
    kernel = native.Kernel.__call__
    monkeypatch.setattr(native.Kernel, "__call__", lambda *a, **k: calls.append(1) or kernel(*a, **k))
    model, x = Local(), torch.randn(2, 700, 64)
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, backend="rewriter", options={"inner": "aot_eager", "variants": ["sdpa"]})
        assert error(compiled(x), expected) <= tolerance(torch.float32)
        calls.clear()
        assert error(compiled(x), expected) <= tolerance(torch.float32)
    assert calls


def test_a_compiled_graph_learns() -> None:
    model, x = Local(), torch.randn(2, 700, 64)
    model(x).square().sum().backward()
    expected = model.project.weight.grad.clone()
    model.zero_grad()
    compiled = torch.compile(model, backend="rewriter", options={"inner": "aot_eager", "variants": ["sdpa"]})
    compiled(x).square().sum().backward()
    assert error(model.project.weight.grad, expected) <= 10 * tolerance(torch.float32)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # opcheck's own
def test_the_operator() -> None:
    implementation = variants()["sdpa"].build(replace(SITE, mask=Full(), bias="dense"), {})
    operands = [torch.randn(1, 2, 64, 16, requires_grad=True) for _ in range(3)]
    bias = torch.randn(64, 64, requires_grad=True)
    given = (*operands, bias, None, None, implementation.name)  # a mask that is passed says all
    torch.library.opcheck(torch.ops.rewriter.attend.default, given)
    wanted = [*operands, bias]
    got = torch.autograd.grad(torch.ops.rewriter.attend(*given).square().sum(), wanted)
    expected = torch.autograd.grad(implementation(*given[:5]).square().sum(), wanted)
    for mine, theirs in zip(got, expected, strict=True):
        assert error(mine, theirs) <= tolerance(torch.float32)


def test_two_functions_of_one_name_are_two_operators() -> None:
    built = [Generated(Formula((lambda i, j, n=n: i - j < n,)), SITE, lambda *given: given[0]) for n in (2, 3)]
    assert built[0].name != built[1].name


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")  # torch's own, of its forward derivatives
def test_forward_derivatives_take_the_plain_way() -> None:
    implementation = variants()["sdpa"].build(replace(SITE, softcap=3.0), {})
    operands = tuple(torch.randn(1, 2, 64, 16) for _ in range(3))
    along = tuple(torch.randn(1, 2, 64, 16) for _ in range(3))

    def of(attend: Any) -> Any:
        return torch.func.jvp(lambda q, k, v: attend(q, k, v, None, None), operands, along)[1]

    assert error(of(implementation), of(implementation.plain)) <= tolerance(torch.float32)


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
    runs = Lists(formula)(query, query, {}, spec.listed, spec.block_n)
    assert error(kernel(query, query, query, runs.first, runs.runs, scale=0.2), expected) <= tolerance(torch.float32)
    text = source(formula, Blocks(), head_dim=32, v_head_dim=32, dtype=torch.float32, kinds={})
    assert "remainder((i - j), 5)" in text or "remainder(t" in text


def test_the_bench_says_what_this_machine_has_no_kernel_for() -> None:
    def run() -> Tensor:
        return torch.ones(2)

    there, lacking = kernels._timed("dense", 2, torch.float32, 1, {"SDPA": run, "generated C++": Refusal("why")}, 9.0)
    assert there.milliseconds is not None and there.faster is None  # it runs alone
    assert lacking.milliseconds is None and lacking.reason == "why"
    table = kernels_markdown([there, lacking, lacking])
    assert "| generated C++ | - | - |" in table and table.count("-: why.") == 1
