"""The masks of the benchmark against their definitions in words, what they keep, and the blocks that are visited."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from rewriter.codegen.blocks import runs_of
from rewriter.codegen.families import kernels_of
from rewriter.codegen.formula import Formula, indices
from rewriter.errors import OptionError
from rewriter.kernels.sparse.block_sparse import MASKS
from rewriter.site import Causal, Chunked, DataPrefix, Dense, Documents, Full, Padding, PrefixCausal, Window2d
from rewriter.target import Target
from rewriter.testing import assert_close, brute_force, inputs
from rewriter.variant import Config, variants

SPARSE = variants()["block_sparse"]
SITE = SPARSE.cases[0].site
LENGTH = 203
DOCUMENTS = [50, 17, 75, 61]
EVERY = Full() & Full()


def visible(formula: Formula, length: int, heads: int = 6) -> Tensor:
    """bool (H, N, N) of a formula's masks."""
    given = indices(torch.empty(1, heads, length, 1), torch.empty(1, heads, length, 1))
    return formula.visible({}, **given).expand(1, heads, length, length)[0]


def told(sees: Callable[[int, int], bool]) -> Tensor:
    return torch.tensor([[sees(i, j) for j in range(LENGTH)] for i in range(LENGTH)])


def slices(*given: tuple[int, int, int, int, int]) -> Tensor:
    """The benchmark's way to write a mask: queries a to b, keys c to d, 0 for all of them or 1 for those up to a
    diagonal that ends at the last query and the last key.
    """
    seen = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
    for a, b, c, d, kind in given:
        seen[a:b, c:d] = torch.ones(b - a, d - c).tril(d - c - (b - a) if kind else d).bool()
    return seen


ENDS = list(accumulate(DOCUMENTS))
SPANS = list(zip([0, *ENDS], ENDS, strict=False))
(QUESTION, LAST) = SPANS[0], SPANS[-1]
OF_DOCUMENTS: dict[str, Any] = {"documents": "50,17,75"}

