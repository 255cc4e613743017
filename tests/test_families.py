"""`rewriter kernels show | compile`: both families of kernels, for every variant that has a formula."""

from __future__ import annotations

import ast
import json
import os
from dataclasses import replace
from typing import Any

import pytest

from rewriter import cli
from rewriter.codegen.families import Kernels, kernels_of
from rewriter.codegen.formula import Formula
from rewriter.codegen.sampling_formula import SamplingFormula
from rewriter.site import AttentionSite, Padding
from rewriter.target import Target
from rewriter.variant import Variant, variants

pytest.importorskip("triton")

CPU = Target.current()
FORMULAS = {name: each for name, each in variants().items() if each.formula is not None}
EVERY_FORMULA = pytest.mark.parametrize("variant", FORMULAS.values(), ids=FORMULAS)


def made(variant: Variant, number: int = 0, **facts: Any) -> Kernels:
    """For one of the variant's cases."""
    return kernels_of(*formula_of(variant, number, **facts))


def formula_of(variant: Variant, number: int = 0, **facts: Any) -> tuple[Any, AttentionSite]:
    assert variant.formula is not None
    case = variant.cases[number]
    site = replace(case.site, **facts)
    config = next(iter(case.configs or variant.configs(site, CPU)))
    return variant.formula(site, config), site


def functions(text: str) -> set[str]:
    return {node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}


@EVERY_FORMULA
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_sources_hold_the_named_kernels(variant: Variant, target: str) -> None:
    for number in range(len(variant.cases)):
        kernels = made(variant, number)
        for name in kernels.names:
            assert name in functions(kernels.triton(kernels.default(name, target)))


@EVERY_FORMULA
def test_padding_is_read(variant: Variant) -> None:
    """Nothing is dropped silently: what a call passes is an argument of the kernels."""
    mask = variant.cases[0].site.mask
    if variant.cases[0].site.samples:
        pytest.skip("padding is zeros in what is sampled")
    plain, padded = made(variant), made(variant, mask=mask & Padding())
    without, with_ = (each.triton(each.default(each.names[0], "sm_90")) for each in (plain, padded))
    read = "padding + j", "in_padding +"
    assert not any(each in without for each in read)
    formula, _ = formula_of(variant)
    if isinstance(formula, Formula) and formula.ordered:  # what padding hides is said by tensors of the formula's own
        assert with_ == without and formula.types and all(f"in_{name} +" in without for name in formula.types)
    else:
        assert any(each in with_ for each in read)


def named(variant: Variant) -> list[str]:
    """The options that name the variant and a site like that of its first case."""
    site = variant.cases[0].site
    known = {"--tokens": site.tokens, "--samples": site.samples}
    lie = [word for name, value in known.items() if value for word in (name, value)]
    return ["--variant", variant.name, "--mask", str(site.mask.positional), *lie]


@EVERY_FORMULA
def test_show(variant: Variant, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["kernels", "show", *named(variant), "--head-dim", "40"]) == 0
    assert made(variant).names[0] in functions(capsys.readouterr().out)


def test_features_that_are_passed_have_their_own_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["kernels", "show", "--variant", "linear", "--head-dim", "48", "--v-head-dim", "32"]) == 0
    text = capsys.readouterr().out
    assert "FEATURES = tl.constexpr(96)" in text and "VALUES = tl.constexpr(32)" in text


def test_cpp_where_it_is_generated(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["kernels", "show", "--target", "cpu", "--mask", "causal(0) & padding", "--variant"]
    assert cli.run([*command, "sdpa"]) == 0
    assert "in_padding" in capsys.readouterr().out
    assert cli.run([*command, "linear"]) == 2
    assert "no C++ is generated" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["original"], f"no variant 'original' with a formula: choose among {', '.join(FORMULAS)}"),
        (["axial"], "axial does not apply: a sequence has one axis only"),
        (["axial", "--mask", "full"], "axial does not apply: it is not known how the tokens lie"),
        (["axial", "--mask", "full", "--tokens", "24x24", "--config", "axis=all"], "several kernels: choose one"),
        (["axial", "--mask", "full", "--tokens", "24x24", "--config", "axis=2"], "axis 2 is none of the 2"),
        (["sdpa", "--dtype", "int8"], "'int8' is none of float32"),
        (["sdpa", "--mask", "diagonal"], "not a mask"),
        (["linear", "--mask", "sliding_window(3,0)"], "linear does not apply: a running sum can be causal or full"),
        (["sliding_window", "--config", "width=3"], "no setting 'width': window, sinks"),
        (["sdpa", "--blocks", "64,x"], "'64,x' is not block_m,block_n,num_warps,num_stages"),
        (["linear", "--blocks", "1,2,3,4,5,6"], "is not chunk,block_f,block_e,num_warps,num_stages"),
        (["linear", "--blocks", "24"], "chunk is 24; it must be a power of two"),
        (["linear", "--blocks", "64,64,64,4,0"], "num_stages is 0; it must be at least 1"),
        (["sdpa", "--blocks", "64,64,4,-1"], "num_stages is -1; it must be at least 1"),
        (["sdpa", "--blocks", "64,64,4,2,0"], "splits is 0; it must be at least 1"),
        (["sdpa", "--target", "gpu"], "The target 'gpu' has to be sm_NN or gfxNNN"),
        (["sdpa", "--target", "sm_75"], "the limits of sm_75 are not known, only those of sm_80"),
        (["sdpa", "--target", "cpu", "--dtype", "float16"], "generated C++ is for float32 and bfloat16"),
        (["sliding_window", "--config", "window=wide"], "sliding_window is not defined for window=wide"),
        (["sliding_window", "--config", "window"], "sliding_window is not defined for window"),
        (["sliding_window", "--config", "window=-5"], "window is -5; it must be at least 0"),
    ],
)
def test_one_sentence_for_what_is_wrong(given: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["kernels", "show", "--variant", *given]) == 2
    assert sentence in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("sizes", ["wide", "0", "64,,128", "512"])
def test_head_sizes_of_defaults(sizes: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["kernels", "defaults", "--target", "sm_90", "--sizes", sizes]) == 2
    assert "is not head sizes from 1 to 256" in capsys.readouterr().err


@pytest.mark.parametrize("target", ["cpu", "sm_90"])
def test_what_is_known_of_a_mask_only_by_its_tensor_is_read(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["kernels", "show", "--variant", "sdpa", "--mask", "causal(0) & dense", "--target", target]) == 0
    assert "in_mask" in capsys.readouterr().out


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter cannot compile")
@EVERY_FORMULA
def test_compile(variant: Variant, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["kernels", "compile", *named(variant), "--target", "sm_90"]
    assert cli.run([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["kernels"]
    assert [each["kernel"] for each in found] == list(made(variant).names)
    assert variant.formula is not None
    site = replace(variant.cases[0].site, head_dim=64)
    formula = variant.formula(site, next(iter(variant.configs(site, CPU))))
    multiplies = not isinstance(formula, SamplingFormula)
    # A product of fewer than 64 rows, such as a state of few features, has no instruction for a whole warp group.
    products = ("HGMMA", "HMMA") if (getattr(formula, "features", None) or 64) < 64 else ("HGMMA",)
    for each in found:
        assert each["target"] == "sm_90" and each["registers"] <= 255
        assert each["loop"] is None or any(name.startswith(products) for name in each["loop"]["tensor_core"])
    assert cli.run(command) == 0  # out of the cache
    table = capsys.readouterr().out
    assert table.count("main loop") == len(found) and ("HGMMA" in table) == multiplies
