"""From a match to the canonical operator: the operands in (B, H, S, D), the mask put together, the call.

The same function builds it in the graph and runs it on real tensors, so that what the proof checks is what is placed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode

from rewriter.axes import Placed
from rewriter.canonical import Emit, SizeOf, gathered, run, scattered, sizes_from
from rewriter.capture import Graph
from rewriter.facts import HIDDEN, Op, Reading, Roles
from rewriter.masks import Tokens, tokens_at
from rewriter.nodes import is_call, storage, value_of, written
from rewriter.ops import attention
from rewriter.site import AttentionSite, Full
from rewriter.twins import twin_among

_ATEN = torch.ops.aten
Value = Callable[[fx.Node], Any]
"""What stands for a node of the match: a tensor, or a node."""


class Operands(NamedTuple):
    """The tensor arguments of the canonical operator."""

    query: Any
    key: Any
    value: Any
    mask: Any
    padding: Any
    sink: Any = None

    @property
    def given(self) -> tuple[Any, ...]:
        """The arguments of an implementation: a sink is passed where there is one."""
        return self[:5] if self.sink is None else self


@dataclass
class Match:
    """One attention in one graph: its facts, what was read, and the node whose value it computes."""

    site: AttentionSite
    reading: Reading
    padding: Tokens | None = None
    structured: bool = True
    """Does the positional part of the site's mask say everything that is added to the scores?"""
    spare: bool = False
    """Does it say everything while what was observed holds?"""
    watched_buffers: tuple[fx.Node, ...] = ()
    """What held the values by which the mask was classified."""
    watched_flags: tuple[fx.Node, ...] = ()
    """What was taken for 0s and 1s."""
    roles: Roles = field(init=False)

    def __post_init__(self) -> None:
        self.roles = self.reading.roles()

    @property
    def output(self) -> fx.Node:
        """The node whose value it computes."""
        return self.reading.output.node

    @property
    def watched(self) -> tuple[fx.Node, ...]:
        """What a sentinel looks at in every call."""
        return self.watched_buffers + self.watched_flags

    @property
    def inputs(self) -> list[fx.Node]:
        """The nodes at the border of the match, each once: queries, keys, values, masks, sinks, padding, fills."""
        nodes = [side.node for side in self.reading.operands] + [placed.node for placed in self.reading.tensors]
        nodes += [self.padding.node] if self.padding is not None else []
        return list(dict.fromkeys([*nodes, *self.reading.buffers]))

    def sizes(self, emit: Emit, value: Value, replaced: Mapping[int, int] | None = None) -> SizeOf:
        """How long each atom is in this call."""
        placed = [side.placed for side in self.reading.operands] + self.reading.tensors
        return sizes_from(emit, [(each, value(each.node)) for each in placed], replaced)

    def operands(self, emit: Emit, value: Value, size: SizeOf, mask: Any, padding: Any) -> Operands:
        """The canonical operands from the values of the match's inputs."""
        roles, (query, key, values) = self.roles, self.reading.operands
        dtype = self.site.torch_dtype

        def gather(placed: Placed, heads: Any, rows: Any, width: Any, full: bool = True) -> Any:
            tensor = value(placed.node)
            if (tensor.meta["val"] if isinstance(tensor, fx.Node) else tensor).dtype not in (dtype, torch.float64):
                tensor = emit(_ATEN.to.dtype, tensor, dtype)
            wanted = (roles.batch, heads, rows, width)
            return gathered(emit, tensor, placed.layout, wanted, size, (full, full, full, full))

        q = gather(query.placed, roles.query_heads, roles.rows, roles.width)
        k = gather(key.placed, roles.heads, roles.columns, roles.width)
        v = gather(values.placed, roles.heads, roles.columns, roles.value_width)
        for op in self.reading.factors:
            assert op.tensor is not None
            apply = _ATEN.mul.Tensor if op.kind == "mul" else _ATEN.div.Tensor
            if set(op.tensor.atoms) & set(roles.columns):
                k = emit(apply, k, gather(op.tensor, roles.heads, roles.columns, (), False))
            else:
                q = emit(apply, q, gather(op.tensor, roles.query_heads, roles.rows, (), False))
        sink = None
        if self.reading.sink is not None:
            placed = Placed(self.reading.sink, self.reading.sink_axes)
            sink = gather(placed, roles.query_heads, (), (), False)
            sink = emit(_ATEN.reshape.default, emit(_ATEN.expand.default, sink, [-1, self.site.heads, -1, -1]), [-1])
        elif self.reading.zero_sink:
            sink = emit(_ATEN.new_zeros.default, q, [self.site.heads])
        return Operands(q, k, v, mask, padding, sink)

    def result(self, emit: Emit, out: Any, size: SizeOf, *, cast: bool = True) -> Any:
        """The canonical output in the shape, and with `cast` the type, that the rest of the graph expects."""
        out = scattered(emit, out, self.roles.output, self.reading.output.layout, size)
        dtype = value_of(self.output).dtype
        return emit(_ATEN.to.dtype, out, dtype) if cast and dtype != self.site.torch_dtype else out

    def canonical_output(self, value: Tensor, size: SizeOf) -> Tensor:
        """The original's output as (B, H, Sq, Dv)."""
        result: Tensor = gathered(run, value, self.reading.output.layout, self.roles.output, size, (True,) * 4)
        return result


