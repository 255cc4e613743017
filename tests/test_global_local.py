"""Attention over blocks and inside the own block, against a loop over queries and the identities that hold for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rewriter.kernels.exact import sdpa
from rewriter.kernels.sparse.global_local import Cache, GlobalLocal
from rewriter.raising import Operands
from rewriter.recover import fit
from rewriter.site import AttentionSite, Causal
from rewriter.testing import inputs
from rewriter.variant import variants

SITE = AttentionSite(
    path="here", heads=4, kv_heads=2, head_dim=16, v_head_dim=16, dtype="float32", scale=0.3, mask=Causal(), batch=2,
    q_len=45, kv_len=45,
)  # fmt: skip


def made(site: AttentionSite, block: int, moved: float = 0.0) -> torch.nn.Module:
    module = variants()["global_local"].build(site, {"block": block})
    assert isinstance(module, torch.nn.Module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(moved * torch.randn_like(parameter))
    return module


def by_query(
    module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, real: Tensor, block: int, scale: float
) -> Tensor:
    """One query of one head at a time, from the formulas of the paper's parts."""
    out = torch.zeros(*q.shape[:3], v.shape[3])
    for b, h, i in [(b, h, i) for b in range(q.shape[0]) for h in range(q.shape[1]) for i in range(q.shape[2])]:
        own = h // (q.shape[1] // k.shape[1])
        place = i + k.shape[2] - q.shape[2]
        scores, values = [], []
        for n in range(place // block):
            tokens = [j for j in range(n * block, (n + 1) * block) if real[b, j]]
            if tokens:
                key = sum(module.key_weights[own, j % block] * k[b, own, j] for j in tokens) / len(tokens)
                value = sum(module.value_weights[own, j % block] * v[b, own, j] for j in tokens) / len(tokens)
                scores.append(scale * q[b, h, i] @ key + torch.tensor(len(tokens)).log() + module.mass[own])
                values.append(value)
        for j in range(place // block * block, place + 1):
            if real[b, j]:
                scores.append(scale * q[b, h, i] @ k[b, own, j])
                values.append(v[b, own, j])
        if scores:
            out[b, h, i] = torch.stack(scores).softmax(0) @ torch.stack(values)
    return out


@pytest.mark.parametrize(("block", "q_len"), [(4, 45), (7, 45), (16, 9), (45, 45), (64, 45)])
def test_every_query_by_itself(block: int, q_len: int) -> None:
    site = replace(SITE, q_len=q_len)
    query, key, value, *_ = inputs(site, seed=1)
    real = torch.ones(2, 45, dtype=torch.bool)
    real[0, :6] = real[1, 40:] = False
    module = made(site, block, moved=0.3)
    with torch.no_grad():
        expected = by_query(module, query, key, value, real, block, site.scale)
        torch.testing.assert_close(module(query, key, value, None, real), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("block", [1, 45, 300])
def test_blocks_of_one_token_or_of_all_are_the_attention_itself(block: int) -> None:
    query, key, value, *_ = inputs(SITE, seed=2)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=SITE.scale, enable_gqa=True)
    with torch.no_grad():
        torch.testing.assert_close(made(SITE, block)(query, key, value, None, None), expected, atol=1e-5, rtol=1e-5)


def test_equal_tokens_of_a_block_are_one() -> None:
    """The logarithm of the count gives a block the weight of its tokens."""
    query, key, value, *_ = inputs(SITE, seed=3)
    key, value = (t[:, :, :9].repeat_interleave(5, 2) for t in (key, value))
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=SITE.scale, enable_gqa=True)
    with torch.no_grad():
        torch.testing.assert_close(made(SITE, 5)(query, key, value, None, None), expected, atol=1e-5, rtol=1e-5)


def test_decoding_gives_what_the_whole_sequence_gives() -> None:
    query, key, value, *_ = inputs(SITE, seed=4)
    module = made(SITE, 8, moved=0.3)
    with torch.no_grad():
        whole = module(query, key, value, None, None)
        for n in range(1, 46):
            step = module(query[:, :, n - 1 : n], key[:, :, :n], value[:, :, :n], None, None)
            torch.testing.assert_close(step, whole[:, :, n - 1 : n], atol=1e-5, rtol=1e-5)


def test_what_a_decoder_needs_is_one_key_a_block() -> None:
    _, key, value, *_ = inputs(SITE, seed=5)
    blocks, values, counts = made(SITE, 8).embedded(key, value, torch.ones(2, 45, dtype=torch.bool))  # type: ignore[operator]
    assert blocks.shape == values.shape == (2, 2, 6, 16)
    assert counts.tolist() == [[8, 8, 8, 8, 8, 5]] * 2


@pytest.mark.parametrize("padded", [False, True])
def test_a_cache_holds_blocks_and_gives_what_all_keys_give(padded: bool) -> None:
    """A prompt, chunks of several lengths, and single tokens."""
    site = replace(SITE, q_len=45, kv_len=45)
    query, key, value, *_ = inputs(site, seed=7)
    padding = torch.ones(2, 45, dtype=torch.bool)
    padding[0, :13] = not padded  # a whole block and more
    module = made(site, 8, moved=0.3)
    assert isinstance(module, GlobalLocal)
    with torch.no_grad():
        whole = module(query, key, value, None, padding if padded else None)
        cache, start = Cache(module), 0
        for n in (19, 1, 1, 1, 1, 1, 1, 7, 8, 1, 1, 1, 1, 1):
            part = slice(start, start + n)
            given = query[:, :, part], key[:, :, part], value[:, :, part]
            out = cache.step(*given, padding[:, part] if padded else None)
            torch.testing.assert_close(out, whole[:, :, part], atol=1e-5, rtol=1e-5)
            start += n
            assert cache.keys == start // 8 + start % 8
            held = {t.shape[2] for t in (*cache.finished[:2], *cache.last[:2])}
            assert held <= {start // 8, start % 8}
            assert all(t.untyped_storage().nbytes() == t.nbytes for t in cache.last)
    assert start == 45


def test_a_fit_comes_closer_to_the_original() -> None:
    """Of keys and values that drift slowly, with places that matter more than others."""
    torch.manual_seed(6)
    site = replace(SITE, q_len=256, kv_len=256)
    query, key, value, *_ = inputs(site, seed=6)
    emphasis = torch.linspace(0.2, 2.0, 8).repeat(32)[:, None]
    key, value = (t[:, :, ::8].repeat_interleave(8, 2) * emphasis for t in (key, value))
    target = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=site.scale, enable_gqa=True)
    before, after = fit(made(site, 8), [(Operands(query, key, value, None, None), target)], steps=60)
    assert after < 0.8 * before


def test_the_queries_that_see_the_most_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they leave free holds all others: parts that grow were each new memory to the process."""
    attend, seen = sdpa.attend, list[int]()

    def watched(query: Tensor, key: Tensor, *rest: Any, **options: Any) -> Tensor:
        seen.append(key.shape[2])
        return attend(query, key, *rest, **options)

    monkeypatch.setattr("rewriter.kernels.exact.sdpa.attend", watched)
    site = replace(SITE, q_len=1100, kv_len=1100)
    made(site, 4)(*inputs(site, seed=2)[:3], None, None)
    assert seen == [76 + 1024 // 4 + 18, *(256 + start // 4 + 63 for start in (768, 512, 256, 0))]
