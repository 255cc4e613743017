"""`rewriter bench variants`: found by discovery, measured beside SDPA, with the ideal of what their masks show."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from rewriter import cli
from rewriter.bench import tables
from rewriter.bench.variants import BASELINE, SIZES, Row, _ideal, measured, offered
from rewriter.codegen.blocks import pairs_of
from rewriter.codegen.either import pairs
from rewriter.codegen.formula import Formula, indices, of_site, passed, reading
from rewriter.errors import OptionError, RewriterError
from rewriter.kernels.exact.sdpa import attend
from rewriter.site import AttentionSite, Causal, Full, Mask, Padding
from rewriter.target import Target
from rewriter.testing import inputs
from rewriter.variant import register, unregister, variants


def rows(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    assert cli.run(["bench", "variants", *arguments, "--repeats", "1", "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["rows"]
    return found


def test_time_memory_and_the_ideal(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["axial", "linear", "sdpa"]
    chosen = [word for name in names for word in ("--variant", name)]
    sizes = ["--size", "16x16", "--size", "300", "--dtype", "float32"]
    found = rows(capsys, *chosen, *sizes)
    assert [(row["case"], row["variant"]) for row in found] == [
        ("16x16", BASELINE),
        ("16x16", "axial"),
        ("causal(0)", BASELINE),
        ("causal(0)", "linear"),
        ("causal(0)", "sdpa"),
    ]
    axial, linear, sdpa = (next(row for row in found if row["variant"] == name) for name in names)
    assert axial["work"] == 1 / 16 and axial["ideal"] == 16 and axial["reached"] == axial["faster"] / 16
    assert sdpa["work"] == 1 and linear["work"] > 0 and linear["ideal"] is None and linear["reached"] is None
    assert all(row["milliseconds"] > 0 and row["config"] is not None for row in found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_places_in_maps_beside_attention_to_all_of_them(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = rows(capsys, "--variant", "deformable", "--size", "16x16", "--dtype", dtype)
    assert [(row["case"], row["variant"]) for row in found] == [
        ("16x16, 4+4+4 places", BASELINE),
        ("16x16, 4+4+4 places", "deformable"),
    ]
    assert found[1]["milliseconds"] > 0 and found[1]["work"] is None and found[1]["ideal"] is None


@pytest.mark.parametrize("name", variants())
def test_every_variant_has_a_site(name: str) -> None:
    """At the sizes that are measured if none are named."""
    found = [
        choice for size in SIZES for _, here in offered([variants()[name]], size, "float32", True) for choice in here
    ]
    assert found and all(choice.variant.name == name for choice in found)


@pytest.mark.parametrize("name", [name for name, each in variants().items() if each.fidelity == "approximate"])
def test_pairs_are_those_of_the_mask(name: str) -> None:
    """Counted by the implementation, and one by one in its formula."""
    variant = variants()[name]
    for case in variant.cases:
        if variant.formula is None or case.site.tokens is not None:
            continue
        for config in case.configs or variant.configs(case.site, Target.current()):
            given, formula = inputs(case.site, seed=0), variant.formula(case.site, config)
            if not formula.types:  # else it reads what the implementation makes of a call
                assert pairs(variant.build(case.site, config), *given) == counted(formula, *given)


def counted(formula: Formula, query: Any, key: Any, value: Any, mask: Any, padding: Any, *sink: Any) -> int:
    tensors = passed(mask, padding)
    seen = reading(formula, tensors).visible(tensors, **indices(query, key))
    return int(seen.expand(*query.shape[:3], key.shape[2]).sum())


def test_pairs_on_a_grid() -> None:
    site = replace(variants()["axial"].cases[0].site, mask=Full()).sized(batch=2, q_len=577, kv_len=577)
    built = variants()["axial"].build(site, {"axis": 0})
    given = inputs(site, seed=0)
    assert pairs(built, *given) == 2 * 4 * (576 * 25 + 577), "24 of the grid and the one in front, which sees all"
    padded = replace(site, mask=Padding() & Full())
    assert (pairs(built, *inputs(padded, seed=0)) or 0) < (pairs(built, *given) or 0)
    assert pairs_of(of_site(site), given[0], given[1], {}) == 2 * 4 * 577**2


def test_what_is_wrong_is_not_timed() -> None:
    right = variants()["sdpa"]
    register(replace(right, name="wrong", build=lambda site, config: lambda *given: given[2] * 2))
    try:
        with pytest.raises(RewriterError, match="wrong with no settings"):
            list(measured(["wrong"], ["100"], ["float32"]))
    finally:
        unregister("wrong")


def test_what_is_too_large_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewriter.bench.variants._SECONDS", 1e-9)
    first, second, third, fourth = measured(["sdpa"], ["200", "100"], ["float32"], repeats=1)
    assert (first.tokens, second.tokens, third.tokens) == (100, 100, 200) and not second.reason
    assert fourth.variant == "sdpa" and fourth.milliseconds is None and "would take" in fourth.reason
    assert "Not measured: sdpa at causal(0) of 200" in tables.left_out([first, second, third, fourth])


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    row = Row("64x64", 4096, "float32", "axial", "axis=0", 2.0, 32.0, 1 / 64, 64.0, 8.25)
    assert tables.variant_rows([row])[0][3:] == ("axial", "2.0", "32.00x", "1.6%", "64.0x", "50%", "8.2")
    assert tables.variant_rows([replace(row, work=None, ideal=None)])[0][6:9] == ("-", "-", "-")
    assert cli.run(["bench", "variants", "--variant", "sdpa", "--size", "64", "--dtype", "bfloat16", "--markdown"]) == 0
    header, _, *lines = capsys.readouterr().out.splitlines()
    assert header.startswith("| case | tokens |") and lines[1].startswith("| causal(0) | 64 | bfloat16 | sdpa |")


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--variant", "none"], "no variant 'none'"),
        (["--size", "8by8"], "a size is written 4096, 64x64"),
        (["--dtype", "int8"], "'int8' is none of float32, bfloat16"),
    ],
)
def test_one_sentence_for_what_is_wrong(given: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", "variants", *given]) == 2
    assert sentence in " ".join(capsys.readouterr().err.split())
    with pytest.raises(OptionError):
        list(measured(["none"]))


@pytest.mark.parametrize("mask", [Causal(), Full()], ids=str)
def test_products_of_fused_attention_are_counted(mask: Mask) -> None:
    site = AttentionSite(
        path="a", heads=4, kv_heads=2, head_dim=8, v_head_dim=8, dtype="float32", scale=0.3, mask=mask, batch=2,
        q_len=70, kv_len=70,
    )  # fmt: skip
    fused = partial(attend, scale=site.scale, positional=mask)
    with torch.no_grad():
        assert _ideal(site, fused, inputs(site, seed=0)) == (1.0, None)
