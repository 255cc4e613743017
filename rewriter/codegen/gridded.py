"""Attention over a grid: its formula, its definition, and its implementation in the order of boxes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rewriter.codegen.blocks import pairs_of
from rewriter.codegen.either import Either
from rewriter.codegen.formula import Formula, of_site, passed, reading
from rewriter.codegen.implementation import Build, FormulaOf, defined, generated
from rewriter.codegen.layout import Layout, Rules, RulesOf, box_of, from_boxes, plane_of, seeing, to_boxes, zeros_of
from rewriter.site import AttentionSite
from rewriter.variant import Config, Implementation


def formula_on_grid(rules_of: RulesOf, *, boxes: bool = True) -> FormulaOf:
    """What kernels compute: the site's own formula with fewer keys, of tokens in the order of boxes."""

    def formula(site: AttentionSite, config: Config) -> Formula:
        layout, own = plane_of(site), of_site(site)
        rules = rules_of(site, config)
        box = box_of(layout, rules) if boxes and not layout.endless else None
        return replace(own, masks=(*own.masks, seeing(layout, rules, box)))

    return formula


def defined_on_grid(rules_of: RulesOf) -> Callable[..., Tensor]:
    """The definition: of tokens as they lie. Calls of other lengths are the site's own attention."""
    local, whole = defined(formula_on_grid(rules_of, boxes=False)), defined(_own)

    def reference(query: Tensor, key: Tensor, *rest: Any) -> Tensor:
        *_, site, config = rest
        layout = plane_of(site)
        if not fits(layout, query, key):
            return whole(query, key, *rest)
        given = _behind(zeros_of(layout, rules_of(site, config)), key, *rest[:3])
        return local(query, *given, *rest[3:])

    return reference


def built_on_grid(rules_of: RulesOf) -> Build:
    """The implementation, generated. Calls of other lengths are the site's own attention."""

    def build(site: AttentionSite, config: Config) -> Implementation:
        layout, rules = plane_of(site), rules_of(site, config)
        local = generated(formula_on_grid(rules_of))(site, config)
        if layout.endless:
            return local
        whole = formula_on_grid(rules_of, boxes=False)(site, config)
        boxed = Boxed(local, whole, layout, rules, box_of(layout, rules), zeros_of(layout, rules))
        return Either(boxed, generated(_own)(site, config), lambda query, key: fits(layout, query, key))

    return build


@dataclass(frozen=True)
class Boxed:
    """`local` of tokens in the order of boxes, with so many `zeros` in front of the keys, as an attention of tokens as
    they lie, whose masks are `formula`'s and `padding`. What is added to the scores follows the tokens; a mask that is
    bool says nothing more, and is not read.
    """

    local: Implementation
    formula: Formula
    layout: Layout
    rules: Rules
    box: tuple[int, ...]
    zeros: int

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, padding: Tensor | None, /, *sink: Tensor
    ) -> Tensor:
        """(B, H, tokens, Dv)."""
        order = self.layout, self.rules, self.box
        query, key, value = (to_boxes(t, *order) for t in (query, key, value))
        if padding is not None:
            padding = to_boxes(padding[:, None, :, None], *order)[:, 0, :, 0]
        bias = None if mask is None or mask.dtype == torch.bool else _bias_to_boxes(mask, *order)
        given = _behind(self.zeros, key, value, bias, padding)
        return from_boxes(self.local(query, *given, *sink), *order)

    def pairs(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, padding: Tensor | None, /, *sink: Tensor
    ) -> int:
        """How many pairs of a query and a key are shown."""
        key, value, mask, padding = _behind(self.zeros, key, value, mask, padding)
        seen = passed(mask, padding)
        return pairs_of(reading(self.formula, seen), query, key, seen)


def _behind(
    zeros: int, key: Tensor, value: Tensor, mask: Tensor | None, padding: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Keys, values and what is said of them, behind so many that are zero and of which nothing is said."""
    if not zeros:
        return key, value, mask, padding
    if mask is not None:
        shown = mask.expand(*mask.shape[:-1], key.shape[2])
        mask = F.pad(shown, (zeros, 0), value=float(mask.dtype == torch.bool))
    padding = None if padding is None else F.pad(padding, (zeros, 0), value=True)
    key, value = (F.pad(t, (0, 0, zeros, 0)) for t in (key, value))
    return key, value, mask, padding


def _bias_to_boxes(bias: Tensor, layout: Layout, rules: Rules, box: Sequence[int]) -> Tensor:
    """(B, H, tokens, tokens) as they lie -> box by box; axes of size 1 serve all."""
    bias = bias[(None,) * (4 - bias.dim())]
    for axis in (2, 3):
        if bias.shape[axis] > 1:
            bias = to_boxes(bias.transpose(2, axis), layout, rules, box).transpose(2, axis)
    return bias


def _own(site: AttentionSite, config: Config) -> Formula:
    return of_site(site)


def fits(layout: Layout, query: Tensor, key: Tensor) -> bool:
    """Are these the tokens of the layout?"""
    return layout.endless or (query.shape[2] == layout.length and key.shape[2] == layout.length)