def arguments(operands: Operands, site: AttentionSite, *, dropout: bool = True) -> tuple[Any, ...]:
    """The arguments of the canonical operator."""
    numbers = site.scale, str(site.mask.positional), site.dropout_p if dropout else 0.0
    return *operands[:5], *numbers, operands.sink, site.softcap or 0.0, site.normaliser


class ChangedInPlace(ValueError):
    """A tensor of the attention is changed while it is computed."""


def between(match: Match) -> tuple[list[fx.Node], list[fx.Node]]:
    """The nodes between the inputs of a match and its output, and the sizes from outside that they use.

    Raises ValueError where they are not whole, or where the canonical operator, which reads all inputs where the output
    stands, would read something else than they do.
    """
    inputs, needed, todo = set(match.inputs), {match.output}, [match.output]
    sizes: dict[fx.Node, None] = {}
    while todo:
        for source in todo.pop().all_input_nodes:
            if source in inputs or source in needed or twin_among(source, match.inputs):
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
    read: set[int | None] = set()
    while node is not nodes[-1]:
        if node in inside:
            read |= {storage(source) for source in node.all_input_nodes} & borders
        targets = {storage(target) for target in written(node)}
        # What is changed before the attention reads it, the operator reads as the attention did.
        if targets & (read if node in inside else read | inner - borders):
            raise ChangedInPlace(f"{node.name} changes in place what the attention reads")
        if targets & inner and any(
            user not in inside and _reads(user, each)
            for each in nodes[:-1]
            if storage(each) in targets
            for user in each.users
        ):
            raise ChangedInPlace(f"{node.name} changes in place what is also used outside of the attention")
        node = node.next


def _reads(user: fx.Node, node: fx.Node) -> bool:
    """Does this user look at more than the shape of the node?"""
    if is_call(user, _ATEN.expand_as, _ATEN.view_as):
        return user.args[0] is node
    return not is_call(user, *_LIKE)


_LIKE = (
    _ATEN.sym_size, _ATEN.zeros_like, _ATEN.ones_like, _ATEN.full_like, _ATEN.empty_like, _ATEN.new_zeros,
    _ATEN.new_ones, _ATEN.new_full, _ATEN.new_empty,
)  # fmt: skip


