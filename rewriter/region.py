"""The region of a match, the original code of one attention, as something that runs by itself.

It is cut at the inputs of the match. The proof runs it on small sizes in full precision, the tuner times it and keeps
it as the original implementation beside the candidates.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import fields
from functools import singledispatch
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from rewriter.axes import Axis, Layout, as_captured
from rewriter.canonical import SizeOf, run
from rewriter.facts import Op
from rewriter.nodes import is_bias, is_call, value_of
from rewriter.ops import attention
from rewriter.raising import ChangedInPlace, Match, Operands, arguments, between, compose_mask, compose_padding
from rewriter.site import Padding, Refusal
from rewriter.twins import twin_among

if TYPE_CHECKING:
    from rewriter.sampled import SampledMatch

_ATEN = torch.ops.aten

Sizes = Mapping[int, int]
"""Which integers to replace by which: token counts by other token counts."""


class Region:
    """The nodes between the inputs of a match and its output. Raises `ValueError` where `between` does."""

    def __init__(self, match: Match) -> None:
        self.match = match
        self.nodes, self.sizes = between(match)
        # As they stand now: the graph is rewritten later, and dead nodes lose their arguments.
        self._arguments = {node: (node.args, node.kwargs) for node in self.nodes}
        outer = {source for node in self.nodes for source in node.all_input_nodes if _is_tensor(source)}
        outer -= {*self.nodes, *match.inputs}
        self._twins = {node: twin for node in outer if (twin := twin_among(node, match.inputs)) is not None}

    @property
    def lengths(self) -> tuple[int, int]:
        """(Sq, Skv) as captured."""
        roles = self.match.roles
        return self._count(roles.rows), self._count(roles.columns)

    @property
    def trials(self) -> dict[str, dict[str, Any]]:
        """What a proof is run on: keyword arguments of `values` by name."""
        return {
            "random": {},
            "large": {"magnitude": 30.0},
            "hidden-row": {"hide_rows": True},
            "infinite": {"hide_rows": True, "infinite": True},
        }

    @property
    def scores(self) -> int:
        """How many there are at the captured size."""
        return math.prod(self.lengths) * self.batch * self.match.site.heads

    @property
    def batch(self) -> int:
        """B as captured."""
        return self._count(self.match.roles.batch)

    def _count(self, axis: Axis) -> int:
        return math.prod(as_captured(atom.size, self.match.inputs) for atom in axis)

    def resized(self, q_len: int, kv_len: int) -> Sizes:
        """The replacement that gives the region other lengths; empty where an integer has another meaning too."""
        roles, (own_q, own_kv) = self.match.roles, self.lengths
        others = {
            as_captured(atom.size, self.match.inputs)
            for axis in (roles.batch, roles.heads, roles.groups, roles.width, roles.value_width)
            for atom in axis
        }
        products = {self.match.site.heads, self.match.site.kv_heads, self.batch, 1, 0}
        if (others | products) & {own_q, own_kv} or (own_q == own_kv) != (q_len == kv_len):
            return {}
        if len(roles.rows) != 1 or len(roles.columns) != 1:  # a grid of tokens has no other length
            return {}
        return {own_q: q_len, own_kv: kv_len}

    def identity(self) -> str:
        """Two regions with the same text compute the same function of inputs of the same shapes."""
        inputs = self.match.inputs
        names = {n: f"i{k}" for k, n in enumerate(inputs)} | {n: f"n{k}" for k, n in enumerate(self.nodes)}
        names |= {node: names[twin] for node, twin in self._twins.items()}
        lines = [f"{value_of(n).dtype}{tuple(map(hint, value_of(n).shape))}" for n in inputs]
        for node in self.nodes:
            args = fx.map_arg(self._arguments[node], lambda n: names.get(n) or f"={hint(n.meta['val'])}")
            lines.append(f"{node.target}{args}")
        return "\n".join([*lines, self.match.site.key(), self._reading(names)])

    def _reading(self, names: Mapping[fx.Node, str]) -> str:
        """What the canonical operator is called with."""
        match, reading = self.match, self.match.reading
        atoms: dict[Any, str] = {}

        def text(axes: Layout) -> str:
            return str([[atoms.setdefault(atom, f"a{len(atoms)}") for atom in axis] for axis in axes])

        roles = text(tuple(getattr(match.roles, each.name) for each in fields(match.roles)))
        sides = [(names[side.node], side.scale, text(side.placed.layout)) for side in reading.operands]
        ops = [
            (op.kind, op.number, (names[op.tensor.node], text(op.tensor.layout)) if op.tensor else None)
            for op in reading.ops
        ]
        rest = (text(reading.output.layout), names.get(reading.sink) if reading.sink else reading.zero_sink)
        padding = (names[match.padding.node], text(match.padding.layout)) if match.padding else None
        return f"{roles} {sides} {ops} {rest} {padding} {match.structured}"

    def module(self, sizes: Sizes | None = None, *, proof: bool = False, live: bool = False) -> fx.GraphModule:
        """The region as a module of the values of `match.inputs`. For a proof: full precision, no dropout.

        Sizes from outside the region (`self.sizes`) become the numbers they were captured with; in a `live` module they
        are further inputs.
        """
        graph, copies = fx.Graph(), dict[fx.Node, Any]()
        for index, node in enumerate(self.match.inputs + (self.sizes if live else [])):
            copies[node] = graph.placeholder(f"input_{index}")
        copies |= {node: copies[twin] for node, twin in self._twins.items()}

        def copied(node: fx.Node) -> Any:
            return copies[node] if node in copies else changed(hint(node.meta["val"]))

        def changed(value: Any) -> Any:
            if isinstance(value, torch.dtype):
                return proof_dtype(value) if proof else value
            return (sizes or {}).get(value, value) if isinstance(value, int) and not isinstance(value, bool) else value

        for node in self.nodes:
            args, kwargs = fx.node.map_aggregate(self._arguments[node], changed)
            args, kwargs = fx.map_arg((args, kwargs), copied)
            if proof and is_call(node, _ATEN.dropout, _ATEN.dropout_):
                copies[node] = args[0]
                continue
            if proof and is_call(node, _ATEN.scaled_dot_product_attention) and self.match.site.dropout_p:
                kwargs = {n: v for n, v in kwargs.items() if n != "dropout_p"}
                args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            is_made = node.target is not operator.getitem and not any(map(_is_tensor, node.all_input_nodes))
            if proof and is_made and _is_floating(node):
                kwargs = {**kwargs, "dtype": torch.float64}  # it makes a tensor of the default type
            copies[node] = graph.create_node(node.op, node.target, args, kwargs)
        graph.output(copies[self.match.output])
        owner = self.match.output.graph.owning_module
        assert owner is not None
        return fx.GraphModule(owner, graph)

    def values(
        self,
        sizes: Sizes | None = None,
        *,
        proof: bool = False,
        magnitude: float = 1.0,
        hide_rows: bool = False,
        infinite: bool = False,
        seed: int = 0,
    ) -> dict[fx.Node, Tensor]:
        """Random values of the inputs. Masks hide about a third; with `hide_rows` the first query sees nothing.

        What an additive mask hides is -inf where `infinite`, else the lowest finite number.
        """
        generator = torch.Generator().manual_seed(seed)
        ops = self.match.reading.ops
        # One that is known for a bias by its values hides nothing.
        known = self.match.site.bias in ("alibi", "relative", "table") and sum(op.kind == "add" for op in ops) == 1
        terms = {
            op.tensor.node: op
            for op in ops
            if op.tensor is not None
            and (op.kind in ("keep", "drop") or (op.kind == "add" and not known and not is_bias(op.tensor.node)))
        }
        padding = self.match.padding.node if self.match.padding is not None else None
        fills = {op.buffer: op.number for op in ops if op.buffer is not None}
        values: dict[fx.Node, Tensor] = {}
        for node in self.match.inputs:
            fake = value_of(node)
            dtype = proof_dtype(fake.dtype) if proof else fake.dtype
            floats = fake.dtype.is_floating_point
            shape = [(sizes or {}).get(hint(n), hint(n)) for n in fake.shape]
            if node in fills:
                tensor = torch.full(shape, fills[node], dtype=dtype)
            elif node in terms or node is padding:
                visible = torch.rand(shape, generator=generator) < 0.7
                op = terms.get(node)
                if hide_rows and len(shape) > 1:
                    visible[..., :1, :] = False
                if proof and not hide_rows and op is not None and self._is_fill_below(op):
                    visible.fill_(True)  # or a row would be hidden by chance, and what is added to its fill be seen
                flags = ~visible if op is not None and op.kind == "drop" else visible
                lowest = float("-inf") if infinite else torch.finfo(value_of(node).dtype).min if floats else 0.0
                hidden = lowest if op is None or op.number > 0 else -lowest
                tensor = flags if dtype == torch.bool else _as_numbers(flags, dtype, generator, hidden)
                if hide_rows and op is not None and op.kind == "add" and self._above_a_fill(op):
                    # What is added to such a fill is lost in float32; the precision of a proof would keep it.
                    tensor = torch.where(tensor.abs() < 1e3, torch.zeros_like(tensor), tensor)
            else:
                tensor = torch.randn(shape, generator=generator).mul(magnitude).to(dtype)
            values[node] = tensor.to(fake.device)
        return values

    def _above_a_fill(self, op: Op) -> bool:
        ops = self.match.reading.ops
        return any(map(_is_fill, ops[: ops.index(op)]))

    def _is_fill_below(self, op: Op) -> bool:
        ops = self.match.reading.ops
        return _is_fill(op) and any(each.kind == "add" for each in ops[ops.index(op) :])

    def size(self, values: Mapping[fx.Node, Tensor], sizes: Sizes | None = None) -> SizeOf:
        """How long each atom is where the inputs have these values."""
        return self.match.sizes(run, values.__getitem__, sizes)

    def operands(
        self, values: Mapping[fx.Node, Tensor], sizes: Sizes | None = None, *, keep_mask: bool, proof: bool = False
    ) -> Operands:
        """The canonical operands from the values of the inputs; without `keep_mask` as they are placed in the graph."""
        match, value, size = self.match, values.__getitem__, self.size(values, sizes)
        dtype = proof_dtype(match.site.torch_dtype) if proof else match.site.torch_dtype
        mask = compose_mask(run, match, value, size, dtype) if keep_mask or not match.structured else None
        padding = compose_padding(run, match, value, size) if match.site.mask.has(Padding) else None
        return match.operands(run, value, size, mask, padding)

    def canonical(self, values: Mapping[fx.Node, Tensor], sizes: Sizes) -> Tensor:
        """What the canonical operator makes of these inputs, in the shape of the original's output. For a proof."""
        tensors = self.operands(values, sizes, keep_mask=True, proof=True)
        out = attention(*arguments(tensors, self.match.site, dropout=False))
        made: Tensor = self.match.result(run, out, self.size(values, sizes), cast=False)
        return made


