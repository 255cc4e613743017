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

from rewriter.nodes import argument, constant, is_call, value_of
from rewriter.pattern import Normaliser, Pattern, Step
from rewriter.twins import are_twins

_ATEN = torch.ops.aten


def normaliser(node: fx.Node) -> Normaliser | None:
    """e / e.sum(axis, keepdim=True) with e = exp(scores), or a softmax, which is in proportion to them."""
    if is_call(node, _ATEN.exp):
        return _by_logarithm(node) or _divided_later(node)
    if not is_call(node, _ATEN.div, _ATEN.true_divide) or len(node.args) != 2:
        return None
    weights, total = node.args
    assert isinstance(weights, fx.Node) and isinstance(total, fx.Node | int | float)
    found = _exponential(weights)
    if found is None:
        return None
    power, hidden, edit = found
    one_more = False
    if is_call(total, _ATEN.clamp, _ATEN.clamp_min):
        assert isinstance(total, fx.Node)
        total, edit = total.all_input_nodes[0], "epsilon"
    if is_call(total, _ATEN.add):
        assert isinstance(total, fx.Node)
        left, right = total.args[:2]
        total, other = (left, right) if is_call(left, _ATEN.sum) else (right, left)
        one_more = is_call(power, _ATEN.exp) and _is_one(other, power)
        if not one_more:
            edit = "epsilon"
    if not is_call(total, _ATEN.sum):
        return None
    assert isinstance(total, fx.Node)
    axes, keeps = argument(total, "dim"), argument(total, "keepdim")
    summed = total.args[0]
    assert isinstance(summed, fx.Node)
    if not are_twins(summed, weights) or not isinstance(axes, (list, tuple)) or len(axes) != 1 or not keeps:
        return None
    scores, axis, inner = power.all_input_nodes[0], int(axes[0]), None
    if not is_call(power, _ATEN.exp):
        inner, rank = power, value_of(power).dim()
        if int(argument(power, "dim")) % rank != axis % rank:
            return None
    if one_more and is_call(scores, _ATEN.sub):  # the 1 was shifted too, as exp(-max)
        scores = scores.all_input_nodes[0]
    dtype = value_of(node).dtype
    return Normaliser(scores, axis, dtype=dtype, zero_sink=one_more, hidden=hidden, edit=edit, inner=inner)


def _exponential(node: Any, depth: int = 0) -> tuple[fx.Node, tuple[tuple[fx.Node, Step], ...], str] | None:
    """The exponential or the softmax that these were, what was hidden of it, and an edit that is no hiding."""
    if is_call(node, _ATEN.exp, _ATEN.softmax, _ATEN._softmax, _ATEN._safe_softmax):
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
    if is_call(node, _ATEN.mul, _ATEN.mul_) and len(node.all_input_nodes) == 2:
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


def _by_logarithm(node: fx.Node) -> Normaliser | None:
    """exp(s - logsumexp(s, axis, keepdim=True))."""
    difference = node.all_input_nodes[0]
    if not is_call(difference, _ATEN.sub):
        return None
    scores, total = difference.args[:2]
    if not isinstance(scores, fx.Node) or not is_call(total, _ATEN.logsumexp):
        return None
    assert isinstance(total, fx.Node)
    axes, keeps = argument(total, "dim"), argument(total, "keepdim")
    if total.args[0] is not scores or not isinstance(axes, (list, tuple)) or len(axes) != 1 or not keeps:
        return None
    return Normaliser(scores, int(axes[0]), dtype=value_of(node).dtype)


def _divided_later(node: fx.Node) -> Normaliser | None:
    """exp(s) goes into the product with the values, and the result is divided by its sum."""
    sums = [user for user in node.users if is_call(user, _ATEN.sum)]
    axes = argument(sums[0], "dim") if sums else None
    if len(sums) != 1 or not isinstance(axes, (list, tuple)) or len(axes) != 1 or len(node.users) < 2:
        return None
    if any(is_call(user, _ATEN.div, _ATEN.true_divide) for user in node.users):
        return None
    scores = node.all_input_nodes[0]
    return Normaliser(scores, int(axes[0]), dtype=value_of(node).dtype, edit="divided_later")


def _is_one(other: Any, power: fx.Node) -> bool:
    """exp(0), shifted as the scores were: 1 beside exp(s), exp(-m) beside exp(s - m)."""
    shifted = power.all_input_nodes[0]
    if not is_call(shifted, _ATEN.sub):
        return constant(other) == 1.0
    if not is_call(other, _ATEN.exp):
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
