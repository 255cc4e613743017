"""From a match to the canonical operator: the operands in (B, H, S, D), the mask put together, the call.

The same function builds it in the graph and runs it on real tensors, so that what the proof checks is what is placed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._guards import detect_fake_mode

from rewriter.capture import Graph
from rewriter.ops import attention
from rewriter.pattern import MaskTerm, Operand, Reading, value_of
from rewriter.site import AttentionSite

_ATEN = torch.ops.aten

Emit = Callable[..., Any]
"""`emit(operator, *args)`: applies an operator to values, or adds its call to a graph."""


class Operands(NamedTuple):
    """The tensor arguments of the canonical operator."""

    query: Any
    key: Any
    value: Any
    mask: Any
    padding: Any


@dataclass
class Match:
    """One attention in one graph: its facts, what was read, and the node whose value it computes."""

    site: AttentionSite
    reading: Reading
    output: fx.Node
    padding: fx.Node | None

    @property
    def inputs(self) -> list[fx.Node]:
        """The nodes at the border of the match, each once: queries, keys, values, masks, padding."""
        reading = self.reading
        assert reading.query and reading.key and reading.value
        nodes = [reading.query.node, reading.key.node, reading.value.node, *(term.node for term in reading.terms)]
        return list(dict.fromkeys(nodes + ([self.padding] if self.padding is not None else [])))

    @property
    def mask_is_structure(self) -> bool:
        """Does the positional part of the site's mask say everything?"""
        return self.site.mask == self.site.mask.positional

    def operands(self, emit: Emit, value: Callable[[fx.Node], Any], mask: Any, padding: Any) -> Operands:
        """The canonical operands from the values of the match's inputs."""
        reading = self.reading
        assert reading.query and reading.key and reading.value
        sides = (_canonical(emit, side, value(side.node)) for side in (reading.query, reading.key, reading.value))
        query, key, values = sides
        return Operands(query, key, values, mask, padding)

    def result(self, emit: Emit, out: Any) -> Any:
        """The canonical output in the form that the rest of the graph expects."""
        out = emit(_ATEN.squeeze.dim, out, 1) if value_of(self.output).dim() == 3 else out
        dtype = value_of(self.output).dtype
        return out if dtype == self.site.torch_dtype else emit(_ATEN.to.dtype, out, dtype)

    def constants(self) -> tuple[float, str, float]:
        """The number and text arguments of the canonical operator."""
        return self.site.scale, str(self.site.mask.positional), self.site.dropout_p


def _canonical(emit: Emit, side: Operand, value: Any) -> Any:
    value = emit(_ATEN.transpose.int, value, -2, -1) if side.transposed else value
    return emit(_ATEN.unsqueeze.default, value, 1) if value_of(side.node).dim() == 3 else value


def compose_mask(emit: Emit, match: Match, value: Callable[[fx.Node], Any], dtype: torch.dtype) -> Any:
    """The whole mask as one tensor, bool where that says the same, else additive in this type (that of the queries)."""
    terms = match.reading.terms
    if not terms:
        return None
    if len(terms) == 1 and terms[0].kind != "add" and terms[0].fill == float("-inf"):
        mask = value(terms[0].node)
        mask = mask if terms[0].kind == "keep" else emit(_ATEN.logical_not.default, mask)
    else:
        parts = [_additive(emit, term, value(term.node), dtype) for term in terms]
        mask = parts[0]
        for part in parts[1:]:
            mask = emit(_ATEN.add.Tensor, mask, part)
    is_3d = value_of(match.output).dim() == 3 and value_of(terms[0].node).dim() == 3
    return emit(_ATEN.unsqueeze.default, mask, 1) if is_3d else mask


def _additive(emit: Emit, term: MaskTerm, value: Any, dtype: torch.dtype) -> Any:
    if term.kind == "add":
        held = value_of(value) if isinstance(value, fx.Node) else value
        value = value if held.dtype == dtype else emit(_ATEN.to.dtype, value, dtype)
        return value if term.factor == 1 else emit(_ATEN.mul.Tensor, value, term.factor)
    # A finite fill in a narrower type than the scores were in must not become infinite: a row that is hidden
    # altogether is an even mixture of the values with a finite fill, and not a number with an infinite one.
    fill = max(term.fill, torch.finfo(dtype).min) if term.fill != float("-inf") else term.fill
    hidden = value if term.kind == "drop" else emit(_ATEN.logical_not.default, value)
    zeros = emit(_ATEN.zeros_like.default, value, dtype=dtype)
    return emit(_ATEN.masked_fill.Scalar, zeros, hidden, fill)


def compose_padding(emit: Emit, match: Match, value: Callable[[fx.Node], Any]) -> Any:
    """bool (B or 1, Skv), True on real tokens, or None."""
    if match.padding is None:
        return None
    flat = emit(_ATEN.squeeze.dims, value(match.padding), [1, 2])
    batch = match.site.batch
    return flat if batch is None else emit(_ATEN.expand.default, flat, [batch, -1])


@dataclass(frozen=True)
class Raised:
    """A match as it stands in the graph: `call` is the canonical operator, `result` what the graph now uses.

    The original nodes stay, unused, until dead code is removed: `give_back` makes the graph use them again.
    """

    match: Match
    call: fx.Node
    result: fx.Node

    def give_back(self) -> None:
        """Use the original nodes."""
        self.result.replace_all_uses_with(self.match.output)


def raise_sites(gm: Graph, matches: list[Match]) -> list[Raised]:
    """Write a canonical call for each match and use it in place of the original."""
    placed: list[Raised] = []
    results: dict[fx.Node, fx.Node] = {}
    composed: dict[tuple[Any, ...], tuple[Any, Any]] = {}
    order = {node: place for place, node in enumerate(gm.graph.nodes)}
    fake_mode = detect_fake_mode([node.meta.get("val") for node in gm.graph.nodes]) or nullcontext()

    def emit(operator: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = gm.graph.call_function(operator, args, kwargs)
        fakes = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with fake_mode, torch.no_grad():
            node.meta["val"] = operator(*fakes[0], **fakes[1])
        return node

    def itself(node: fx.Node) -> fx.Node:
        return results.get(node, node)

    for match in matches:
        reading = match.reading
        place = (tuple(reading.terms), match.padding, value_of(match.output).dim(), match.site.dtype)
        if place not in composed:
            # One mask serves every layer, so it is put together once, where its last ingredient stands.
            ingredients = [term.node for term in reading.terms] + ([match.padding] if match.padding else [])
            anchor = max(ingredients, key=order.__getitem__, default=match.output)
            composed[place] = _compose_after(gm, anchor, emit, match, itself) if ingredients else (None, None)
        mask, padding = composed[place]
        with gm.graph.inserting_before(match.output):
            tensors = match.operands(emit, itself, None if match.mask_is_structure else mask, padding)
            node = emit(attention, *tensors, *match.constants())
            node.meta |= {k: v for k, v in match.output.meta.items() if k in ("stack_trace", "nn_module_stack")}
            result = match.result(emit, node)
        match.output.replace_all_uses_with(result)
        results[match.output] = result
        placed.append(Raised(match, node, result))
    return placed


def _compose_after(gm: Graph, anchor: fx.Node, emit: Emit, match: Match, itself: Any) -> tuple[Any, Any]:
    following = anchor.next
    while following.op == "placeholder":
        following = following.next
    with gm.graph.inserting_before(following):
        mask = compose_mask(emit, match, itself, match.site.torch_dtype)
        return mask, compose_padding(emit, match, itself)