STATIC: list[tuple[Config, Tensor, int]] = [
    ({"mask": "causal"}, slices((0, LENGTH, 0, LENGTH, 1)), LENGTH * (LENGTH + 1) // 2),
    (
        {"mask": "full_document", **OF_DOCUMENTS},
        slices(*((a, b, a, b, 0) for a, b in SPANS)),
        sum(n * n for n in DOCUMENTS),
    ),
    (
        {"mask": "causal_document", **OF_DOCUMENTS},
        slices(*((a, b, a, b, 1) for a, b in SPANS)),
        sum(n * (n + 1) // 2 for n in DOCUMENTS),
    ),
    (
        {"mask": "share_question", **OF_DOCUMENTS},
        slices(
            (0, ENDS[1], 0, ENDS[1], 1), *(s for a, b in SPANS[2:] for s in ((a, b, a, b, 1), (a, b, 0, 50, 0)))
        ),
        sum(n * (n + 1) // 2 for n in DOCUMENTS) + 50 * (LENGTH - 50),
    ),
    (
        {"mask": "causal_blockwise", **OF_DOCUMENTS},
        slices(*((a, b, a, b, 1) for a, b in SPANS[:-1]), (LAST[0], LENGTH, 0, LENGTH, 1)),
        sum(n * (n + 1) // 2 for n in DOCUMENTS) + DOCUMENTS[-1] * LAST[0],
    ),
    (
        {"mask": "prefix_lm_causal", "prefix": 30},
        slices((0, 30, 0, 30, 0), (30, LENGTH, 0, LENGTH, 1)),
        LENGTH * (LENGTH + 1) // 2 + 30 * 29 // 2,
    ),
    (
        {"mask": "prefix_lm_document", "prefix": 13, **OF_DOCUMENTS},
        slices(*(each for a, b in SPANS for each in ((a, a + 13, a, a + 13, 0), (a + 13, b, a, b, 1)))),
        sum(n * (n + 1) // 2 + 13 * 12 // 2 for n in DOCUMENTS),
    ),
    (
        {"mask": "sliding_window", "left": 20, "right": 7},
        told(lambda i, j: j in range(i - 20, i + 8)),
        LENGTH * 28 - 20 * 21 // 2 - 7 * 8 // 2,
    ),
    (
        {"mask": "sliding_window_causal", "window": 20},
        told(lambda i, j: j in range(i - 20, i + 1)),
        LENGTH * 21 - 20 * 21 // 2,
    ),
    (
        {"mask": "global_sliding_window", "window": 20},
        slices((0, 20, 0, LENGTH, 0), (0, LENGTH, 0, 20, 0)) | told(lambda i, j: j in range(i - 20, i + 21)),
        LENGTH**2 - (LENGTH - 20) ** 2 + (LENGTH - 20) * 41 - 20 * 21,
    ),
    (
        {"mask": "block_causal_document", "block": 16, **OF_DOCUMENTS},
        slices(*((r, min(r + 16, b), a, min(r + 16, b), 0) for a, b in SPANS for r in range(a, b, 16))),
        sum(min(16, n - r) * min(r + 16, n) for n in DOCUMENTS for r in range(0, n, 16)),
    ),
]  # fmt: skip
SPARSES: list[Config] = [
    {"mask": "block_sparse", "block": 32, "density": 0.25, "seed": 5},
    {"mask": "block_sparse", "block": 32, "density": 0.4, "own": True},
    {"mask": "variable_block_sparse", "block": 128, "density": 0.2},
    {"mask": "variable_block_sparse", "block": 128, "density": 0.5, "own": True},
]


def test_every_mask_of_the_benchmark_is_tested() -> None:
    assert len(STATIC) + 1 == 12
    assert {str(each["mask"]) for each in [*(s[0] for s in STATIC), *SPARSES]} | {"full"} == set(MASKS)


@pytest.mark.parametrize(("config", "expected", "area"), STATIC, ids=[str(s[0]["mask"]) for s in STATIC])
@pytest.mark.parametrize("block", [(16, 16), (16, 64), (64, 32)])
def test_static_masks(config: Config, expected: Tensor, area: int, block: tuple[int, int]) -> None:
    formula = SPARSE.formula(replace(SITE, mask=EVERY), config)  # type: ignore[misc]
    seen = visible(formula, LENGTH)
    assert torch.equal(seen, expected.expand_as(seen))
    assert int(expected.sum()) == area
    checked(formula, seen, block)


def checked(formula: Formula, seen: Tensor, size: tuple[int, int]) -> None:
    """The blocks with a pair are visited, and no others."""
    (m, n), (heads, length, _) = size, seen.shape
    padded = torch.nn.functional.pad(seen, (0, -length % n, 0, -length % m))
    some = padded.unflatten(2, (-1, n)).unflatten(1, (-1, m)).any(4).any(2)
    facts = {"batch": 1, "heads": heads, "q_len": length, "kv_len": length, "block_m": m, "block_n": n}
    runs = runs_of(formula.expressions({})[0], **facts)
    listed = torch.zeros_like(some)
    first = runs.first.expand(1, heads, -1)[0]
    for h in range(heads):
        for row in range(some.shape[1]):
            for begin, end, _ in runs.runs[first[h, row] : first[h, row + 1]].tolist():
                listed[h, row, begin:end] = True
    assert torch.equal(listed, some)


@pytest.mark.parametrize("config", SPARSES, ids=str)
def test_sparse_blocks(config: Config) -> None:
    length = 2048
    formula = SPARSE.formula(replace(SITE, mask=EVERY), config)  # type: ignore[misc]
    seen = visible(formula, length)
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[3]), "a group of heads has one pattern"
    checked(formula, seen, (32, 32))
    begins = [0, *(t for t in range(1, length) if not torch.equal(seen[:, t], seen[:, t - 1]))]
    sizes = [b - a for a, b in zip(begins, [*begins[1:], length], strict=True)]
    if config["mask"] == "block_sparse":
        assert set(sizes) == {32}
    else:
        assert len(set(sizes)) > 1 and min(sizes[:-1]) >= 128 and max(sizes) <= 3 * 128
        assert all(t % 32 == 0 for t in begins)
    blocks = seen[:, begins][:, :, begins]
    for t, size in zip(begins, sizes, strict=True):
        alike = seen[:, :, t : t + size]
        assert torch.equal(alike, alike[:, :, :1].expand_as(alike)), "keys of a block are seen together"
    diagonal = blocks.diagonal(dim1=1, dim2=2)
    assert bool(diagonal.all()) == bool(config.get("own", False))


@pytest.mark.parametrize("density", [0.1, 0.2, 0.5, 0.8, 1.0])
def test_density_is_the_share_that_is_kept(density: float) -> None:
    config: Config = {"mask": "block_sparse", "block": 16, "density": density}
    formula = SPARSE.formula(replace(SITE, mask=EVERY), config)  # type: ignore[misc]
    seen = visible(formula, 640)[:, ::16, ::16].float()
    assert torch.allclose(seen.mean(2), torch.tensor(density)), "of each row"
    assert torch.allclose(seen.mean(1), torch.tensor(density), atol=0.35), "of each column, by chance"
    own = visible(SPARSE.formula(replace(SITE, mask=EVERY), {**config, "own": True}), 640)[:, ::16, ::16].float()  # type: ignore[misc]
    assert torch.equal(own, torch.maximum(seen, torch.eye(40)))


def test_a_growing_sequence_keeps_its_blocks() -> None:
    for config in SPARSES:
        formula = SPARSE.formula(SITE, config)  # type: ignore[misc]
        assert torch.equal(visible(formula, 700)[:, :500, :500], visible(formula, 500))


@pytest.mark.parametrize("mask", [Causal(), Full() & Full(), Causal() & Padding(), PrefixCausal(9)], ids=str)
@pytest.mark.parametrize(
    "config",
    [
        {"mask": "full"},
        {"mask": "block_sparse", "block": 16, "density": 1.0},
        {"mask": "variable_block_sparse", "block": 16, "density": 1.0},
        {"mask": "sliding_window", "left": 300, "right": 300},
        {"mask": "full_document", "documents": "300"},
        {"mask": "block_causal_document", "documents": "300", "block": 300},
    ],
    ids=lambda c: str(c["mask"]),
)
def test_a_mask_that_hides_nothing_is_exact(mask: Any, config: Config) -> None:
    site = replace(SITE, mask=mask).sized(batch=3, q_len=200, kv_len=200)
    arguments = inputs(site, seed=1)
    built = SPARSE.build(site, config)
    for each in (built, built.plain):  # type: ignore[attr-defined]
        assert_close(each(*arguments), brute_force(*arguments, site=site), torch.float32)


@pytest.mark.parametrize("mask", [Documents(), DataPrefix() & Padding(), Causal() & Documents(), Chunked(64)], ids=str)
@pytest.mark.parametrize("additive", [False, True])
def test_what_the_site_hides_stays_hidden(mask: Any, additive: bool) -> None:
    site = replace(SITE, mask=mask).sized(batch=3, q_len=200, kv_len=200)
    config: Config = {"mask": "block_sparse", "block": 16, "density": 0.5, "own": True}
    query, key, value, shown, padding = inputs(site, seed=2)
    narrowed = visible(SPARSE.formula(replace(SITE, mask=EVERY), config), 200)  # type: ignore[misc]
    both = narrowed[None] if shown is None else narrowed & shown
    expected = brute_force(query, key, value, both, padding, site=site)
    if additive and shown is not None:
        shown = torch.zeros(shown.shape).masked_fill(~shown, float("-inf"))
    built = SPARSE.build(site, config)
    for each in (built, built.plain):  # type: ignore[attr-defined]
        assert_close(each(query, key, value, shown, padding), expected, torch.float32)


def test_refuses_what_it_does_not_know() -> None:
    for mask in (Dense(), Window2d(7, 7, 3, 3)):
        assert "too little is known" in SPARSE.takes(replace(SITE, mask=Causal() & mask), Target.current()).reason  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"mask": "striped"}, "no mask 'striped': choose among full, causal"),
        ({}, "no mask 'None'"),
        ({"mask": "causal_document"}, "needs the setting 'documents'"),
        ({"mask": "causal_document", "documents": "5,0"}, "a document without a token"),
        ({"mask": "block_sparse", "block": 16, "density": 0.0}, "a density of 0.0"),
        ({"mask": "variable_block_sparse", "block": 18, "density": 0.5}, "a positive multiple of 4"),
    ],
)
def test_one_sentence_for_a_wrong_config(config: Config, sentence: str) -> None:
    with pytest.raises(OptionError, match=sentence):
        SPARSE.build(SITE, config)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter cannot compile")
@pytest.mark.parametrize(
    "config", [{"mask": "block_causal_document", "documents": "700,90,1300", "block": 256}, SPARSES[3]], ids=str
)
def test_compiles_ahead_of_time(config: Config) -> None:
    pytest.importorskip("triton")
    site = replace(SITE, dtype="bfloat16", head_dim=64, v_head_dim=64)
    kernels = kernels_of(SPARSE.formula(site, config), site)  # type: ignore[misc]
    name = kernels.names[0]
    binary = kernels.binary(name, kernels.default(name, "sm_90"), "sm_90")
    assert binary.loop is not None and binary.loop.tensor