def compose_mask(emit: Emit, match: Match, value: Value, size: SizeOf, dtype: torch.dtype) -> Any:
    """All that is added to the scores as one tensor, broadcastable to (B, H, Sq, Skv): bool where that says the same,
    else additive in this type (that of the queries). It is what the original makes of scores that are all 0.
    """

    def gather(op: Op) -> Any:
        assert op.tensor is not None
        return gathered(emit, value(op.tensor.node), op.tensor.layout, match.roles.scores, size, (False,) * 4)

    ops = match.reading.ops
    masks = [op for op in ops if op.kind in ("add", "shift", "keep", "drop")]
    if not masks:
        return None
    first = masks[0]
    if len(masks) == 1 and first.kind in ("keep", "drop") and first.number == float("-inf") and first.buffer is None:
        return gather(first) if first.kind == "keep" else emit(_ATEN.logical_not.default, gather(first))
    lowest = torch.finfo(match.site.torch_dtype).min
    finite = any(op.kind in ("keep", "drop") and op.number != float("-inf") for op in masks)
    mixed = finite and any(op.kind == "add" for op in masks)
    mask = None
    for op in ops:
        if op.kind == "add":
            term = _narrowed(emit, gather(op), dtype, lowest)
            term = emit(_ATEN.mul.Tensor, term, op.number) if op.number != 1 else term
            mask = term if mask is None else emit(_ATEN.add.Tensor, mask, term)
        elif op.kind == "shift" and mask is None:
            mask = emit(_ATEN.full.default, [1, 1, 1, 1], op.number, dtype=dtype, device=match.site.device)
        elif op.kind == "shift":
            mask = emit(_ATEN.add.Scalar, mask, op.number)
        elif op.kind in ("keep", "drop"):
            hidden = gather(op) if op.kind == "drop" else emit(_ATEN.logical_not.default, gather(op))
            mask = emit(_ATEN.zeros_like.default, hidden, dtype=dtype) if mask is None else mask
            much = 1 if mixed else _MUCH
            if op.buffer is None:
                fill = op.number if op.number == float("-inf") else max(op.number * much, lowest)
                filled = emit(_ATEN.new_full.default, mask, [], fill)
            else:
                filled = emit(_ATEN.to.dtype, _held_fill(emit, value(op.buffer), much, lowest), dtype)
            mask = emit(_ATEN.where.self, hidden, filled, mask)
        elif mask is not None and op.kind == "floor":
            mask = emit(_ATEN.clamp_min.default, mask, max(op.number, torch.finfo(dtype).min))
        elif mask is not None and op.kind == "scale":
            mask = emit(_ATEN.mul.Tensor, mask, op.number)
        elif mask is not None and op.kind in ("mul", "div"):
            factor = emit(_ATEN.to.dtype, gather(op), dtype)
            mask = emit(_ATEN.mul.Tensor if op.kind == "mul" else _ATEN.div.Tensor, mask, factor)
    return _enlarged(emit, mask, torch.finfo(dtype).min) if mixed else mask


_MUCH = 1e20
"""A row that is hidden altogether is an even mixture of the values where the fill is finite. Here the fill is added, so
it must be so much larger that the scores are lost in it.
"""


def _held_fill(emit: Emit, held: Any, much: float, lowest: float) -> Any:
    """What a buffer fills in now, so much larger. A number that would not hide the scores makes NaN of them: it is not
    what was read.
    """
    held = emit(_ATEN.to.dtype, emit(_ATEN.reshape.default, held, []), torch.float64)
    larger = emit(_ATEN.clamp_min.default, emit(_ATEN.mul.Tensor, held, much), lowest)
    larger = emit(_ATEN.where.self, emit(_ATEN.isinf.default, held), held, larger)
    return emit(_ATEN.where.ScalarOther, emit(_ATEN.le.Scalar, held, HIDDEN), larger, float("nan"))


def _enlarged(emit: Emit, mask: Any, lowest: float) -> Any:
    """What hides, made larger. Of two numbers the larger stays the larger, whether filled in or added; -inf stays."""
    larger = emit(_ATEN.clamp.default, emit(_ATEN.mul.Tensor, mask, _MUCH), lowest)
    hidden = emit(_ATEN.logical_and.default, emit(_ATEN.le.Scalar, mask, HIDDEN), emit(_ATEN.isfinite.default, mask))
    return emit(_ATEN.where.self, hidden, larger, mask)


def _narrowed(emit: Emit, value: Any, dtype: torch.dtype, lowest: float) -> Any:
    held = value_of(value) if isinstance(value, fx.Node) else value
    if held.dtype == dtype:
        return value
    if held.dtype.is_floating_point and torch.finfo(held.dtype).min < lowest:
        value = emit(_ATEN.clamp.default, value, lowest)  # In a narrower type it must not become infinite.
    return emit(_ATEN.to.dtype, value, dtype)


def compose_padding(emit: Emit, match: Match, value: Value, size: SizeOf) -> Any:
    """bool (B, Skv), True on real tokens, or None."""
    if match.padding is None:
        return None
    full = (match.site.batch is not None, True)
    return tokens_at(emit, match.padding, value(match.padding.node), match.roles, size, full)


@dataclass(frozen=True)
class Raised:
    """A match as it stands in the graph: `call` is the canonical operator, `result` what the graph now uses.

    The original nodes stay, unused, until dead code is removed: `give_back` makes the graph use them again.
    """

    match: Match
    call: fx.Node
    result: fx.Node
    original: frozenset[fx.Node]

    @property
    def operands(self) -> Operands:
        """The tensor arguments of the call."""
        query, key, value, mask, padding, *_, sink, _, _ = self.call.args
        return Operands(query, key, value, mask, padding, sink)

    def give_back(self) -> None:
        """Use the original nodes."""
        self.result.replace_all_uses_with(self.match.output)


