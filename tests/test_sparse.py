"""Sharded attention: its published pattern, the blocks that are visited, what decoding reads, and compilation."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace
from typing import Any

import pytest
import torch

from rewriter.codegen.blocks import runs_of
from rewriter.codegen.families import kernels_of
from rewriter.codegen.formula import Formula, indices
from rewriter.errors import OptionError
from rewriter.kernels.sparse.s2 import Cache
from rewriter.site import Causal, Full, Padding, Refusal
from rewriter.target import Target
from rewriter.testing import assert_close, brute_force, inputs
from rewriter.variant import Config, variants

S2 = variants()["s2"]
SITE = S2.cases[0].site
WHOLE = replace(SITE, mask=Full(), heads=4)
"""Its queries see both sides."""


def visible(formula: Formula, heads: int, length: int) -> torch.Tensor:
    """bool (H, N, N) of a formula's masks."""
    given = indices(torch.empty(1, heads, length, 1), torch.empty(1, heads, length, 1))
    return formula._visible(**formula.numbers, **given).expand(1, heads, length, length)[0]


def test_the_published_pattern() -> None:
    """Two heads, 6 blocks, 2 of them local, stride 3."""
    site = replace(SITE, heads=2, kv_heads=2)
    formula = S2.formula(site, {"block": 4, "local": 2, "stride": 3})
    seen = visible(formula, 2, 24)
    assert not (seen & ~torch.ones(24, 24).tril().bool()).any(), "causal token by token"
    rows = [["".join("01"[int(x)] for x in row) for row in head] for head in seen[:, 3::4, ::4].tolist()]
    assert rows[0] == ["100000", "110000", "111000", "101100", "100110", "100111"]
    assert rows[1] == ["100000", "110000", "011000", "001100", "001110", "001011"]


@pytest.mark.parametrize(("local", "right", "stride"), [(2, 2, 3), (1, 3, 4), (3, 1, 2), (2, 2, 1)])
def test_the_pattern_of_both_sides(local: int, right: int, stride: int) -> None:
    """The published rule, for each pair of blocks; and its mirror image."""
    formula = S2.formula(WHOLE, {"block": 4, "local": local, "right": right, "stride": stride})
    seen = visible(formula, 4, 50)
    for m, n in itertools.product(range(13), repeat=2):
        keep = (max(0, m - n - local + 1) + max(0, n - m - right + 1)) % stride == 0
        assert bool((seen[:, 4 * m : 4 * m + 4, 4 * n : 4 * n + 4] == keep).all())
    mirrored = {"block": 4, "local": right, "right": local, "stride": stride}
    assert torch.equal(visible(S2.formula(WHOLE, mirrored), 4, 48), visible(formula, 4, 48).mT)


def test_both_sides_visit_their_blocks_only() -> None:
    formula = S2.formula(WHOLE, {"block": 16, "local": 2, "right": 2, "stride": 4})
    runs = runs_of(formula.expressions({})[0], batch=1, heads=4, q_len=512, kv_len=512, block_m=16, block_n=16)
    whole = visible(formula, 4, 512)[0].unflatten(0, (32, 16)).unflatten(2, (32, 16)).any(3).any(1)
    assert runs.visited == whole.sum() and not runs.runs[:, 2].any(), "and none of them has to be masked"
    assert whole.sum() < 0.4 * 32 * 32


@pytest.mark.parametrize("config", [{"phase": 1}, {"dense": 1}, {"alike": True}], ids=str)
def test_heads_differ_in_one_direction_only(config: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="all heads keep the same"):
        S2.build(WHOLE, {"block": 16, "local": 2, "right": 2, "stride": 4, **config})


@pytest.mark.parametrize(
    "config",
    [{}, {"phase": 1}, {"dense": 1}, {"alike": True}, {"stride": 5, "local": 3}],
    ids=str,
)
def test_only_kept_blocks_are_visited(config: dict[str, Any]) -> None:
    site = replace(SITE, heads=4, kv_heads=2)
    formula = S2.formula(site, {"block": 16, "local": 2, "stride": 4, **config})
    mask = formula.expressions({})[0]
    runs = runs_of(mask, batch=1, heads=4, q_len=512, kv_len=512, block_m=16, block_n=16)
    whole = visible(formula, 4, 512).unflatten(1, (32, 16)).unflatten(3, (32, 16)).any(4).any(2)
    assert runs.visited == whole.sum()
    shared = whole.unflatten(0, (2, 2))
    assert torch.equal(shared[:, 0], shared[:, 1]), "query heads of a group share their pattern"
    assert torch.equal(whole[0], whole[2]) == ("alike" in config)
    if "dense" in config:
        assert torch.equal(whole[3], torch.ones(32, 32).tril().bool())


