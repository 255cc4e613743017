"""Ahead-of-time compilation: what is said about a small attention kernel on four targets, and every way to say no."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from rewriter.cli import run
from rewriter.codegen.ahead import CompileError, Launch, compile_ahead, parse_target
from rewriter.codegen.compiled import binaries, launches
from rewriter.codegen.configs import default
from rewriter.codegen.disassembly import Counts, analysed, gcn, sass
from rewriter.codegen.expression import Kind, kinds_of
from rewriter.codegen.formula import Formula, causal, not_before, reading
from rewriter.codegen.fragments import KERNELS, Blocks
from rewriter.errors import OptionError
from tests.formulas import unusual

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter cannot compile")

TARGETS = {
    "sm_80": "HMMA.16816.F32",
    "sm_90": "HGMMA.64x64x16.F32",
    "sm_100": "UTCHMMA",
    "gfx942": "v_mfma_f32_32x32x8_",
}
SIGNATURE = {
    **dict.fromkeys(("q", "k", "v", "o"), "*fp16"),
    "scale": "fp32",
    **dict.fromkeys(("keys", "q_row", "k_row", "v_row", "o_row"), "i32"),
}
DIVISIBLE = ("q", "k", "v", "o", "q_row", "k_row", "v_row", "o_row")
BLOCKS = {"M": 128, "N": 64, "D": 64}


def attention(q, k, v, o, scale, keys, q_row, k_row, v_row, o_row, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr):
    """One head, all keys in full blocks, the scale in base 2."""
    rows = tl.program_id(0) * M + tl.arange(0, M)
    columns = tl.arange(0, D)
    queries = tl.load(q + rows[:, None] * q_row + columns[None, :])
    largest = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    result = tl.zeros([M, D], tl.float32)
    for start in tl.range(0, keys, N):
        place = start + tl.arange(0, N)
        scores = tl.dot(queries, tl.load(k + place[None, :] * k_row + columns[:, None]))
        larger = tl.maximum(largest, tl.max(scores, 1) * scale)
        weights = tl.math.exp2(scores * scale - larger[:, None])
        shrink = tl.math.exp2(largest - larger)
        total = total * shrink + tl.sum(weights, 1)
        values = tl.load(v + place[:, None] * v_row + columns[None, :])
        result = tl.dot(weights.to(values.dtype), values, result * shrink[:, None])
        largest = larger
    result = result / total[:, None]
    tl.store(o + rows[:, None] * o_row + columns[None, :], result.to(o.dtype.element_ty))


KERNEL = JITFunction(attention)


@pytest.fixture(scope="module", autouse=True)
def compiled_afresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing out of Triton's cache: a test that compiles nothing proves nothing."""
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
        yield


def compiled(target: str, blocks: Mapping[str, int] = BLOCKS, **settings: Any):
    return compile_ahead(KERNEL, SIGNATURE, blocks, target, **{"divisible": DIVISIBLE, **settings})


@pytest.mark.parametrize("target", TARGETS)
def test_both_products_run_on_tensor_cores(target: str) -> None:
    warps = 8 if target == "sm_100" else 4  # 4 there leave no room for 128 rows of scores
    binary = compiled(target, num_warps=warps)
    threads = warps * parse_target(target).warp_size
    loop = binary.loop
    assert loop is not None and binary.loops == (loop,)
    # Multiply-adds of both products over those of one instruction of one warp, or of the four or more of a block.
    product = 2 * 128 * 64 * 64
    expected = {
        "sm_80": product // (16 * 8 * 16 * warps),
        "sm_90": product // (64 * 64 * 16),
        "sm_100": product // (128 * 64 * 16),
        "gfx942": product // (32 * 32 * 8 * warps),
    }[target]
    assert loop.tensor == expected
    assert {kind.startswith(TARGETS[target]) for kind in loop.tensor_core} == {True}
    # An exp for each score of a thread, and for each row that it keeps the factor of.
    scores = 128 * 64 // threads
    assert scores < loop.exp <= scores + 4
    assert binary.spills == 0
    assert 2 * scores < loop.instructions < binary.code.instructions
    assert 64 < binary.registers <= 255
    assert 0 < binary.shared <= binary.shared_limit


