"""Functions of indices that several tests make kernels of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rewriter.codegen.formula import Formula


def near(i: Any, j: Any, window: int) -> Any:
    return (i - j < window) & (j <= i)


def same_segment(b: Any, i: Any, j: Any, segment: Any) -> Any:
    return segment[b, i] == segment[b, j]


def alibi(s: Any, h: Any, i: Any, j: Any, slopes: Any) -> Any:
    return s - slopes[h] * (i - j).abs()


def of_distance(s: Any, i: Any, j: Any) -> Any:
    """Functions of whole numbers, which have no form of their own on any target."""
    age = (i - j).abs()
    return s * torch.exp(-age) - torch.log(age + 1) + torch.sqrt(j) * torch.sigmoid(i - j) * 0.1 + torch.tanh(~j % 3)


def by_name(s: Any, i: Any, j: Any) -> Any:
    return torch.where(condition=i >= j, input=s, other=torch.clamp(input=s, max=0.5)) + torch.clamp(i, j * 0.5) * 0.1


def scattered(i: Any, j: Any) -> Any:
    """Products beyond 32 bits."""
    return ((i * 70000) * j + j * 2654435761) % 7 < 5


def later_kind(i: Any, j: Any, kind: Any) -> Any:
    """Of uint8 a difference would wrap around."""
    return (kind[i] - kind[j]).clamp(min=j % 2) < 2


def position(i: Any, j: Any) -> Any:
    return -(i - j).abs()


def unusual(length: int) -> dict[str, tuple[Formula, dict[str, Tensor]]]:
    """Formulas of what is rarely said, with the tensors that they read of so many keys."""
    kind = torch.randint(0, 5, (length,)).to(torch.uint8)
    window = {"window": torch.tensor(20)}
    places = torch.randn(length)

    def placed(s: Any, i: Any, j: Any, places: Any) -> Any:
        return s + (places[i] - places[j])

    return {
        "distance": (Formula(scores=(of_distance,)), {}),
        "by name": (Formula(scores=(by_name,)), {}),
        "large": (Formula((scattered,)), {}),
        "bytes": (Formula((later_kind,)), {"kind": kind}),
        "all keys": (Formula((lambda: True,)), {}),
        "position alone": (Formula((near,), (position,), window), {}),
        "a constant": (Formula(scores=(lambda s: 1,)), {}),
        "float16": (Formula(scores=(placed,)), {"places": places.half()}),
        "float64": (Formula(scores=(placed,)), {"places": places.double()}),
    }