@pytest.mark.parametrize(
    ("mask", "config"),
    [
        *itertools.product(
            (Causal(), Causal() & Padding()),
            ({"stride": 1, "local": 1}, {"stride": 7, "local": 13}, {"stride": 7, "dense": 2}),
        ),
        *itertools.product(
            (Full(), Full() & Padding(), Causal()),
            ({"stride": 1, "local": 1, "right": 1}, {"stride": 7, "local": 13, "right": 13}),
        ),
    ],
    ids=str,
)
def test_exact_where_nothing_is_left_out(mask: Any, config: dict[str, int]) -> None:
    site = replace(SITE, mask=mask).sized(batch=3, q_len=200, kv_len=200)
    arguments = inputs(site, seed=1)
    built = S2.build(site, {"block": 16, "local": 1, **config})
    for each in (built, built.plain):  # type: ignore[attr-defined]
        assert_close(each(*arguments), brute_force(*arguments, site=site), torch.float32)


@pytest.mark.parametrize("phase", [0, 3])
def test_decoding_reads_the_kept_blocks_only(phase: int) -> None:
    """What a head does not keep may be gone: NaN there changes nothing, also behind an additive mask."""
    config: Config = {"block": 16, "local": 2, "stride": 4, "phase": phase}
    site = replace(SITE, heads=4, kv_heads=2).sized(batch=2, q_len=1, kv_len=333)
    query, key, value, _, _ = inputs(site, seed=2)
    built = S2.build(site, config)
    expected = S2.reference(query, key, value, None, None, site, config)
    seen = visible(S2.formula(site, config), 4, 333)[::2, -1]  # of the last query, for each key/value head
    assert 0.2 < seen.float().mean() < 0.45
    gone = ~seen[None, :, :, None]
    with torch.no_grad():
        out = built(query, key.masked_fill(gone, float("nan")), value.masked_fill(gone, float("nan")), None, None)
    assert_close(out, expected, torch.float32)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        {"block": 16, "local": 2, "stride": 4},
        {"block": 8, "local": 1, "stride": 12, "phase": 5},
        {"block": 8, "local": 3, "stride": 3, "alike": True},
        {"block": 16, "local": 2, "stride": 8, "dense": 1},
    ],
    ids=str,
)
def test_a_cache_holds_the_kept_keys_and_gives_what_all_give(config: Config, padded: bool) -> None:
    """A prompt, chunks of several lengths, and single tokens."""
    site = replace(SITE, heads=8, kv_heads=4).sized(batch=2, q_len=301, kv_len=301)
    query, key, value, _, _ = inputs(site, seed=4)
    padding = torch.ones(2, 301, dtype=torch.bool)
    padding[0, :37] = not padded
    expected = S2.reference(query.double(), key.double(), value.double(), None, padding, site, config)
    cache, start, block = Cache(site, config), 0, int(config["block"])
    for n in (150, 1, 1, 15, 16, 17, 60, *[1] * 41):
        part = slice(start, start + n)
        given = query[:, :, part], key[:, :, part], value[:, :, part]
        assert_close(cache.step(*given, padding[:, part] if padded else None), expected[:, :, part], torch.float32)
        start += n
        shard = -(-(start // block) // int(config["stride"])) * block
        most = shard + (int(config["local"]) + 1) * block
        assert all(t.shape[2] <= most for t in cache.held["sparse"])
        assert "dense" not in config or all(t.shape[2] == start for t in cache.held["dense"])
    assert start == 301 and most < 301 / 2
    with pytest.raises(OptionError, match="cannot be let go of"):
        Cache(site, {**config, "right": 2})


def test_a_step_of_decoding_is_causal_by_itself() -> None:
    step = replace(SITE, mask=Full()).sized(batch=1, q_len=1, kv_len=4096)
    assert S2.takes(step, Target.current()) is True
    arguments = inputs(step, seed=3)
    config = next(iter(S2.configs(step, Target.current())))
    out, causal = (S2.build(replace(step, mask=mask), config)(*arguments) for mask in (Full(), Causal()))
    assert torch.equal(out, causal)
    assert_close(out, S2.reference(*arguments, step, config), torch.float32)
    refused = S2.takes(step.sized(batch=1, q_len=2, kv_len=4096), Target.current())
    assert isinstance(refused, Refusal) and "cross-attention" in refused.reason


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter cannot compile")
@pytest.mark.parametrize(("mask", "more"), [(Causal(), {}), (Full(), {"right": 8})], ids=str)
def test_compiles_ahead_of_time(mask: Any, more: dict[str, int]) -> None:
    """On tensor cores, and the forward kernel without spills."""
    pytest.importorskip("triton")
    site = replace(SITE, mask=mask, dtype="bfloat16", head_dim=64, v_head_dim=64)
    kernels = kernels_of(S2.formula(site, {"block": 64, "local": 8, "stride": 8, **more}), site)
    for name in kernels.names:
        binary = kernels.binary(name, kernels.default(name, "sm_90"), "sm_90")
        assert binary.loop is not None and binary.loop.tensor
        assert binary.spills == 0 or name != kernels.names[0]