def test_bfloat16_on_tensor_cores() -> None:
    signature = {name: kind.replace("fp16", "bf16") for name, kind in SIGNATURE.items()}
    binary = compile_ahead(KERNEL, signature, BLOCKS, "sm_90", divisible=DIVISIBLE)
    assert binary.loop is not None and binary.loop.tensor_core == {"HGMMA.64x64x16.F32.BF16": 16}


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_loads_are_wide_only_where_addresses_allow_it(target: str) -> None:
    wide, narrow = compiled(target).loop, compiled(target, divisible=()).loop
    assert wide is not None and narrow is not None
    threads = 4 * parse_target(target).warp_size
    bits = 2 * 64 * 64 * 16  # a block of keys and one of values
    assert wide.global_loads == {"128": bits // threads // 128}
    assert narrow.global_loads == {"16": bits // threads // 16}
    assert narrow.instructions > 1.2 * wide.instructions


def test_spills_are_seen() -> None:
    """Half the registers that 128 rows need on sm_90; gfx1100 has half of those of gfx942."""
    for target, settings in (("sm_90", {"maxnreg": 104}), ("gfx1100", {})):
        binary = compiled(target, **settings)
        assert binary.code.spill_stores > 100 and binary.code.spill_loads > 100
        assert binary.row()["spills"] == f"{binary.spills} B"


def test_binary_as_json_and_as_a_row() -> None:
    binary = compiled("sm_90", num_stages=3, maxnreg=240)
    assert (binary.kernel, binary.target, binary.warps, binary.stages) == ("attention", "sm_90", 4, 3)
    assert binary.registers <= 240
    document = json.loads(json.dumps(binary.to_json()))
    assert document["loop"] == document["loops"][0]
    assert document["loop"]["tensor_core"] == {"HGMMA.64x64x16.F32": 16}
    row = binary.row()
    assert row["main loop"] == f"{document['loop']['instructions']} (16 tensor)"
    assert row["shared"].endswith("of 227 KiB") and row["spills"] == "none"
    assert all(isinstance(cell, str) and cell for cell in row.values())


def test_targets() -> None:
    sm, cdna, rdna = (parse_target(name) for name in ("sm_90", "gfx942", "gfx1100"))
    assert (sm.backend, sm.arch, sm.warp_size) == ("cuda", 90, 32)
    assert (cdna.backend, cdna.arch, cdna.warp_size) == ("hip", "gfx942", 64)
    assert (rdna.backend, rdna.arch, rdna.warp_size) == ("hip", "gfx1100", 32)
    assert parse_target("gfx90a").warp_size == 64


@pytest.mark.parametrize("name", ["h100", "sm90", "sm_90a", "gfx", "cuda", "", "sm_90 "])
def test_names_that_are_no_target(name: str) -> None:
    with pytest.raises(OptionError, match="has to be sm_NN or gfxNNN, such as sm_80"):
        parse_target(name)


@pytest.mark.parametrize("name", ["sm_42", "sm_999", "gfx111"])
def test_targets_without_known_limits(name: str) -> None:
    with pytest.raises(OptionError, match=f"limits of {name} are not known"):
        compiled(name)


@pytest.mark.parametrize(
    ("target", "blocks", "settings", "sentence"),
    [
        ("sm_90", {"M": 128, "N": 256, "D": 256}, {"num_warps": 8, "num_stages": 3}, "shared memory and sm_90 has 227"),
        ("sm_120", {"M": 128, "N": 128, "D": 128}, {"num_warps": 8, "num_stages": 3}, "memory and sm_120 has 99"),
        ("sm_90", {"M": 128, "N": 64, "D": 48}, {}, "range must be a power of 2"),
        ("sm_90", {"M": 128, "N": 8, "D": 64}, {}, "K >= 16"),
        ("sm_90", BLOCKS, {"num_warps": 3}, "num_warps must be a power of 2"),
        ("sm_90", BLOCKS, {"num_warps": 64}, "64 warps of 32 are over 1024 threads"),
        ("gfx942", BLOCKS, {"num_warps": 32}, "32 warps of 64 are over 1024 threads"),
        ("sm_90", BLOCKS, {"maxnreg": 32}, "Insufficient registers"),
    ],
)  # fmt: skip
def test_configs_that_do_not_fit(
    target: str, blocks: Mapping[str, int], settings: dict[str, Any], sentence: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CompileError, match=sentence) as caught:
        compiled(target, blocks, **settings)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    assert target in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("signature", "constants", "settings", "sentence"),
    [
        (SIGNATURE, {"M": 128, "N": 64}, {}, "D: neither typed nor constant"),
        (SIGNATURE, {**BLOCKS, "E": 1}, {}, "E: unknown"),
        ({**SIGNATURE, "D": "i32"}, BLOCKS, {}, "D: typed and constant"),
        (SIGNATURE, BLOCKS, {"divisible": ("q", "D")}, "D: unknown"),
        (SIGNATURE, BLOCKS, {"maxnregs": 3}, "sm_90 has no option maxnregs"),
    ],
)
def test_arguments_that_do_not_match(
    signature: dict[str, str], constants: dict[str, int], settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(OptionError, match=sentence):
        compile_ahead(KERNEL, signature, constants, "sm_90", **settings)


@pytest.mark.parametrize("name", unusual(1))
def test_functions_that_say_what_is_rarely_said(name: str) -> None:
    """The interpreter takes more than the compiler does."""
    formula, tensors = unusual(64)[name]
    (binary,) = binaries(
        formula, Blocks(32, 32), "sm_90", head_dim=32, kinds=kinds_of(tensors), kernels=("forward",)
    )  # fmt: skip
    assert binary.code.tensor


WINDOW = Formula((causal, not_before), numbers={"offset": 0, "left": 255})


def as_ones(launch: Launch) -> Launch:
    """With 1 for each whole number, which Triton makes a constant of: not all that a number can is for constants."""
    ones = {argument: 1 for argument, kind in launch.signature.items() if kind in ("i32", "i64")}
    assert ones
    return replace(
        launch,
        signature={argument: kind for argument, kind in launch.signature.items() if argument not in ones},
        constants={**launch.constants, **ones},
        divisible=[argument for argument in launch.divisible if argument not in ones],
    )


@pytest.mark.parametrize("kernel", [*KERNELS, "forward_jvp"])
def test_one_token_one_head_and_steps_of_one(kernel: str) -> None:
    kinds: dict[str, Kind] = {"bias": "float", "mask": "bool", "padding": "bool"}
    for formula in (WINDOW, reading(Formula(sink=True), kinds)):
        (launch,) = launches(formula, Blocks(32, 32), head_dim=32, kinds=kinds, kernels=(kernel,))
        assert as_ones(launch).compiled("sm_90").code.tensor


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("size", [64, 128])
def test_forward_derivatives_fit_at_the_default_config(target: str, size: int) -> None:
    """They hold twice what the forward pass does."""
    blocks = default(target, "forward_jvp", size)
    (binary,) = binaries(WINDOW, blocks, target, head_dim=size, kernels=("forward_jvp",))
    assert binary.spills == 0


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_nothing_spills_at_the_default_config(target: str) -> None:
    for kernel in KERNELS:
        (binary,) = binaries(WINDOW, default(target, kernel, 64), target, head_dim=64, kernels=(kernel,))
        assert binary.spills == 0


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("size", [64, 128])
def test_a_learned_bias_fits_at_the_default_config(target: str, size: int) -> None:
    """A block of it takes what the tiles of a larger config need: 480 KiB of shared memory were asked for, of 227."""
    kinds: dict[str, Kind] = {"bias": "float"}
    formula = reading(Formula((causal,), numbers={"offset": 0}), kinds)
    assert formula.reads_pairs(kinds) and not WINDOW.reads_pairs({})
    for kernel in KERNELS:
        blocks = default(target, kernel, size, pairs=True)
        (binary,) = binaries(
            formula, blocks, target, head_dim=size, kinds=kinds, kernels=(kernel,), gradients=("bias",)
        )
        assert binary.spills == 0


@pytest.mark.parametrize(
    ("variant", "tokens", "mask"),
    [("sliding_window", None, "causal(0)"), ("s2", None, "causal(0)"), ("block_sparse", None, "causal(0)")]
    + [(name, "32x32", "full") for name in ("neighborhood", "halo", "axial", "dilated")]
    + [("neighborhood", "8x16x16", "full")],
)
@pytest.mark.parametrize("size", [64, 128])
def test_masks_of_variants_do_not_spill(
    variant: str, tokens: str | None, mask: str, size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """On sm_90, where default configs leave few registers: a block in which the mask is asked is taken in parts."""
    site = ["--mask", mask, *(["--tokens", tokens] if tokens else []), "--head-dim", str(size)]
    assert run(["kernels", "compile", "--variant", variant, "--target", "sm_90", *site, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["kernels"]
    assert [each["kernel"] for each in found] == [*KERNELS]
    assert {(each["code"]["spill_stores"], each["code"]["spill_loads"]) for each in found} == {(0, 0)}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("size", [64, 128])
def test_float32_fits_at_the_default_config(kernel: str, size: int) -> None:
    """Without tensor cores a config of bfloat16 spilled 100 KB, or asked for more memory than there is."""
    blocks = default("sm_90", kernel, size, torch.float32)
    (binary,) = binaries(WINDOW, blocks, "sm_90", head_dim=size, dtype=torch.float32, kernels=(kernel,))
    assert binary.spills == 0


def test_the_line_of_a_function_that_a_kernel_calls_is_named() -> None:
    (launch,) = launches(Formula(), Blocks(32, 32), head_dim=32, kernels=("forward",))
    with pytest.raises(CompileError, match=r"forward for sm_90 does not compile: .*fp17"):
        replace(launch, signature={**launch.signature, "query": "*fp17"}).compiled("sm_90")
    with pytest.raises(CompileError, match="Both operands must be same dtype"):
        replace(launch, signature={**launch.signature, "query": "*fp32"}).compiled("sm_90")


def test_unknown_type() -> None:
    with pytest.raises(CompileError, match=r"attention for sm_90 does not compile: .*fp15"):
        compile_ahead(KERNEL, {**SIGNATURE, "scale": "fp15"}, BLOCKS, "sm_90")


def test_interpreted_kernels_are_not_compiled() -> None:
    from triton.runtime.interpreter import InterpretedFunction

    with pytest.raises(CompileError, match="TRITON_INTERPRET=1"):
        compile_ahead(InterpretedFunction(attention), SIGNATURE, BLOCKS, "sm_90")


def listed(*lines: str) -> str:
    """A listing of nvdisasm's from labels and instructions."""
    return "\n".join(line if line.endswith(":") else f"        /*{n:04x}*/  {line} ;" for n, line in enumerate(lines))


def test_flow_of_sass() -> None:
    """Two loops in a row, the second inside a third, a spinning wait out of line, and padding."""
    code, loops = analysed(
        "kernel",
        listed(
            "kernel:", "LDG.E.LTC128B.64 R0, [R2]", "HMMA.16816.F32 R0, R0, R0",
            ".L_x_0:", "HMMA.16816.F32 R0, R0, R0", "LDSM.16.MT88.4 R0, [R1]", "@!P0 BRA `(.L_x_0)",
            ".L_x_1:", "LDS.U16 R0, [R1]", "FADD R0, R0, R0",
            ".L_x_2:", "@!PT LDS RZ, [RZ]", "@!P1 BRA `(.L_x_4)",
            ".L_x_3:", "UTCHMMA gdesc[UR0]", "STL.64 [R1], R2", "@P0 MUFU.EX2 R0, R0", "BRA.U UP0, `(.L_x_2)",
            "UTMALDG.2D [UR0], [UR2]", "@P2 BRA `(.L_x_1)", "@P0 EXIT", "LDL.LU R2, [R1]", "EXIT",
            ".L_x_4:", "SYNCS.PHASECHK P1, [UR1]", "@!P1 BRA `(.L_x_4)", "BRA `(.L_x_3)",
            ".L_x_5:", "BRA `(.L_x_5)", "NOP",
        ),
        sass,
    )  # fmt: skip
    first = Counts(3, {"HMMA.16816.F32": 1}, 0, {}, {"128": 1}, 0, 0)
    second = Counts(9, {"UTCHMMA": 1}, 1, {}, {}, 8, 0)
    assert loops == (first, second)
    assert (code.instructions, code.tensor, code.exp) == (21, 3, 1)
    assert code.global_loads == {"64": 1, "bulk": 1} and code.shared_loads == {"128": 1, "16": 1}
    assert (code.spill_stores, code.spill_loads) == (8, 4)


def test_flow_of_gcn() -> None:
    listing = """
attn:
	s_cbranch_scc1 .LBB0_2
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
	buffer_load_dwordx3 v[0:2], v3, s[0:3], 0 offen
	buffer_load_ushort v1, v3, s[0:3], 0 offen
	global_load_lds_dwordx4 v[0:1], off
	ds_read2st64_b64 v[0:3], v4 offset1:8
	ds_read_u16_d16 v0, v4
	v_mfma_f32_16x16x16_bf16 v[0:3], v[4:5], v[6:7], v[0:3]
	v_exp_f32_e32 v1, v2
	s_cbranch_scc0 .LBB0_1
.LBB0_2:
	scratch_store_dwordx2 off, v[0:1], off ; 8-byte Folded Spill
	scratch_load_dword v0, off, off ; 4-byte Folded Reload
	s_endpgm
	s_nop 0
"""
    code, (loop,) = analysed("attn", listing, gcn)
    assert loop == Counts(
        8, {"v_mfma_f32_16x16x16_bf16": 1}, 1, {"96": 1, "16": 1, "128": 1}, {"128": 1, "16": 1}, 0, 0
    )
    assert (code.instructions, code.spill_stores, code.spill_loads) == (12, 8, 4)