def emitter(gm: Graph) -> Emit:
    """Adds calls to a graph, with the values that stand for their results."""
    fake_mode = detect_fake_mode([node.meta.get("val") for node in gm.graph.nodes]) or nullcontext()

    def emit(operator: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = gm.graph.call_function(operator, args, kwargs)
        fakes = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with fake_mode, torch.no_grad():
            # Running the canonical operator would cost a tenth of a second a site where sizes are symbolic.
            node.meta["val"] = _like_output(*fakes[0]) if operator is attention else operator(*fakes[0], **fakes[1])
        return node

    return emit


def raise_sites(gm: Graph, matches: list[Match]) -> list[Raised]:
    """Write a canonical call for each match and use it in place of the original."""
    placed: list[Raised] = []
    results: dict[fx.Node, fx.Node] = {}
    composed: dict[tuple[Any, ...], tuple[Any, Any]] = {}
    order = {node: place for place, node in enumerate(gm.graph.nodes)}
    changes = [(node, {storage(target) for target in targets}) for node in order if (targets := written(node))]
    originals = [frozenset(between(match)[0]) for match in matches]
    emit = emitter(gm)

    def itself(node: fx.Node) -> fx.Node:
        return results.get(node, node)

    for match, original in zip(matches, originals, strict=True):
        # One mask serves every layer, so it is put together once, where its last ingredient stands or is last changed.
        ingredients = [op.tensor.node for op in match.reading.ops if op.tensor] + match.reading.buffers
        ingredients += [match.padding.node] if match.padding else []
        ready = [*ingredients, *_changes(changes, ingredients, order[match.output], order)]
        anchor = max(ready, key=order.__getitem__, default=match.output)
        place = (anchor, _mask_identity(match))
        if place not in composed:
            # What is made from numbers alone stands anywhere above.
            composed[place] = _compose(gm, _following(anchor) if ready else match.output, emit, match, itself)
        mask, padding = composed[place]
        with gm.graph.inserting_before(match.output):
            size = match.sizes(emit, itself)
            operands = match.operands(emit, itself, size, None if match.structured else mask, padding)
            node = emit(attention, *arguments(operands, match.site))
            node.meta |= {k: v for k, v in match.output.meta.items() if k in ("stack_trace", "nn_module_stack")}
            result = match.result(emit, node, size)
        match.output.replace_all_uses_with(result)
        results[match.output] = result
        placed.append(Raised(match, node, result, original))
    return placed


def _mask_identity(match: Match) -> str:
    """Two matches with the same text, of the same tensors, have the same mask and padding."""
    names = match.roles.named
    lines = [
        (op.kind, op.number, op.tensor.node.name if op.tensor else "", _axes_as_text(op.tensor, names), str(op.buffer))
        for op in match.reading.ops
        if op.kind != "scale" or any(other.kind in ("add", "keep", "drop") for other in match.reading.ops)
    ]
    sizes = [names[atom] for axis in match.roles.scores for atom in axis]
    tokens = match.padding
    padding = (tokens.node.name, tokens.test, tokens.factor, _axes_as_text(tokens, names)) if tokens else None
    return str((lines, sizes, padding, match.site.dtype, match.site.mask != Full()))


def _axes_as_text(placed: Placed | None, names: Mapping[Any, str]) -> str:
    return str([[names.get(atom) for atom in axis] for axis in placed.layout]) if placed else ""


def _like_output(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


def _changes(
    changes: list[tuple[fx.Node, set[int | None]]], nodes: list[fx.Node], end: int, order: dict[fx.Node, int]
) -> list[fx.Node]:
    """What changes these tensors in place before `end`."""
    own = {storage(node) for node in nodes}
    return [node for node, targets in changes if order[node] < end and targets & own]


def _following(anchor: fx.Node) -> fx.Node:
    following = anchor.next
    while following.op == "placeholder":
        following = following.next
    return following


def _compose(gm: Graph, before: fx.Node, emit: Emit, match: Match, itself: Any) -> tuple[Any, Any]:
    """The mask and the padding, right after what they are made from: their own lengths are all they may need."""
    with gm.graph.inserting_before(before):
        tensors = [*match.reading.tensors, *([match.padding] if match.padding else [])]
        available = [each for each in tensors if each.node is not match.reading.sink]
        size = sizes_from(emit, [(each, itself(each.node)) for each in available])
        mask = compose_mask(emit, match, itself, size, match.site.torch_dtype)
        return mask, compose_padding(emit, match, itself, size)
