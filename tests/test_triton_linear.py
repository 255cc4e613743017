"""The generated kernels of the linear family against the definition: on a GPU, or in Triton's interpreter.

The interpreter is chosen when Triton is imported (`TRITON_INTERPRET=1`, as `make test` does for this file).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from rewriter.codegen.linear import LinearKernel  # noqa: E402
from rewriter.codegen.linear_configs import contenders  # noqa: E402
from rewriter.codegen.linear_formula import LinearFormula, LinearState  # noqa: E402
from rewriter.codegen.linear_fragments import LinearBlocks, source  # noqa: E402
from rewriter.codegen.linear_implementation import by_kernels  # noqa: E402
from rewriter.errors import OptionError  # noqa: E402
from rewriter.guard import error, tolerance  # noqa: E402
from rewriter.kernels.linear.linear import VARIANT as LINEAR  # noqa: E402
from rewriter.kernels.linear.linear import features, signed  # noqa: E402
from rewriter.site import Causal, Full, Mask, Padding  # noqa: E402
from rewriter.target import Target  # noqa: E402

INTERPRETED = bool(triton.knobs.runtime.interpret)
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
pytestmark = pytest.mark.gpu
SMALL = LinearBlocks(16, 16, 16)
DECAYS = ("none", "head", "token", "channel")


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that was never written reads as NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def elu_plus_one(x: Any) -> Any:
    return torch.where(x > 0, x + 1.0, torch.exp(x))


def rectified(x: Any, slope: float) -> Any:
    return torch.maximum(x, slope * x)


def squashed(x: Any) -> Any:
    return x * torch.sigmoid(x) + torch.tanh(x)


def wide(x: Tensor | None) -> Tensor | None:
    """The same in float64, beside the original where gradients are concerned."""
    return x if x is None or x.dtype == torch.bool else x.double()


def logs(
    formula: LinearFormula, batch: int, heads: int, length: int, features: int, *, most: float = 2.0
) -> Tensor | None:
    shapes = {"head": (heads,), "token": (batch, heads, length), "channel": (batch, heads, length, features)}
    shape = shapes.get(formula.decay)
    return None if shape is None else (-torch.rand(shape, device=DEVICE) * most).requires_grad_()


def compared(
    formula: LinearFormula,
    *,
    heads: int = 4,
    key_heads: int = 2,
    value_heads: int = 2,
    decay_heads: int = 4,
    q_len: int | None = None,
    kv_len: int = 41,
    features: int = 16,
    width: int = 16,
    blocks: LinearBlocks | None = SMALL,
    dtype: torch.dtype = torch.float32,
    scale: float = 0.3,
    batch: int = 2,
    layout: Callable[[Tensor], Tensor] = lambda t: t,
    padding: Tensor | None = None,
    initial: bool = False,
    most: float = 2.0,
    slack: float = 2.0,
) -> None:
    """The answer, the last state and all gradients against those of the definition in float64."""
    q_len = kv_len if q_len is None else q_len
    shapes = (heads, q_len, features), (key_heads, kv_len, features), (value_heads, kv_len, width)
    operands = [torch.randn(batch, *shape, device=DEVICE).to(dtype) for shape in shapes]
    if padding is not None:  # what stands at padded tokens is never read
        padding = padding.to(DEVICE)
        for each in operands[1:]:
            each.masked_fill_(~padding[:, None, :, None], float("nan"))
    operands = [layout(each).requires_grad_() for each in operands]
    log_decay = logs(formula, batch, decay_heads, kv_len, features, most=most)
    count = max(key_heads, value_heads, decay_heads if log_decay is not None else 1)
    state = None
    if initial:
        sums = torch.randn(batch, count, features, width, device=DEVICE).requires_grad_()
        totals = torch.rand(batch, count, features, device=DEVICE).add(1.0).requires_grad_()
        state = LinearState(sums, totals if formula.normalised else None)
    leaves = [*operands, *(t for t in (log_decay, *(state or ())) if t is not None)]
    out, last = LinearKernel(formula, blocks)(
        *operands, scale, log_decay=log_decay, padding=padding, state=state
    )  # fmt: skip
    expected, end = formula.reference(
        *map(wide, operands), scale, log_decay=wide(log_decay), padding=padding,
        state=LinearState(*map(wide, state)) if state else None,
    )  # fmt: skip
    assert out.dtype == dtype and last.sums.dtype == torch.float32
    limit = tolerance(dtype)
    answers = [out, *(t for t in last if t is not None)]
    truths = [expected, *(t for t in end if t is not None)]
    for got, truth in zip(answers, truths, strict=True):
        assert error(got.double(), truth) <= limit
    above = [torch.randn_like(each) for each in answers]
    actual = torch.autograd.grad(answers, leaves, above)
    wanted = torch.autograd.grad(truths, leaves, [each.double() for each in above])
    for leaf, got, truth in zip(leaves, actual, wanted, strict=True):
        assert got.dtype == truth.dtype
        # What a decay between j and i brings, i - j times, is found as a difference of i times and j times.
        lost = 10 if leaf is log_decay else 1
        assert error(got.double(), truth.double()) <= lost * slack * limit


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
def test_decays(decay: Any, normalised: bool) -> None:
    compared(LinearFormula(elu_plus_one, elu_plus_one, decay=decay, normalised=normalised))


@pytest.mark.parametrize("normalised", [False, True])
def test_every_key(normalised: bool) -> None:
    formula = LinearFormula(elu_plus_one, elu_plus_one, normalised=normalised, causal=False)
    compared(formula)
    compared(formula, q_len=5, padding=torch.rand(2, 41) < 0.7)
    compared(formula, q_len=50, initial=True)
    compared(formula, q_len=20, kv_len=300, heads=2)  # more chunks than parts


@pytest.mark.parametrize("length", [1, 31, 32, 33, 64])
@pytest.mark.parametrize("decay", DECAYS)
def test_lengths_about_a_chunk(decay: Any, length: int) -> None:
    formula = LinearFormula(elu_plus_one, elu_plus_one, decay=decay, normalised=True)
    compared(formula, kv_len=length, blocks=LinearBlocks(32, 16, 16), heads=2, key_heads=1, decay_heads=2, initial=True)


@pytest.mark.parametrize("decay", DECAYS)
def test_fewer_queries_than_keys(decay: Any) -> None:
    formula = LinearFormula(None, elu_plus_one, decay=decay)
    for q_len in (1, 17):
        compared(formula, q_len=q_len, blocks=LinearBlocks(32, 16, 16), initial=True)


@pytest.mark.parametrize("decay", DECAYS)
def test_padding(decay: Any) -> None:
    padding = torch.rand(2, 41) < 0.7
    padding[0, :20] = False  # a whole chunk, on the left
    compared(LinearFormula(elu_plus_one, elu_plus_one, decay=decay, normalised=True), padding=padding, initial=True)


@pytest.mark.parametrize(("features", "width"), [(8, 24), (24, 40), (40, 24), (80, 16)])
@pytest.mark.parametrize("decay", ["token", "channel"])
def test_head_sizes(features: int, width: int, decay: Any) -> None:
    formula = LinearFormula(elu_plus_one, elu_plus_one, decay=decay, normalised=True)
    blocks = LinearBlocks(16, 32, 16)
    compared(formula, features=features, width=width, kv_len=20, blocks=blocks, padding=torch.rand(2, 20) < 0.7)


@pytest.mark.parametrize(
    ("heads", "key_heads", "value_heads", "decay_heads"),
    [(1, 1, 1, 1), (4, 1, 1, 1), (6, 2, 2, 2), (6, 2, 2, 6), (4, 4, 2, 4), (4, 1, 2, 2), (4, 1, 4, 2)],
)
def test_heads(heads: int, key_heads: int, value_heads: int, decay_heads: int) -> None:
    counts: dict[str, Any] = {"heads": heads, "key_heads": key_heads, "value_heads": value_heads}
    compared(LinearFormula(decay="token"), **counts, decay_heads=decay_heads, initial=True)
    compared(LinearFormula(elu_plus_one, elu_plus_one, normalised=True), **counts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decay", DECAYS)
def test_narrow_types(dtype: torch.dtype, decay: Any) -> None:
    formula = LinearFormula(elu_plus_one, elu_plus_one, decay=decay, normalised=True)
    compared(formula, dtype=dtype, blocks=LinearBlocks(32, 16, 16))


def test_float16_keeps_the_range_of_sums() -> None:
    formula = LinearFormula()
    q = torch.full((1, 1, 40, 16), 100.0, device=DEVICE, dtype=torch.float16)
    v = torch.full((1, 1, 40, 16), 1e-2, device=DEVICE, dtype=torch.float16)
    out, _ = LinearKernel(formula, SMALL)(q, q, v, 1e-3)
    expected, _ = formula.reference(q.double(), q.double(), v.double(), 1e-3)
    assert error(out.double(), expected) <= tolerance(torch.float16)


@pytest.mark.parametrize("decay", ["head", "token", "channel"])
def test_strong_decays(decay: Any) -> None:
    compared(LinearFormula(decay=decay), most=30.0, blocks=LinearBlocks(32, 16, 16), slack=20.0)


def test_a_decay_that_forgets_everything() -> None:
    q, k, v = (torch.randn(1, 1, 40, 16, device=DEVICE) for _ in range(3))
    gone = torch.zeros(1, 1, 40, device=DEVICE)
    gone[..., 20] = float("-inf")
    out, _ = LinearKernel(LinearFormula(decay="token"), SMALL)(q, k, v, 1.0, log_decay=gone)
    expected, _ = LinearFormula().reference(*(t[:, :, 20:].double() for t in (q, k, v)), 1.0)
    assert error(out[:, :, 20:].double(), expected) <= tolerance(torch.float32)


def test_maps_of_queries_and_keys_differ() -> None:
    compared(LinearFormula(rectified, squashed, {"slope": 0.1}, decay="token"))
    compared(LinearFormula(torch.exp, torch.tanh, decay="head"))
    constant = LinearFormula(key_map=lambda x: 2.0)
    q = torch.randn(1, 1, 20, 16, device=DEVICE)
    expected, _ = constant.reference(q, q, q, 1.0)
    assert error(LinearKernel(constant, SMALL)(q, q, q, 1.0)[0], expected) <= tolerance(torch.float32)


@pytest.mark.parametrize("mask", [Causal(), Causal() & Padding(), Full() & Padding()], ids=str)
def test_maps_that_mix_channels_come_before_the_kernel(mask: Mask) -> None:
    """A variant's module and the kernel of its formula, given phi(q) and phi(k), against the variant's definition."""
    site = replace(LINEAR.cases[0].site, mask=mask, device=DEVICE)
    module = LINEAR.build(site, {})
    for weight in module.parameters():
        torch.nn.init.normal_(weight.data, std=0.25)
    query, key, value = (torch.randn(2, heads, 40, 16, device=DEVICE) for heads in (6, 2, 2))
    padding = torch.rand(2, 40, device=DEVICE) < 0.7 if mask.has(Padding) else None
    expected = LINEAR.reference(query, key, value, None, padding, site, {}, module=module)
    phi_q = features(query, signed(module.root * module.query_map))
    phi_k = features(key.repeat_interleave(3, 1), signed(module.root * module.key_map))
    assert phi_q.shape[3] == module.formula.features
    out, _ = LinearKernel(module.formula, SMALL)(phi_q, phi_k, value, 1.0, padding=padding)
    for each in (out, module(query, key, value, None, padding)):
        assert error(each, expected) <= tolerance(torch.float32)


def test_rows_of_features_that_are_not_aligned() -> None:
    """As of 16 signs and a one: zeros are added, and nothing to the answer or the gradients."""
    formula = LinearFormula(normalised=True, features=17)
    q, k = (torch.rand(1, 2, 40, 17, device=DEVICE, requires_grad=True) for _ in range(2))
    value = torch.randn(1, 2, 40, 16, device=DEVICE)
    ours, expected = by_kernels(formula, q, k, value, 1.0, None), formula.reference(q, k, value, 1.0)[0]
    assert error(ours, expected) <= tolerance(torch.float32)
    for own, theirs in zip(*(torch.autograd.grad(o.square().sum(), (q, k)) for o in (ours, expected)), strict=True):
        assert error(own, theirs) <= tolerance(torch.float32)


def test_strides() -> None:
    formula = LinearFormula(elu_plus_one, elu_plus_one, decay="token")
    compared(formula, layout=lambda t: t.transpose(1, 2).contiguous().transpose(1, 2).detach())
    compared(formula, layout=lambda t: t.mT.contiguous().mT.detach())


def test_gates_of_any_layout() -> None:
    q, k, v = (torch.randn(2, 2, 20, 16, device=DEVICE) for _ in range(3))
    gates = -torch.rand(2, 2, 16, 20, device=DEVICE).mT
    kernel = LinearKernel(LinearFormula(decay="channel"), SMALL)
    expected, _ = kernel.formula.reference(q, k, v, 1.0, log_decay=gates)
    assert error(kernel(q, k, v, 1.0, log_decay=gates)[0], expected) <= tolerance(torch.float32)
    assert error(kernel.step(q, k, v, 1.0, log_decay=gates)[0], expected) <= tolerance(torch.float32)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
def test_steps_after_a_prefill(decay: Any, normalised: bool) -> None:
    """A prefill, a chunk after it, and steps of one and of a few tokens are the whole."""
    formula = LinearFormula(elu_plus_one, elu_plus_one, decay=decay, normalised=normalised)
    kernel = LinearKernel(formula, SMALL)
    q, k, v = (torch.randn(2, heads, 41, size, device=DEVICE) for heads, size in ((4, 24), (2, 24), (2, 40)))
    log_decay, padding = logs(formula, 2, 4, 41, 24), torch.rand(2, 41, device=DEVICE) < 0.8
    log_decay = None if log_decay is None else log_decay.detach()
    whole, end = formula.reference(
        *(t.double() for t in (q, k, v)), 0.3, log_decay=wide(log_decay), padding=padding
    )  # fmt: skip
    parts, state = [], None
    for n, (start, stop) in enumerate([(0, 20), (20, 37), (37, 38), (38, 41)]):
        at = slice(start, stop)
        own = log_decay if log_decay is None or log_decay.dim() == 1 else log_decay[:, :, at]
        run = kernel if n < 2 else kernel.step
        out, state = run(
            *(t[:, :, at] for t in (q, k, v)), 0.3, log_decay=own, padding=padding[:, at], state=state
        )  # fmt: skip
        parts.append(out)
    assert state is not None
    assert error(torch.cat(parts, 2).double(), whole) <= tolerance(torch.float32)
    for got, truth in zip(state, end, strict=True):
        assert (got is None) == (truth is None)
        assert got is None or truth is None or error(got.double(), truth) <= tolerance(torch.float32)


@pytest.mark.parametrize("normalised", [False, True])
def test_a_step_in_place(normalised: bool) -> None:
    formula = LinearFormula(elu_plus_one, elu_plus_one, decay="head", normalised=normalised)
    q, k, v = (torch.randn(1, 2, 1, 16, device=DEVICE) for _ in range(3))
    before = LinearState(
        torch.randn(1, 2, 16, 16, device=DEVICE), torch.rand(1, 2, 16, device=DEVICE) if normalised else None
    )
    log_decay = torch.tensor([-0.5, 0.0], device=DEVICE)
    kernel = LinearKernel(formula, SMALL)
    out, new = kernel.step(q, k, v, 1.0, before, log_decay=log_decay)
    kept = before.sums.clone()
    assert not torch.equal(new.sums, kept)
    again, same = kernel.step(q, k, v, 1.0, before, log_decay=log_decay, in_place=True)
    assert same.sums is before.sums and torch.equal(before.sums, new.sums) and torch.equal(out, again)
    assert not normalised or (before.totals is not None and torch.equal(before.totals, new.totals))


def test_the_default_config() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        compared(LinearFormula(elu_plus_one, elu_plus_one, decay="token"), blocks=None, kv_len=70, dtype=dtype)


@pytest.mark.parametrize("learned", [False, True])
def test_the_fastest_config_is_asked_for_once(monkeypatch: pytest.MonkeyPatch, learned: bool) -> None:
    """With a stand-in for the clock, for which the last is the fastest."""
    target = replace(Target.current(torch.device(DEVICE)), capability="sm_90")
    monkeypatch.setattr("rewriter.codegen.linear.Target", SimpleNamespace(current=lambda device: target))
    monkeypatch.setattr("rewriter.codegen.linear._TUNED", {})
    tried: list[int] = []
    monkeypatch.setattr(
        "rewriter.tune.measure.medians", lambda times: tried.append(len(times)) or [2.0] * (len(times) - 1) + [1.0]
    )
    formula = LinearFormula(elu_plus_one, elu_plus_one, normalised=True)
    shipped, *others = contenders(formula, 64, 64, torch.bfloat16, "sm_90")
    assert shipped == LinearBlocks.of(torch.bfloat16, "sm_90") and others
    assert all(each.chunk > shipped.chunk for each in others), "states are what costs most"
    q, k, v = (torch.randn(1, 1, 150, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=learned) for _ in range(3))
    for _ in range(2):
        assert LinearKernel(formula).tuned(q, k, v, 0.5, None, None) == others[-1]
    assert tried == [len(others) + 1]
    LinearKernel(formula).tuned(q[:, :, :40], k[:, :, :40], v[:, :, :40], 0.5, None, None)
    assert len(tried) == 2, "of another length another may be the fastest"
    out, expected = LinearKernel(formula, others[-1])(q, k, v, 0.5)[0], formula.reference(q, k, v, 0.5)[0]
    assert error(out, expected) <= tolerance(torch.bfloat16)


def test_what_does_not_fit_together() -> None:
    q, k = torch.randn(1, 4, 8, 16, device=DEVICE), torch.randn(1, 3, 8, 16, device=DEVICE)
    gates = torch.zeros(1, 4, 8, device=DEVICE)
    kernel = LinearKernel(LinearFormula(decay="token"), SMALL)
    for sentence, operands, given in (
        ("4 query heads, 3 of keys", (q, k, k), {"log_decay": gates[:, :3]}),
        ("given is none", (q, q, q), {}),
        ("3 axes, not 4", (q, q, q), {"log_decay": gates[..., None]}),
        ("8 queries cannot end with 4 keys", (q, q[:, :, :4], q[:, :, :4]), {"log_decay": gates[..., :4]}),
        ("have 16 features and keys 8", (q, q[..., :8], q), {"log_decay": gates}),
        ("the state's sums are", (q, q, q), {"log_decay": gates, "state": LinearState(torch.zeros(1, 2, 16, 16))}),
    ):
        with pytest.raises(OptionError, match=sentence):
            kernel(*operands, 1.0, **given)
    with pytest.raises(OptionError, match="one query for each key; given are 1 and 8"):
        kernel.step(q[:, :, :1], q, q, 1.0, log_decay=gates)
    with pytest.raises(OptionError, match="a decay by head is that of a causal sum"):
        LinearFormula(decay="head", causal=False)
    with pytest.raises(OptionError, match="chunk is 24"):
        LinearBlocks(24)
    with pytest.raises(OptionError, match="for which no kernel has a word"):
        source(LinearFormula(torch.cos), SMALL, features=16, values=16, dtype=torch.float32)
