"""The kernels of the linear family compiled for targets that are not here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton

from rewriter.codegen.ahead import CompileError
from rewriter.codegen.linear_compiled import BACKWARD, FORWARD, binaries, launches
from rewriter.codegen.linear_formula import LinearFormula
from rewriter.codegen.linear_fragments import LinearBlocks
from tests.test_ahead import as_ones

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter cannot compile")

TENSOR = {"sm_80": "HMMA.16816", "sm_90": "HGMMA.64x", "sm_100": "UTCHMMA", "gfx942": "v_mfma_f32_"}
ELEMENTWISE = ("passed", "step")


@pytest.fixture(scope="module", autouse=True)
def compiled_afresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing out of Triton's cache: a test that compiles nothing proves nothing."""
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
        yield


def elu_plus_one(x: Any) -> Any:
    return torch.where(x > 0, x + 1.0, torch.exp(x))


def formula(decay: Any, *, causal: bool = True) -> LinearFormula:
    return LinearFormula(elu_plus_one, elu_plus_one, decay=decay, normalised=True, causal=causal)


@pytest.mark.parametrize("target", TENSOR)
@pytest.mark.parametrize("decay", ["token", "channel"])
def test_targets(target: str, decay: Any) -> None:
    found = binaries(formula(decay), LinearBlocks(), target, features=64)
    assert [each.kernel for each in found] == [*FORWARD, *BACKWARD]
    for each in found:
        assert each.shared <= each.shared_limit
        assert (each.code.tensor == 0) == (each.kernel in ELEMENTWISE)
        assert each.spills == 0 or each.kernel == "step"  # some bytes, outside of its loop
        # Blocks of 16 are below what the newer tensor cores multiply at once: they take the older instruction.
        small = decay == "channel" and "states" not in each.kernel and target in ("sm_90", "sm_100")
        kinds = ("HMMA.16816",) if small else (TENSOR[target],)
        assert all(kind.startswith(kinds) for kind in each.code.tensor_core)


@pytest.mark.parametrize("decay", ["none", "token", "channel"])
def test_one_token_one_head_and_steps_of_one(decay: Any) -> None:
    found = launches(formula(decay), LinearBlocks(), features=64, padded=True)
    for each in found:
        assert as_ones(each).compiled("sm_90").code.instructions


CONFIGS = [(size, decay, torch.bfloat16) for size in (64, 128) for decay in ("none", "token", "channel")]


@pytest.mark.parametrize(
    ("size", "decay", "dtype"), [*CONFIGS, (128, "token", torch.float16), (128, "token", torch.float32)]
)
def test_nothing_spills_at_the_default_config(size: int, decay: Any, dtype: torch.dtype) -> None:
    found = binaries(formula(decay), LinearBlocks.of(dtype, "sm_90"), "sm_90", features=size, dtype=dtype)
    assert {each.kernel: each.spills for each in found if each.spills} == {}


def test_nothing_spills_where_features_are_passed() -> None:
    """128 features that come from 64, as of the variant: on sm_80 two stages were 40 bytes too many."""
    passed = LinearFormula(normalised=True)
    found = binaries(passed, LinearBlocks.of(torch.bfloat16, "sm_80"), "sm_80", features=128, values=64)
    assert {each.kernel: each.spills for each in found if each.spills} == {}


def test_every_key_and_padding() -> None:
    found = binaries(formula("none", causal=False), LinearBlocks(), "sm_90", features=40, values=72, padded=True)
    assert all(each.spills == 0 for each in found)


def test_a_config_that_does_not_fit() -> None:
    with pytest.raises(CompileError, match="KiB of shared memory and gfx942 has 64"):
        binaries(formula("none"), LinearBlocks(256, 128, 128), "gfx942", features=128, kernels=("states_of",))
