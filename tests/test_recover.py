"""Fitting learned variants: nearer to the original, never farther, and the same every time."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter import recover
from rewriter.kernels.linear.linear import VARIANT
from rewriter.raising import Operands
from rewriter.recover import fit
from rewriter.site import AttentionSite, Causal
from rewriter.testing import brute_force, inputs

SITE = AttentionSite(
    path="a", heads=2, kv_heads=1, head_dim=8, v_head_dim=8, dtype="float32", scale=1.0, mask=Causal(),
    batch=2, q_len=24, kv_len=24,
)  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads on a busy machine wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def samples(count: int = 2) -> list[tuple[Operands, Tensor]]:
    given = [Operands(*inputs(SITE, seed=seed)) for seed in range(count)]
    return [(operands, brute_force(*operands, site=SITE).float()) for operands in given]


def built() -> nn.Module:
    module = VARIANT.build(SITE, {"feature_map": "hedgehog"})
    assert isinstance(module, nn.Module)
    return module


def relative(module: nn.Module, kept: list[tuple[Operands, Tensor]]) -> float:
    """The definition: squared error over the square of the original, the mean over the samples."""
    with torch.no_grad():
        errors = [((module(*o.given) - t) ** 2).sum() / (t**2).sum() for o, t in kept]
    return torch.stack(errors).mean().item()


class Scaled(nn.Module):
    """One number that multiplies the values: the right one is 3."""

    def __init__(self, start: float = 1.0) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(start))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, padding: Any) -> Tensor:
        return self.factor * value


def scaled_samples() -> list[tuple[Operands, Tensor]]:
    value = torch.randn(1, 1, 5, 2)
    return [(Operands(value, value, value, None, None), 3 * value)]


def test_the_error_falls_and_is_told_truly() -> None:
    module, kept = built(), samples()
    start = relative(module, kept)
    before, after = fit(module, kept)
    assert before == pytest.approx(start, rel=1e-4) and after == pytest.approx(relative(module, kept), rel=1e-4)
    assert after < 0.8 * before
    assert all(parameter.grad is None for parameter in module.parameters())


def test_it_finds_what_can_be_found() -> None:
    module = Scaled()
    before, after = fit(module, scaled_samples(), steps=200, rate=0.1)
    assert before == pytest.approx(4 / 9) and after < 1e-3 and module.factor.item() == pytest.approx(3, abs=0.1)


def test_the_best_is_kept_and_it_is_never_worse() -> None:
    for start, rate in ((1.0, 50.0), (3.0, 1.0)):  # steps much too large, and nothing to gain
        module, kept = Scaled(start), scaled_samples()
        before, after = fit(module, kept, steps=30, rate=rate)
        assert after <= before and relative(module, kept) == pytest.approx(after, abs=1e-6)
    assert module.factor.item() == 3.0


def test_the_best_is_kept_also_between_worse_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    over = recover._loss_over
    monkeypatch.setattr(recover, "_loss_over", lambda *args: seen.append(over(*args)) or seen[-1])
    module, kept = Scaled(2.5), scaled_samples()
    _, after = fit(module, kept, steps=60, rate=1.0)
    assert after == min(seen) < seen[0] and relative(module, kept) == pytest.approx(after, abs=1e-6)


def test_the_same_every_time() -> None:
    one, other = built(), built()
    assert fit(one, samples(), steps=12) == fit(other, samples(), steps=12)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_the_scale_of_the_values_does_not_matter() -> None:
    kept = samples()
    large = [(o._replace(value=1e4 * o.value), 1e4 * t) for o, t in kept]
    before, after = fit(built(), kept, steps=12)
    assert fit(built(), large, steps=12) == (pytest.approx(before, rel=1e-3), pytest.approx(after, rel=1e-2))


def test_it_works_where_gradients_are_off_and_leaves_that_so() -> None:
    with torch.no_grad():
        before, after = fit(built(), samples(), steps=12)
        assert after < before and not torch.is_grad_enabled()


def test_only_what_wants_gradients_is_fitted() -> None:
    module = built()
    module.key_map.requires_grad_(False)
    fixed = copy.deepcopy(module.state_dict())
    fit(module, samples(), steps=12)
    assert torch.equal(module.key_map, fixed["key_map"]) and not torch.equal(module.query_map, fixed["query_map"])


def test_nothing_to_fit() -> None:
    frozen = built().requires_grad_(False)
    before, after = fit(frozen, samples())
    assert before == after > 0
    assert fit(built(), []) == (0.0, 0.0)
    assert fit(Scaled(2.0), scaled_samples(), steps=0) == (pytest.approx(1 / 9), pytest.approx(1 / 9))


def test_a_fit_that_explodes_is_undone() -> None:
    class Exploding(Scaled):
        def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, padding: Any) -> Tensor:
            return torch.where(self.factor == 1, self.factor, self.factor * math.nan) * value

    module = Exploding()
    before, after = fit(module, scaled_samples(), steps=12)
    assert before == after == pytest.approx(4 / 9) and module.factor.item() == 1.0


@pytest.mark.parametrize(("begin", "kept"), [(2.0, 2.0), (-5.0, 1.0)])
def test_a_module_may_start_from_data_and_keeps_it_where_it_is_better(begin: float, kept: float) -> None:
    class Starting(Scaled):
        def start(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, padding: Any) -> None:
            assert value.shape == (1, 1, 5, 2)
            self.factor.data.fill_(begin)

    module = Starting()
    before, after = fit(module, scaled_samples(), steps=0)
    assert module.factor.item() == kept and before == pytest.approx(4 / 9)
    assert after == pytest.approx((3 - kept) ** 2 / 9)


@pytest.mark.parametrize(("begin", "kept"), [(2.0, 2.0), (-5.0, 1.0)])
def test_a_start_is_all_where_there_are_only_buffers(begin: float, kept: float) -> None:
    class Still(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("factor", torch.tensor(1.0))

        def start(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, padding: Any) -> None:
            self.get_buffer("factor").fill_(begin)

        def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, padding: Any) -> Tensor:
            return self.get_buffer("factor") * value

    module = Still()
    assert fit(module, scaled_samples()) == (pytest.approx(4 / 9), pytest.approx((3 - kept) ** 2 / 9))
    assert module.get_buffer("factor").item() == kept
