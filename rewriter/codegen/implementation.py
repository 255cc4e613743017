"""What a variant with a formula runs: the fastest of its plain implementation and of what is generated for the formula.

They compete by measurement, once for each site, its sizes and the target, and the times are remembered in the cache. On
CPUs generated C++ takes part, and copies of the keys that are seen; on GPUs generated Triton. Kernels have the shipped
config and those that promise less work.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from rewriter.codegen import cpp
from rewriter.codegen.attend import attend, registered
from rewriter.codegen.blocks import lists_of, pairs_of
from rewriter.codegen.formula import Formula, passed, reading
from rewriter.codegen.gathered import BLOCK, Gathered, traced, transformed
from rewriter.codegen.tuning import as_called, fastest, up_to
from rewriter.site import AttentionSite, Refusal
from rewriter.variant import Config, Implementation

_FEWEST = 16
"""With fewer queries a CPU mostly packs keys, and lists of blocks are made anew for every length of a cache."""

FormulaOf = Callable[[AttentionSite, Config], Formula]
Build = Callable[[AttentionSite, Config], Implementation]
Reads = Callable[..., dict[str, Tensor]]
"""What a formula reads of a call beside its mask and padding, made from query, key and padding, and from the tensors
that are the variant's own: a map of blocks, say. It is part of the call, and of what is measured.
"""


class Order(Protocol):
    """Tokens as a formula sees them, where they lie otherwise in the operands of a call."""

    @property
    def places(self) -> tuple[Tensor, Tensor]:
        """Where the queries and the keys of the formula lie, int32; -1 for one that is nowhere, which is zeros."""
        ...

    def said(self, mask: Tensor | None, padding: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """What is said of pairs of tokens, and of keys, in this order."""
        ...

    def around(self, inner: Implementation) -> Implementation:
        """`inner`, which takes tokens in this order, as an attention of tokens as they lie."""
        ...


def defined(formula: FormulaOf) -> Callable[..., Tensor]:
    """The definition of a variant, from its formula."""

    def reference(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, padding: Tensor | None, *rest: Any
    ) -> Tensor:
        *sink, site, config = rest
        tensors = passed(mask, padding)
        whole = reading(formula(site, config), tensors)
        return whole.reference(query, key, value, site.scale, sink=sink[0] if sink else None, **tensors)

    return reference


def generated(
    formula: FormulaOf,
    plain: Build | None = None,
    reads: Reads | None = None,
    *,
    computes: frozenset[str] = frozenset(),
) -> Build:
    """The implementation of a formula. `plain` serves where nothing is generated: where derivatives are wanted on a
    CPU, without a compiler, and wherever it is faster. Of a site's elements it `computes` these. Where scores pass
    others, and where there is none, blocks of queries with copies of the keys that they see take its place.
    """

    def build(site: AttentionSite, config: Config) -> Implementation:
        own = formula(site, config)
        otherwise = plain(site, config) if plain and site.elements <= computes else Gathered(own, site.scale)
        return Generated(own, site, otherwise, reads)

    return build


class Generated:
    """An attention by the fastest of what there is for its formula."""

    def __init__(
        self,
        formula: Formula,
        site: AttentionSite,
        plain: Callable[..., Tensor],
        reads: Reads | None = None,
        order: Order | None = None,
    ) -> None:
        self.formula, self.site, self.reads, self.order = formula, site, reads, order
        self.plain: Callable[..., Tensor] = order.around(plain) if order else plain
        self._chosen: dict[Any, Callable[..., Tensor]] = {}
        self.name = registered(self._said(), self.formula, self)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_chosen": {}}  # a built kernel is of one process

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.name = registered(self._said(), self.formula, self)

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        padding: Tensor | None,
        /,
        *sink: Tensor,
        **own: Tensor,
    ) -> Tensor:
        """(B, H, Sq, Dv). What is the variant's `own` goes to the plain implementation, and to what `reads`; gradients
        flow to it, too.
        """
        given: Any = (query, key, value, mask, padding, *sink)
        every = [t for t in (*given, *own.values()) if t is not None]
        learned = torch.is_grad_enabled() and any(t.requires_grad for t in every)
        on_gpu = query.device.type == "cuda"
        if (learned and not on_gpu) or (own and traced(query)):
            return self.plain(*given, **own)
        if traced(query):  # one node in the graph, measured when it runs
            out: Tensor = attend(query, key, value, mask, padding, sink[0] if sink else None, self.name)
            return out
        if any(transformed(t) for t in every):
            return self._shipped(given, own)(*given, **own) if on_gpu else self.plain(*given, **own)
        return self._fastest(given, own, learned)(*given, **own)

    def _said(self) -> str:
        """What is computed, and where."""
        functions = [f"{each.__module__}.{each.__qualname__}" for each in self.formula.masks + self.formula.scores]
        numbers = sorted(self.formula.numbers.items())
        return json.dumps([self.site.key(), functions, numbers, self.formula.normaliser])

    def pairs(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        padding: Tensor | None,
        /,
        *sink: Tensor,
        **own: Tensor,
    ) -> int:
        """How many pairs of a query and a key this call shows."""
        formula, tensors, standing = self._seen((query, key, value, mask, padding), own)
        if self.order:
            formula = replace(formula, masks=(*formula.masks, _somewhere))
            tensors["lies"] = self.order.places[0] >= 0
        return pairs_of(formula, *standing, tensors)

    def _fastest(self, given: Any, own: dict[str, Tensor], learned: bool) -> Callable[..., Tensor]:
        query, key, value, *others = given
        on_gpu = query.device.type == "cuda"
        if query.shape[2] < _FEWEST and not on_gpu:
            return self.plain
        lengths = up_to(query.shape[2]), up_to(key.shape[2])
        sizes = (*query.shape[:2], key.shape[1], *lengths, query.shape[3], value.shape[3])
        place = (*sizes, str(query.dtype), *(None if each is None else str(each.dtype) for each in others), learned)
        if place not in self._chosen:
            self._chosen[place] = (
                self._best_on_gpu(given, own, place, learned) if on_gpu else self._best_on_cpu(given, own, place)
            )
        return self._chosen[place]

    def _best_on_cpu(
        self, given: tuple[Any, ...], own: dict[str, Tensor], place: tuple[Any, ...]
    ) -> Callable[..., Tensor]:
        """The fastest of all that there is."""
        made = {"plain": self.plain, **dict(self._on_cpu(given, own))}
        return made[self._measured(given, own, place, made)] if len(made) > 1 else self.plain

    def _best_on_gpu(
        self, given: tuple[Any, ...], own: dict[str, Tensor], place: tuple[Any, ...], learned: bool
    ) -> Callable[..., Tensor]:
        """Generated Triton, unless the plain implementation is faster: kernel after kernel gets the config with which
        a call, with the gradients that are wanted, is the fastest.
        """
        from rewriter.codegen.fragments import KERNELS
        from rewriter.codegen.softmax import SoftmaxKernel, contenders

        formula, tensors, standing = self._seen(given, own)
        best = SoftmaxKernel(formula)
        names = KERNELS if learned else KERNELS[:1]
        for name in names:
            made = {str(each): each for each in contenders(best, name, tensors, *standing)}
            tried = {text: self._called(each) for text, each in made.items()}
            if name == names[-1]:
                tried["plain"] = self.plain
            if len(tried) > 1:
                text = self._measured(given, own, place, tried)
                if text not in made:
                    return self.plain
                best = made[text]
        return self._called(best)

    def _shipped(self, given: tuple[Any, ...], own: dict[str, Tensor]) -> Callable[..., Tensor]:
        from rewriter.codegen.softmax import SoftmaxKernel

        return self._called(SoftmaxKernel(self._seen(given, own)[0]))

    def _on_cpu(self, given: tuple[Any, ...], own: dict[str, Tensor]) -> Iterator[tuple[str, Callable[..., Tensor]]]:
        """Generated C++, each with a text that says which, none without a compiler; and copies of keys, where the
        plain implementation is another and the mask hides most.
        """
        formula, tensors, standing = self._seen(given, own)
        for size in cpp.sizes(formula, *standing, tensors):
            made = cpp.attention(formula, given[0], given[2], tensors, size, self.order.places if self.order else None)
            if isinstance(made, Refusal):
                break
            yield str(made.kernel.spec), self._called(made)
        elsewhere = self.order or self.reads or formula.ordered  # copies are of tokens as they lie
        if not (elsewhere or isinstance(self.plain, Gathered)) and _hides_most(formula, *standing, tensors):
            yield "gathered", Gathered(self.formula, self.site.scale)

    def _seen(
        self, given: tuple[Any, ...], own: dict[str, Tensor]
    ) -> tuple[Formula, dict[str, Tensor], tuple[Tensor, Tensor]]:
        """The formula of a call, what it reads, and tensors of the shapes of the queries and keys that it speaks of."""
        query, key, _, mask, padding, *_ = given
        if self.order:
            query, key = cpp.placed(query, key, self.order.places)
            mask, padding = self.order.said(mask, padding)
        return reading(self.formula, passed(mask, padding)), self._tensors(query, key, mask, padding, own), (query, key)

    def _tensors(
        self, query: Tensor, key: Tensor, mask: Tensor | None, padding: Tensor | None, own: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """All that the formula reads of a call, by name."""
        more = self.reads(query, key, padding, **own) if self.reads else {}
        return {**passed(mask, padding), **more}

    def _called(self, made: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """With the tensors of a call by their names. C++ goes by the places of an order; other kernels take the tokens
        in this order.
        """
        order, by_places = self.order, isinstance(made, cpp.Attention)

        def run(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            mask: Tensor | None,
            padding: Tensor | None,
            /,
            *sink: Tensor,
            **own: Tensor,
        ) -> Tensor:
            learned = sink[0] if sink else None
            if order and by_places:
                mask, padding = order.said(mask, padding)
            read = self._tensors(query, key, mask, padding, own)
            return made(query, key, value, self.site.scale, sink=learned, **read)

        return order.around(run) if order and not by_places else run

    def _measured(
        self,
        given: tuple[Any, ...],
        own: dict[str, Tensor],
        sizes: tuple[Any, ...],
        made: Mapping[str, Callable[..., Tensor]],
    ) -> str:
        """The name of the fastest."""
        calls = {name: as_called(each, given, own) for name, each in made.items()}
        return fastest("attention, by name", [self._said(), sizes], calls, given[0].device) or "plain"


def _hides_most(formula: Formula, query: Tensor, key: Tensor, tensors: Mapping[str, Tensor]) -> bool:
    """Does less than half of all blocks remain?"""
    if not formula.masks:
        return False
    runs = lists_of(formula)(query, key, tensors, BLOCK, BLOCK)
    return 2 * runs.visited < runs.first[..., 1:].numel() * -(-key.shape[2] // BLOCK)


def _somewhere(row: Any, lies: Any) -> Any:
    return lies[row]
