"""Softmax written out: exp(s - max) / sum(exp(s - max)), perhaps without the maximum, perhaps with 1 more in the sum
("softmax1", Miller 2023, "Attention is off by one"), perhaps with a mask over the exponentials, which may be
a softmax already."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import fx

from rewriter.nodes import argument, constant, depends_on_data, is_call, unsliced, value_of
from rewriter.pattern import Contraction, Normaliser, Pattern, Step, ask
from rewriter.twins import are_twins

_ATEN = torch.ops.aten
_POWERS = (_ATEN.exp, _ATEN.exp_, _ATEN.exp2, _ATEN.exp2_, _ATEN.pow.Scalar)
_HIDINGS = (
    _ATEN.mul, _ATEN.mul_, _ATEN.masked_fill, _ATEN.masked_fill_, _ATEN.where, _ATEN.tril, _ATEN.triu,
)  # fmt: skip
_SUMS = (_ATEN.sum, _ATEN.logsumexp)
_SOFTMAXES = (_ATEN.softmax, _ATEN._softmax, _ATEN._safe_softmax)
_RESHAPES = (_ATEN.unsqueeze, _ATEN.view, _ATEN.reshape, _ATEN._unsafe_view, _ATEN.expand, _ATEN.expand_as, _ATEN.alias)


def normaliser(node: fx.Node) -> Normaliser | None:
    """e / e.sum(axis, keepdim=True) with e = exp(scores), or a softmax, which is in proportion to them."""
    if (found := _divided(node)) is not None:
        return found
    if not is_call(node, *_POWERS, *_HIDINGS):
        return None
    return _by_logarithm(node) or _divided_later(node) or _undivided(node)


def _divided(node: fx.Node) -> Normaliser | None:
    for weights, total in _quotients(node):
        found = _exponential(weights)
        result = _over_its_sum(node, weights, total, *found) if found is not None else None
        if result is not None:
            return result
    return None


def _quotients(node: fx.Node) -> Iterator[tuple[fx.Node, Any]]:
    """(a, b) of a / b, and of a * (1 / b)."""
    if is_call(node, _ATEN.div, _ATEN.div_, _ATEN.true_divide) and len(node.args) == 2 and not node.kwargs:
        if isinstance(node.args[0], fx.Node):
            yield node.args[0], node.args[1]
    elif is_call(node, _ATEN.mul, _ATEN.mul_) and len(node.all_input_nodes) == 2:
        for weights, factor in itertools.permutations(node.all_input_nodes):
            while is_call(factor, _ATEN.mul) and 1.0 in map(constant, factor.args):  # as 1 / b is traced
                factor = factor.all_input_nodes[0]
            if is_call(factor, _ATEN.reciprocal) or (is_call(factor, _ATEN.pow) and constant(factor.args[1]) == -1):
                yield weights, factor.all_input_nodes[0]


def _over_its_sum(
    node: fx.Node, weights: fx.Node, total: Any, power: fx.Node, hidden: tuple[tuple[fx.Node, Step], ...], edit: str
) -> Normaliser | None:
    one_more = False
    if is_call(total, _ATEN.clamp, _ATEN.clamp_min):
        total, edit = total.all_input_nodes[0], "epsilon"
    if is_call(total, _ATEN.add):
        left, right = total.args[:2]
        total, other = (left, right) if _total(left, weights) is not None else (right, left)
        one_more = _base(power) is not None and _is_one(other, power)
        if not one_more:
            edit = "epsilon"
    found = _total(total, weights)
    if found is None:
        return None
    axis, inner, base = found[1], None, _base(power)
    scores = power.all_input_nodes[0]
    if not is_call(found[0], _ATEN.sum) or not are_twins(found[0].all_input_nodes[0], weights):
        return None
    if base is None:
        inner, rank = power, value_of(power).dim()
        if int(argument(power, "dim")) % rank != axis % rank:
            return None
    if one_more and is_call(scores, _ATEN.sub):  # the 1 was shifted too, as exp(-max)
        scores = scores.all_input_nodes[0]
    dtype = value_of(node).dtype
    return Normaliser(
        scores, axis, dtype=dtype, zero_sink=one_more, hidden=hidden, edit=edit, inner=inner, factor=base or 1.0
    )


def _total(node: Any, like: fx.Node) -> tuple[fx.Node, int] | None:
    """The sum, or its logarithm, over an axis of what is shaped like this, where that axis is kept or put back."""
    wide = [*value_of(like).shape]
    shapes = []
    while is_call(node, *_RESHAPES) or (is_call(node, _ATEN.slice) and unsliced(node) is not node):
        shapes.append([*value_of(node).shape])
        node = node.all_input_nodes[0]
    axes = argument(node, "dim") if is_call(node, *_SUMS) else None
    if not isinstance(axes, (list, tuple)) or len(axes) != 1 or value_of(node.all_input_nodes[0]).dim() != len(wide):
        return None
    axis = int(axes[0]) % len(wide)
    kept = [1 if place == axis else size for place, size in enumerate(wide)]
    return (node, axis) if kept in [*shapes, [*value_of(node).shape]] else None


def _base(node: Any) -> float | None:
    """The logarithm of the base, where this is a power of one number."""
    if not is_call(node, *_POWERS):
        return None
    if is_call(node, _ATEN.exp, _ATEN.exp_):
        return 1.0
    base = constant(node.args[0]) if is_call(node, _ATEN.pow) else 2.0
    return math.log(base) if base is not None and base > 1 else None


def _exponential(node: Any, depth: int = 0) -> tuple[fx.Node, tuple[tuple[fx.Node, Step], ...], str] | None:
    """The exponential or the softmax that these were, what was hidden of it, and an edit that is no hiding."""
    if _base(node) is not None or is_call(node, *_SOFTMAXES):
        return node, (), ""
    for source, hiding in _hidings(node) if depth < _MOST_MASKS else ():
        if (found := _exponential(source, depth + 1)) is not None:
            power, hidden, edit = found
            if isinstance(hiding, str):
                return power, hidden, hiding
            kind, tensor = hiding
            return power, (*hidden, (node, Step(kind, source, tensor, float("-inf")))), edit
    return None


_MOST_MASKS = 4


def _hidings(node: Any) -> Iterator[tuple[fx.Node, tuple[Literal["keep", "drop"], fx.Node] | str]]:
    """Of what this may be a part: (the whole, (where it is or is not 0 by a bool mask)), or (the whole, an edit)."""
    if is_call(node, _ATEN.mul, _ATEN.mul_) and _of_tensors(node):
        for source, mask in itertools.permutations(node.all_input_nodes):
            seen = mask
            while is_call(seen, _ATEN.to, _ATEN._to_copy):
                seen = seen.all_input_nodes[0]
            yield source, ("keep", seen) if value_of(seen).dtype == torch.bool else "weighted"
    elif is_call(node, _ATEN.masked_fill, _ATEN.masked_fill_) and constant(node.args[2]) == 0:
        yield node.args[0], ("drop", node.args[1])
    elif is_call(node, _ATEN.where) and len(node.args) == 3:
        condition, chosen, other = node.args
        if constant(other) == 0:
            yield chosen, ("keep", condition)
        if constant(chosen) == 0:
            yield other, ("drop", condition)
    elif is_call(node, _ATEN.tril, _ATEN.triu):
        yield node.all_input_nodes[0], "triangular"


def _of_tensors(node: fx.Node) -> bool:
    return [isinstance(each.meta.get("val"), torch.Tensor) for each in node.all_input_nodes] == [True, True]


def _by_logarithm(node: fx.Node) -> Normaliser | None:
    """exp(s - logsumexp(s, axis, keepdim=True))."""
    difference = node.all_input_nodes[0] if is_call(node, _ATEN.exp, _ATEN.exp_) else None
    if not is_call(difference, _ATEN.sub, _ATEN.sub_):
        return None
    assert isinstance(difference, fx.Node)
    scores, total = difference.args[:2]
    if not isinstance(scores, fx.Node):
        return None
    found = _total(total, scores)
    if found is None or not is_call(found[0], _ATEN.logsumexp) or found[0].args[0] is not scores:
        return None
    return Normaliser(scores, found[1], dtype=value_of(node).dtype, doubt="by_logarithm")


def _divided_later(node: fx.Node) -> Normaliser | None:
    """exp(s) goes into the product with the values, and the result is divided by its sum."""
    sums = [user for user in node.users if is_call(user, _ATEN.sum)]
    axes = argument(sums[0], "dim") if sums else None
    if len(sums) != 1 or not isinstance(axes, (list, tuple)) or len(axes) != 1 or len(node.users) < 2:
        return None
    found = _exponential(node)
    base = _base(found[0]) if found is not None else None
    if found is None or base is None or any(_divided(user) is not None for user in node.users):
        return None
    power, hidden, _ = found
    scores = power.all_input_nodes[0]
    dtype = value_of(node).dtype
    return Normaliser(scores, int(axes[0]), dtype=dtype, hidden=hidden, edit="divided_later", factor=base)


def _undivided(node: fx.Node) -> Normaliser | None:
    """exp(s) goes into a product, and nothing divides it: the sum may be a column of that product."""
    axis = _summed_with_values(node)
    found = _exponential(node) if axis is not None else None
    base = _base(found[0]) if found is not None else None
    if axis is None or found is None or base is None or any(is_call(user, _ATEN.sum) for user in node.users):
        return None
    power, hidden, _ = found
    scores, dtype = power.all_input_nodes[0], value_of(node).dtype
    if is_call(scores, _ATEN.log_softmax, _ATEN._log_softmax):
        return None
    return Normaliser(scores, axis, dtype=dtype, hidden=hidden, edit="not_divided", factor=base)


def _summed_with_values(node: fx.Node) -> int | None:
    """The axis along which a product with what depends on data sums this."""
    for user in node.users:
        product: Contraction | None = ask("contraction", user)
        if product is None or (product.left is node) == (product.right is node):
            continue
        left = product.left is node
        labels, other = (product.left_labels, product.right) if left else (product.right_labels, product.left)
        if depends_on_data(other):
            return next((place for place, label in enumerate(labels) if label not in product.out_labels), None)
    return None


def _is_one(other: Any, power: fx.Node) -> bool:
    """exp(0), shifted as the scores were: 1 beside exp(s), exp(-m) beside exp(s - m)."""
    shifted = power.all_input_nodes[0]
    if not is_call(shifted, _ATEN.sub):
        return constant(other) == 1.0
    if not is_call(other, power.target):
        return False
    inner = other.all_input_nodes[0]
    return is_call(inner, _ATEN.neg) and inner.all_input_nodes[0] is shifted.args[1]


def _written(scale: float, shift: bool, one: bool) -> Callable[..., torch.Tensor]:
    def example(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        s = (q @ k.mT * scale).masked_fill(~mask, -1e30)
        m = s.amax(-1, keepdim=True) if shift else torch.zeros((), dtype=s.dtype)
        e = (s - m).exp() if shift else s.exp()
        total = e.sum(-1, keepdim=True)
        if one:
            total = total + ((-m).exp() if shift else 1.0)
        return (e / total) @ v

    return example


def _hidden_after(how: int) -> Callable[..., torch.Tensor]:
    def example(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        s = q @ k.mT * 0.3
        e = (s - s.amax(-1, keepdim=True)).exp()
        e = (e * mask, mask.to(e.dtype) * e, e.masked_fill(~mask, 0.0), torch.where(mask, e, 0.0))[how]
        return (e / e.sum(-1, keepdim=True)) @ v

    return example


def _hidden_after_softmax(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    p = (q @ k.mT * 0.3).softmax(-1)
    return (p * mask / (p * mask).sum(-1, keepdim=True)) @ v


def _by_logsumexp(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    s = q @ k.mT * 0.3  # a row that is hidden altogether would sum to the number of keys
    return (s - s.logsumexp(-1, keepdim=True)).exp() @ v


PATTERN = Pattern(
    name="decomposed_softmax",
    normaliser=normaliser,
    examples=(
        _written(1 / math.sqrt(7), True, False),
        _written(0.3, False, False),
        _written(0.3, True, True),
        _written(0.3, False, True),
        _by_logsumexp,
        _hidden_after_softmax,
        *map(_hidden_after, range(4)),
    ),
)
