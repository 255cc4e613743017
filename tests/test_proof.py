"""A match counts only after its own code and the canonical operator gave the same; the proof is cheap."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rewriter import proof
from rewriter.facts import Operand
from rewriter.proof import Proof
from rewriter.raising import Match
from rewriter.site import Causal, Dense, Full, Refusal

INPUTS = tuple(torch.randn(2, 4, 7, 8) for _ in range(3))
MASK = torch.rand(2, 1, 7, 7) > 0.4


def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT * 0.5).masked_fill(~mask, -1e9).softmax(-1) @ v


def called(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def two_masks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT + torch.where(mask, 0.0, -1e9) + torch.where(mask, 1.0, -2.0)).softmax(-1) @ v


def capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (torch.tanh(q @ k.mT / 3) * 3).masked_fill(~mask, -1e9).softmax(-1) @ v


def with_sink(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.pad(q @ k.mT, (0, 1)).softmax(-1)[..., :-1] @ v


def scaled_heads(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT * v.std((0, 2, 3))[:, None, None]).softmax(-1) @ v


@pytest.fixture
def match(rewrite: Any) -> Callable[..., Match]:
    """The match of a function of (query, key, value, mask), not lowered."""

    def find(function: Callable[..., Tensor], *inputs: Tensor) -> Match:
        (found,) = rewrite(function, *(inputs or (*INPUTS, MASK)), variant=None).matches
        return found

    return find


def with_site(match: Match, **facts: Any) -> Match:
    return dataclasses.replace(match, site=dataclasses.replace(match.site, **facts))


def with_reading(match: Match, **parts: Any) -> Match:
    return dataclasses.replace(match, reading=dataclasses.replace(match.reading, **parts))


def with_masks(match: Match, *masks: dict[str, Any] | None) -> Match:
    """The masks in order, each with these fields replaced; None leaves it out."""
    changes, ops = iter(masks), []
    for op in match.reading.ops:
        change = {} if op.tensor is None else next(changes)
        ops += [dataclasses.replace(op, **change)] if change is not None else []
    return with_reading(match, ops=ops)


def with_tensor(side: Operand, other: Operand) -> Operand:
    """Another tensor in the same axes."""
    return dataclasses.replace(side, placed=dataclasses.replace(side.placed, node=other.node))


@pytest.mark.parametrize("function", [eager, called, two_masks, capped, with_sink, scaled_heads])
def test_what_is_right_is_proved(match: Any, function: Any) -> None:
    assert Proof().check(match(function)) is None


TAMPERED: dict[str, tuple[Any, Callable[[Match], Match]]] = {
    "scale": (eager, lambda m: with_site(m, scale=0.35355)),
    "scale by a little": (eager, lambda m: with_site(m, scale=0.5001)),
    "keys and values swapped": (
        eager,
        lambda m: with_reading(
            m,
            key=with_tensor(m.reading.key, m.reading.value),
            value=with_tensor(m.reading.value, m.reading.key),
        ),
    ),
    "queries and keys swapped": (
        called,
        lambda m: with_reading(
            m,
            query=with_tensor(m.reading.query, m.reading.key),
            key=with_tensor(m.reading.key, m.reading.query),
        ),
    ),
    "mask forgotten": (eager, lambda m: with_masks(m, None)),
    "one of two masks forgotten": (two_masks, lambda m: with_masks(m, {}, None)),
    "mask turned around": (eager, lambda m: with_masks(m, {"kind": "keep"})),
    "mask scaled": (two_masks, lambda m: with_masks(m, {}, {"number": 0.5})),
    "softcap": (capped, lambda m: with_site(m, softcap=4.0)),
    "softcap forgotten": (capped, lambda m: with_site(m, softcap=None)),
    "normaliser": (called, lambda m: with_site(m, normaliser="sigmoid")),
    "sink forgotten": (with_sink, lambda m: with_reading(m, zero_sink=False)),
    "factor forgotten": (scaled_heads, lambda m: with_masks(m, None)),
    "factor turned around": (scaled_heads, lambda m: with_masks(m, {"kind": "div"})),
    "structure": (called, lambda m: with_site(m, mask=Full())),
    "offset": (called, lambda m: with_site(m, mask=Causal(1))),
    "a query that sees nothing": (
        lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, mask),
        lambda m: with_masks(m, {"number": -1e30}),
    ),
}


@pytest.mark.parametrize(("function", "tamper"), TAMPERED.values(), ids=TAMPERED)
def test_what_is_wrong_is_refused_with_numbers(match: Any, function: Any, tamper: Callable[[Match], Match]) -> None:
    found = match(function)
    judge = Proof()
    assert judge.check(found) is None
    refusal = judge.check(tamper(found))
    assert isinstance(refusal, Refusal)
    numbers = "the results differ by 0." in refusal.reason or "the results differ by 1." in refusal.reason
    assert numbers or "also depends on" in refusal.reason or "differ by inf" in refusal.reason, refusal.reason


def test_an_output_of_another_shape_is_refused(match: Any) -> None:
    found = match(eager, *INPUTS[:2], torch.randn(2, 4, 7, 6), MASK)
    swapped = with_reading(found, value=found.reading.query)
    assert isinstance(Proof().check(swapped), Refusal)


def test_equal_regions_are_proved_once(rewrite: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    proved: list[str] = []
    prove = proof._prove
    monkeypatch.setattr(proof, "_prove", lambda region: proved.append(region.identity()) or prove(region))

    def layers(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        for _ in range(4):
            q = eager(q, k, v, mask)
        return (q @ k.mT * 0.25).masked_fill(~mask, -1e9).softmax(-1) @ v

    assert len(rewrite(layers, *INPUTS, MASK).sites) == 5
    assert len(proved) == len(set(proved)) == 2, "four equal ones and one of another scale"


def test_a_refusal_is_remembered_with_its_region_only(match: Any) -> None:
    found, judge = match(eager), Proof()
    wrong = with_site(found, scale=0.4)
    assert judge.check(wrong) is judge.check(wrong)
    assert judge.check(found) is None


@pytest.mark.parametrize("lengths", [(4096, 4096), (128, 4096), (1, 4096)])
def test_long_regions_are_shrunk(match: Any, monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, int]) -> None:
    sizes: list[Any] = []
    compare = proof._compare
    monkeypatch.setattr(proof, "_compare", lambda region, to: sizes.append(to) or compare(region, to))
    q_len, kv_len = lengths
    mask = torch.ones(1, 1, q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len)
    found = match(eager, torch.randn(1, 8, q_len, 16), *(torch.randn(1, 8, kv_len, 16) for _ in range(2)), mask)
    start = time.perf_counter()
    assert Proof().check(found) is None
    assert time.perf_counter() - start < 0.5
    assert all(to for to in sizes) or q_len == 1, "no comparison at the full size"


def test_a_number_that_looks_like_a_length(match: Any) -> None:
    """Shrinking would change the scale of 1/64 with the 64 tokens; the region is run at its own size then."""

    def divided(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return (q @ k.mT / 64).softmax(-1) @ v

    found = match(divided, *(torch.randn(1, 2, 64, 8) for _ in range(3)), torch.ones(()))
    assert found.site.scale == 1 / 64


def test_a_length_that_is_fixed_in_the_region(match: Any) -> None:
    def viewed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        weights = (q @ k.mT).softmax(-1).clone()
        return weights @ v.reshape(2, 4, 1760 // 32, -1)

    found = match(viewed, *(torch.randn(2, 4, 55, 8) for _ in range(3)), torch.ones(()))
    assert Proof().check(found) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("width", [32, 80])
def test_the_mathematics_is_proved_not_the_rounding(match: Any, dtype: torch.dtype, width: int) -> None:
    """A scale on the queries rounds elsewhere than one on the scores: in many large rows that shows in float32."""

    def scaled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return ((q * width**-0.25) @ (k * width**-0.25).mT).softmax(-1).to(v.dtype) @ v

    found = match(scaled, *(torch.randn(4, 16, 33, width).to(dtype) for _ in range(3)), torch.ones(()))
    assert found.site.dtype == str(dtype).removeprefix("torch.")
    wrong = Proof().check(with_site(found, scale=found.site.scale * 1.001))
    assert wrong is not None, "a tenth of a percent is below the rounding of the half types"


def test_a_region_that_needs_more_than_its_inputs(match: Any) -> None:
    found = match(eager)
    less = with_reading(found, key=with_tensor(found.reading.key, found.reading.query))
    refusal = Proof().check(less)
    assert isinstance(refusal, Refusal)
    assert "also depends on" in refusal.reason


def test_threads_are_given_back(match: Any) -> None:
    before = torch.get_num_threads()
    Proof().check(match(eager))
    assert torch.get_num_threads() == before


def test_what_is_too_large_to_be_proved_is_refused(match: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = match(eager)
    monkeypatch.setattr(proof, "_MOST_SCORES", 10)
    refusal = Proof().check(found)
    assert isinstance(refusal, Refusal)
    assert "392 scores" in refusal.reason


def test_the_mask_of_the_site_is_what_was_read(match: Any) -> None:
    assert match(eager).site.mask == Dense()
    assert match(called).site.mask == Causal()
