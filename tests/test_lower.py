"""What was chosen stands in the graph, with the strides that the rest relies on; nothing is left of the original."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rewriter.backend import GraphRewriter
from rewriter.capture import compiled
from rewriter.guard import error, tolerance
from rewriter.lower import Lowered, lay_out, memory_order
from rewriter.raising import Match
from rewriter.sampled import SampledMatch
from rewriter.select import Selector
from rewriter.variant import variants

ATEN = torch.ops.aten
PIECES = {ATEN.softmax.int, ATEN.matmul.default, ATEN.bmm.default, ATEN.masked_fill_.Scalar, ATEN.dropout.default}


def tensors(grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """In the strides of a projection: heads are split from the last axis."""
    query, key, value = (torch.randn(2, 7, 4, 8).transpose(1, 2).requires_grad_(grad) for _ in range(3))
    return query, key, value


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 0.5).softmax(-1) @ v


FOLLOWED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "view": lambda q, k, v: eager(q, k, v).view(2, 28, 8),
    "batches viewed as heads": lambda q, k, v: torch.bmm(
        torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).softmax(-1), v.flatten(0, 1)
    ).view(2, 4, 7, 8),
    "contiguous": lambda q, k, v: eager(q, k, v).transpose(1, 2).contiguous().view(2, 7, 32),
    "reshape": lambda q, k, v: eager(q, k, v).transpose(1, 2).reshape(2, 7, 32),
    "select": lambda q, k, v: eager(q, k, v)[0].view(28, 8),
    "unbind": lambda q, k, v: eager(q, k, v).unbind(0)[1].view(28, 8),
    "a factor": lambda q, k, v: (eager(q, k, v) * 2).view(2, 28, 8),
    "the strides of a call": lambda q, k, v: (
        F.scaled_dot_product_attention(q, k, v).transpose(1, 2).view(2, 7, 32)
    ),
    "the strides of a call, as_strided": lambda q, k, v: F.scaled_dot_product_attention(q, k, v).as_strided(
        (2, 7, 32), (224, 32, 1)
    ),
}  # fmt: skip


@pytest.mark.parametrize("variant", ["original", "sdpa"])
@pytest.mark.parametrize("function", FOLLOWED.values(), ids=FOLLOWED)
def test_views_that_follow(rewrite: Any, function: Any, variant: str) -> None:
    inputs = tensors()
    result = rewrite(function, *inputs, variant=variant)
    assert len(result.sites) == 1, result.refusals
    assert error(result.out, function(*inputs)) <= tolerance(torch.float32)


@pytest.mark.parametrize("axes", [(0, 1, 2, 3), (0, 2, 1, 3), (3, 1, 0, 2)])
def test_laid_out(axes: tuple[int, ...]) -> None:
    """In the memory order of another tensor, for all who use it."""
    graph, x = fx.Graph(), torch.randn(2, 3, 4, 5)
    given = graph.placeholder("given")
    result = graph.call_function(ATEN.mul.Tensor, (given, 2.0))
    graph.output((graph.call_function(ATEN.neg.default, (result,)), result))
    other = graph.placeholder("other")
    other.meta["val"] = x.permute(axes).contiguous().permute([axes.index(axis) for axis in range(4)])
    order = memory_order(other)
    graph.erase_node(other)
    assert order == list(axes)
    gm = fx.GraphModule(nn.Module(), graph)
    lay_out(gm, result, order)
    gm.graph.lint()
    gm.recompile()
    negative, out = gm(x)
    assert torch.equal(out, x * 2) and torch.equal(negative, -out)
    assert out.permute(axes).is_contiguous() and negative.permute(axes).is_contiguous()


def test_memory_is_not_touched_where_no_view_follows(rewrite: Any) -> None:
    """An implementation's own strides are the fastest for the projection that follows."""
    result = rewrite(lambda q, k, v: eager(q, k, v).transpose(1, 2).reshape(2, 7, 32), *tensors())
    (module,) = (m for m in result.graphs[0].modules() if isinstance(m, Lowered))
    assert "4 heads of 8" in repr(module)
    assert {node.target for node in result.graphs[0].graph.nodes if node.op == "call_function"} == {
        ATEN.transpose.int, ATEN.reshape.default,
    }  # fmt: skip


def in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores.masked_fill_(torch.ones(7, 7, dtype=torch.bool).triu(1), float("-inf"))
    return scores.softmax(-1) @ v


def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout((q @ k.mT).softmax(-1), 0.1) @ v


@pytest.mark.parametrize("function", [eager, in_place, dropped])
def test_nothing_is_left_of_the_original(rewrite: Any, function: Any) -> None:
    """Not even what counts as an effect: a change in place, a random number."""
    (graph,) = rewrite(function, *tensors()).graphs
    assert not {node.target for node in graph.graph.nodes} & PIECES
    assert [node.op for node in graph.graph.nodes] == ["placeholder"] * 3 + ["call_module", "call_function", "output"]
    assert [node.target for node in graph.graph.nodes][4] is torch.ops.aten.contiguous.default, "for what follows"


def test_effects_of_others_stay(rewrite: Any) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, counter: Tensor) -> Tensor:
        counter.add_(1)
        return eager(q, k, v)

    counter = torch.zeros(())
    result = rewrite(function, *tensors(), counter)
    assert counter == 1
    result.run(*tensors(), counter)
    assert counter == 2


def test_scores_that_are_used_elsewhere_stay(rewrite: Any) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        scores = q @ k.mT
        return scores.softmax(-1) @ v, scores

    inputs = tensors()
    result = rewrite(function, *inputs)
    assert len(result.sites) == 1
    for actual, wanted in zip(result.out, function(*inputs), strict=True):
        assert error(actual, wanted) <= tolerance(torch.float32)


class Chosen(Selector):
    """Chooses by path."""

    def __init__(self, choices: dict[str, Any]) -> None:
        super().__init__()
        self.choices = choices

    def choose(self, match: Match | SampledMatch) -> Any:
        return self.choices.get(match.site.path)


class Three(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return eager(q, eager(q, eager(q, k, v), v), v)


def test_each_site_by_itself() -> None:
    """One is replaced, one left, one replaced by a module with parameters, which is trained."""

    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(2.0))

        def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, padding: Any) -> Tensor:
            return eager(query, key, value) * self.weight

    learned = Learned()
    graphs: list[Any] = []

    def build(query: Tensor, key: Tensor, value: Tensor, mask: Any, padding: Any) -> Tensor:
        return eager(query, key, value) * 3

    rewriter: Any = GraphRewriter(
        Chosen({"": build, "#2": learned}),  # type: ignore[arg-type]
        inner=lambda gm, example_inputs: graphs.append(gm) or gm.forward,
    )
    inputs = tensors(grad=True)
    out = compiled(Three(), rewriter)(*inputs)
    assert list(rewriter.sites) == ["", "#1", "#2"]
    q, k, v = inputs
    expected = eager(q, eager(q, eager(q, k, v) * 3, v), v) * 2
    assert error(out, expected) <= tolerance(torch.float32)
    out.sum().backward()
    assert learned.weight.grad is not None
    assert error(learned.weight.grad, (expected / 2).sum()) <= tolerance(torch.float32)
    assert sum(node.op == "call_module" for node in graphs[0].graph.nodes) == 2
    assert sum(node.target is ATEN.softmax.int for node in graphs[0].graph.nodes) == 1


def test_where_nothing_is_chosen_the_graph_stays(rewrite: Any) -> None:
    inputs = tensors()
    result = rewrite(eager, *inputs, variant=None)
    assert len(result.sites) == 1
    assert not any(node.op == "call_module" for node in result.graphs[0].graph.nodes)
    assert torch.equal(result.out, eager(*inputs))


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_inner_backends_and_gradients(inner: str) -> None:
    inputs = tensors(grad=True)
    build = Chosen({})
    build.choose = lambda match: variants()["original"].build(match.site, {})  # type: ignore[method-assign]
    out = compiled(Three(), GraphRewriter(build, inner=inner))(*inputs)  # type: ignore[arg-type]
    expected = Three()(*inputs)
    assert error(out, expected) <= tolerance(torch.float32)
    direction = torch.randn_like(expected)
    actual = torch.autograd.grad(out, inputs, direction)
    for one, other in zip(actual, torch.autograd.grad(expected, inputs, direction), strict=True):
        assert error(one, other) <= 10 * tolerance(torch.float32)
