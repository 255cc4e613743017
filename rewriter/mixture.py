"""One site, several implementations: by heads, and by the length of a call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rewriter.site import AttentionSite
from rewriter.variant import Implementation


def of_heads(site: AttentionSite, heads: Sequence[int]) -> AttentionSite:
    """The site of some key/value heads, with the query heads that share them."""
    return replace(site, heads=len(heads) * (site.heads // site.kv_heads), kv_heads=len(heads))


class ByHeads:
    """Groups of heads, each with an implementation of its own: ((key/value heads), implementation) pairs, which hold
    every head once.
    """

    def __init__(self, parts: Sequence[tuple[Sequence[int], Implementation]]) -> None:
        self.parts = [(tuple(heads), implementation) for heads, implementation in parts]
        order = [head for heads, _ in self.parts for head in heads]
        self._order = tuple(sorted(range(len(order)), key=order.__getitem__))

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, padding: Tensor | None, /, *sink: Tensor
    ) -> Tensor:
        """(B, H, Sq, Dv)."""
        groups = query.shape[1] // key.shape[1]

        def own(t: Tensor | None, heads: tuple[int, ...]) -> Tensor | None:
            """Of a tensor with the query heads on axis 1; one that serves all heads stays as it is."""
            if t is None or t.dim() < 4 or t.shape[1] == 1:
                return t
            return chosen(t.unflatten(1, (-1, groups)), 1, heads).flatten(1, 2)

        outs = []
        for heads, implementation in self.parts:
            logits = [chosen(each.unflatten(0, (-1, groups)), 0, heads).flatten() for each in sink]
            q = own(query, heads) if query.shape[1] > 1 else query
            assert q is not None
            outs.append(
                implementation(q, chosen(key, 1, heads), chosen(value, 1, heads), own(mask, heads), padding, *logits)
            )
        whole = torch.cat([out.unflatten(1, (-1, groups)) for out in outs], 1)
        return chosen(whole, 1, self._order).flatten(1, 2)


def chosen(t: Tensor, axis: int, places: tuple[int, ...]) -> Tensor:
    """Some places of an axis: a view where they follow one another."""
    if places == tuple(range(places[0], places[0] + len(places))):
        return t.narrow(axis, places[0], len(places))
    return t.index_select(axis, torch.tensor(places, device=t.device))


@dataclass
class Outside:
    """How many calls did not fit what was measured, and what the last of them was."""

    calls: int = 0
    keys: int = 0


class ByLength:
    """An implementation for calls with between `least` and `most` keys; the others are counted and run `otherwise`."""

    def __init__(
        self, implementation: Implementation, otherwise: Implementation, lengths: tuple[int, int], outside: Outside
    ) -> None:
        self.implementation: Callable[..., Tensor] = implementation
        self.otherwise: Callable[..., Tensor] = otherwise
        self.lengths = lengths
        self.outside = outside

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, padding: Tensor | None, /, *sink: Tensor
    ) -> Tensor:
        """(B, H, Sq, Dv)."""
        least, most = self.lengths
        if key.shape[2] >= least and key.shape[2] <= most:
            return self.implementation(query, key, value, mask, padding, *sink)
        if key.shape[2] > most and not torch.compiler.is_compiling():
            self.outside.calls += 1
            self.outside.keys = int(key.shape[2])
        return self.otherwise(query, key, value, mask, padding, *sink)


class UpTo:
    """One implementation for calls with up to `most` keys, and another for longer ones."""

    def __init__(self, most: int, shorter: Implementation, longer: Implementation) -> None:
        self.most = most
        self.shorter: Callable[..., Tensor] = shorter
        self.longer: Callable[..., Tensor] = longer

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, padding: Tensor | None, /, *sink: Tensor
    ) -> Tensor:
        """(B, H, Sq, Dv)."""
        implementation = self.shorter if key.shape[2] <= self.most else self.longer
        return implementation(query, key, value, mask, padding, *sink)
