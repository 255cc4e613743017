"""Operators that are several others, written as these: the grammar then knows them in one spelling."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from string import ascii_letters
from typing import Any

import torch
from torch import Tensor

_ATEN = torch.ops.aten


def einsum(equation: str, tensors: Sequence[Tensor], *, path: Sequence[int] | None = None) -> Any:
    """Of more than two tensors: two by two, first those whose product has the fewest axes. Without a sum it is
    a multiplication. Anything else stays.
    """
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) != len(tensors) or "." in equation or any(len(set(term)) < len(term) for term in (*terms, output)):
        return NotImplemented
    if not arrow:  # what occurs once, in the order of the alphabet
        output = "".join(sorted(letter for letter in set(inputs) - {","} if inputs.count(letter) == 1))
    if len(tensors) == 2:
        kept = set(terms[0]) | set(terms[1]) == set(output)
        if kept:
            return _multiplied(terms[0], tensors[0], terms[1], tensors[1], output)
        return NotImplemented if arrow else torch.einsum(f"{inputs}->{output}", *tensors)
    return _two_by_two(terms, list(tensors), output) if len(tensors) > 2 else NotImplemented


def _two_by_two(terms: list[str], tensors: list[Tensor], output: str) -> Tensor:
    while len(tensors) > 1:
        ways = []
        for i, j in itertools.combinations(range(len(terms)), 2):
            others = set(output).union(*(term for k, term in enumerate(terms) if k not in (i, j)))
            made = "".join(letter for letter in dict.fromkeys(terms[i] + terms[j]) if letter in others)
            ways.append((len(made), i, j, made))
        _, i, j, made = min(ways)
        made = output if len(tensors) == 2 else made
        product = torch.einsum(f"{terms[i]},{terms[j]}->{made}", tensors[i], tensors[j])
        rest = [k for k in range(len(terms)) if k not in (i, j)]
        terms, tensors = [*(terms[k] for k in rest), made], [*(tensors[k] for k in rest), product]
    return tensors[0]


def _multiplied(left: str, one: Tensor, right: str, other: Tensor, output: str) -> Tensor:
    def placed(term: str, tensor: Tensor) -> Tensor:
        order = [term.index(letter) for letter in output if letter in term]
        tensor = tensor if order == sorted(order) else tensor.permute(order)
        for place, letter in enumerate(output):
            tensor = tensor if letter in term else tensor.unsqueeze(place)
        return tensor

    return placed(left, one) * placed(right, other)


def tensordot(one: Tensor, other: Tensor, first: Sequence[int], second: Sequence[int]) -> Tensor:
    """The sum over pairs of axes, as an einsum."""
    letters = iter(ascii_letters)
    left = [next(letters) for _ in range(one.dim())]
    right = [next(letters) for _ in range(other.dim())]
    for i, j in zip(first, second, strict=True):
        right[j] = left[i]
    output = [n for i, n in enumerate(left) if i not in {i % one.dim() for i in first}]
    output += [n for j, n in enumerate(right) if j not in {j % other.dim() for j in second}]
    result: Tensor = torch.einsum(f"{''.join(left)},{''.join(right)}->{''.join(output)}", one, other)
    return result


def cosine_similarity(one: Tensor, other: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """The product of vectors of unit length, none of which is divided by less than `eps`."""
    one, other = (each / torch.linalg.vector_norm(each, dim=dim, keepdim=True).clamp_min(eps) for each in (one, other))
    return (one * other).sum(dim)


def index_fill(tensor: Tensor, dim: int, index: Tensor, value: Any) -> Tensor:
    """A number wherever an axis has one of these places, which may count from its end."""
    length = tensor.shape[dim]
    places = torch.arange(length, device=tensor.device)
    found = (places[:, None] == index.reshape(1, -1) % length).any(1)
    shape = [1] * tensor.dim()
    shape[dim] = -1
    return tensor.masked_fill(found.view(shape), value)


SEVERAL: dict[Any, Callable[..., Any]] = {
    _ATEN.einsum.default: einsum,
    _ATEN.tensordot.default: tensordot,
    _ATEN.linalg_matmul.default: torch.matmul,
    _ATEN.mv.default: lambda matrix, vector: torch.matmul(matrix, vector),
    _ATEN.cosine_similarity.default: cosine_similarity,
    _ATEN.addcmul.default: lambda tensor, one, other, *, value=1: torch.add(tensor, one * other, alpha=value),
    _ATEN.addcdiv.default: lambda tensor, one, other, *, value=1: torch.add(tensor, one / other, alpha=value),
    _ATEN.index_fill.int_Scalar: index_fill,
}
