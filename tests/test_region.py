"""The original code of one attention runs by itself: at its own sizes, at others, and with symbolic ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rewriter.canonical import run
from rewriter.facts import Op
from rewriter.guard import error, tolerance
from rewriter.ops import attention
from rewriter.raising import arguments
from rewriter.region import Region, hint, region_of
from rewriter.site import Causal, Padding, Refusal


def shared(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Grouped heads, in the spelling that reshapes by numbers."""
    b, h, s, d = k.shape
    k, v = (t[:, :, None].expand(b, h, 2, s, d).reshape(b, 2 * h, s, d) for t in (k, v))
    return (q * 0.5 @ k.mT).masked_fill(~mask, -1e9).softmax(-1) @ v


def tensors(length: int = 7, kv_length: int = 9, batch: int = 3) -> tuple[Tensor, ...]:
    q, k, v = torch.randn(batch, 4, length, 8), torch.randn(batch, 2, kv_length, 8), torch.randn(batch, 2, kv_length, 8)
    return q, k, v, torch.rand(batch, 1, length, kv_length) > 0.3


@pytest.fixture
def region(rewrite: Any) -> Callable[..., Region]:
    def find(function: Callable[..., Tensor], *inputs: Tensor, dynamic: bool | None = None) -> Region:
        (match,) = rewrite(function, *inputs, variant=None, dynamic=dynamic).matches
        return Region(match)

    return find


def values(found: Region, *inputs: Tensor) -> list[Tensor]:
    """The tensors in the order of the region's inputs: queries, keys, values, masks."""
    reading = found.match.reading
    nodes = [side.node for side in reading.operands]
    by_node = dict(zip(nodes, inputs[:3], strict=True)) | {placed.node: ~inputs[3] for placed in reading.tensors}
    return [by_node[node] for node in found.match.inputs]


def test_facts(region: Any) -> None:
    found = region(shared, *tensors())
    assert (found.batch, found.lengths) == (3, (7, 9))
    assert found.match.site.kv_heads == 2
    assert not found.sizes


def test_at_its_own_size(region: Any) -> None:
    inputs = tensors()
    found = region(shared, *inputs)
    assert torch.equal(found.module()(*values(found, *inputs)), shared(*inputs))


@pytest.mark.parametrize("lengths", [(5, 6), (19, 23), (64, 1000)])
def test_at_another_size(region: Any, lengths: tuple[int, int]) -> None:
    found = region(shared, *tensors(71, 93))
    other = tensors(*lengths)
    sizes = found.resized(*lengths)
    assert sizes == {71: lengths[0], 93: lengths[1]}
    assert torch.equal(found.module(sizes)(*values(found, *other)), shared(*other))


@pytest.mark.parametrize(
    ("own", "wanted"),
    [
        ((8, 93), (5, 6)),
        ((71, 2), (5, 6)),
        ((3, 93), (5, 6)),
        ((1, 93), (5, 6)),
        ((71, 71), (5, 6)),
        ((71, 93), (5, 5)),
    ],
    ids=["head size", "heads", "batch", "one", "apart", "together"],
)
def test_a_length_with_another_meaning_cannot_be_replaced(region: Any, own: Any, wanted: Any) -> None:
    assert region(shared, *tensors(*own)).resized(*wanted) == {}


def test_values_have_the_sizes_that_are_asked_for(region: Any) -> None:
    found = region(shared, *tensors(71, 93))
    made = found.values(found.resized(19, 23))
    assert [tuple(made[node].shape) for node in found.match.inputs] == [
        (3, 4, 19, 8), (3, 2, 23, 8), (3, 2, 23, 8), (3, 1, 19, 23),
    ]  # fmt: skip
    again = found.values(found.resized(19, 23))
    assert all(torch.equal(made[node], again[node]) for node in made)
    other = found.values(found.resized(19, 23), seed=1)
    assert not torch.equal(made[found.match.inputs[0]], other[found.match.inputs[0]])


@pytest.mark.parametrize("kind", ["drop", "keep", "add"])
@pytest.mark.parametrize("infinite", [False, True])
def test_values_that_hide_a_row(region: Any, kind: str, infinite: bool) -> None:
    spellings = {
        "drop": lambda q, k, v, mask: (q @ k.mT).masked_fill(~mask, -1e9).softmax(-1) @ v,
        "keep": lambda q, k, v, mask: torch.where(mask, q @ k.mT, -1e9).softmax(-1) @ v,
        "add": lambda q, k, v, mask: (q @ k.mT + torch.where(mask, 0.0, -1e9)).softmax(-1) @ v,
    }
    q, _, _, mask = tensors(7, 7)
    found = region(spellings[kind], q, q.clone(), q.clone(), mask)
    (term,) = (op for op in found.match.reading.ops if op.tensor is not None)
    assert term.kind == kind
    for hide in (False, True):
        made = found.values(hide_rows=hide, infinite=infinite)[term.tensor.node]
        hidden = {"drop": made, "keep": ~made.bool(), "add": made <= torch.finfo(torch.float32).min}[kind]
        assert hidden[..., 0, :].all() == hide
        assert 0.1 < hidden[..., 1:, :].float().mean() < 0.5, "about a third is hidden"
        assert kind != "add" or bool(made.isinf().any()) == infinite


def test_for_a_proof_it_is_precise_and_nothing_is_dropped(region: Any) -> None:
    def dropped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        weights = F.dropout((q @ k.mT).float().softmax(-1, dtype=torch.float32).to(v.dtype), 0.5)
        return weights @ v

    inputs = tuple(torch.randn(2, 4, 5, 8).bfloat16() for _ in range(3))
    found = region(dropped, *inputs, torch.ones(()))
    wide = [t.double() for t in inputs]
    out = found.module(proof=True)(*wide)
    assert out.dtype == torch.float64
    assert error(out, (wide[0] @ wide[1].mT).softmax(-1) @ wide[2]) <= tolerance(torch.float64)
    assert {t.dtype for t in found.values(proof=True).values()} == {torch.float64}
    assert {t.dtype for t in found.values().values()} == {torch.bfloat16}


@pytest.mark.parametrize("keywords", [False, True])
def test_for_a_proof_a_call_drops_nothing(region: Any, keywords: bool) -> None:
    def dropped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        if keywords:
            return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5, is_causal=True)
        return F.scaled_dot_product_attention(q, k, v, None, 0.5, True)

    inputs = tuple(torch.randn(2, 4, 5, 8) for _ in range(3))
    found = region(dropped, *inputs, torch.ones(()))
    assert found.match.site.dropout_p == 0.5
    out = found.module(proof=True)(*(t.double() for t in inputs))
    expected = F.scaled_dot_product_attention(*inputs, is_causal=True)
    assert error(out, expected.double()) <= tolerance(torch.float32)


def test_live_with_symbolic_sizes(region: Any) -> None:
    """Sizes are further inputs there, so that one region serves all lengths."""
    found = region(shared, *tensors(7, 9), dynamic=True)
    assert found.sizes
    module = found.module(live=True)
    for batch, length, kv_length in ((3, 7, 9), (2, 5, 31)):
        inputs = tensors(length, kv_length, batch)
        real = {2: 2, 3: batch, 4: 4, 8: 8, 9: kv_length}  # by what they were at the capture
        sizes = [real[hint(node.meta["val"])] for node in found.sizes]
        assert torch.equal(module(*values(found, *inputs), *sizes), shared(*inputs))


def test_identity(region: Any) -> None:
    """The same for equal code on equal shapes; another for anything that the proof depends on."""

    def again(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return shared(q, k, v, mask)

    def other_scale(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return shared(q * 0.5, k, v, mask)

    first = region(shared, *tensors())
    assert region(again, *tensors()).identity() == first.identity()
    for function, inputs in ((other_scale, tensors()), (shared, tensors(batch=2)), (shared, tensors(kv_length=8))):
        assert region(function, *inputs).identity() != first.identity()
    match = first.match
    site = dataclasses.replace(match, site=dataclasses.replace(match.site, mask=Causal()))
    others = [
        dataclasses.replace(match, reading=dataclasses.replace(match.reading, ops=ops))
        for ops in (
            [dataclasses.replace(op, kind="keep") if op.kind == "drop" else op for op in match.reading.ops],
            [dataclasses.replace(op, number=-1.0) if op.kind == "drop" else op for op in match.reading.ops],
            [*match.reading.ops, Op("shift", 1.0)],
        )
    ]
    assert len({first.identity(), Region(site).identity(), *(Region(other).identity() for other in others)}) == 5


def test_it_survives_the_rewriting_of_its_graph(rewrite: Any) -> None:
    """What was cut out before a graph was changed still runs, although the nodes are gone from the graph."""
    inputs = tensors()
    (match,) = rewrite(shared, *inputs, variant=None).matches
    before = Region(match)
    expected = before.module()(*values(before, *inputs))
    gm = match.output.graph.owning_module
    match.output.replace_all_uses_with(match.inputs[0])
    gm.graph.eliminate_dead_code()
    assert torch.equal(before.module()(*values(before, *inputs)), expected)


def test_a_region_that_is_not_whole_is_refused(region: Any) -> None:
    match = region(shared, *tensors()).match
    less = dataclasses.replace(match, reading=dataclasses.replace(match.reading, ops=[]))
    refusal = region_of(less)
    assert isinstance(refusal, Refusal)
    assert "also depends on arg" in refusal.reason


@pytest.mark.parametrize("keep_mask", [True, False])
def test_operands(region: Any, keep_mask: bool) -> None:
    """A structural mask is not passed on, except where the proof asks for it; padding is passed on by itself."""

    def padded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        structure = torch.ones(7, 7, dtype=torch.bool).tril()
        return F.scaled_dot_product_attention(q, k, v, structure & mask)

    def causal(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, torch.ones(7, 7, dtype=torch.bool).tril())

    q = torch.randn(2, 4, 7, 8)
    found = region(causal, q, q.clone(), q.clone(), torch.ones(()))
    operands = found.operands(found.values(), keep_mask=keep_mask)
    assert (operands.mask is not None) == keep_mask
    assert operands.padding is None
    found = region(padded, q, q.clone(), q.clone(), torch.rand(2, 1, 1, 7) > 0.3)
    assert found.match.site.mask == Causal() & Padding()
    operands = found.operands(found.values(), keep_mask=keep_mask)
    assert operands.mask is not None
    assert operands.padding.shape == (2, 7)
    size = found.size(found.values())
    out = found.match.result(run, attention(*arguments(operands, found.match.site)), size)
    assert out.shape == q.shape
