"""The Triton kernels of attention to places in maps, on a GPU, or in Triton's interpreter (`TRITON_INTERPRET=1`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from rewriter.codegen.sampling_triton import backward, forward  # noqa: E402
from rewriter.guard import error, tolerance  # noqa: E402
from rewriter.kernels.sampled.deformable import reference  # noqa: E402
from rewriter.sampling import sampled  # noqa: E402
from tests.test_deformable import operands  # noqa: E402

INTERPRETED = bool(triton.knobs.runtime.interpret)
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"points": (3, 6, 1), "width": 7, "batch": 1, "queries": 70},
        {"sizes": [(1, 30)], "points": (5,), "width": 1, "queries": 5},
        {"queries": 0},
        {"queries": 9, "reach": 30.0},
        {"queries": 5, "width": 64, "dtype": torch.bfloat16},
        {"queries": 5, "dtype": torch.float16},
    ],
    ids=str,
)  # fmt: skip
def test_output_and_gradients_are_those_of_the_definition(facts: dict[str, Any]) -> None:
    maps, grids, weights = operands(**facts)
    given: Any = [each.to(DEVICE) for each in maps], [each.to(DEVICE) for each in grids], weights.to(DEVICE)
    wide = [each.double().requires_grad_() for each in (*given[0], *given[1], given[2])]
    parts = wide[: len(maps)], wide[len(maps) : -1], wide[-1]
    expected = sampled(*parts)
    tolerated = tolerance(weights.dtype)
    out = forward(*given)
    assert out.dtype == weights.dtype and out.shape == expected.shape
    if not out.numel():
        return
    assert error(out, expected) <= tolerated
    assert error(out, reference(*parts)) <= tolerated
    above = torch.randn_like(out)
    d_maps, d_grids, d_weights = backward(above, *given)
    wanted = torch.autograd.grad(expected, wide, above.double())
    for actual, truth in zip((*d_maps, *d_grids, d_weights), wanted, strict=True):
        assert actual.dtype == weights.dtype
        assert error(actual, truth) <= 2 * tolerated


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter
def test_what_is_no_number_stays_none() -> None:
    """As in the sampling of PyTorch: also where a place is outside."""
    level = torch.ones(1, 1, 3, 4, 1, device=DEVICE)
    places = torch.tensor([[float("nan"), 0.0], [0.0, float("inf")], [-9.0, 0.0], [0.0, 0.0]], device=DEVICE)
    grid, weights = places.view(1, 1, -1, 1, 2), torch.ones(1, 1, 4, 1, device=DEVICE)
    assert forward([level], [grid], weights).flatten().isnan().tolist() == [True, True, False, False]
    assert forward([level], [grid], weights * float("nan")).isnan().all()
