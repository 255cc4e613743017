"""What a mask in the graph means: its positional factors as a `Mask`, and the padding, if that is all that is left.

Factors that depend on positions only (`arange`, constants, sizes) are evaluated and classified from their values.
Symbolic sizes are evaluated at several values, one of them beyond every constant in the mask, so that a window that is
wider than the captured input is not taken for a causal mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from rewriter.pattern import constant, is_call, patterns, storage, value_of, written
from rewriter.site import Causal, Dense, Full, Mask, Padding, SlidingWindow

_MOST_ELEMENTS = 1 << 28
"""No mask larger than this is evaluated (bool elements)."""
_MOST_TOKENS = 1 << 20
"""No number in a mask above this is taken for a number of tokens."""

_ATEN = torch.ops.aten
_LIKE = (_ATEN.new_ones, _ATEN.new_zeros, _ATEN.new_full)


@dataclass(frozen=True)
class MaskReading:
    """`mask` as facts. `padding` is the bool node (B or 1, 1, 1, Skv) of such a factor, True on tokens."""

    mask: Mask
    padding: fx.Node | None = None
    blind: bool = False
    """Does the positional part hide every key from some query?"""


def read_mask(node: fx.Node, keep: bool = True) -> MaskReading:
    """Take a mask apart. `keep` is the polarity of a bool mask: does True mean visible?"""
    dense = MaskReading(Dense())
    if value_of(node).dtype != torch.bool and not _patterns_factors(node):
        return dense
    leaves = _leaves(node, keep)
    positional = [leaf for leaf in leaves if _is_positional(leaf[0])]
    others = [leaf for leaf in leaves if leaf not in positional]
    if any(value_of(leaf).dtype != torch.bool for leaf, _ in leaves) or len(others) > 1:
        return dense
    order = _upstream([leaf for leaf, _ in leaves])
    if _changed_aside(order):
        return dense
    structure, blind = _classify_all(positional) if positional else (Full(), False)
    if structure is None:
        return dense
    if not others:
        return MaskReading(structure, blind=blind)
    leaf, polarity = others[0]
    if not polarity or not _is_padding(leaf):
        return dense
    return MaskReading(structure & Padding(), leaf, blind)


def _changed_aside(order: list[fx.Node]) -> bool:
    """Is one of these tensors changed in place through a view, unseen by those who read it?"""
    own, known = {storage(node) for node in order} - {None}, set(order)
    graph = order[0].graph.nodes if order else ()
    return any(node not in known and own & {storage(target) for target in written(node)} for node in graph)


def _patterns_factors(node: fx.Node) -> list[tuple[fx.Node, bool]] | None:
    for pattern in patterns().values():
        found = pattern.factors(node) if pattern.factors else None
        if found is not None:
            return found
    return None


def _leaves(node: fx.Node, keep: bool) -> list[tuple[fx.Node, bool]]:
    """The factors of a conjunction. Below a negation there is a disjunction, so it is not taken apart further."""
    if is_call(node, _ATEN.new_ones, _ATEN.ones) and keep:
        return []
    found = _patterns_factors(node)
    if found is None or (not keep and len(found) > 1):
        return [(node, keep)]
    return [leaf for source, polarity in found for leaf in _leaves(source, keep == polarity)]


def _is_padding(node: fx.Node) -> bool:
    shape = value_of(node).shape
    return len(shape) == 4 and shape[1] == 1 and shape[2] == 1 and shape[3] != 1


def _sources(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values go into this one. A size, or a tensor that only lends its type, lends no values."""
    if isinstance(node.meta.get("val"), (torch.SymInt, int)):
        return []
    if is_call(node, *_LIKE):
        return [source for source in node.all_input_nodes if source is not node.args[0]]
    return node.all_input_nodes


def _upstream(nodes: list[fx.Node]) -> list[fx.Node]:
    """All nodes that these are made from and themselves, in the order of the graph."""
    needed, todo = set(nodes), list(nodes)
    while todo:
        for source in _sources(todo.pop()):
            if source not in needed:
                needed.add(source)
                todo.append(source)
    return [node for node in nodes[0].graph.nodes if node in needed] if nodes else []


def _is_positional(node: fx.Node) -> bool:
    """Made from nothing but `arange`, constants and sizes, without chance?"""
    todo, seen = [node], {node}
    while todo:
        current = todo.pop()
        if isinstance(current.meta.get("val"), (torch.SymInt, int)):
            continue
        if current.op == "placeholder" or (current.op == "get_attr" and constant(current) is None):
            return False
        if torch.Tag.nondeterministic_seeded in getattr(current.target, "tags", ()):
            return False
        todo += [source for source in _sources(current) if source not in seen]
        seen.update(_sources(current))
    return True


