"""From a match to the canonical operator: the operands in (B, H, S, D), the mask put together, the call.

The same function builds it in the graph and runs it on real tensors, so that what the proof checks is what is placed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode

from rewriter.capture import Graph
from rewriter.ops import attention
from rewriter.pattern import MaskTerm, Operand, Reading, storage, value_of, written
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

    def result(self, emit: Emit, out: Any, *, cast: bool = True) -> Any:
        """The canonical output in the shape, and with `cast` the type, that the rest of the graph expects."""
        out = emit(_ATEN.squeeze.dim, out, 1) if value_of(self.output).dim() == 3 else out
        dtype = value_of(self.output).dtype
        return emit(_ATEN.to.dtype, out, dtype) if cast and dtype != self.site.torch_dtype else out

    def constants(self) -> tuple[float, str, float]:
        """The number and text arguments of the canonical operator."""
        return self.site.scale, str(self.site.mask.positional), self.site.dropout_p


def between(match: Match) -> tuple[list[fx.Node], list[fx.Node]]:
    """The nodes between the inputs of a match and its output, and the sizes from outside that they use.

    Raises ValueError where they are not whole, or where the canonical operator, which reads all inputs where the output
    stands, would read something else than they do.
    """
    inputs, needed, todo = set(match.inputs), {match.output}, [match.output]
    sizes: dict[fx.Node, None] = {}
    while todo:
        for source in todo.pop().all_input_nodes:
            if source in inputs or source in needed:
                continue
            if isinstance(source.meta.get("val"), _NUMBERS):
                sizes[source] = None
                continue
            if source.op == "placeholder":
                raise ValueError(f"the attention also depends on {source.name}, which is not read as a part of it")
            needed.add(source)
            todo.append(source)
    nodes = [node for node in match.output.graph.nodes if node in needed]
    _check_changes(nodes, match.inputs)
    return nodes, list(sizes)


_NUMBERS = (torch.SymInt, torch.SymFloat, int, float)


def _check_changes(nodes: list[fx.Node], inputs: list[fx.Node]) -> None:
    borders, inner = ({storage(node) for node in part} - {None} for part in (inputs, nodes))
    inside, node = set(nodes), nodes[0]
    while node is not nodes[-1]:
        targets = {storage(target) for target in written(node)}
        if targets & (borders if node in inside else borders | inner):
            raise ValueError(f"{node.name} changes in place what the attention reads")
        if targets & inner and any(
            user not in inside for each in nodes[:-1] if storage(each) in targets for user in each.users
        ):
            raise ValueError(f"{node.name} changes in place what is also used outside of the attention")
        node = node.next


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
        lowest = torch.finfo(match.site.torch_dtype).min
        parts = [_additive(emit, term, value(term.node), dtype, lowest) for term in terms]
        mask = parts[0]
        for part in parts[1:]:
            mask = emit(_ATEN.add.Tensor, mask, part)
        if len(terms) > 1 and any(term.kind != "add" and term.fill != float("-inf") for term in terms):
            mask = emit(_ATEN.clamp.default, mask, lowest)  # Hidden twice is not more hidden than once.
    is_3d = value_of(match.output).dim() == 3 and any(value_of(term.node).dim() == 3 for term in terms)
    return emit(_ATEN.unsqueeze.default, mask, 1) if is_3d else mask


def _additive(emit: Emit, term: MaskTerm, value: Any, dtype: torch.dtype, lowest: float) -> Any:
    if term.kind == "add":
        held = value_of(value) if isinstance(value, fx.Node) else value
        if held.dtype != dtype:
            # In a narrower type the lowest number must not become infinite.
            narrowed = held.dtype.is_floating_point and torch.finfo(held.dtype).min < lowest
            value = emit(_ATEN.clamp.default, value, lowest) if narrowed else value
            value = emit(_ATEN.to.dtype, value, dtype)
        return value if term.factor == 1 else emit(_ATEN.mul.Tensor, value, term.factor)
    # A row that is hidden altogether is an even mixture of the values where the fill is finite. Here the fill is added,
    # so it must be so large that the scores are lost in it.
    fill = lowest if term.fill != float("-inf") else term.fill
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
    original: frozenset[fx.Node]

    def give_back(self) -> None:
        """Use the original nodes."""
        self.result.replace_all_uses_with(self.match.output)


def raise_sites(gm: Graph, matches: list[Match]) -> list[Raised]:
    """Write a canonical call for each match and use it in place of the original."""
    placed: list[Raised] = []
    results: dict[fx.Node, fx.Node] = {}
    composed: dict[tuple[Any, ...], tuple[Any, Any]] = {}
    order = {node: place for place, node in enumerate(gm.graph.nodes)}
    changes = [(node, {storage(target) for target in targets}) for node in order if (targets := written(node))]
    originals = [frozenset(between(match)[0]) for match in matches]
    fake_mode = detect_fake_mode([node.meta.get("val") for node in gm.graph.nodes]) or nullcontext()

    def emit(operator: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = gm.graph.call_function(operator, args, kwargs)
        fakes = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with fake_mode, torch.no_grad():
            # Running the canonical operator would cost a tenth of a second a site where sizes are symbolic.
            node.meta["val"] = _like_output(*fakes[0]) if operator is attention else operator(*fakes[0], **fakes[1])
        return node

    def itself(node: fx.Node) -> fx.Node:
        return results.get(node, node)

    for match, original in zip(matches, originals, strict=True):
        reading = match.reading
        # One mask serves every layer, so it is put together once, where its last ingredient stands or is last changed.
        ingredients = [term.node for term in reading.terms] + ([match.padding] if match.padding else [])
        ready = [*ingredients, *_changes(changes, ingredients, order[match.output], order)]
        anchor = max(ready, key=order.__getitem__, default=match.output)
        place = (anchor, tuple(reading.terms), match.padding, value_of(match.output).dim(), match.site.dtype)
        if place not in composed:
            composed[place] = _compose_after(gm, anchor, emit, match, itself) if ingredients else (None, None)
        mask, padding = composed[place]
        with gm.graph.inserting_before(match.output):
            tensors = match.operands(emit, itself, None if match.mask_is_structure else mask, padding)
            node = emit(attention, *tensors, *match.constants())
            node.meta |= {k: v for k, v in match.output.meta.items() if k in ("stack_trace", "nn_module_stack")}
            result = match.result(emit, node)
        match.output.replace_all_uses_with(result)
        results[match.output] = result
        placed.append(Raised(match, node, result, original))
    return placed


def _like_output(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


def _changes(
    changes: list[tuple[fx.Node, set[int | None]]], nodes: list[fx.Node], end: int, order: dict[fx.Node, int]
) -> list[fx.Node]:
    """What changes these tensors in place before `end`."""
    own = {storage(node) for node in nodes}
    return [node for node, targets in changes if order[node] < end and targets & own]


def _compose_after(gm: Graph, anchor: fx.Node, emit: Emit, match: Match, itself: Any) -> tuple[Any, Any]:
    following = anchor.next
    while following.op == "placeholder":
        following = following.next
    with gm.graph.inserting_before(following):
        mask = compose_mask(emit, match, itself, match.site.torch_dtype)
        return mask, compose_padding(emit, match, itself)
