"""Every spelling of attention is found once and computes the same when replaced; a look-alike is not found."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewriter.guard import error, tolerance
from rewriter.pattern import Pattern, Step, patterns
from rewriter.site import Causal, Dense, Full, Padding, SlidingWindow

Spelling = Callable[..., Tensor]

EXAMPLES = [
    pytest.param(pattern, example, id=f"{name}-{number}")
    for name, pattern in patterns().items()
    for number, example in enumerate(pattern.examples)
]
SYMBOLIC = [  # a second each, so the first of each pattern stands for the others
    pytest.param(pattern, example, id=f"{name}-{number}", marks=[pytest.mark.slow] if number else [])
    for name, pattern in patterns().items()
    for number, example in enumerate(pattern.examples)
]
PIECES = (torch.ops.aten.softmax.int, torch.ops.aten.matmul.default, torch.ops.aten.bmm.default)


def tensors(
    batch: int = 2, heads: int = 4, length: int = 7, width: int = 8, *, kv_length: int | None = None,
    kv_heads: int | None = None, dtype: torch.dtype = torch.float32, grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Queries, keys and values, with values a little narrower than keys."""
    kv = (batch, kv_heads or heads, kv_length or length)
    made = torch.randn(batch, heads, length, width), torch.randn(*kv, width), torch.randn(*kv, width - 2)
    query, key, value = (t.to(dtype).requires_grad_(grad) for t in made)
    return query, key, value


def random_mask(batch: int, length: int, kv_length: int) -> Tensor:
    """bool, True is visible; every query sees a key."""
    mask = torch.rand(batch, 1, length, kv_length) > 0.4
    mask[..., 0] |= ~mask.any(-1)
    return mask


def takes_shared_heads(example: Spelling) -> bool:
    try:
        example(*tensors(kv_heads=2), random_mask(2, 7, 7))
    except RuntimeError:
        return False
    return True


def placed(graph: torch.fx.GraphModule) -> int:
    return len(graph.graph.find_nodes(op="call_module"))


def edits(pattern: Pattern, graph: torch.fx.GraphModule) -> set[str]:
    """What this pattern itself reads as edits. Only they are a reason to keep one of its examples as it is."""
    found: set[str] = set()
    for node in graph.graph.nodes:
        steps = pattern.element(node) if pattern.element and node.op == "call_function" else None
        for step in (steps,) if isinstance(steps, Step) else steps or ():
            found |= {step.name} if step.kind == "edit" else set()
        product = pattern.contraction(node) if pattern.contraction and node.op == "call_function" else None
        found |= {product.edit} if product is not None and product.edit else set()
    return found


def check_kept_or_placed(pattern: Pattern, result: Any) -> None:
    """The one attention is replaced; or it is kept, and the pattern under test says why."""
    (site,), (graph,) = result.sites, result.graphs
    assert not result.refusals
    if result.kept:
        assert not result.matches and placed(graph) == 0
        assert set(site.edits) == edits(pattern, graph) != set()
    else:
        assert not site.edits
        assert placed(graph) == 1, "the implementation stands in the graph"
        assert not any(n.target in PIECES for n in graph.graph.nodes), "nothing is computed twice"


# --- the examples of the patterns ------------------------------------------------------------------------------------


# Tested in a file of their own: flex_attention runs compiled only, and has no gradients on a CPU (test_backend.py);
# attention to places in maps has no keys (test_deformable.py).
WITHOUT_EXAMPLES = {"flex", "grid_sample", "join"}


@pytest.mark.parametrize("name", patterns())
def test_every_pattern_has_examples(name: str) -> None:
    assert (len(patterns()[name].examples) >= 2) != (name in WITHOUT_EXAMPLES)
    assert patterns()[name].name == name


