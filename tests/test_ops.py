"""The canonical operator: its definition against brute force, its gradients, and its manners in torch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rewriter.guard import error, tolerance
from rewriter.ops import attention
from rewriter.site import Mask


def tensors(
    *, heads: int = 4, kv_heads: int = 4, kv_length: int = 6, dtype: torch.dtype = torch.float32, grad: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    made = torch.randn(2, heads, 5, 8), torch.randn(2, kv_heads, kv_length, 8), torch.randn(2, kv_heads, kv_length, 3)
    query, key, value = (t.to(dtype).requires_grad_(grad) for t in made)
    return query, key, value


def one_by_one(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, sink: Tensor | None = None, softcap: float = 0.0,
    normaliser: str = "softmax",
) -> Tensor:  # fmt: skip
    """The definition, a query at a time in float64; `bias` (B, H, Sq, Skv) is -inf where nothing is seen."""
    weigh = {
        "softmax": math.exp, "sigmoid": lambda s: math.exp(s) / (1 + math.exp(s)), "relu": lambda s: max(s, 0.0),
    }[normaliser]  # fmt: skip
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    groups = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                dots = [scale * float(q[b, h, i].double() @ k[b, h // groups, j].double()) for j in range(k.shape[2])]
                dots = [softcap * math.tanh(dot / softcap) for dot in dots] if softcap else dots
                scores = [weigh(dot + float(bias[b, h, i, j])) for j, dot in enumerate(dots)]
                total = sum(scores) + (0.0 if sink is None else math.exp(float(sink[h])))
                for j, score in enumerate(scores):
                    if total:
                        share = score / total if normaliser == "softmax" else score
                        out[b, h, i] += share * v[b, h // groups, j].double()
    return out


def seen(kind: str) -> Tensor | None:
    """The mask of a form of arguments: whole, a row for each batch, additive, or none."""
    random = torch.rand(2, 4, 5, 6) > 0.4
    random[0, 1, 2] = False  # a query that sees nothing
    return {
        "none": None,
        "bool": random,
        "padding": random[:, :1, :1],
        "additive": torch.randn(2, 4, 5, 6),
        "infinite": torch.where(random, 0.0, float("-inf")),
        "one for all": random[0, 0],
    }[kind]


KINDS = pytest.mark.parametrize("kind", ["none", "bool", "padding", "additive", "infinite", "one for all"])


@KINDS
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_definition(kind: str, kv_heads: int) -> None:
    inputs, mask = tensors(kv_heads=kv_heads), seen(kind)
    bias = torch.zeros(2, 4, 5, 6)
    if mask is not None:
        bias = bias.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else bias + mask
    actual = attention(*inputs, mask, None, 0.3, "full", 0.0)
    assert error(actual, one_by_one(*inputs, bias, 0.3)) <= tolerance(torch.float32)


BEYOND = pytest.mark.parametrize(
    "beyond",
    [
        {"softcap": 0.7}, {"sink": torch.zeros(4)}, {"sink": torch.linspace(-2, 2, 4)}, {"normaliser": "sigmoid"},
        {"normaliser": "relu"}, {"softcap": 3.0, "sink": torch.linspace(-2, 2, 4)},
        {"softcap": 3.0, "normaliser": "sigmoid"},
    ],
    ids=lambda beyond: " ".join(beyond),
)  # fmt: skip


@KINDS
@BEYOND
def test_the_definition_beyond_softmax(kind: str, beyond: dict[str, Any]) -> None:
    inputs, mask = tensors(kv_heads=2), seen(kind)
    bias = torch.zeros(2, 4, 5, 6)
    if mask is not None:
        bias = bias.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else bias + mask
    actual = attention(*inputs, mask, None, 0.3, "full", 0.0, **beyond)
    assert error(actual, one_by_one(*inputs, bias, 0.3, **beyond)) <= tolerance(torch.float32)


@BEYOND
def test_gradients_beyond_softmax(beyond: dict[str, Any]) -> None:
    inputs, mask = tensors(kv_heads=2, dtype=torch.float64, grad=True), seen("infinite")
    sink = beyond["sink"].double().requires_grad_() if "sink" in beyond else None

    def call(query: Tensor, key: Tensor, value: Tensor, *sinks: Tensor) -> Any:
        given = beyond | ({"sink": sinks[0]} if sinks else {})
        return attention(query, key, value, mask, None, 0.3, "causal(0)", 0.0, **given)

    assert torch.autograd.gradcheck(call, (*inputs, *([] if sink is None else [sink])), fast_mode=True)


@pytest.mark.parametrize(
    "structure", ["full", "causal(0)", "causal(-1)", "sliding_window(2, 1)", "causal(1) & padding"]
)
def test_structure_stands_for_a_mask(structure: str) -> None:
    inputs = tensors()
    mask = Mask.parse(structure).positional.visible(5, 6)
    expected = attention(*inputs, mask, None, 0.3, "full", 0.0)
    assert torch.equal(attention(*inputs, None, None, 0.3, structure, 0.0), expected)


def test_a_mask_has_the_last_word_over_structure_and_padding() -> None:
    inputs, mask = tensors(), torch.rand(2, 1, 5, 6) > 0.4
    expected = attention(*inputs, mask, None, 0.3, "full", 0.0)
    padding = torch.zeros(2, 6, dtype=torch.bool)
    assert torch.equal(attention(*inputs, mask, padding, 0.3, "causal(0)", 0.0), expected)


@pytest.mark.parametrize("kind", ["bool", "infinite"])
def test_a_query_that_sees_nothing_gives_zero(kind: str) -> None:
    inputs = tensors(grad=True)
    out = attention(*inputs, seen(kind), None, 0.3, "full", 0.0)
    assert torch.equal(out[0, 1, 2], torch.zeros(3))
    assert not out.isnan().any()
    for gradient in torch.autograd.grad(out.sum(), inputs):
        assert not gradient.isnan().any()


@KINDS
def test_gradients(kind: str) -> None:
    inputs, mask = tensors(kv_heads=2, dtype=torch.float64, grad=True), seen(kind)

    def call(query: Tensor, key: Tensor, value: Tensor) -> Any:
        return attention(query, key, value, mask, None, 0.3, "causal(0)", 0.0)

    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


def test_gradients_of_a_bias() -> None:
    bias = torch.randn(4, 5, 6, dtype=torch.float64, requires_grad=True)
    inputs = tensors(dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda b: attention(*inputs, b, None, 0.3, "full", 0.0), bias, fast_mode=True)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("none", torch.float32),
        ("padding", torch.float32),
        ("infinite", torch.bfloat16),
        pytest.param("bool", torch.float32, marks=pytest.mark.slow),
        pytest.param("additive", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("one for all", torch.bfloat16, marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own doing
def test_manners(kind: str, dtype: torch.dtype) -> None:
    inputs, mask = tensors(kv_heads=2, dtype=dtype, grad=True), seen(kind)
    padding = torch.ones(2, 6, dtype=torch.bool) if kind == "padding" else None
    torch.library.opcheck(attention, (*inputs, mask, padding, 0.3, "causal(0)", 0.0))
    if kind == "none":
        torch.library.opcheck(attention, (*inputs, mask, padding, 0.3, "causal(0)", 0.0, torch.ones(4), 5.0, "softmax"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types(dtype: torch.dtype) -> None:
    inputs = tensors(dtype=dtype)
    out = attention(*inputs, None, None, 0.3, "full", 0.0)
    assert out.dtype == dtype
    wide = attention(*(t.double() for t in inputs), None, None, 0.3, "full", 0.0)
    assert error(out, wide) <= tolerance(dtype)


def test_dropout_keeps_the_mean() -> None:
    query, key, _ = tensors(kv_length=6)
    one_hot = torch.eye(6).expand(2, 4, 6, 6)
    weights = attention(query, key, one_hot, None, None, 0.3, "full", 0.0)
    dropped = torch.stack([attention(query, key, one_hot, None, None, 0.3, "full", 0.5) for _ in range(50)])
    kept = dropped != 0
    assert kept.float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert error(dropped[kept], (2 * weights).expand_as(dropped)[kept]) <= tolerance(torch.float32)


@pytest.mark.parametrize("structure", ["", "causal", "causal(0", "dense()&", "band(3)"])
def test_a_structure_that_cannot_be_read(structure: str) -> None:
    if structure == "causal":
        assert Mask.parse(structure) == Mask.parse("causal(0)")
        return
    with pytest.raises(ValueError, match="not a mask"):
        attention(*tensors(), None, None, 0.3, structure, 0.0)
