"""Which nodes hold the same values: two expressions that are written alike, and nothing that only looks so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from rewriter.capture import exported
from rewriter.twins import are_twins, twin_among


def written_in_place(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x.clone()
    before = y.view(-1).gt(0)
    y.add_(1)
    return before, y.view(-1).gt(0)


def long(x: Tensor) -> Tensor:
    for _ in range(80):
        x = x.neg()
    return x


SAME: dict[str, Callable[[Tensor], Any]] = {
    "one call": lambda x: (y := x > 0, y),
    "two calls": lambda x: (x.view(-1, 1) > 0, x.view(-1, 1) > 0),
    "with a constant": lambda x: (x == torch.tensor(2.0), x == torch.tensor(2.0)),
    "parts of a split": lambda x: (x.chunk(2)[1].neg(), x.chunk(2)[1].neg()),
}
DIFFERENT: dict[str, Callable[[Tensor], Any]] = {
    "another number": lambda x: (x > 0, x > 1),
    "another type of number": lambda x: (x.mul(True), x.mul(1)),
    "another constant": lambda x: (x == torch.tensor(2.0), x == torch.tensor(3.0)),
    "another type of constant": lambda x: (x == torch.tensor(2.0), x == torch.tensor(2)),
    "another tensor": lambda x: (x.neg() > 0, x.abs() > 0),
    "another part": lambda x: (x.chunk(2)[0].neg(), x.chunk(2)[1].neg()),
    "drawn by chance": lambda x: (torch.rand_like(x) > 0, torch.rand_like(x) > 0),
    "changed in place": written_in_place,
    "too long to compare": lambda x: (long(x), long(x)),
}


def results(function: Callable[[Tensor], Any]) -> list[fx.Node]:
    graph = make_fx(function, tracing_mode="fake", pre_dispatch=True)(torch.randn(4, 6)).graph
    return list(graph.output_node().args[0])  # type: ignore[arg-type, union-attr]


@pytest.mark.parametrize("name", SAME)
def test_twins(name: str) -> None:
    one, other = results(SAME[name])
    assert are_twins(one, other)
    assert twin_among(one, [other]) is other


@pytest.mark.parametrize("name", DIFFERENT)
def test_no_twins(name: str) -> None:
    one, other = results(DIFFERENT[name])
    assert not are_twins(one, other)
    assert twin_among(one, [other]) is None


def test_constants_of_an_inner_module() -> None:
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x == torch.tensor(2.0), x == torch.tensor(2.0)

    model = nn.Sequential(nn.Sequential(Inner()))
    graph = exported(torch.export.export(model, (torch.randn(4, 6),), strict=False)).graph
    one, other = graph.output_node().all_input_nodes
    assert one is not other
    assert are_twins(one, other)