@pytest.mark.parametrize(("pattern", "example"), EXAMPLES)
def test_float32_with_gradients(rewrite: Any, pattern: Pattern, example: Spelling) -> None:
    kv_heads = 2 if takes_shared_heads(example) else 4
    inputs = tensors(3, 4, 13, kv_heads=kv_heads, kv_length=11, grad=True)
    mask = random_mask(3, 13, 11)
    result = rewrite(example, *inputs, mask)
    assert [(s.heads, s.kv_heads, s.head_dim, s.v_head_dim) for s in result.sites] == [(4, kv_heads, 8, 6)] or (
        [(s.heads, s.kv_heads) for s in result.sites] == [(1, 1)]  # batch and heads in one axis
    )
    check_kept_or_placed(pattern, result)
    expected = example(*inputs, mask)
    assert error(result.out, expected) <= tolerance(torch.float32)
    direction = torch.randn_like(expected)
    actual_gradients = torch.autograd.grad(result.out, inputs, direction)
    for actual, wanted in zip(actual_gradients, torch.autograd.grad(expected, inputs, direction), strict=True):
        assert error(actual, wanted) <= tolerance(torch.float32)


@pytest.mark.parametrize(("pattern", "example"), EXAMPLES)
def test_bfloat16_at_batch_one(rewrite: Any, pattern: Pattern, example: Spelling) -> None:
    inputs = tensors(1, 4, 9, kv_length=17, dtype=torch.bfloat16)
    mask = random_mask(1, 9, 17)
    result = rewrite(example, *inputs, mask, variant="sdpa")
    assert [s.dtype for s in result.sites] == ["bfloat16"]
    check_kept_or_placed(pattern, result)
    assert result.out.dtype == torch.bfloat16
    assert error(result.out, example(*inputs, mask)) <= tolerance(torch.bfloat16)


@pytest.mark.parametrize(("pattern", "example"), SYMBOLIC)
def test_symbolic_sizes(rewrite: Any, pattern: Pattern, example: Spelling) -> None:
    result = rewrite(example, *tensors(2, 4, 7), random_mask(2, 7, 7), dynamic=True, variant="sdpa")
    assert [(s.q_len, s.kv_len) for s in result.sites] == [(None, None)]
    for batch, length in ((2, 7), (3, 19), (2, 137)):
        inputs, mask = tensors(batch, 4, length), random_mask(batch, length, length)
        assert error(result.run(*inputs, mask), example(*inputs, mask)) <= tolerance(torch.float32)
    check_kept_or_placed(pattern, result)  # of one graph, which serves all lengths


# --- other spellings, most of them from public bugs of other systems -------------------------------------------------


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


def causal(length: int, kv_length: int | None = None) -> Tensor:
    """bool, aligned at the end."""
    kv_length = kv_length or length
    return torch.arange(kv_length) <= torch.arange(length)[:, None] + (kv_length - length)


