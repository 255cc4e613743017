"""Attention in blocks of gathered keys against the definition with the whole matrix of scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rewriter.codegen.formula import Formula, capped, passed, reading
from rewriter.codegen.gathered import Gathered
from tests.formulas import near


def islands(h: Any, i: Any, j: Any, step: int) -> Any:
    """Far apart, and different by heads."""
    return ((i // 32 + j // 32 + h) % step == 0) & (i >= 40)


def far(i: Any, j: Any) -> Any:
    return ((i - j).abs() < 20) | (j < 30)


FORMULAS = {
    "window": Formula((near,), numbers={"window": 90}),
    "window and sinks": Formula((far,)),
    "by heads": Formula((islands,), numbers={"step": 7}),
    "softcap": Formula((far,), (capped,), {"softcap": 0.5}),
    "sink": Formula((near,), numbers={"window": 30}, sink=True),
    "sigmoid": Formula((near,), numbers={"window": 200}, normaliser="sigmoid"),
}


def operands(q_len: int, kv_len: int, v_width: int = 16, grad: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(q_len)
    query, key, value = (torch.randn(2, h, n, d) for h, n, d in ((4, q_len, 16), (2, kv_len, 16), (2, kv_len, v_width)))
    return query.requires_grad_(grad), key.requires_grad_(grad), value.requires_grad_(grad)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize(("q_len", "kv_len", "v_width"), [(577, 577, 16), (130, 1000, 8), (65, 65, 16)])
@pytest.mark.parametrize("given", ["nothing", "padding", "mask", "bias"])
def test_output_and_gradients_are_those_of_the_definition(
    name: str, q_len: int, kv_len: int, v_width: int, given: str
) -> None:
    formula, (query, key, value) = FORMULAS[name], operands(q_len, kv_len, v_width)
    padding = mask = None
    if given == "padding":
        padding = torch.ones(2, kv_len, dtype=torch.bool)
        padding[1, : kv_len // 2] = False
    elif given != "nothing":
        mask = torch.randn(2, 1, q_len, kv_len)
        mask = mask > 0 if given == "mask" else mask
    sink = [torch.randn(4)] if formula.sink else []
    tensors = passed(mask, padding)
    expected = reading(formula, tensors).reference(query, key, value, 0.3, sink=sink[0] if sink else None, **tensors)
    actual = Gathered(formula, 0.3)(query, key, value, mask, padding, *sink)
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-5)
    wanted = torch.randn_like(expected)
    for got, right in zip(
        torch.autograd.grad(actual, (query, key, value), wanted),
        torch.autograd.grad(expected, (query, key, value), wanted),
        strict=True,
    ):
        torch.testing.assert_close(got, right, atol=1e-4, rtol=1e-4)


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor has that is made."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.most = max(self.most, out.numel() if isinstance(out, Tensor) else 0)
        return out


@pytest.mark.parametrize("name", ["window", "softcap"])
def test_nothing_grows_with_the_square_of_the_length(name: str) -> None:
    most = []
    for length in (2048, 4096):
        query, key, value = operands(length, length, grad=False)
        with Largest() as seen:
            Gathered(FORMULAS[name], 0.3)(query, key, value, None, None)
        most.append(seen.most)
    assert most[1] < 4096**2 / 8
    assert most[1] <= 2 * most[0]


def test_a_traced_call_is_the_definition() -> None:
    query, key, value = operands(130, 130)
    run = Gathered(FORMULAS["window"], 0.3)
    compiled = torch.compile(lambda *given: run(*given, None, None), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(query, key, value), run(query, key, value, None, None), atol=2e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")  # torch's own, of its forward derivatives
def test_forward_derivatives_pass() -> None:
    query, key, value = operands(130, 130, grad=False)
    run = Gathered(FORMULAS["window"], 0.3)
    tangent = torch.randn_like(query)
    _, actual = torch.func.jvp(lambda q: run(q, key, value, None, None), (query,), (tangent,))
    step = 1e-3
    moved = run(query + step * tangent, key, value, None, None) - run(query - step * tangent, key, value, None, None)
    torch.testing.assert_close(actual, moved / (2 * step), atol=1e-3, rtol=1e-2)
