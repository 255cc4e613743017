"""What a variant with a formula runs on each device: Triton on GPUs, on CPUs what is the fastest there.

On a CPU the generated C++ competes with the variant's own plain implementation, by measurement: once for each site, its
sizes and target, and the winner is remembered in the cache.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from rewriter.cache import recall, remember
from rewriter.codegen import cpp
from rewriter.codegen.formula import Formula, biased, shown, tokens
from rewriter.site import AttentionSite, Refusal
from rewriter.target import Target
from rewriter.variant import Config, Implementation

_FEWEST = 16
"""With fewer queries a kernel mostly packs keys, and lists of blocks are made anew for every length of a cache."""

FormulaOf = Callable[[AttentionSite, Config], Formula]
Build = Callable[[AttentionSite, Config], Implementation]


def defined(formula: FormulaOf) -> Callable[..., Tensor]:
    """The definition of a variant, from its formula."""

    def reference(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, padding: Tensor | None, *rest: Any
    ) -> Tensor:
        *sink, site, config = rest
        whole, tensors = completed(formula(site, config), mask, padding)
        return whole.reference(query, key, value, site.scale, sink=sink[0] if sink else None, **tensors)

    return reference


def plainly(formula: FormulaOf) -> Build:
    """The definition as an implementation, with the whole matrix of scores: what there is where nothing better is."""
    reference = defined(formula)

    def build(site: AttentionSite, config: Config) -> Implementation:
        return lambda *given: reference(*given, site, config)

    return build


def generated(formula: FormulaOf, plain: Build | None = None) -> Build:
    """The implementation of a formula. `plain` serves where nothing is generated: where gradients are wanted on a CPU,
    while a graph is traced, without a compiler, and wherever it is faster.
    """
    otherwise = plain or plainly(formula)

    def build(site: AttentionSite, config: Config) -> Implementation:
        return Generated(formula(site, config), site, otherwise(site, config))

    return build


def completed(formula: Formula, mask: Tensor | None, padding: Tensor | None) -> tuple[Formula, dict[str, Tensor]]:
    """The formula with the tensors of one call: padding, and a mask that is bool or added."""
    tensors: dict[str, Tensor] = {}
    if padding is not None:
        formula, tensors["padding"] = replace(formula, masks=(*formula.masks, tokens)), padding
    if mask is not None:
        whole = mask[(None,) * (4 - mask.dim())] if mask.dim() < 4 else mask
        if mask.dtype == torch.bool:
            formula, tensors["mask"] = replace(formula, masks=(*formula.masks, shown)), whole
        else:
            formula, tensors["bias"] = replace(formula, scores=(*formula.scores, biased)), whole
    return formula, tensors


class Generated:
    """An attention by the fastest of what was made for its formula."""

    def __init__(self, formula: Formula, site: AttentionSite, plain: Implementation) -> None:
        self.formula, self.site, self.plain = formula, site, plain
        self._chosen: dict[Any, Implementation] = {}

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, padding: Tensor | None, /, *sink: Tensor
    ) -> Tensor:
        """(B, H, Sq, Dv)."""
        given: Any = (query, key, value, mask, padding, *sink)
        if torch.compiler.is_compiling() or is_fake(query):
            return self.plain(*given)
        if query.device.type == "cuda":
            return self._on_gpu(*given)
        learned = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
        return self.plain(*given) if learned else self._fastest(given)(*given)

    def _on_gpu(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, padding: Any, *sink: Tensor) -> Tensor:
        from rewriter.codegen.softmax import kernel_of

        formula, tensors = completed(self.formula, mask, padding)
        return kernel_of(formula)(query, key, value, self.site.scale, sink=sink[0] if sink else None, **tensors)

    def _fastest(self, given: Any) -> Implementation:
        query, key, value, *others = given
        if query.shape[2] < _FEWEST:
            return self.plain
        # A cache grows with every call: lengths up to the next power of two have one answer.
        lengths = [1 << (n - 1).bit_length() for n in (query.shape[2], key.shape[2])]
        sizes = (*query.shape[:2], key.shape[1], *lengths, query.shape[3], value.shape[3])
        place = (*sizes, str(query.dtype), *(each is None for each in others))
        if place not in self._chosen:
            candidate = self._native(given)
            self._chosen[place] = self.plain if candidate is None else self._measured(given, place, *candidate)
        return self._chosen[place]

    def _native(self, given: tuple[Any, ...]) -> tuple[Implementation, str] | None:
        """The generated C++, and a text that says which; None where there is none."""
        query, _, value, mask, padding, *_ = given
        formula, tensors = completed(self.formula, mask, padding)
        made = cpp.attention(formula, query, value, tensors)
        if isinstance(made, Refusal):
            return None

        def attend(
            query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, padding: Tensor | None, /, *sink: Tensor
        ) -> Tensor:
            _, tensors = completed(self.formula, mask, padding)
            return made(query, key, value, self.site.scale, sink=sink[0] if sink else None, **tensors)

        return attend, str(made.kernel.spec)

    def _measured(self, given: Any, sizes: tuple[Any, ...], candidate: Implementation, name: str) -> Implementation:
        from rewriter.tune.measure import alternate, medians

        place = json.dumps([self.site.key(), name, sizes, Target.current("cpu").to_json()])
        taken = recall("cpu", place)
        if taken is None:
            with torch.no_grad():
                runs = [lambda: self.plain(*given), lambda: candidate(*given)]
                taken = medians(alternate(runs, repeats=3, budget=2.0))
            remember("cpu", place, taken)
        return candidate if taken[1] < taken[0] else self.plain