def in_place(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = q @ k.mT
    scores.masked_fill_(~mask, -1e9)
    return scores.softmax(-1) @ v


def two_fills(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = (q @ k.mT).masked_fill(~causal(7), torch.finfo(q.dtype).min)
    return scores.masked_fill(~mask, torch.finfo(q.dtype).min).softmax(-1) @ v


def dropped_copy(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.clone((q @ k.mT).masked_fill(~mask, -1e9).softmax(-1)) @ v


OTHERS: dict[str, Spelling] = {
    "keys stored sequence-first": lambda q, k, v, m: (q @ k.transpose(1, 2).permute(0, 2, 3, 1)).softmax(-1) @ v,
    "keys by swapaxes": lambda q, k, v, m: (q @ k.swapaxes(-1, -2)).softmax(-1) @ v,
    "scale 0.5": lambda q, k, v, m: (q @ k.mT * 0.5).masked_fill(~m, -1e9).softmax(-1) @ v,
    "times a third": lambda q, k, v, m: ((q @ k.mT).mul(1 / 3) + torch.where(m, 0.0, -1e9)).softmax(-1) @ v,
    "divided by three": lambda q, k, v, m: ((q @ k.mT).div(3) + torch.where(m, 0.0, -1e9)).softmax(-1) @ v,
    "divided by a tensor": lambda q, k, v, m: ((q @ k.mT) / torch.full([], 3.0)).softmax(-1) @ v,
    "times a constant tensor": lambda q, k, v, m: ((q @ k.mT) * torch.tensor(0.3)).softmax(-1) @ v,
    "a number times the scores": lambda q, k, v, m: (0.3 * (q @ k.mT)).softmax(-1) @ v,
    "split scale": lambda q, k, v, m: ((q * 0.595) @ (k * 0.595).mT).softmax(-1) @ v,
    "scale above the mask": lambda q, k, v, m: (((q @ k.mT) + torch.where(m, 0.0, -1e9)) * 0.3).softmax(-1) @ v,
    "mask + scores": lambda q, k, v, m: (torch.where(m, 0.0, -1e9) + q @ k.mT).softmax(-1) @ v,
    "two masks": lambda q, k, v, m: (q @ k.mT + torch.where(m, 0.0, -1e9) + torch.rand(7, 7)).softmax(-1) @ v,
    "a fill of -1e4": lambda q, k, v, m: (q @ k.mT).masked_fill(~m, -1e4).softmax(-1) @ v,
    "a fill of -1e9": lambda q, k, v, m: (q @ k.mT).masked_fill(m.logical_not(), -1e9).softmax(-1) @ v,
    "a fill of -inf": lambda q, k, v, m: (q @ k.mT).masked_fill(~m, float("-inf")).softmax(-1) @ v,
    "a fill in place": in_place,
    "two fills": two_fills,
    "where with a tensor": lambda q, k, v, m: (
        torch.where(m, q @ k.mT, torch.full([], torch.finfo(q.dtype).min)).softmax(-1) @ v
    ),
    "where the other way": lambda q, k, v, m: torch.where(~m, -1e9, q @ k.mT).softmax(-1) @ v,
    "the copy that dropout leaves": dropped_copy,
    "no copy of one head": lambda q, k, v, m: (q @ k[:, :1].mT).softmax(-1) @ v[:, :1],
    "values are the keys": lambda q, k, v, m: (q @ k.mT).masked_fill(~m, -1e9).softmax(-1) @ k,
    "self": lambda q, k, v, m: (q @ q.mT).softmax(-1) @ q,
    "cast to float64": lambda q, k, v, m: (q @ k.mT).double().softmax(-1).to(v.dtype) @ v,
}


@pytest.mark.parametrize("spelling", OTHERS.values(), ids=OTHERS)
def test_other_spellings(rewrite: Any, spelling: Spelling) -> None:
    inputs, mask = tensors(), random_mask(2, 7, 7)
    mask[0, 0, 3] = False  # one query sees nothing
    torch.manual_seed(1)
    result = rewrite(spelling, *inputs, mask)
    assert len(result.sites) == 1, result.refusals
    assert placed(result.graphs[0]) == 1
    assert not any(n.target in PIECES for n in result.graphs[0].graph.nodes)
    torch.manual_seed(1)
    expected = spelling(*inputs, mask)
    assert error(result.out, expected) <= tolerance(torch.float32)
    assert not (result.out.isnan() & ~expected.isnan()).any(), "no NaN that was not there"


@pytest.mark.parametrize(
    ("spelling", "scale"),
    [
        (lambda q, k, v: (q @ k.mT * 0.5).softmax(-1) @ v, 0.5),
        (lambda q, k, v: (q @ k.mT / 3).softmax(-1) @ v, 1 / 3),
        (lambda q, k, v: ((q * 0.5) @ (k / 4).mT * 0.1).softmax(-1) @ v, 0.0125),
        (lambda q, k, v: ((q @ k.mT) * torch.tensor(0.25)).softmax(-1) @ v, 0.25),
        (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.5), 0.5),
        (lambda q, k, v: F.scaled_dot_product_attention(q, k, v), 1 / math.sqrt(8)),
        (softmax_attention, 1.0),
    ],
)
def test_the_scale_is_a_fact(rewrite: Any, spelling: Spelling, scale: float) -> None:
    result = rewrite(spelling, *tensors())
    assert [s.scale for s in result.sites] == [pytest.approx(scale)]


@pytest.mark.parametrize(
    ("spelling", "mask"),
    [
        (softmax_attention, Full()),
        (lambda q, k, v: (q @ k.mT).masked_fill(~causal(7), -1e9).softmax(-1) @ v, Causal()),
        (lambda q, k, v: (q @ k.mT + torch.full((7, 7), -1e9).triu(1)).softmax(-1) @ v, Causal()),
        (lambda q, k, v: torch.where(causal(7), q @ k.mT, -1e9).softmax(-1) @ v, Causal()),
        (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), Causal()),
        (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, causal(7)), Causal()),
        (lambda q, k, v: F.scaled_dot_product_attention(q[:, :, :5], k, v, is_causal=True), Causal(-2)),
        (lambda q, k, v: F.scaled_dot_product_attention(q[:, :, 3:], k, v, causal(4, 7)), Causal()),
        (
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, causal(7) & ~causal(7).tril(-3)),
            SlidingWindow(2, 0),
        ),
        # GQA that sees everything is not causal.
        (lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], enable_gqa=True), Full()),
        # A query that sees nothing mixes the values evenly with a finite fill, and gives 0 in the algebra.
        (lambda q, k, v: (q @ k.mT).masked_fill(~causal(7).tril(-1), -1e9).softmax(-1) @ v, Dense()),
        (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, causal(7).tril(-1)), Causal(-1)),
        # So small a scale brings hidden keys back into view.
        (lambda q, k, v: ((q @ k.mT + torch.where(causal(7), 0.0, -1e4)) * 1e-4).softmax(-1) @ v, Dense()),
        # Chance is not a function of positions.
        (lambda q, k, v: (q @ k.mT).masked_fill(torch.rand(7, 7) < 1e-9, -1e9).softmax(-1) @ v, Dense()),
    ],
)
def test_the_mask_is_a_fact(rewrite: Any, spelling: Spelling, mask: Any) -> None:
    inputs = tensors()
    torch.manual_seed(1)
    result = rewrite(spelling, *inputs)
    assert [s.mask for s in result.sites] == [mask]
    torch.manual_seed(1)
    assert error(result.out, spelling(*inputs)) <= tolerance(torch.float32)


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_shared_heads(rewrite: Any, groups: int) -> None:
    def spelling(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return softmax_attention(q, *(t.repeat_interleave(groups, 1) for t in (k, v)))

    inputs = tensors(heads=6, kv_heads=6 // groups)
    result = rewrite(spelling, *inputs)
    assert [(s.heads, s.kv_heads) for s in result.sites] == [(6, 6 // groups)]
    assert error(result.out, spelling(*inputs)) <= tolerance(torch.float32)


def test_heads_that_only_keys_share(rewrite: Any) -> None:
    def spelling(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return softmax_attention(q, k.repeat_interleave(2, 1) * 0.5, v)

    inputs = tensors()[0], tensors(kv_heads=2)[1], tensors()[2]
    result = rewrite(spelling, *inputs)
    assert [(s.heads, s.kv_heads) for s in result.sites] == [(4, 4)]
    assert error(result.out, spelling(*inputs)) <= tolerance(torch.float32)


@pytest.mark.parametrize(("length", "width"), [(137, 512), (521, 80), (1025, 40)])
def test_lengths_and_widths_that_are_no_powers_of_two(rewrite: Any, length: int, width: int) -> None:
    def spelling(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q * width**-0.5 @ k.mT).masked_fill(~causal(length), -1e9).softmax(-1) @ v

    inputs = tensors(1, 2, length, width)
    result = rewrite(spelling, *inputs, variant="sdpa")
    assert [s.mask for s in result.sites] == [Causal()], result.refusals
    assert error(result.out, spelling(*inputs)) <= tolerance(torch.float32)


def test_left_padding_is_kept(rewrite: Any) -> None:
    def spelling(q: Tensor, k: Tensor, v: Tensor, tokens: Tensor) -> Tensor:
        mask = causal(7) & tokens[:, None, None, :]
        return (q @ k.mT + torch.where(mask, 0.0, torch.finfo(q.dtype).min)).softmax(-1) @ v

    inputs, tokens = tensors(), torch.tensor([[False] * 3 + [True] * 4, [True] * 7])
    result = rewrite(spelling, *inputs, tokens, variant="sdpa")
    assert [s.mask for s in result.sites] == [Causal() & Padding()]
    assert error(result.out, spelling(*inputs, tokens)) <= tolerance(torch.float32)
    everything = torch.ones_like(tokens)
    assert error(result.run(*inputs, everything), spelling(*inputs, everything)) <= tolerance(torch.float32)
    assert len(result.graphs) == 1


def test_a_mask_of_another_type_stays_finite(rewrite: Any) -> None:
    """The lowest float32 would be -inf in bfloat16, and a query that sees nothing not a number."""

    def spelling(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return ((q @ k.mT).float() + bias).softmax(-1).to(v.dtype) @ v

    inputs = tensors(dtype=torch.bfloat16)
    bias = torch.where(random_mask(2, 7, 7), 0.0, torch.finfo(torch.float32).min)
    bias[0, 0, 2] = torch.finfo(torch.float32).min
    result = rewrite(spelling, *inputs, bias)
    assert len(result.sites) == 1
    assert error(result.out, spelling(*inputs, bias)) <= tolerance(torch.bfloat16)


def test_dropout_is_a_fact(rewrite: Any) -> None:
    def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.dropout((q @ k.mT).softmax(-1), 0.25) @ v

    def dropped_call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.25, scale=1.0)

    query, key, _ = tensors(1, 2, 200, 4)
    one_hot = torch.eye(200).expand(1, 2, 200, 200)  # of which the result is the weights themselves
    weights = (query @ key.mT).softmax(-1)
    for spelling in (dropped, dropped_call):
        result = rewrite(spelling, query, key, one_hot)
        assert [s.dropout_p for s in result.sites] == [0.25]
        assert not any(n.target in PIECES for n in result.graphs[0].graph.nodes), "nothing is computed twice"
        kept = result.out != 0
        assert kept.float().mean().item() == pytest.approx(0.75, abs=0.01)
        assert error(result.out[kept], weights[kept] / 0.75) <= tolerance(torch.float32)


def test_a_scale_and_a_dropout_that_belong_to_the_module(rewrite: Any) -> None:
    """Under dynamic shapes dynamo makes float attributes symbolic."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.drop = 0.3, 0.1

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.dropout((q @ k.mT * self.scale).softmax(-1), self.drop, self.training) @ v

    model, inputs = Attention().eval(), tensors()
    result = rewrite(model, *inputs, dynamic=True)
    assert [s.scale for s in result.sites] == [0.3]
    model.scale = 0.7
    assert error(result.run(*inputs), model(*inputs)) <= tolerance(torch.float32), "the number is guarded"
    result = rewrite(model.train(), *inputs, dynamic=True)
    assert [(s.scale, s.dropout_p) for s in result.sites] == [(0.7, 0.1)]


def test_autocast(rewrite: Any) -> None:
    inputs = tensors()
    with torch.autocast("cpu", torch.bfloat16):
        result = rewrite(softmax_attention, *inputs)
        expected = softmax_attention(*inputs)
    assert len(result.sites) == 1, result.refusals
    assert result.out.dtype == expected.dtype == torch.bfloat16
    assert error(result.out, expected) <= tolerance(torch.bfloat16)


# --- recognised, beyond softmax(scale * q k^T + mask) v ---------------------------------------------------------------

RECOGNISED: dict[str, tuple[Spelling, dict[str, Any]]] = {
    "a learned temperature": (lambda q, k, v: ((q @ k.mT) * v.mean()).softmax(-1) @ v, {"factor": "scalar"}),
    "a temperature for each head": (
        lambda q, k, v: ((q @ k.mT) / v.exp().mean((0, 2, 3))[:, None, None]).softmax(-1) @ v,
        {"factor": "head"},
    ),
    "softcap": (lambda q, k, v: ((q @ k.mT / 5).tanh() * 5).softmax(-1) @ v, {"softcap": 5.0}),
    "two products": (lambda q, k, v: (q @ k.mT + k @ q.mT).softmax(-1) @ v, {"bias": "dense"}),
    "queries for all batches": (lambda q, k, v: (q[:1] @ k.mT).softmax(-1) @ v, {"batch": 2}),
    "a mask larger than the scores": (
        lambda q, k, v: (q[:, :, :1] @ k.mT + torch.rand(7, 7)).softmax(-1) @ v,
        {"mask": Dense()},
    ),
    "a mask for heads that are all one": (
        lambda q, k, v: (q[:, :1] @ k[:, :1].mT + torch.rand(4, 7, 7)).softmax(-1) @ v[:, :1],
        {"mask": Dense()},
    ),
    "the axis of the keys, turned": (lambda q, k, v: (q @ k.mT).transpose(2, 3).softmax(-2).mT @ v, {}),
}


@pytest.mark.parametrize(("spelling", "facts"), RECOGNISED.values(), ids=RECOGNISED)
def test_recognised_with_facts(rewrite: Any, spelling: Spelling, facts: dict[str, Any]) -> None:
    inputs = tensors(grad=True)
    torch.manual_seed(1)
    result = rewrite(spelling, *inputs)
    (site,) = result.sites
    assert not result.kept and not result.refusals
    assert placed(result.graphs[0]) == 1
    plain = {
        "heads": 4, "q_len": 7, "kv_len": 7, "scale": 1.0, "mask": Full(), "bias": "none", "factor": None,
        "softcap": None, "normaliser": "softmax", "sink": None, "edits": (),
    }  # fmt: skip
    assert {name: getattr(site, name) for name in plain | facts} == plain | facts
    torch.manual_seed(1)
    expected = spelling(*inputs)
    assert error(result.out, expected) <= tolerance(torch.float32)
    direction = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, inputs, direction)
    for actual, other in zip(torch.autograd.grad(result.out, inputs, direction), wanted, strict=True):
        assert error(actual, other) <= tolerance(torch.float32)


# --- recognised, and kept as they are --------------------------------------------------------------------------------


def used_twice(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = (q @ k.mT).softmax(-1)
    return weights @ v, weights


def changed_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores[..., 0] = -1e9  # through a view that nobody reads
    return scores.softmax(-1) @ v


def changed_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = k.clone()
    scores = q @ k.mT
    k.zero_()
    return scores.softmax(-1) @ v + k.sum()


KEPT: dict[str, tuple[Spelling, str]] = {
    "weights with another user": (used_twice, "weights_used"),
    "a mask that multiplies": (
        lambda q, k, v: ((q @ k.mT) * (torch.rand(7, 7) > 0.3)).softmax(-1) @ v,
        "scaled_by_position",
    ),
    "weights that are edited": (lambda q, k, v: (q @ k.mT).softmax(-1).square() @ v, "squared"),
    "a fill that hides nothing": (
        lambda q, k, v: (q @ k.mT).masked_fill(~causal(7), -1.0).softmax(-1) @ v,
        "soft_mask",
    ),
    "a fill that is turned around": (
        lambda q, k, v: ((q @ k.mT).masked_fill(~causal(7), -1e30) * -1).softmax(-1) @ v,
        "soft_mask",
    ),
    "scores changed through a view": (changed_scores, "changed_in_place"),
    "keys changed before they are used": (changed_keys, "changed_in_place"),
    "dropped twice": (lambda q, k, v: F.dropout(F.dropout((q @ k.mT).softmax(-1), 0.5), 0.5) @ v, "dropped_twice"),
}


@pytest.mark.parametrize(("spelling", "edit"), KEPT.values(), ids=KEPT)
def test_kept_with_the_name_of_the_edit(rewrite: Any, spelling: Spelling, edit: str) -> None:
    inputs = tensors()
    torch.manual_seed(1)
    result = rewrite(spelling, *inputs)
    (site,) = result.sites
    assert not result.matches and not result.refusals
    assert (site.heads, site.head_dim, site.q_len, site.kv_len) == (4, 8, 7, 7)
    assert site.edits == (edit,)
    assert placed(result.graphs[0]) == 0
    torch.manual_seed(1)
    expected = spelling(*inputs)
    for actual, wanted in zip(*((t if isinstance(t, tuple) else (t,)) for t in (result.out, expected)), strict=True):
        assert torch.equal(actual, wanted)


# --- refused with a sentence -----------------------------------------------------------------------------------------


REFUSED: dict[str, tuple[Spelling, str]] = {
    "an element that is not known": (lambda q, k, v: (q @ k.mT).sin().softmax(-1) @ v, "stopped at aten.sin"),
    "weights that are not known": (lambda q, k, v: (q @ k.mT).softmax(-1).sin() @ v, "stopped at aten.sin"),
    "the axis of the queries": (lambda q, k, v: (q @ k.mT).softmax(-2) @ v, "other axes"),
    "weights on the right": (lambda q, k, v: v.mT @ (q @ k.mT).softmax(-1), "other axes"),
}


@pytest.mark.parametrize(("spelling", "sentence"), REFUSED.values(), ids=REFUSED)
def test_refused_with_a_sentence(rewrite: Any, spelling: Spelling, sentence: str) -> None:
    inputs = tensors()
    torch.manual_seed(1)
    result = rewrite(spelling, *inputs)
    assert not result.sites
    assert any(sentence in refusal for refusal in result.refusals), result.refusals
    assert all("test_patterns.py:" in refusal for refusal in result.refusals), "with the line of the model"
    torch.manual_seed(1)
    expected = spelling(*inputs)
    for actual, wanted in zip(*((t if isinstance(t, tuple) else (t,)) for t in (result.out, expected)), strict=True):
        assert torch.equal(actual, wanted)


# --- what only looks like attention ----------------------------------------------------------------------------------


class Router(nn.Module):
    """A mixture of experts: softmax over a linear layer, then a mixture by products."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.experts = nn.Parameter(torch.randn(4, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        outs = torch.einsum("bsd,edf->bsef", x, self.experts)
        return (weights[:, :, None] @ outs).squeeze(2)


class Prototypes(nn.Module):
    """softmax(x @ parameter) @ parameter: a lookup in a learned table."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 8))
        self.spelling = spelling

    def forward(self, x: Tensor) -> Tensor:
        scores = {"mT": lambda: x @ self.table.mT, "T": lambda: x @ self.table.T, "t": lambda: x @ self.table.t()}
        return scores[self.spelling]().softmax(-1) @ self.table


class SqueezeExcite(nn.Module):
    """Weights of channels, from a convolution of their means."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).softmax(1)
        return x * gate @ x.mT


class Classifier(nn.Module):
    """Its scores meet a product again, that of the next layer."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.next = nn.Linear(8, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.next(self.head(x).softmax(-1))


LOOK_ALIKES: dict[str, Any] = {
    "router": Router(),
    "classifier": Classifier(),
    "prototypes-mT": Prototypes("mT"),
    "prototypes-T": Prototypes("T"),
    "prototypes-t": Prototypes("t"),
    "no values": lambda x: (x @ x.mT).softmax(-1),
    "no values, but a loss": lambda x: (x @ x.mT).softmax(-1).log().diagonal(dim1=-2, dim2=-1).mean(),
    "a softmax of nothing": lambda x: x.softmax(-1) @ x.mT,
    "gates": lambda x: x * x.mean(-2, keepdim=True).softmax(-1),
}


@pytest.mark.parametrize("model", LOOK_ALIKES.values(), ids=LOOK_ALIKES)
def test_look_alikes_are_left_alone_in_silence(rewrite: Any, model: Any) -> None:
    x = torch.randn(2, 6, 8)
    result = rewrite(model, x)
    assert not result.sites
    assert not result.refusals, "nothing that a reader would take for attention"
    assert torch.equal(result.out, model(x))


class Cascade(nn.Module):
    """Heads one after the other over a map, each fed with what came out of the last; joined, activated, projected."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Conv2d(8, 24, 1) for _ in range(2))
        self.out = nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            heads: list[Tensor] = []
            for part, layer in zip(x.chunk(2, 1), self.qkv, strict=True):
                q, k, v = layer(part + heads[-1] if heads else part).flatten(2).chunk(3, 1)
                heads.append((v @ (q.mT @ k * 0.35).softmax(-1).mT).unflatten(2, x.shape[2:]))
            x = x + self.out(torch.cat(heads, 1).relu())
        return x


def test_what_an_attention_gives_is_no_score_of_another(rewrite: Any) -> None:
    model, x = Cascade(), torch.randn(2, 16, 3, 4)
    result = rewrite(model, x)
    assert [site.normaliser for site in result.sites] == 4 * ["softmax"]
    assert len(result.matches) == 4


def test_squeeze_and_excitation(rewrite: Any) -> None:
    model, x = SqueezeExcite(), torch.randn(2, 8, 4, 4)
    result = rewrite(model, x)
    assert not result.sites
    assert not result.refusals
    assert torch.equal(result.out, model(x))


def test_channel_attention(rewrite: Any) -> None:
    """Cross-covariance attention: the scores are of channels by channels, D x D. It is recognised, and left alone."""

    class Channels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(32, 96)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 4, 1).unbind(0)
            weights = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT).softmax(-1)
            return (weights @ v).permute(0, 3, 1, 2).flatten(2)

    model, x = Channels(), torch.randn(2, 20, 32)
    result = rewrite(model, x)
    assert not result.matches
    assert [(s.q_len, s.kv_len, s.head_dim, s.edits) for s in result.sites] == [(8, 8, 20, ("over_channels",))]
    assert torch.equal(result.out, model(x))
