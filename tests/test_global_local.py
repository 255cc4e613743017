"""Attention over blocks and inside the own block, against a loop over queries and the identities that hold for it."""

from __future__ import annotations

import copy
import os
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rewriter.codegen import cpp
from rewriter.codegen.blocks import lists_of
from rewriter.codegen.families import kernels_of
from rewriter.codegen.formula import reading
from rewriter.codegen.native import compiler
from rewriter.kernels.exact import sdpa
from rewriter.kernels.sparse.global_local import VARIANT, Cache, GlobalLocal, formula, read, reference
from rewriter.raising import Operands
from rewriter.recover import fit
from rewriter.site import AttentionSite, Causal, Padding
from rewriter.testing import assert_close, inputs
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


@pytest.mark.parametrize("padded", [False, True])
def test_queries_before_all_keys_see_nothing(padded: bool) -> None:
    site = replace(SITE, q_len=45, kv_len=20)
    query, key, value, *_ = inputs(site, seed=1)
    module, padding = made(site, 8, moved=0.3), torch.rand(2, 20) < 0.8 if padded else None
    expected = reference(query, key, value, None, padding, site, {"block": 8}, module)  # type: ignore[arg-type]
    for learned in (False, True):
        with torch.set_grad_enabled(learned):
            out = module(query, key, value, None, padding)
        assert (out[:, :, :25] == 0).all()
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


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
    assert blocks.shape == values.shape == (2, 2, 5, 16)
    assert counts.tolist() == [[8, 8, 8, 8, 8]] * 2


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


# --- generated kernels -----------------------------------------------------------------------------------------------


def listed(site: AttentionSite, block: int, size: int, padding: Tensor | None = None) -> tuple[int, Tensor]:
    """How many blocks of `size` by `size` a kernel visits, and the pairs that are seen, by the words of the paper."""
    module = made(site, block)
    assert isinstance(module, GlobalLocal)
    query, key, value, *_ = inputs(site, seed=8)
    (query, keys, _, _, real), mass = module._of_all(query, key, value, padding)
    tensors = read(query, keys, real, mass=mass, block=block) | ({} if real is None else {"padding": real})
    before, q_len = mass.shape[2], query.shape[2]
    visited = lists_of(reading(formula(site, {"block": block}), tensors))(query, keys, tensors, size, size).visited
    i = torch.arange(key.shape[2] - q_len, key.shape[2])[:, None]
    first = key.shape[2] - keys.shape[2] + before
    j, n = torch.arange(first, key.shape[2]), torch.arange(before)
    seen = torch.cat([n < i // block, (j <= i) & (j >= i // block * block)], 1).expand(len(key), -1, -1)
    return visited, seen if real is None else seen & real[:, None]


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize(("block", "q_len", "kv_len"), [(4, 515, 515), (16, 515, 515), (64, 130, 515), (7, 70, 515)])
@pytest.mark.parametrize("padded", [False, True])
def test_blocks_that_hold_a_pair_are_visited(block: int, q_len: int, kv_len: int, size: int, padded: bool) -> None:
    padding = torch.ones(2, kv_len, dtype=torch.bool)
    padding[0, :150] = padding[1, 500:] = False
    visited, seen = listed(replace(SITE, q_len=q_len, kv_len=kv_len), block, size, padding if padded else None)
    whole = F.pad(seen, (0, -seen.shape[2] % size, 0, -seen.shape[1] % size))
    some = whole.unflatten(2, (-1, size)).unflatten(1, (-1, size)).any(4).any(2)
    if padded:  # at an edge a block may hold real tokens, and tokens that are seen, and none that are both
        assert some.sum() <= visited <= 1.1 * some.sum()
    else:
        assert visited == some[0].sum()


@pytest.mark.parametrize("block", [4, 16, 64])
def test_work_is_that_of_blocks_before_and_the_own(block: int) -> None:
    """Of 64 x 64: those of half of all pairs of a query and a block, and two or three on the diagonal."""
    site, n = replace(SITE, batch=1, q_len=8192, kv_len=8192), 8192 // 64
    visited, _ = listed(site, block, 64)
    most = n * (n // block + 1) // 2 + 3 * n
    assert most // 2 < visited <= most
    assert 8 * visited < n * (n + 1) // 2 * (8 if block == 4 else 3)


CASES = [
    (4, "float32", 500, False), (16, "float32", 300, True), (64, "bfloat16", 500, True), (7, "bfloat16", 90, False),
]  # fmt: skip


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize(("block", "dtype", "q_len", "padded"), CASES)
def test_generated_code_on_a_cpu(
    block: int, dtype: str, q_len: int, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is the faster one: of a whole sequence, of a part of it, and of what a cache holds."""
    monkeypatch.setattr("rewriter.tune.measure.medians", lambda times: [2.0] + [1.0] * (len(times) - 1))
    monkeypatch.setattr("rewriter.codegen.tuning.recall", lambda kind, place: None)
    calls, attend = [], cpp.Attention.__call__
    monkeypatch.setattr(cpp.Attention, "__call__", lambda *given, **more: calls.append(0) or attend(*given, **more))
    site = replace(SITE, dtype=dtype, q_len=q_len, kv_len=515)
    query, key, value, *_ = inputs(site, seed=9)
    padding = torch.ones(2, 515, dtype=torch.bool)
    padding[0, :100] = padding[1, 510:] = not padded
    real = padding if padded else None
    module = made(site, block, moved=0.3)
    assert isinstance(module, GlobalLocal)
    expected = reference(query.double(), key.double(), value.double(), None, real, site, {"block": block}, module)
    with torch.no_grad():
        assert_close(module(query, key, value, None, real), expected, site.torch_dtype)
        assert calls
        calls.clear()
        module(query[:, :, -1:], key, value, None, real)
        assert not calls, "one query is not worth a kernel on a CPU"
        cache, start = Cache(module), 515 - q_len
        cache.step(
            key[:, :, :start].repeat_interleave(2, 1), key[:, :, :start], value[:, :, :start], padding[:, :start]
        )
        calls.clear()
        out = cache.step(query, key[:, :, start:], value[:, :, start:], padding[:, start:])
        assert calls
        assert_close(out, expected, site.torch_dtype)


def test_a_step_of_decoding_copies_what_it_sees() -> None:
    site = replace(SITE, q_len=1, kv_len=515)
    module = made(site, 16)
    assert isinstance(module, GlobalLocal)
    (_, keys, values, _, _), mass = module._of_all(*inputs(site, seed=2)[:3], None)
    assert keys.shape[2] == values.shape[2] == 515 // 16 + 515 % 16 and mass.shape[2] == 32
    assert module.pairs(*inputs(site, seed=2)[:3], None, None) == 2 * 4 * (32 + 3)


def test_copies_choose_for_themselves() -> None:
    """What was built belongs to one process."""
    site = replace(SITE, q_len=200, kv_len=200)
    module, given = made(site, 16, moved=0.3), inputs(site, seed=3)
    with torch.no_grad():
        expected = module(*given)
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert_close(other(*given), expected, torch.float32)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter cannot compile")
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_kernels_for_other_machines(target: str) -> None:
    pytest.importorskip("triton")
    site = replace(SITE, head_dim=64, v_head_dim=64, dtype="bfloat16", mask=Causal() & Padding())
    kernels = kernels_of(formula(site, {"block": 16}), site)
    assert VARIANT.formula is formula
    for name in kernels.names:
        binary = kernels.binary(name, kernels.default(name, target), target)
        assert binary.loop is not None and binary.loop.tensor_core
        assert name != "forward" or binary.spills == 0
