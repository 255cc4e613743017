"""Nodes that compute the same from the same: one expression, a mask say, written out where it is used each time."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_flatten

from rewriter.nodes import constant, storage, written

_MOST = 64
"""No mask is written in more calls than this."""


def are_twins(one: fx.Node, other: fx.Node) -> bool:
    """Do these two hold the same values whenever they run? Nothing they are made from may be drawn by chance or changed
    in place.
    """
    seen: set[tuple[fx.Node, fx.Node]] = set()
    todo = [(one, other)]
    while todo:
        pair = todo.pop()
        if pair[0] is pair[1] or pair in seen:
            continue
        seen.add(pair)
        sources = None if len(seen) > _MOST else _sources(*pair)
        if sources is None:
            return False
        todo += sources
    own = {storage(node) for pair in seen for node in pair} - {None}
    return not seen or not any(storage(target) in own for node in one.graph.nodes for target in written(node))


def twin_among(node: fx.Node, nodes: list[fx.Node]) -> fx.Node | None:
    """The first of these that holds the same as this node."""
    return next((each for each in nodes if are_twins(node, each)), None)


def _sources(one: fx.Node, other: fx.Node) -> list[tuple[fx.Node, fx.Node]] | None:
    """What has to be the same for two calls to be; None where they are different calls."""
    if _same_number(one, other):
        return []
    if one.target is not other.target or not _is_pure(one) or not _is_pure(other):
        return None
    (mine, spec), (others, spec_of_other) = (tree_flatten((each.args, dict(each.kwargs))) for each in (one, other))
    if spec != spec_of_other:
        return None
    pairs = list(zip(mine, others, strict=True))
    nodes = [(a, b) for a, b in pairs if isinstance(a, fx.Node) and isinstance(b, fx.Node)]
    rest = [(a, b) for a, b in pairs if not (isinstance(a, fx.Node) and isinstance(b, fx.Node))]
    return nodes if all(type(a) is type(b) and a == b for a, b in rest) else None


def _same_number(one: fx.Node, other: fx.Node) -> bool:
    """Constants that are written out are an attribute each."""
    number = constant(one)
    values: list[Any] = [one.meta.get("val"), other.meta.get("val")]
    if number is None or number != constant(other) or not all(isinstance(each, torch.Tensor) for each in values):
        return False
    mine, others = values
    return bool(mine.dtype == others.dtype and mine.shape == others.shape and mine.device == others.device)


def _is_pure(node: fx.Node) -> bool:
    target = node.target
    if node.op != "call_function":
        return False
    if not isinstance(target, torch._ops.OpOverload):
        return getattr(target, "__module__", "") == "_operator"  # an item of several results, a sum of two sizes
    return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags
