"""The canonical operator takes the place of a match, and gives it back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from rewriter.capture import to_aten
from rewriter.detect import detect
from rewriter.guard import error, tolerance
from rewriter.lower import clean
from rewriter.ops import attention
from rewriter.raising import Raised, raise_sites
from rewriter.site import Causal, Dense, Padding

ATEN = torch.ops.aten


def captured(function: Callable[..., Any], *inputs: Any, dynamic: bool | None = None) -> fx.GraphModule:
    """The function in pre-dispatch ATen. In `meta`: what was found, and the inputs in the order of the graph."""
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        graph = to_aten(gm, example_inputs)
        graph.meta["found"] = detect(graph)
        graph.meta["inputs"] = [value if isinstance(value, Tensor) else int(value) for value in example_inputs]
        graphs.append(graph)
        return gm.forward

    torch.compile(function, backend=backend, dynamic=dynamic)(*inputs)
    (graph,) = graphs
    return graph


def outputs(graph: fx.GraphModule) -> Any:
    return graph(*graph.meta["inputs"])


def raised(graph: fx.GraphModule) -> list[Raised]:
    placed = raise_sites(graph, graph.meta["found"].matches)
    graph.graph.lint()
    graph.recompile()
    return placed


def count(graph: fx.GraphModule, *targets: Any) -> int:
    return sum(node.target in targets for node in graph.graph.nodes)


def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT * 0.5).masked_fill(~mask, -1e9).softmax(-1) @ v


def called(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, torch.where(mask, 0.0, -1e9))


def in_batches(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Three axes, with a mask for each batch and head, as older models have it."""
    batch, heads, length, _ = q.shape
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    bias = torch.where(mask, 0.0, -1e9).expand(batch, heads, length, length).flatten(0, 1)
    scores = torch.bmm(q, k.transpose(1, 2)) + bias
    return torch.bmm((scores + torch.ones(length, length)).softmax(-1), v).unflatten(0, (batch, heads))


def upcast(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The output in another type than the queries."""
    return ((q @ k.mT).softmax(-1) @ v).to(torch.float64)


def layers(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Five layers under one mask; each takes the last one's output for queries, keys or values."""
    hidden = ~mask
    for number in range(5):
        out = (q @ k.mT * 0.5).masked_fill(hidden, -1e9).softmax(-1) @ v
        q, k, v = [(out, k, v), (q, out, v), (q, k, out)][number % 3]
    return q + k + v


ALL = pytest.mark.parametrize("function", [eager, called, in_batches, upcast, layers])


def tensors(batch: int = 2, length: int = 7) -> tuple[Tensor, ...]:
    made = tuple(torch.randn(batch, 4, length, 8) for _ in range(3))
    return *made, torch.rand(batch, 1, length, length) > 0.3


@ALL
@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "symbolic"])
def test_the_same_is_computed(function: Any, dynamic: bool | None) -> None:
    graph = captured(function, *tensors(), dynamic=dynamic)
    expected = outputs(graph)
    placed = raised(graph)
    assert count(graph, attention) == len(placed) == (5 if function is layers else 1)
    assert placed[0].match.site.q_len == (None if dynamic else 7)
    for actual, wanted in zip(outputs(graph), expected, strict=True):
        assert error(actual, wanted) <= tolerance(torch.float32)
        assert actual.dtype == wanted.dtype


@ALL
def test_given_back_it_is_as_before(function: Any) -> None:
    graph = captured(function, *tensors())
    expected, before = outputs(graph), graph.code
    for place in raised(graph):
        place.give_back()
    clean(graph)
    assert graph.code == before
    assert all(map(torch.equal, outputs(graph), expected))


def test_some_are_given_back() -> None:
    graph = captured(layers, *tensors())
    expected = outputs(graph)
    for place in raised(graph)[1::2]:
        place.give_back()
    clean(graph)
    assert count(graph, attention) == 3
    assert count(graph, ATEN.softmax.int) == 2
    assert error(outputs(graph)[0], expected[0]) <= tolerance(torch.float32)


def test_facts_of_the_nodes() -> None:
    """What follows reads them: the fake value, the line and the module of the original."""
    graph = captured(upcast, *tensors())
    (match,) = graph.meta["found"].matches
    (place,) = raised(graph)
    assert place.call.target is attention
    assert place.call.meta["val"].shape == match.output.meta["val"].shape == (2, 4, 7, 8)
    assert place.call.meta["stack_trace"] == match.output.meta["stack_trace"]
    assert place.result.meta["val"].dtype == match.output.meta["val"].dtype
    assert match.output in place.original
    assert {node.target for node in place.original} == {ATEN.mT.default, ATEN.matmul.default, ATEN.softmax.int}


def test_a_mask_is_put_together_once_for_all_layers() -> None:
    graph = captured(layers, *tensors())
    raised(graph)
    clean(graph)
    assert count(graph, attention) == 5
    assert count(graph, ATEN.where.self) == 1
    assert count(graph, ATEN.softmax.int, ATEN.matmul.default, ATEN.masked_fill.Scalar) == 0


def causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def test_the_code_of_a_mask_that_is_structure_is_gone() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = torch.where(causal(7)[None, None], 0.0, torch.finfo(q.dtype).min)
        for _ in range(3):
            q = (q @ k.mT * 0.5 + bias).softmax(-1) @ v
        return q

    graph = captured(function, *tensors()[:3])
    expected = outputs(graph)
    assert graph.meta["found"].sites[0].mask == Causal()
    places = raised(graph)
    assert all(place.call.args[3] is None for place in places)
    clean(graph)
    assert {node.target for node in graph.graph.nodes if node.op == "call_function"} == {attention}
    assert error(outputs(graph)[0], expected[0]) <= tolerance(torch.float32)


def test_padding_is_given_apart_and_once() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        mask = causal(7) & padding[:, None, None, :]
        for _ in range(3):
            q = F.scaled_dot_product_attention(q, k, v, mask)
        return q

    inputs = (*tensors()[:3], torch.rand(2, 7) > 0.3)
    graph = captured(function, *inputs)
    assert graph.meta["found"].sites[0].mask == Causal() & Padding()
    places = raised(graph)
    assert len({place.call.args[3] for place in places}) == len({place.call.args[4] for place in places}) == 1
    assert places[0].call.args[4].meta["val"].shape == (2, 7)
    assert places[0].call.args[6] == "causal(0)"


def test_one_padding_for_all_batches_is_expanded() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, padding[:, None, None, :])

    graph = captured(function, *tensors()[:3], torch.rand(1, 7) > 0.3)
    (place,) = raised(graph)
    assert place.match.site.mask == Padding()
    assert place.call.args[4].meta["val"].shape == (2, 7)


@pytest.mark.parametrize("later", [False, True])
def test_a_mask_that_is_changed_in_place(later: bool) -> None:
    """It is put together after the change, unless the change comes after the attention."""

    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        mask = mask.clone()
        if not later:
            mask[..., :3] = True
        out = eager(q, k, v, mask)
        if later:
            mask[..., :3] = True
        return out + mask.sum()

    inputs = tensors()
    graph = captured(function, *inputs)
    assert graph.meta["found"].sites[0].mask == Dense()
    raised(graph)
    assert error(outputs(graph)[0], function(*inputs)) <= tolerance(torch.float32)


def test_no_matches() -> None:
    graph = captured(lambda x: x.softmax(-1), torch.randn(2, 3))
    before = graph.code
    assert raised(graph) == []
    assert graph.code == before
