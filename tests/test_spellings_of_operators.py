"""The same attention by other operators than the usual ones: products, sums, exponentials, masks. Captured without
dynamo, each in some milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewriter.backend import GraphRewriter
from rewriter.detect import Detection
from rewriter.site import Causal, Full, Padding
from tests.programs import check_equal, rewritten

S, SCALE = 7, 8**-0.5


def qkv(*lead: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(*lead, S, 8, requires_grad=True) for _ in range(3))
    return q, k, v


def found(model: Callable[..., Tensor], *inputs: Tensor) -> Detection:
    """What is detected, after a check of values and gradients."""
    detection, run = rewritten(model, *inputs, variant="sdpa")
    given = tuple(t for t in inputs if t.requires_grad)
    check_equal(run(*inputs), model(*inputs), given)
    return detection


def tril() -> Tensor:
    return torch.ones(S, S, dtype=torch.bool).tril()


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT * SCALE


# --- products --------------------------------------------------------------------------------------------------------


def by_tensordot(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.tensordot((torch.tensordot(q, k, ([1], [1])) * SCALE).softmax(-1), v, 1)


def scaled_by_channel(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("bhij,bhjd->bhid", torch.einsum("bhid,bhjd,hd->bhij", q, k, w).softmax(-1), v)


def projected_at_once(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("bhij,bhjd,hdf->bif", scores(q, k).softmax(-1), v, w)


PRODUCTS: dict[str, tuple[Callable[..., Tensor], Callable[[], Sequence[Tensor]]]] = {
    "tensordot": (by_tensordot, lambda: qkv()),
    "linalg.matmul": (
        lambda q, k, v: torch.linalg.matmul(torch.linalg.matmul(q, k.mT).softmax(-1), v), lambda: qkv(2, 4)
    ),
    "einsum without an output": (lambda q, k, v: torch.einsum("ik,jk", q, k).softmax(-1) @ v, lambda: qkv()),
    "einsum of three, a factor": (scaled_by_channel, lambda: (*qkv(2, 4), nn.Parameter(torch.randn(4, 8)))),
    "einsum of three, a projection": (projected_at_once, lambda: (*qkv(2, 4), nn.Parameter(torch.randn(4, 8, 5)))),
    "a mean": (
        lambda q, k, v: ((q[..., :, None, :] * k[..., None, :, :]).mean(-1).softmax(-1)[..., None] * v[..., None, :, :])
        .sum(-2),
        lambda: qkv(2, 4),
    ),
    "cosine_similarity": (
        lambda q, k, v: (F.cosine_similarity(q[..., :, None, :], k[..., None, :, :], -1) * 10).softmax(-1) @ v,
        lambda: qkv(2, 4),
    ),
    "a query without an axis": (lambda q, k, v: (k @ q[0] * SCALE).softmax(0) @ v, lambda: qkv()),
    "a product on the right of a difference": (
        lambda q, k, v: (-(q.square().sum(-1, keepdim=True) - 2 * q @ k.mT)).softmax(-1) @ v, lambda: qkv(2, 4)
    ),
    "addcmul": (
        lambda q, k, v, b, g: torch.addcmul(scores(q, k), b, g).softmax(-1) @ v,
        lambda: (*qkv(2, 4), nn.Parameter(torch.randn(S, S)), nn.Parameter(torch.randn(4, 1, 1))),
    ),
    "addcmul of the scores": (
        lambda q, k, v: torch.addcmul(torch.zeros(S, S), q @ k.mT, torch.tensor(SCALE)).softmax(-1) @ v,
        lambda: qkv(2, 4),
    ),
    "addcdiv": (
        lambda q, k, v: torch.addcdiv(torch.zeros(S, S), q @ k.mT, torch.tensor(3.0)).softmax(-1) @ v,
        lambda: qkv(2, 4),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("model", "inputs"), PRODUCTS.values(), ids=PRODUCTS)
def test_products(model: Callable[..., Tensor], inputs: Callable[[], Sequence[Tensor]]) -> None:
    (match,) = found(model, *inputs()).matches
    assert match.site.head_dim == 8


def test_an_einsum_of_three_of_any_length() -> None:
    """Which two tensors meet first does not depend on how long they are."""
    seen = GraphRewriter(None)
    run = torch.compile(projected_at_once, backend=seen)
    weight = nn.Parameter(torch.randn(4, 8, 5))
    for length in (6, 9, 40):
        q, k, v = (torch.randn(2, 4, length, 8) for _ in range(3))
        for tensor in (q, k, v):
            torch._dynamo.mark_dynamic(tensor, 2)
        check_equal(run(q, k, v, weight), projected_at_once(q, k, v, weight))
    assert seen.graphs == len(seen.sites) == 1


def test_a_three_way_mask_is_not_lost() -> None:
    """Of three tensors in a product, the mask meets the weights first."""

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.einsum("bhij,ij,bhjd->bhid", scores(q, k).softmax(-1), tril().float(), v)

    (site,) = found(model, *qkv(2, 4)).sites
    assert site.edits


def test_a_linear_layer_by_tensordot_is_none() -> None:
    weight = nn.Parameter(torch.randn(8, 5))
    model: Any = lambda x, w: torch.tensordot(x, w, ([2], [0])).softmax(-1) @ torch.randn(5, 8)  # noqa: E731
    assert not rewritten(model, torch.randn(2, S, 8), weight)[0].sites


# --- normalisers -----------------------------------------------------------------------------------------------------


def powers(base: Callable[[Tensor], Tensor], logarithm: float) -> Callable[..., Tensor]:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = scores(q, k) / logarithm
        e = base(s - s.amax(-1, keepdim=True))
        return e / e.sum(-1, keepdim=True) @ v

    return model


def divided(by: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda q, k, v: by(scores(q, k).exp()) @ v


def in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    s -= s.amax(-1, keepdim=True)
    s.exp_()
    s /= s.sum(-1, keepdim=True)
    return s @ v


def by_logsumexp(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    return (s - s.logsumexp(-1).unsqueeze(-1)).exp() @ v


NORMALISERS: dict[str, Callable[..., Tensor]] = {
    "exp2": powers(torch.exp2, math.log(2)),
    "a power of two": powers(lambda s: 2**s, math.log(2)),
    "a power of ten": powers(lambda s: torch.pow(10.0, s), math.log(10)),
    "a sum with its axis put back": divided(lambda e: e / e.sum(-1).unsqueeze(-1)),
    "a sum indexed with None": divided(lambda e: e / e.sum(-1)[..., None]),
    "a sum in another shape": divided(lambda e: e / e.sum(-1).view(2, 4, S, 1).expand_as(e)),
    "times the reciprocal": divided(lambda e: e * e.sum(-1, keepdim=True).reciprocal()),
    "one over the sum": divided(lambda e: e * (1 / e.sum(-1, keepdim=True))),
    "to the power of minus one": divided(lambda e: e.sum(-1, keepdim=True).pow(-1) * e),
    "logsumexp with its axis put back": by_logsumexp,
}


@pytest.mark.parametrize("model", NORMALISERS.values(), ids=NORMALISERS)
def test_normalisers(model: Callable[..., Tensor]) -> None:
    (match,) = found(model, *qkv(2, 4)).matches
    assert match.site.scale == pytest.approx(SCALE)
    assert match.site.mask == Full()


def test_a_softmax_in_place() -> None:
    with torch.no_grad():
        (match,) = found(in_place, *(t.detach() for t in qkv(2, 4))).matches
    assert match.site.scale == pytest.approx(SCALE)


def hidden_by_logsumexp(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k).masked_fill(~tril(), -1e30)
    return (s - s.logsumexp(-1, keepdim=True)).exp() @ v


def divided_by_a_column(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    both = scores(q, k).exp() @ torch.cat([v, torch.ones_like(v[..., :1])], -1)
    return both[..., :-1] / both[..., -1:]


def divided_in_the_end(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = scores(q, k).exp().tril()
    return (e @ v) / e.sum(-1, keepdim=True)


def masked_and_divided_in_the_end(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = torch.exp2(scores(q, k)) * tril()
    return torch.einsum("bhij,bhjd->bhid", e, v) / e.sum(-1)[..., None]


def narrow_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (scores(q, k).softmax(-1).bfloat16() @ v.bfloat16()).float()


def written_at_places(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s, (i, j) = scores(q, k), torch.triu_indices(S, S, 1)
    s[..., i, j] = -float("inf")
    return s.softmax(-1) @ v


RECOGNISED: dict[str, tuple[Callable[..., Tensor], str]] = {
    "by the logarithm of a sum, with hidden keys": (hidden_by_logsumexp, "by_logarithm"),
    "the sum as a column of the product": (divided_by_a_column, "not_divided"),
    "a triangle, divided in the end": (divided_in_the_end, "divided_later"),
    "a mask, divided in the end": (masked_and_divided_in_the_end, "divided_later"),
    "values of a narrower type": (narrow_values, "types_differ"),
    "written at places": (written_at_places, "written_at_places"),
}


@pytest.mark.parametrize(("model", "edit"), RECOGNISED.values(), ids=RECOGNISED)
def test_what_is_only_recognised(model: Callable[..., Tensor], edit: str) -> None:
    (site,) = found(model, *qkv(2, 4)).sites
    assert edit in site.edits


ALIKE: dict[str, Callable[..., Tensor]] = {
    "divided by the sum of the other axis": divided(lambda e: e / e.sum(-2)[..., None]),
    "divided by the sum of something else": lambda q, k, v: (
        scores(q, k).exp() / scores(k, q).exp().sum(-1, keepdim=True) @ v
    ),
    "a power that falls": powers(lambda s: torch.pow(0.5, s), math.log(2)),
}


@pytest.mark.parametrize("model", ALIKE.values(), ids=ALIKE)
def test_what_is_no_softmax_is_not_rewritten(model: Callable[..., Tensor]) -> None:
    assert not found(model, *qkv(2, 4)).matches


def features(q: Tensor, k: Tensor, v: Tensor, projection: Tensor) -> Tensor:
    """Exponentials of random features: a product with what no data went into, and no attention to keys."""
    a, b = ((t @ projection).exp() for t in (q, k))
    return a @ (b.mT @ v)


def test_random_features_are_no_attention() -> None:
    projection = torch.randn(8, 6)
    detection, _ = rewritten(lambda q, k, v: features(q, k, v, projection), *qkv(2, 4))
    assert not detection.sites


# --- masks and biases ------------------------------------------------------------------------------------------------


def test_a_number_at_some_places_of_an_axis() -> None:
    hidden = torch.tensor([2, 5, -1])  # counted from the end
    model: Any = lambda q, k, v: scores(q, k).index_fill(-1, hidden, -float("inf")).softmax(-1) @ v  # noqa: E731
    assert len(found(model, *qkv(2, 4)).matches) == 1


def test_a_mask_by_addcmul() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        hidden = (~tril()).float()
        return torch.addcmul(scores(q, k), torch.ones(S, S), hidden, value=-1e9).softmax(-1) @ v

    assert [match.site.mask for match in found(model, *qkv(2, 4)).matches] == [Causal()]


def test_alibi_of_counted_tokens() -> None:
    """BLOOM and Falcon: positions are the cumulative sum of what says which keys are tokens."""

    def model(q: Tensor, k: Tensor, v: Tensor, tokens: Tensor) -> Tensor:
        slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
        bias = slopes[:, None] * ((tokens.cumsum(-1) - 1) * tokens)[:, None, :]
        return (scores(q, k) + bias[:, :, None] + torch.full((S, S), -float("inf")).triu(1)).softmax(-1) @ v

    tokens = torch.ones(2, S, dtype=torch.long)
    (match,) = found(model, *qkv(2, 4), tokens).matches
    assert (match.site.bias, match.site.mask) == ("alibi", Causal())
    tokens[1, :3] = 0
    _, run = rewritten(model, *(inputs := (*qkv(2, 4), tokens)), variant="sdpa")
    check_equal(run(*inputs), model(*inputs))


def test_a_number_for_each_head_is_no_alibi() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, shift: Tensor) -> Tensor:
        return (scores(q, k) + shift).softmax(-1) @ v

    shift = nn.Parameter(torch.randn(4, 1, 1), requires_grad=False)
    (match,) = found(model, *qkv(2, 4), shift).matches
    assert match.site.bias != "alibi"


def test_a_row_of_a_table_of_masks() -> None:
    """The place in a cache takes a row of a triangle: what is beyond it is hidden, and nothing else, wherever it is."""

    def model(q: Tensor, k: Tensor, v: Tensor, place: Tensor) -> Tensor:
        return scores(q[..., :1, :], k).masked_fill(~tril()[place], -float("inf")).softmax(-1) @ v

    (match,) = found(model, *qkv(2, 4), torch.tensor([3])).matches
    assert match.site.mask == Padding()
