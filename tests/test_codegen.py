"""Functions of indices: what is traced, printed and differentiated is the function, and block lists skip nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, fx

from rewriter.codegen import blocks
from rewriter.codegen.blocks import Lists, runs_of
from rewriter.codegen.derivative import derivatives
from rewriter.codegen.dialect import CPP, TRITON, printed
from rewriter.codegen.expression import traced
from rewriter.codegen.formula import (
    Formula,
    capped,
    causal,
    chunked,
    indices,
    not_after,
    not_before,
    of_mask,
    prefix_causal,
)
from rewriter.codegen.fragments import Blocks, source
from rewriter.errors import OptionError
from rewriter.site import AttentionSite, Causal, Chunked, Full, Mask, PrefixCausal, SlidingWindow
from rewriter.testing import brute_force
from rewriter.tune.measure import peak_memory
from tests.formulas import unusual

LENGTHS = st.integers(1, 70)


def visible(formula: Formula, q_len: int, kv_len: int, batch: int = 1, heads: int = 1, **tensors: Tensor) -> Tensor:
    """bool (B, H, Sq, Skv), from the definition: of equal scores, what is seen has a weight."""
    query, key = torch.zeros(batch, heads, q_len, 1), torch.zeros(batch, heads, kv_len, 1)
    one_hot = torch.eye(kv_len).expand(batch, heads, kv_len, kv_len)
    return formula.reference(query, key, one_hot, 1.0, **tensors) > 0


def check_blocks(formula: Formula, q_len: int, kv_len: int, block_m: int, block_n: int, **tensors: Tensor) -> float:
    """Every listed run is what its flag says, nothing that is visible is left out. Returns the share of pairs that are
    visited and hold nothing visible.
    """
    kinds: dict[str, Any] = {n: "bool" if t.dtype == torch.bool else "int" for n, t in tensors.items()}
    batch = max((len(t) for t in tensors.values()), default=1)
    whole = visible(formula, q_len, kv_len, batch, 2, **tensors)
    sizes = {"batch": batch, "heads": 2, "q_len": q_len, "kv_len": kv_len, "block_m": block_m, "block_n": block_n}
    wasted = 0
    for transposed in (False, True):
        lists = runs_of(formula.expressions(kinds)[0], **sizes, tensors=tensors, transposed=transposed)
        seen, (row, column) = (whole.mT, (block_n, block_m)) if transposed else (whole, (block_m, block_n))
        for b in range(batch):
            for h in range(2):
                first = lists.first[min(b, len(lists.first) - 1), min(h, lists.first.shape[1] - 1)].tolist()
                for m, (begin, end) in enumerate(itertools.pairwise(first)):
                    rows = seen[b, h, m * row : (m + 1) * row]
                    left = rows.clone()
                    for start, stop, asked in lists.runs[begin:end].tolist():
                        part = rows[:, start * column : stop * column]
                        assert start < stop
                        assert asked or bool(part.all())
                        assert asked or (len(rows) == row or not transposed)
                        assert asked or stop * column <= seen.shape[-1]
                        wasted += sum(not bool(each.any()) for each in part.split(column, -1))
                        left[:, start * column : stop * column] = False
                    assert not bool(left.any())
    return wasted / (2 * 2 * batch)


@given(q_len=LENGTHS, kv_len=LENGTHS, size=st.integers(0, 30), block_m=st.sampled_from([1, 8, 16]))
@example(q_len=1, kv_len=70, size=3, block_m=16)
def test_blocks_of_bands_are_exact(q_len: int, kv_len: int, size: int, block_m: int) -> None:
    for mask in ((causal,), (not_before, not_after), (causal, not_before)):
        formula = Formula(mask, numbers={"offset": 0, "left": size, "right": size})
        assert check_blocks(formula, q_len, kv_len, block_m, 8) == 0


@given(q_len=LENGTHS, kv_len=LENGTHS, size=st.integers(1, 30))
def test_blocks_of_other_masks(q_len: int, kv_len: int, size: int) -> None:
    def strided(i: Any, j: Any, size: int) -> Any:
        return (i % size == j % size) | (j < 3)

    def far(i: Any, j: Any, size: int) -> Any:
        return ~((i - j).abs() < size) & (torch.minimum(i, j) * 2 >= 5)

    for function in (chunked, prefix_causal, strided, far):
        check_blocks(Formula((function,), numbers={"chunk": size, "prefix": size, "size": size}), q_len, kv_len, 8, 16)


@pytest.mark.parametrize("transposed", [False, True])
def test_blocks_are_looked_at_part_by_part(transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def kept(h: Any, i: Any, j: Any, keep: Any) -> Any:
        return keep[h, i // 8, j // 8] > 0

    keep = (torch.rand(3, 20, 20, generator=torch.Generator().manual_seed(0)) < 0.4).float()
    for formula, tensors in (
        (Formula((causal, not_before), numbers={"offset": 0, "left": 30}), {}),
        (Formula((kept,)), {"keep": keep}),
        (Formula(), {}),
    ):
        mask = formula.expressions(dict.fromkeys(tensors, "float"))[0]
        sizes: dict[str, Any] = {"batch": 2, "heads": 3, "q_len": 150, "kv_len": 155, "block_m": 16, "block_n": 8}
        whole = runs_of(mask, **sizes, tensors=tensors, transposed=transposed)
        for most in (1, 50, 77):
            monkeypatch.setattr(blocks, "_AT_ONCE", most)
            parts = runs_of(mask, **sizes, tensors=tensors, transposed=transposed)
            assert torch.equal(parts.first, whole.first) and torch.equal(parts.runs, whole.runs)
        monkeypatch.undo()


def test_lists_of_a_million_tokens_need_little_memory() -> None:
    mask = Formula((causal, not_before), numbers={"offset": 0, "left": 255}).expressions({})[0]
    sizes = {"batch": 1, "heads": 1, "q_len": 1 << 20, "kv_len": 1 << 20, "block_m": 128, "block_n": 128}
    assert peak_memory(lambda: runs_of(mask, **sizes)) < 100e6


@given(seed=st.integers(0, 1000), q_len=LENGTHS)
def test_blocks_of_masks_that_read_tensors(seed: int, q_len: int) -> None:
    def documents(b: Any, i: Any, j: Any, segment: Any) -> Any:
        return segment[b, i] == segment[b, j]

    def padded(b: Any, j: Any, padding: Any) -> Any:
        return padding[b, j]

    def of_tensor(row: Any, j: Any, mask: Any) -> Any:
        return mask[row, j]

    generator = torch.Generator().manual_seed(seed)
    segment = torch.randint(0, 3, (2, 70), generator=generator).sort(-1).values
    check_blocks(Formula((documents,)), q_len, 70, 8, 8, segment=segment)
    padding = torch.rand(3, 70, generator=generator) < 0.1
    assert check_blocks(Formula((padded,)), q_len, 70, 8, 8, padding=padding) == 0
    dense = torch.rand(1, 70, generator=generator) < 0.1
    check_blocks(Formula((of_tensor,)), 1, 70, 8, 8, mask=dense)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_lists_follow_what_is_written_into_a_tensor(mode: Any) -> None:
    def padded(b: Any, j: Any, padding: Any) -> Any:
        return padding[b, j]

    with mode():
        padding = torch.arange(64)[None] < 16
        lists, query = Lists(Formula((padded,))), torch.zeros(1, 1, 64, 8)
        first = lists(query, query, {"padding": padding}, 16, 16)
        assert first.visited == 4
        assert lists(query, query, {"padding": padding}, 16, 16) is first
        padding[:, 16:32] = True
        assert lists(query, query, {"padding": padding}, 16, 16).visited == 8


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_lists_live_as_long_as_what_they_are_of(mode: Any) -> None:
    def padded(b: Any, j: Any, padding: Any) -> Any:
        return padding[b, j]

    with mode():
        lists, query = Lists(Formula((padded,))), torch.zeros(1, 1, 64, 8)
        kept = torch.arange(64)[None] < 16
        for _ in range(3):
            assert lists(query, query, {"padding": kept.clone()}, 16, 16).visited == 4
        assert not lists._known
        assert lists(query, query, {"padding": kept}, 16, 16) is lists(query, query, {"padding": kept}, 16, 16)
        assert len(lists._known) == 1


def test_a_window_visits_what_it_needs() -> None:
    """N / block rows of window / block + 1 blocks, of which all but the two ends need no mask."""
    numbers = {"offset": 0, "left": 255}
    mask, _ = Formula((causal, not_before), numbers=numbers).expressions({})
    lists = runs_of(mask, batch=1, heads=1, q_len=8192, kv_len=8192, block_m=64, block_n=64)
    assert lists.visited == 128 * 5 - (1 + 2 + 3 + 4)
    whole = lists.runs[lists.runs[:, 2] == 0]
    assert int((whole[:, 1] - whole[:, 0]).sum()) == 128 * 3 - (1 + 2 + 3)


# --- functions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mask",
    [Full(), Causal(), Causal(3), SlidingWindow(4, 2), SlidingWindow(None, 1), Chunked(5), PrefixCausal(4),
     Causal() & SlidingWindow(3, None), Causal() & Chunked(4)],
)  # fmt: skip
def test_masks_of_sites(mask: Mask) -> None:
    functions, numbers = of_mask(mask)
    for q_len, kv_len in ((9, 9), (1, 9), (4, 11), (12, 5)):
        expected = mask.visible(q_len, kv_len)
        assert torch.equal(visible(Formula(functions, numbers=numbers), q_len, kv_len)[0, 0], expected)


def mixed(s: Tensor, h: Tensor, i: Tensor, j: Tensor, slopes: Tensor, places: Tensor) -> Tensor:
    age = i - j
    bent = torch.where(age > 2, torch.tanh(s) * slopes[h], s / 3.0 - places[j].exp())
    return torch.maximum(bent, s.clamp(min=-1.0)) + torch.sqrt(torch.sigmoid(s)) * torch.log(s.abs() + 2.0) - 1.0


@pytest.mark.parametrize(
    "function",
    [mixed, lambda s: s, lambda s: 2.0 - s * s, lambda s: 1.0 / (s * s + 1.0), lambda s: torch.clamp(-s, -0.5, 0.5)],
)
def test_derivatives(function: Callable[..., Tensor]) -> None:
    names = ("slopes", "places")
    expression = traced(function, {}, dict.fromkeys(names, "float"))
    query = torch.zeros(1, 3, 5, 1, dtype=torch.float64)
    given_: dict[str, Any] = {**indices(query, query), "s": torch.randn(1, 3, 5, 5, dtype=torch.float64)}
    tensors = {"slopes": torch.randn(3, dtype=torch.float64), "places": torch.randn(5, dtype=torch.float64)}
    graph, read = derivatives(expression)
    slope, *others = evaluated(graph, {**given_, **tensors})
    s = given_["s"].requires_grad_()
    held = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    named = {node.target for node in expression.graph.find_nodes(op="placeholder")}
    out = function(**{name: value for name, value in {**given_, **held}.items() if name in named})
    (expected,) = torch.autograd.grad(out.sum(), s, retain_graph=True)
    assert torch.allclose(slope.expand_as(expected).double(), expected)
    for node, other in zip(read, others, strict=True):
        index = given_["h"] if node.args[0].target == "slopes" else given_["j"]
        (truth,) = torch.autograd.grad(out.sum(), held[str(node.args[0].target)], retain_graph=True)
        total = torch.zeros_like(truth).index_add_(0, index.expand_as(out).flatten(), other.expand_as(out).flatten())
        assert torch.allclose(total, truth)


def test_a_branch_that_is_not_taken_may_be_infinite() -> None:
    graph, _ = derivatives(traced(lambda s: torch.where(s > 0, s + 1.0, torch.exp(s)), {}, {}))
    (slope,) = evaluated(graph, {"s": torch.tensor([200.0, -1.0])})
    assert torch.allclose(slope, torch.tensor([1.0, -1.0]).exp() * torch.tensor([1 / torch.e, 1.0]))


def evaluated(graph: fx.Graph, given: dict[str, Any]) -> Any:
    module = fx.GraphModule({}, graph)
    return module(*(given[str(node.target)] for node in graph.find_nodes(op="placeholder")))


def test_what_is_used_twice_is_computed_once() -> None:
    def twice(s: Any) -> Any:
        bent = torch.tanh(s)
        return bent * bent

    for dialect in (TRITON, CPP):
        lines, (result,) = printed(traced(twice, {}, {}).graph, dialect)
        assert len(lines) == 1
        assert result == "(t0 * t0)"


def test_words_of_each_language() -> None:
    def asked(b: Any, i: Any, j: Any, padding: Any) -> Any:
        return ~padding[b, j] & (i // 4 == j // 4)

    graph = traced(asked, {}, {"padding": "bool"}).graph
    assert "!in_padding(b, j)" in printed(graph, CPP)[1][0]
    triton = printed(graph, TRITON)[1][0]
    assert "floor_divided(i, 4)" in triton
    assert "tl.load(in_padding + step(b, in_padding_n0, in_padding_s0)" in triton


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda i, j: i if i > j else j, "decides something by a value"),
        (lambda i, unknown: i < unknown, "'unknown', which is no index, no number and no tensor"),
        (lambda s: torch.erf(s), "for which no kernel has a word"),
        (lambda i, j: (i - j)[0] > 0, "takes an element of something that is no tensor"),
        (lambda s: torch.add(s, s, alpha=2), "calls add with alpha, for which"),
        (lambda s, j: s + torch.div(j, 4, rounding_mode="floor"), "calls div with rounding_mode"),
        (lambda s: s % 0.5, "divides with remainder what is no whole number"),
        (lambda s: s // 0.5, "divides with remainder what is no whole number"),
        (lambda i, j: torch.logical_not(i - j), "takes a number for a bool"),
        (lambda i, j: torch.logical_and(i, j > 2), "takes a number for a bool"),
        (lambda s, i: torch.where(i, s, 0.0), "decides by a number"),
        (lambda i, j: (i > 3) + (j > 3), "calculates with bools alone"),
        (lambda i: int(i), "what no kernel can: TypeError: int"),
        (lambda s: torch.relu(s), "calls relu, for which"),
        (lambda s, table: s * table, "reads table whole: take an element"),
        (lambda s, h, table: s + table[:, h], "reads table at slice.* no whole number"),
        (lambda s, table: s + table[s], "reads table at s, which is no whole number"),
        (lambda i, j, table: table[i < j], "reads table at lt, which is no whole number"),
    ],
)
def test_what_no_kernel_can_do_is_a_sentence(function: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        traced(function, {}, {"table": "float"})


def test_a_mask_says_what_is_seen_and_sees_no_score() -> None:
    with pytest.raises(OptionError, match="asks for the score, which no mask sees"):
        Formula((lambda s: s > 0,))
    with pytest.raises(OptionError, match="gives a number; a mask says True"):
        Formula((lambda i, j: (i - j) % 3,)).expressions({})


@pytest.mark.parametrize("name", unusual(1))
def test_blocks_of_unusual_masks(name: str) -> None:
    formula, tensors = unusual(70)[name]
    if formula.masks:
        kinds: dict[str, Any] = dict.fromkeys(tensors, "int")
        lists = runs_of(formula.expressions(kinds)[0], batch=1, heads=1, q_len=70, kv_len=70, block_m=8, block_n=8,
                        tensors=tensors)  # fmt: skip
        at = {n: torch.arange(70).view(shape) for n, shape in (("i", (-1, 1)), ("row", (-1, 1)), ("j", (1, -1)))}
        seen = formula.visible(tensors, **at).expand(70, 70)
        listed = torch.zeros(9, 9, dtype=torch.bool)
        for m, (begin, end) in enumerate(itertools.pairwise(lists.first[0, 0].tolist())):
            for start, stop, asked in lists.runs[begin:end].tolist():
                listed[m, start:stop] = True
                assert asked or bool(seen[8 * m : 8 * m + 8, 8 * start : 8 * stop].all())
        assert not bool((seen & ~listed.repeat_interleave(8, 0).repeat_interleave(8, 1)[:70, :70]).any())


def test_the_reference_is_the_canonical_operator() -> None:
    site = AttentionSite(
        path="here", heads=4, kv_heads=2, head_dim=4, v_head_dim=4, dtype="float32", scale=0.5, sink="learned",
        mask=Causal() & SlidingWindow(3, None), softcap=2.0,
    )  # fmt: skip
    q, k, v, sink = *(torch.randn(2, heads, 9, 4) for heads in (4, 2, 2)), torch.randn(4)
    functions, numbers = of_mask(site.mask)
    formula = Formula(functions, (capped,), {**numbers, "softcap": 2.0}, sink=True)
    expected = brute_force(q, k, v, None, None, sink, site=site)
    assert torch.allclose(formula.reference(q, k, v, 0.5, sink=sink).double(), expected, atol=1e-6)


def test_the_source_says_what_it_is() -> None:
    options: dict[str, Any] = {"head_dim": 64, "v_head_dim": 64, "dtype": torch.float16, "kinds": {}}
    text = source(Formula((causal,), numbers={"offset": 0}), Blocks(128, 64), **options)
    assert text.splitlines()[0].startswith('"""causal; 64>64, float16')
    assert "'block_m': 128" in text.splitlines()[0]
    compile(text, "generated", "exec")
    with pytest.raises(OptionError, match="block_n is 48; it must be a power of two"):
        Blocks(64, 48)
