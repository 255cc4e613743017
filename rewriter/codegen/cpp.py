"""A formula in C++: the spec of its kernel on a CPU, and the kernel."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from rewriter.codegen.blocks import lists_of, promising, work
from rewriter.codegen.dialect import CPP, printed, word
from rewriter.codegen.expression import Expression, above, kind_of, kind_of_type, kinds_of, places, spelled
from rewriter.codegen.formula import Formula
from rewriter.codegen.fragments import captured
from rewriter.codegen.native import Kernel, Spec, load
from rewriter.errors import OptionError
from rewriter.site import Refusal

Size = tuple[int, int]
"""(block_m, block_n): queries and keys of a block. Each square of a higher block has a list of its own, so that at the
edges of a mask no more is computed than smaller blocks would, by products as large as elsewhere.
"""
_BLOCKS = (16, 32, 64, 128)
# Fitted to a causal window of 256 in float32 on AVX-512: with blocks of 64 x 16 to 128 x 32 within 8% of the measured.
_PER_KEY, _PER_QUERY = 3.0, 1.2
_WORTH = 1 << 21
"""Scores of a call, some 2 ms, below which no build of seconds is spent on better blocks."""


def spec_of(
    formula: Formula,
    *,
    head_dim: int,
    v_head_dim: int,
    dtype: torch.dtype,
    tensors: Mapping[str, torch.dtype] | None = None,
) -> Spec:
    """What the C++ source of a formula is made from; `tensors` are the types of those that a call passes."""
    known = dict(tensors or {})
    mask, score = formula.expressions({name: kind_of_type(each) for name, each in known.items()})
    keyed: list[str] = []
    return Spec(
        head_dim=head_dim,
        v_head_dim=v_head_dim,
        dtype=str(dtype).removeprefix("torch."),
        mask=_text(mask, keyed) if mask else None,
        score=_text(score, keyed) if score else None,
        keyed=tuple(keyed),
        normaliser=formula.normaliser,
        captures=tuple(
            (word(name), str(known[name]).removeprefix("torch."), rank) for name, rank in captured(mask, score).items()
        ),
    )


@cache
def kernel(
    formula: Formula,
    head_dim: int,
    v_head_dim: int,
    dtype: torch.dtype,
    tensors: Any,
    size: Size | None = None,
    ordered: bool = False,
) -> Kernel | Refusal:
    """The kernel of a formula with blocks of `size`, built if need be; `tensors` are pairs of name and type."""
    spec = spec_of(formula, head_dim=head_dim, v_head_dim=v_head_dim, dtype=dtype, tensors=dict(tensors))
    block_m, block_n = default(dtype) if size is None else size
    parts = block_m // min(block_m, block_n)
    return load(replace(spec, block_m=block_m, block_n=block_n, parts=parts, ordered=ordered))


def default(dtype: torch.dtype) -> Size:
    """What needs no measurement. Products of narrow elements are of many keys, or they are slow."""
    return (64, 32) if dtype == torch.float32 else (64, 64)


def sizes(formula: Formula, query: Tensor, key: Tensor, tensors: Mapping[str, Tensor]) -> list[Size]:
    """Those worth a measurement: the default, and others that promise less work for this mask."""

    def cost(size: Size) -> float:
        block_m, block_n = size
        listed = min(size)  # a key costs once for all parts of a block
        return work(
            formula, query, key, tensors, listed, block_n, per_key=_PER_KEY * listed / block_m, per_query=_PER_QUERY
        )

    first = default(query.dtype)
    if query.shape[0] * query.shape[1] * cost(first) < _WORTH:
        return [first]
    return promising(first, itertools.product(_BLOCKS, _BLOCKS), cost)


def operands(formula: Formula, query: Tensor, key: Tensor, tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """The captured tensors as a kernel is given them. Raises OptionError where one is read outside of its axes."""
    lengths = {"b": query.shape[0], "h": query.shape[1], "row": query.shape[2], "i": key.shape[2], "j": key.shape[2]}
    expressions = formula.expressions(kinds_of(tensors))
    given: dict[str, Tensor] = {}
    for node in (n for each in expressions if each for n in each.graph.nodes if spelled(n) == "getitem"):
        name = str(node.args[0])
        tensor = given.setdefault(name, tensors[name])
        index = [str(place) for place in places(node)]
        for place, size in zip(index, tensor.shape, strict=True):
            if size not in (1, lengths.get(place, size)):
                raise OptionError(f"{name} has {size} places along {place}, of which there are {lengths[place]}")
        if index[-1] in lengths and tensor.shape[-1] == 1:  # neighbours along the last axis are read together
            given[name] = tensor.expand(*tensor.shape[:-1], lengths[index[-1]]).contiguous()
    return [given[name] for name in captured(*expressions)]


@dataclass(frozen=True)
class Attention:
    """A formula on the CPU: operands (B, heads, S, .) as a Triton kernel is given them -> (B, H, Sq, Dv). The formula
    speaks of queries and keys that lie at these `places` of the operands, where they are given.
    """

    formula: Formula
    kernel: Kernel
    places: tuple[Tensor, Tensor] | None = None

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, *, sink: Tensor | None = None, **tensors: Tensor
    ) -> Tensor:
        """Scale multiplies q k^T; `tensors` are those that the formula names."""
        if not (query.numel() and key.numel()):  # nothing is seen, or nobody looks: there are no blocks to list
            return query.new_zeros(*query.shape[:3], value.shape[3])
        spec = self.kernel.spec
        standing = placed(query, key, self.places)
        runs = lists_of(self.formula)(*standing, tensors, spec.listed, spec.block_n)
        return self.kernel(
            query,
            key,
            value,
            runs.first,
            runs.runs,
            scale=scale,
            sink=None if sink is None else sink.float(),
            captures=operands(self.formula, *standing, tensors),
            places=self.places,
        )


def placed(query: Tensor, key: Tensor, places: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Tensors of the shapes that these would have with a row for each of the places."""
    if places is None:
        return query, key
    query, key = (t[:, :, :1].expand(-1, -1, len(at), -1) for t, at in zip((query, key), places, strict=True))
    return query, key


