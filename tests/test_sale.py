"""SALE: which blocks are kept, by the identities of its definition."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from rewriter.codegen import estimate
from rewriter.codegen.blocks import lists_of
from rewriter.codegen.formula import reading
from rewriter.codegen.native import compiler
from rewriter.errors import OptionError
from rewriter.kernels.sparse.sale import VARIANT, formula, kept, quantised, selected
from rewriter.site import AttentionSite, Refusal
from rewriter.testing import assert_close, brute_force, inputs
from rewriter.variant import Config

SITE: AttentionSite = VARIANT.cases[0].site.sized(batch=1, q_len=1060, kv_len=1060)
MODES = pytest.mark.parametrize(("steps", "rounded"), [("token", False), ("token", True), ("fragment", True)])


def config(tau: float, steps: str = "token", rounded: bool = False, local: int = 128) -> Config:
    return {"tau": tau, "local": local, "steps": steps, "rounded": rounded, "floor": 0}


def maps(query: Tensor, key: Tensor, padding: Tensor | None, how: Config) -> tuple[Tensor, Tensor]:
    """As implemented, and as defined."""
    numbers = formula(SITE, how).numbers
    return kept(query, key, padding, SITE.scale, numbers), selected(query, key, padding, SITE.scale, how)


@MODES
@pytest.mark.parametrize("q_len", [1060, 700])
@pytest.mark.parametrize("local", [128, 300])
def test_the_map_is_that_of_the_definition(steps: str, rounded: bool, q_len: int, local: int) -> None:
    query, key, *_ = inputs(SITE.sized(batch=2, q_len=q_len, kv_len=1060), seed=1)
    found, defined = maps(query, key, None, config(0.1, steps, rounded, local))
    assert torch.equal(found, defined)
    assert 0.2 < found.float().mean() / maps(query, key, None, config(1e-5))[0].float().mean() < 0.9


@MODES
def test_the_map_is_the_same_without_a_compiler(steps: str, rounded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "load", lambda rows, keys: Refusal("there is no compiler"))
    query, key, *_ = inputs(SITE.sized(batch=2, q_len=1060, kv_len=1060), seed=1)
    padding = torch.rand(2, 1060) < 0.9
    found, defined = maps(query, key, padding, config(0.1, steps, rounded))
    assert torch.equal(found, defined)


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("wide", [False, True], ids=["bfloat16", "float32"])
def test_blocks_above_their_thresholds(wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel alone, with products in either type; ragged queries, an odd width, groups of heads."""
    monkeypatch.setattr(estimate, "multiplies", lambda dtype: not wide)
    kernel = estimate.load.__wrapped__(48, 32)
    assert not isinstance(kernel, Refusal), kernel
    query, key = (torch.randint(-7, 8, (2, heads, n, 13), dtype=torch.int8) for heads, n in ((4, 100), (2, 150)))
    q_step, k_step = torch.rand(2, 4, 100) + 0.1, torch.rand(2, 2, 150) + 0.1
    constant, threshold = torch.randn(2, 4, 150), 80 + 60 * torch.randn(2, 4, 100)
    far = torch.tensor([0, 64, 128])
    out = kernel(query, key, q_step, k_step, constant, threshold, far)
    wide_key, wide_step = (t.repeat_interleave(2, 1) for t in (key, k_step))
    scores = query.float() @ wide_key.float().mT * q_step[..., None] * wide_step[:, :, None] + constant[:, :, None]
    above = torch.nn.functional.pad(scores > threshold[..., None], (0, 10, 0, 44))
    expected = above.unflatten(3, (5, 32)).unflatten(2, (3, 48)).any(5).any(3)
    assert torch.equal(out, expected & (torch.arange(5) * 32 < far[:, None]))
    assert 0.1 < out[:, :, 1:].float().mean() < 0.9
    with pytest.raises(OptionError, match="float32 of"):
        kernel(query, key, q_step[:, :2], k_step, constant, threshold, far)
    with pytest.raises(OptionError, match="int8"):
        kernel(query.int(), key, q_step, k_step, constant, threshold, far)
    with pytest.raises(OptionError, match="multiple of 64"):
        kernel(query, key, q_step, k_step, constant, threshold, far + 32)


def test_blocks_of_keys_fill_products() -> None:
    assert isinstance(estimate.load(64, 48), Refusal)


def test_fewer_blocks_are_kept_as_tau_grows_and_the_sink_and_the_band_always() -> None:
    query, key, *_ = inputs(SITE, seed=2)
    found = [maps(query, key, None, config(tau))[0] for tau in (0.0, 0.05, 0.1, 0.2, 1e9)]
    assert all((less <= more).all() for more, less in pairwise(found))
    counts = [each.sum().item() for each in found]
    assert counts == sorted(set(counts), reverse=True)
    blocks, keys = torch.arange(17)[:, None], torch.arange(34)
    assert torch.equal(found[0], (keys * 32 < blocks * 64 + 64).expand_as(found[0])), "all that is causal"
    last = found[-1]
    assert last[..., 0].all() and last[0, 0, 16].nonzero().flatten().tolist() == [0, *range(28, 34)]


