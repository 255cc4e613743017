"""Attention by binary codes: the codes, both forms of the sum, and where their gradients go."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rewriter.kernels.linear.ecoformer import VARIANT, EcoFormer, signs, similar
from rewriter.raising import Operands
from rewriter.recover import fit
from rewriter.site import AttentionSite, Causal, Full, Mask, Padding
from rewriter.testing import assert_close, brute_force, inputs
from rewriter.variant import Config

SITE = AttentionSite(
    path="a", heads=4, kv_heads=2, head_dim=8, v_head_dim=6, dtype="float32", scale=0.3, mask=Causal(),
    batch=2, q_len=40, kv_len=40,
)  # fmt: skip


def config(mode: str, bits: int = 4) -> Config:
    return {"bits": bits, "anchors": 7, "bias_mode": mode}


def built(site: AttentionSite, settings: Config) -> EcoFormer:
    module = VARIANT.build(site, settings)
    assert isinstance(module, EcoFormer)
    return module


def code(module: EcoFormer, head: int, x: Tensor) -> list[float]:
    """The definition for one token, number by number."""
    anchors, sigma = module.anchors[head].double(), module.log_sigma[head].double().exp()
    x = x.double() / x.double().norm()
    phi = [(-((x - anchor) ** 2).sum() / (2 * sigma)).exp() for anchor in anchors]
    phi = [each - mu for each, mu in zip(phi, module.centre[head].double(), strict=True)]
    sums = [sum(float(w * p) for w, p in zip(row, phi, strict=True)) for row in module.directions[head].double()]
    return [1.0 if each >= 0 else -1.0 for each in sums]


@torch.no_grad()
@pytest.mark.parametrize("mode", ["paper", "official"])
@pytest.mark.parametrize("mask", [Causal() & Padding(), Full() & Padding()], ids=str)
def test_it_is_the_sum_that_one_writes_by_hand(mode: str, mask: Mask) -> None:
    site = replace(SITE, mask=mask).sized(batch=2, q_len=5, kv_len=9)
    module = built(site, config(mode))
    query, key, value, _, padding = inputs(site, seed=1)
    padding[0], padding[0, 4] = True, False  # the own position of query 0
    out = module(query, key, value, None, padding)
    for row, head, i in ((0, 0, 0), (0, 3, 2), (0, 2, 4), (1, 1, 3), (1, 2, 4)):
        own, beta, at = code(module, head // 2, query[row, head, i]), 5, i + 4
        top, total = torch.zeros(6).double(), 0.0
        for j in range(9):
            if padding[row, j] and (j <= at or not mask.has(Causal)):
                product = sum(a * b for a, b in zip(own, code(module, head // 2, key[row, head // 2, j]), strict=True))
                total += product + beta
                weight = product + beta if mode == "paper" else product + beta * (j == at)
                top += weight * value[row, head // 2, j].double()
        assert_close(out[row, head, i], top / total if total else top, torch.float32)


@torch.no_grad()
def test_the_forms_differ() -> None:
    """On inputs of unit scale by about 1: the official weights sum to less than one, but for the first token."""
    given = inputs(SITE, seed=2)
    paper, official = (built(SITE, config(mode))(*given) for mode in ("paper", "official"))
    assert_close(paper[:, :, 0], official[:, :, 0], torch.float32)
    assert (paper - official).abs().max() > 0.5
    ones = (given[0], given[1], torch.ones_like(given[2]), None, None)
    assert_close(built(SITE, config("paper"))(*ones), torch.ones_like(paper), torch.float32)
    assert (built(SITE, config("official"))(*ones)[:, :, 20:] < 0.9).all()


def test_the_sign_of_zero_is_one_and_gradients_go_straight_through() -> None:
    y = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.99, 1.0, 3.0], requires_grad=True)
    out = signs(y)
    assert out.tolist() == signs(y.detach()).tolist() == [-1.0, -1.0, -1.0, 1.0, 1.0, 1.0, 1.0]
    slope = torch.arange(1.0, 8.0)
    assert torch.autograd.grad(out, y, slope)[0].tolist() == [0.0, 0.0, 3.0, 4.0, 5.0, 0.0, 0.0]


@torch.no_grad()
def test_queries_and_keys_share_their_hash() -> None:
    module = built(SITE, config("paper", bits=16))
    x = torch.randn(2, 2, 9, 8)
    both = module.codes(x)
    assert both.abs().unique().tolist() == [1.0] and both.shape == (2, 2, 9, 16)
    assert 0.2 < (both > 0).float().mean() < 0.8
    assert torch.equal(module.codes(x.repeat_interleave(2, 1)), both.repeat_interleave(2, 1))
    assert torch.equal(module.codes(100 * x), both), "only directions count"


@torch.no_grad()
@pytest.mark.parametrize("mode", ["paper", "official"])
def test_what_is_padded_is_not_read(mode: str) -> None:
    site = replace(SITE, mask=Full() & Padding())
    module = built(site, config(mode))
    query, key, value, _, padding = inputs(site, seed=3)
    out = module(query, key, value, None, padding)
    hidden = ~padding[:, None, :, None]
    other: Any = (key.masked_fill(hidden, 7.0), value.masked_fill(hidden, 1e6))
    assert torch.equal(module(query, *other, None, padding), out)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["paper", "official"])
def test_later_tokens_change_nothing(mode: str) -> None:
    module = built(SITE, config(mode))
    query, key, value, _, _ = inputs(SITE, seed=4)
    out = module(query, key, value, None, None)
    key[:, :, 25:], value[:, :, 25:] = 3.0, 100.0
    assert torch.equal(module(query, key, value, None, None)[:, :, :25], out[:, :, :25])


def test_similar_are_the_most_and_the_least_of_what_is_seen() -> None:
    scores = torch.arange(30.0).expand(2, 30)
    seen = torch.ones(2, 30, dtype=torch.bool)
    seen[0, :2], seen[1, 12:] = False, False
    first, second = similar(scores, seen).tolist()
    assert first == [0.0] * 2 + [-1.0] * 10 + [0.0] * 8 + [1.0] * 10
    assert second == [-1.0] * 2 + [0.0] * 8 + [1.0] * 2 + [0.0] * 18, "10 of 12 are both"


def clustered(site: AttentionSite, seed: int) -> tuple[Operands, Tensor]:
    """Tokens of four kinds that attend to their own, and what comes of it."""
    query, key, value, mask, padding = inputs(site, seed=seed)
    random = torch.Generator().manual_seed(seed)
    kinds = torch.randint(4, (2, 1, 40), generator=random)
    centres = 4 * torch.eye(8)[:4][kinds]
    given = Operands(0.5 * query + centres, 0.5 * key + centres, value + centres[..., :6], mask, padding)
    return given, brute_force(*given.given, site=site).float()


@pytest.mark.parametrize("mask", [Causal(), Full() & Padding()], ids=str)
def test_the_hash_starts_from_what_attends_most_and_is_fitted_further(mask: Mask) -> None:
    site = replace(SITE, mask=mask, scale=1.0)
    samples = [clustered(site, seed) for seed in (1, 2)]
    module, other = (built(site, config("paper", bits=16)) for _ in range(2))
    before, started = fit(module, samples, steps=0)
    assert started < 0.9 * before
    operands, _ = clustered(site, 3)  # not what it was fitted to
    products = (module.codes(operands.query) @ module.codes(operands.key).repeat_interleave(2, 1).mT).detach()
    scores = operands.query @ operands.key.repeat_interleave(2, 1).mT
    wanted = similar(scores, torch.ones_like(scores, dtype=torch.bool))
    assert products[wanted > 0].mean() > products[wanted < 0].mean() + 8
    assert fit(module, samples, steps=60)[1] < started
    assert fit(other, samples, steps=0) == (before, started), "the same every time"
