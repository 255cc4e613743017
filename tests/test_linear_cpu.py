"""Linear attention in chunks on the CPU against its definition token by token."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from rewriter.codegen import linear_cpu
from rewriter.codegen.linear_cpu import scan
from rewriter.codegen.linear_formula import LinearFormula, LinearState
from rewriter.guard import error, tolerance


def elu_plus_one(x: Any) -> Any:
    return torch.where(x > 0, x + 1.0, torch.exp(x))


def wide(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.dtype == torch.bool else x.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("decay", ["none", "head", "token"])
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (16, 16), (17, 17), (41, 41), (9, 41), (1, 41), (40, 57)])
def test_causal(q_len: int, kv_len: int, decay: Any, normalised: bool, dtype: torch.dtype) -> None:
    check(LinearFormula(elu_plus_one, elu_plus_one, decay=decay, normalised=normalised), q_len, kv_len, dtype)


@pytest.mark.parametrize("normalised", [False, True])
def test_every_key(normalised: bool) -> None:
    check(LinearFormula(elu_plus_one, elu_plus_one, normalised=normalised, causal=False), 20, 41, torch.float32)


@pytest.mark.parametrize("multiplies", [True, False])
@pytest.mark.parametrize("normalised", [False, True])
def test_a_cpu_with_and_without_products_in_bfloat16(
    normalised: bool, multiplies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_cpu, "_KEPT", {torch.bfloat16} if multiplies else set())
    check(LinearFormula(elu_plus_one, elu_plus_one, decay="head", normalised=normalised), 41, 41, torch.bfloat16)


def check(formula: LinearFormula, q_len: int, kv_len: int, dtype: torch.dtype) -> None:
    shapes = (4, q_len, 24), (2, kv_len, 24), (2, kv_len, 40)
    operands = [torch.randn(2, *shape).to(dtype).requires_grad_() for shape in shapes]
    shape = {"head": (4,), "token": (2, 4, kv_len)}.get(formula.decay)
    log_decay = None if shape is None else (-torch.rand(shape)).requires_grad_()
    count = 2 if log_decay is None else 4
    for padding, state in (
        (None, None),
        (torch.rand(2, kv_len) < 0.7, LinearState(torch.randn(2, count, 24, 40), torch.rand(2, count, 24) + 1.0)),
    ):
        state = state if state is None or formula.normalised else LinearState(state.sums)
        given = {"query_map": formula.query_map, "key_map": formula.key_map, "normalised": formula.normalised}
        asked: dict[str, Any] = {**given, "causal": formula.causal, "padding": padding, "state": state, "chunk": 16}
        expected, end = formula.reference(
            *map(wide, operands), 0.3, log_decay=wide(log_decay), padding=padding,
            state=LinearState(*map(wide, state)) if state else None,
        )  # fmt: skip
        out, last = scan(*operands, 0.3, log_decay=log_decay, **asked)
        assert out.dtype == dtype
        assert error(out.double(), expected) <= 2 * tolerance(dtype)
        for got, truth in zip(last, end, strict=True):
            if got is not None and truth is not None:
                assert error(got.double(), truth.repeat_interleave(4 // truth.shape[1], 1)) <= 2 * tolerance(dtype)
        with torch.no_grad():
            assert torch.equal(scan(*operands, 0.3, log_decay=log_decay, **asked)[0], out)
        if formula.normalised and kv_len == 1:
            continue  # a single key's weight is 1, whatever the operands: the gradients are rounding
        leaves = [*operands, *([] if log_decay is None else [log_decay])]
        above = torch.randn_like(out)
        actual = torch.autograd.grad(out, leaves, above, allow_unused=True)
        wanted = torch.autograd.grad(expected, leaves, above.double(), allow_unused=True)
        for got, truth in zip(actual, wanted, strict=True):
            assert (got is None) <= (truth is None or not truth.any())
            if got is not None and truth is not None and truth.any():
                assert error(got.double(), truth.double()) <= 4 * tolerance(dtype)


MEMORY = """
import resource, sys, torch
from rewriter.codegen.linear_cpu import scan
torch.set_num_threads(1)
length = int(sys.argv[1])
q, k, v = (torch.randn(1, 2, length, 64) for _ in range(3))
scan(q[:, :, :512], k[:, :, :512], v[:, :, :512], 1.0, key_map=torch.exp, normalised=True)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with torch.no_grad():
    out, _ = scan(q, k, v, 1.0, key_map=torch.exp, normalised=True)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) - out.nbytes / 1024)
"""


def test_memory_beyond_the_answer_does_not_grow() -> None:
    def beyond(length: int) -> float:
        done = subprocess.run([sys.executable, "-c", MEMORY, str(length)], check=True, capture_output=True, text=True)
        return float(done.stdout)

    assert beyond(65536) < 8 * 1024  # KiB; the answer is 32 MiB
