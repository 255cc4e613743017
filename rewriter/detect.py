"""Find every attention in a graph by meaning: anchors, the walk, the facts.

From a normaliser the walk goes up through scale, mask and casts to the product of queries and keys, and down through
casts and dropout to the product with the values; calls that are an attention already are read from their arguments.
What it meets and does not understand is a refusal. What it understood is proved (`rewriter.proof`) before it counts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from rewriter.capture import Graph, frame_path, site_path, source_line
from rewriter.masks import MaskReading, read_mask
from rewriter.pattern import (
    Answer,
    MaskTerm,
    Operand,
    Reading,
    comes_from_product,
    fixed,
    is_parameter,
    patterns,
    value_of,
)
from rewriter.proof import Proof
from rewriter.raising import Match
from rewriter.site import AttentionSite, Causal, Dense, Full, Mask, Refusal


@dataclass
class Detection:
    """What one graph holds."""

    matches: list[Match] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)

    @property
    def sites(self) -> list[AttentionSite]:
        """The sites of the matches, in the order of the graph."""
        return [match.site for match in self.matches]


def detect(gm: Graph, names: Mapping[str, str] | None = None) -> Detection:
    """Every attention in a pre-dispatch graph, and what looked like one and was not taken. The graph is not changed.

    `names` maps str(id(module)) to the module's qualified name (see `capture.module_names`).
    """
    found, proof, masks = Detection(), Proof(), dict[tuple[fx.Node, bool], MaskReading]()
    frame = frame_path(gm, names or {})
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        read = _read_anchor(node)
        if read is None:
            continue
        path = site_path(node, names or {}, frame)
        match = read if isinstance(read, Refusal) else _match(*read, path, masks)
        refusal = match if isinstance(match, Refusal) else proof.check(match)
        if refusal is not None:
            found.refusals.append(dataclasses.replace(refusal, path=path, source=source_line(node)))
        elif isinstance(match, Match):
            found.matches.append(match)
    _number_repeated_paths(found.matches)
    return found


def _number_repeated_paths(matches: list[Match]) -> None:
    """One module may hold several attentions: the second at a path is called path#1."""
    seen: dict[str, int] = {}
    for match in matches:
        path = match.site.path
        count = seen.get(path, 0)
        seen[path] = count + 1
        if count:
            match.site = dataclasses.replace(match.site, path=f"{path}#{count}")


def _read_anchor(node: fx.Node) -> tuple[Reading, fx.Node] | Refusal | None:
    """(reading, output node) of the attention at this node; None where nothing is like attention."""
    reading = Reading()
    for pattern in patterns().values():
        if pattern.call is not None:
            answer = pattern.call(node, reading)
            if isinstance(answer, Refusal):
                return answer
            if answer is not None:
                _strip_operands(reading)
                return reading, answer
    for pattern in patterns().values():
        if pattern.normaliser is not None:
            answer = pattern.normaliser(node, reading)
            if answer is None:
                continue
            # A router or a classifier: its scores come from a linear layer, and it is none of our business.
            if not comes_from_product(node.all_input_nodes[0]):
                return None
            up = answer if isinstance(answer, Refusal) else _walk_up(answer, reading)
            down = _walk_down(node, reading)
            if down is None:
                return None
            if isinstance(up, Refusal) or isinstance(down, Refusal):
                return up if isinstance(up, Refusal) else down if isinstance(down, Refusal) else None
            _strip_operands(reading)
            return reading, down
    return None


def _walk_up(node: fx.Node, reading: Reading) -> Refusal | None:
    """From the scores to the product of queries and keys; None when it arrived."""
    while True:
        for pattern in patterns().values():
            answer = pattern.product(node, reading) if pattern.product else None
            if answer is node:
                return None
            if answer is None and pattern.score is not None:
                answer = pattern.score(node, reading)
            if isinstance(answer, Refusal):
                return answer
            if answer is not None:
                node = answer
                break
        else:
            return Refusal(f"the reading of the scores stopped at {_describe(node)}")


def _walk_down(node: fx.Node, reading: Reading) -> fx.Node | Refusal | None:
    """From the weights to the product with the values; None where the weights never meet values."""
    start = node
    while True:
        users = list(node.users)
        if len(users) != 1:
            return Refusal("the attention weights are used more than once") if _meets_values(start) else None
        answer: Answer = None
        for pattern in patterns().values():
            answer = pattern.weight(users[0], node, reading) if pattern.weight is not None else None
            if answer is not None:
                break
        if isinstance(answer, Refusal):
            return answer
        if answer is None:
            stopped = Refusal(f"the reading of the weights stopped at {_describe(users[0])}")
            return stopped if _meets_values(start) else None
        if reading.value is not None:
            return answer
        node = answer


def _meets_values(weights: fx.Node) -> bool:
    """Do these weights reach a product within a few steps? Otherwise they are a classifier's or a router's."""
    todo = [(weights, 0)]
    while todo:
        node, depth = todo.pop()
        for user in node.users:
            if user.op == "output":
                continue
            if user.target in _VALUE_PRODUCTS:
                return True
            if depth < 6:
                todo.append((user, depth + 1))
    return False