def proof_dtype(dtype: torch.dtype) -> torch.dtype:
    """The mathematics is proved where rounding does not hide a mistake, nor look like one."""
    return torch.float64 if dtype.is_floating_point else dtype


def hint(size: Any) -> Any:
    """A size or factor as a plain number: a symbolic one as captured."""
    return size.node.hint if isinstance(size, (torch.SymInt, torch.SymFloat)) else size


def _is_fill(op: Op) -> bool:
    """A finite number in place of hidden scores, in which float32 loses whatever is added to it."""
    return op.kind in ("keep", "drop") and float("-inf") < op.number <= -1e8


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _is_floating(node: fx.Node) -> bool:
    return node.op == "call_function" and _is_tensor(node) and value_of(node).dtype.is_floating_point


@singledispatch
def whole(match: Any) -> Region:
    """The region of a match, of its own kind for each kind of match."""
    return Region(match)


def region_of(match: Match | SampledMatch) -> Region | Refusal:
    """The region, or why the match is not whole. Raises `ChangedInPlace` where that is why."""
    try:
        return whole(match)
    except ChangedInPlace:
        raise
    except ValueError as reason:
        return Refusal(str(reason))


def _as_numbers(visible: Tensor, dtype: torch.dtype, generator: torch.Generator, hidden: float) -> Tensor:
    """Added to scores: a bias where visible, `hidden` where not. Integers: 1 and 0."""
    if not dtype.is_floating_point:
        return visible.to(dtype)
    bias = torch.randn(visible.shape, generator=generator).to(dtype)
    return bias.masked_fill(~visible, hidden)