def _classify_all(leaves: list[tuple[fx.Node, bool]]) -> tuple[Mask | None, bool]:
    """The conjunction of positional factors, and whether it hides every key from some query.

    It is classified from its values at the largest sizes, where every window shows, and must agree with them at others.
    """
    nodes = [leaf for leaf, _ in leaves]
    order = _upstream(nodes)
    found: Mask | None = None
    blind = False
    for sizes in _size_assignments(order):
        try:
            values = _evaluate(order, sizes)
        except (ArithmeticError, IndexError, RuntimeError, TypeError, ValueError, _TooLarge):
            return None, False
        seen = torch.ones((), dtype=torch.bool)
        for leaf, polarity in leaves:
            seen = seen & (values[leaf] if polarity else ~values[leaf])
        seen = _only(seen)
        mask = classify(seen)
        found = mask if found is None else found
        if mask is None or found is None or not (mask == found or _agrees(found, seen)):
            return None, False
        blind = blind or not bool(seen.any(-1).all())
    return found, blind


def _agrees(mask: Mask, seen: Tensor) -> bool:
    return seen.dim() == 2 and torch.equal(mask.visible(seen.shape[0], seen.shape[1], seen.device), seen)


def _only(visible: Tensor) -> Tensor:
    """bool[Sq, Skv] where the batches and heads in front are all alike."""
    if visible.dim() <= 2:
        return visible
    flat = visible.flatten(0, -3)
    return flat[0] if bool((flat == flat[:1]).all()) else visible


def classify(visible: Tensor) -> Mask | None:
    """The positional mask with these values, bool[Sq, Skv]; None if it is no band of ages."""
    if bool(visible.all()):
        return Full()
    if visible.dim() != 2:
        return None
    q_len, kv_len = visible.shape
    count = visible.sum(-1)
    shown = count > 0
    if not bool(shown.any()):
        return None
    # Row by row, because a table of ages would take eight times the memory of the mask.
    first = visible.to(torch.uint8).argmax(-1)
    last = kv_len - 1 - visible.flip(-1).to(torch.uint8).argmax(-1)
    place = torch.arange(q_len, device=visible.device) + (kv_len - q_len)
    high, low = int((place - first)[shown].max()), int((place - last)[shown].min())
    begin, end = (place - high).clamp(min=0), (place - low).clamp(max=kv_len - 1)
    is_band = torch.where(begin <= end, (first == begin) & (last == end) & (count == end - begin + 1), ~shown)
    if not bool(is_band.all()):
        return None
    youngest, oldest = int(kv_len - q_len) - (kv_len - 1), kv_len - 1
    right = -low if low > youngest else 0 if q_len == 1 else None
    left = high if high < oldest else None
    if left is None:
        return Full() if right is None else Causal(right)
    return SlidingWindow(left, right)


class _TooLarge(Exception):
    pass


def _expression(value: Any) -> sympy.Expr | int:
    return value.node.expr if isinstance(value, torch.SymInt) else int(value)


def _symints(order: list[fx.Node]) -> list[torch.SymInt]:
    found = [n.meta.get("val") for n in order]
    found += [size for v in found if isinstance(v, Tensor) for size in v.shape]
    return [v for v in found if isinstance(v, torch.SymInt)]


def _size_assignments(order: list[fx.Node]) -> list[Mapping[sympy.Symbol, int]]:
    """Values for the symbols: all beyond the largest constant in the mask; each a little larger; and as captured."""
    symints = _symints(order)
    symbols = sorted({s for v in symints for s in v.node.expr.free_symbols}, key=str)
    if not symbols:
        return [{}]
    shape_env = symints[0].node.shape_env
    assert shape_env is not None
    hints = {s: int(shape_env.backed_var_to_val.get(s, 8)) for s in symbols}
    numbers = [constant(value) for node in order for value in (node, *node.args, *node.kwargs.values())]
    beyond = max((abs(int(n)) for n in numbers if n is not None and abs(n) < _MOST_TOKENS), default=0) + 13
    return [
        {s: max(hint, beyond) + i for i, (s, hint) in enumerate(hints.items())},
        {s: hint + 3 + 2 * i for i, (s, hint) in enumerate(hints.items())},
        hints,
    ]


def _evaluate(order: list[fx.Node], sizes: Mapping[sympy.Symbol, int]) -> dict[fx.Node, Any]:
    """Run the nodes with real tensors; sizes come from their expressions, so that related sizes stay related."""
    values: dict[fx.Node, Any] = {}

    def concrete(source: fx.Node) -> Any:
        # What is not among the values only lends a type.
        return values[source] if source in values else torch.empty(0, dtype=value_of(source).dtype)

    for node in order:
        held = node.meta.get("val")
        if isinstance(held, (torch.SymInt, int)) and not isinstance(held, bool):
            expression = _expression(held)
            values[node] = expression if isinstance(expression, int) else int(expression.subs(sizes))
        elif node.op == "get_attr":
            values[node] = getattr(node.graph.owning_module, str(node.target)).clone()
        else:
            shape = held.shape if isinstance(held, Tensor) else ()
            count = 1
            for size in shape:
                expression = _expression(size)
                count *= expression if isinstance(expression, int) else int(expression.subs(sizes))
            if count > _MOST_ELEMENTS:
                raise _TooLarge
            assert callable(node.target)
            values[node] = node.target(*fx.map_arg(node.args, concrete), **fx.map_arg(node.kwargs, concrete))
    return values