def attention(
    formula: Formula,
    query: Tensor,
    value: Tensor,
    tensors: Mapping[str, Tensor],
    size: Size | None = None,
    places: tuple[Tensor, Tensor] | None = None,
) -> Attention | Refusal:
    """The formula's kernel for operands like these, with blocks of `size`."""
    types = tuple((name, tensor.dtype) for name, tensor in tensors.items())
    made = kernel(formula, query.shape[3], value.shape[3], query.dtype, types, size, places is not None)
    return made if isinstance(made, Refusal) else Attention(formula, made, places)


def _text(expression: Expression, keyed: list[str]) -> str:
    """What it says, with reads of `keyed` in place of what it divides of the key alone, which is put there."""
    known: dict[fx.Node, str] = {}
    for node in _of_keys(expression.graph):
        known[node] = f"keyed{len(keyed)}"
        keyed.append(_said(*printed(expression.graph, CPP, [node])))
    return _said(*printed(expression.graph, CPP, known=known))


def _said(lines: list[str], results: list[str]) -> str:
    (result,) = results
    return f"[&] {{ {' '.join(lines)} return {result}; }}()" if lines else result


def _of_keys(graph: fx.Graph) -> list[fx.Node]:
    """Integers that are computed from `j` alone by divisions, where something else begins."""
    alone: dict[fx.Node, None] = {}  # in the order of the graph
    for node in graph.nodes:
        read = node.all_input_nodes
        if node.target == "j" or (node.op != "output" and kind_of(node) == "int" and read and alone.keys() >= {*read}):
            alone[node] = None
    return [
        node
        for node in alone
        if not alone.keys() >= {*node.users} and any(spelled(each) in ("floordiv", "mod") for each in above([node]))
    ]