@MODES
def test_a_key_of_high_score_far_away_keeps_its_block(steps: str, rounded: bool) -> None:
    query, key, value, *_ = inputs(SITE, seed=3)
    query, key = query * 0.1, key * 0.1
    query[:, 2, 1000] = 4.0
    key[:, 1, 300] = 4.0  # 2 heads of queries share it
    found, _ = maps(query, key, None, config(1.5, steps, rounded))
    far = found.clone()
    far[..., 0] = False
    assert far[0, 2, 1000 // 64].nonzero().flatten().tolist()[0] == 300 // 32
    assert not far[0, 3, 1000 // 64, 300 // 32], "each head of queries chooses its own"
    out = VARIANT.build(SITE, config(1.5, steps, rounded))(query, key, value, None, None)
    exact = brute_force(query, key, value, None, None, site=SITE)
    assert_close(out[:, 2, 1000], exact[:, 2, 1000], torch.float32)
    assert (out - exact).abs().max() > 1e-3, "what is not kept is not attended"


@pytest.mark.parametrize("tau", [0.0, 1e-6])
def test_without_a_threshold_it_is_exact(tau: float) -> None:
    site = replace(SITE, mask=VARIANT.cases[1].site.mask).sized(batch=3, q_len=500, kv_len=500)
    arguments = inputs(site, seed=4)
    out = VARIANT.build(site, config(tau))(*arguments)
    assert_close(out, brute_force(*arguments, site=site), torch.float32)


def test_steps_are_shared_in_fragments_and_zeros_have_one() -> None:
    x = torch.zeros(1, 40, 2)
    x[0, 3], x[0, 11], x[0, 12] = 14.0, -7.0, 3.5
    rows, step = quantised(x, (2, 8), (-2,))
    assert rows.dtype == torch.int8 and rows[0, [3, 11, 12], 0].tolist() == [7, -4, 7]
    assert step[0, [3, 11, 4, 12, 0], 0].tolist() == [2.0, 2.0, 0.5, 0.5, 1.0]
    keys, step = quantised(x, (4, 4, 2), (-3, -1))
    assert keys[0, [3, 11, 12], 1].tolist() == [7, -4, 7]
    assert step[0, [2, 3, 26, 27, 4, 13, 0, 35], 0].tolist() == [2.0, 2.0, 2.0, 2.0, 0.5, 0.5, 1.0, 1.0]
    tokens, step = quantised(x, (1,), (-1,))
    assert tokens[0, [3, 11, 12, 0], 0].tolist() == [7, -7, 7, 0] and step[0, 11].item() == 1.0
    zeros = torch.zeros(1, 4, 1060, 16)
    for found in maps(zeros, zeros[:, :2], None, config(0.1)):
        assert found[0, 0, 16, 5].logical_not(), "all scores are equal: none stands out"


def test_hidden_tokens_neither_choose_nor_are_chosen() -> None:
    query, key, value, *_ = inputs(SITE.sized(batch=2, q_len=1060, kv_len=1060), seed=5)
    padding = torch.ones(2, 1060, dtype=torch.bool)
    padding[:, :100] = False
    site = replace(SITE, mask=VARIANT.cases[1].site.mask)
    built = VARIANT.build(site, config(0.1))
    out = built(query, key, value, None, padding)
    for each in (query, key, value):
        each[:, :, :100] = 50.0
    assert_close(built(query, key, value, None, padding)[:, :, 100:], out[:, :, 100:], torch.float32)
    found, _ = maps(query, key, padding, config(0.1))
    assert not found[..., :3].any()


def test_kernels_visit_what_is_kept() -> None:
    query, key, *_ = inputs(SITE, seed=6)
    how = config(0.05)
    blocks, _ = maps(query, key, None, how)
    runs = lists_of(reading(formula(SITE, how), ()))(query, key, {"kept": blocks}, 64, 32)
    assert runs.visited == blocks.sum()


@MODES
def test_the_whole_matrix_is_never_in_memory(steps: str, rounded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewriter.kernels.sparse.sale._TOGETHER", 1 << 18)
    site = SITE.sized(batch=1, q_len=2048, kv_len=2048)
    query, key, *_ = inputs(site, seed=7)
    numbers = formula(site, config(0.1, steps, rounded)).numbers
    from tests.test_kernels import Largest

    with Largest() as largest:
        kept(query, key, None, site.scale, numbers)
    assert largest.numel < 4 * 2048 * 2048 / 16