_VALUE_PRODUCTS = {torch.ops.aten.matmul.default, torch.ops.aten.bmm.default, torch.ops.aten.einsum.default}


def _strip_operands(reading: Reading) -> None:
    """Walk up queries, keys and values. Heads must be shared alike by keys and values, or they stay repeated."""
    assert reading.query and reading.key and reading.value
    for side in (reading.query, reading.key, reading.value):
        _strip(side)
    if reading.key.groups != reading.value.groups:
        reading.key, reading.value = reading.key.shared or reading.key, reading.value.shared or reading.value
    reading.scale *= reading.query.scale * reading.key.scale


def _strip(side: Operand) -> None:
    while True:
        for pattern in patterns().values():
            before = dataclasses.replace(side)
            answer = pattern.operand(side.node, side) if pattern.operand else None
            if isinstance(answer, fx.Node):
                side.node = answer
                if side.groups != before.groups:
                    side.shared = before
                break
        else:
            return


def _describe(node: fx.Node) -> str:
    where = source_line(node)
    return f"{node.target}" + (f" ({where})" if where else "")


def _static(size: int | torch.SymInt) -> int | None:
    return size if isinstance(size, int) else None


def _match(
    reading: Reading, output: fx.Node, path: str, masks: dict[tuple[fx.Node, bool], MaskReading]
) -> Match | Refusal:
    """The facts of the site, or the one that is missing."""
    assert reading.query and reading.key and reading.value
    query, key, value = (value_of(side.node) for side in (reading.query, reading.key, reading.value))
    if not query.dim() == key.dim() == value.dim() or query.dim() not in (3, 4):
        return Refusal(f"queries, keys and values of rank {query.dim()}, {key.dim()} and {value.dim()}")
    if not query.dtype == key.dtype == value.dtype or not query.dtype.is_floating_point:
        return Refusal(f"queries, keys and values of types {query.dtype}, {key.dtype} and {value.dtype}")
    if any(is_parameter(side.node) for side in (reading.key, reading.value)):
        return Refusal("the keys or values are parameters, which makes this a linear layer")
    heads, kv_heads, v_heads = (1, 1, 1) if query.dim() == 3 else (fixed(t.shape[1]) for t in (query, key, value))
    kv_axis = -1 if reading.key.transposed else -2
    width, value_width = fixed(query.shape[-1]), fixed(value.shape[-1])
    if None in (heads, kv_heads, v_heads, width, value_width):
        return Refusal("the number of heads or the head size is symbolic")
    if heads % kv_heads or kv_heads != v_heads:
        return Refusal(f"{heads} query heads cannot share {kv_heads} key heads and {v_heads} value heads")
    batches = [str(t.shape[0]) for t in (query, key, value)]  # as text, because a comparison would be guarded
    if len(set(batches)) > 1:
        return Refusal(f"queries, keys and values of batch {', '.join(batches)}")
    q_len, kv_len = query.shape[-2], key.shape[kv_axis]
    structure = _call_structure(reading, q_len, kv_len)
    if isinstance(structure, Refusal):
        return structure
    mask = MaskReading(structure)
    if len(reading.terms) == 1:
        term = reading.terms[0]
        place = (term.node, term.kind != "drop")
        if place not in masks:
            masks[place] = read_mask(*place) if query.dim() == 4 else MaskReading(Dense())
        found = masks[place] if _hides_exactly(term, masks[place]) else MaskReading(Dense())
        mask = MaskReading(structure & found.mask, found.padding)
    elif reading.terms:
        mask = MaskReading(structure & Dense())
    site = AttentionSite(
        path=path,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=width,
        v_head_dim=value_width,
        dtype=str(query.dtype).removeprefix("torch."),
        scale=reading.scale,
        mask=mask.mask,
        batch=_static(query.shape[0]),
        q_len=_static(q_len),
        kv_len=_static(kv_len),
        device=query.device.type,
        softmax_dtype=str(reading.softmax_dtype).removeprefix("torch.") if reading.softmax_dtype else None,
        dropout_p=reading.dropout_p,
        spelling=reading.spelling,
        source=source_line(output),
    )
    return Match(site=site, reading=reading, output=output, padding=mask.padding)


def _hides_exactly(term: MaskTerm, found: MaskReading) -> bool:
    """Does the term do to the scores what the mask says? A query that sees no key gives 0 there; a finite number in
    place of its scores gives an even mixture of the values. A scale above an additive mask may bring it back into view.
    """
    finite = term.kind == "add" or term.fill != float("-inf")
    return not (found.blind and finite) and term.factor >= _LEAST_FACTOR


_LEAST_FACTOR = 1 / 32


def _call_structure(reading: Reading, q_len: int | torch.SymInt, kv_len: int | torch.SymInt) -> Mask | Refusal:
    """`is_causal` of a call aligns the first query with the first key."""
    if not reading.causal:
        return Full()
    offset = q_len - kv_len
    if isinstance(offset, torch.SymInt):
        if offset.node.expr != 0:
            return Refusal("a causal call whose lengths differ by a symbolic number")
        offset = 0
    return Causal(int(offset))
