"""Attention over a grid: its formula, its definition, and its implementation in the order of boxes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rewriter.codegen.either import Either
from rewriter.codegen.formula import Formula, of_site
from rewriter.codegen.gathered import Gathered
from rewriter.codegen.implementation import Build, FormulaOf, Generated, defined, generated
from rewriter.codegen.layout import (
    Layout,
    Rules,
    RulesOf,
    box_of,
    folded,
    from_boxes,
    plane_of,
    seeing,
    to_boxes,
    zeros_of,
)
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
        formula = formula_on_grid(rules_of)(site, config)
        plain = Gathered(formula, site.scale)
        if layout.endless:
            return Generated(formula, site, plain)
        order = Boxes(layout, rules, box_of(layout, rules), zeros_of(layout, rules))
        boxed = Generated(formula, site, plain, order=order)
        return Either(boxed, generated(_own)(site, config), lambda query, key: fits(layout, query, key))

    return build


@dataclass(frozen=True)
class Boxes:
    """The order of boxes, with so many `zeros` in front of the keys. What is added to the scores follows the tokens; a
    mask that is bool says nothing more than the formula and the padding do, and is not read.
    """

    layout: Layout
    rules: Rules
    box: tuple[int, ...]
    zeros: int

    @cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """Where the tokens of the boxes lie, as queries and as keys."""
        lie = torch.arange(1, self.layout.length + 1, dtype=torch.int32).view(1, 1, -1, 1)
        queries = self._sorted(lie).flatten() - 1
        return queries, F.pad(queries, (self.zeros, 0), value=-1)

    def said(self, mask: Tensor | None, padding: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Biases (B or 1, H or 1, tokens, tokens), and padding (B, tokens), box by box."""
        if padding is not None:
            padding = self._sorted(padding[:, None, :, None])[:, 0, :, 0]
        bias = None
        if mask is not None and mask.dtype != torch.bool:
            bias = mask[(None,) * (4 - mask.dim())]
            for axis in (2, 3):
                if bias.shape[axis] > 1:
                    bias = self._sorted(bias.transpose(2, axis)).transpose(2, axis)
        keys = math.prod(folded(self.layout, self.rules, self.box)) + self.layout.free
        return _said_behind(self.zeros, keys, bias, padding)

    def around(self, inner: Implementation) -> Implementation:
        """`inner`, which takes tokens box by box, of tokens as they lie."""

        def run(
            query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, padding: Tensor | None, /, *sink: Tensor
        ) -> Tensor:
            key, value = (F.pad(self._sorted(t), (0, 0, self.zeros, 0)) for t in (key, value))
            out = inner(self._sorted(query), key, value, *self.said(mask, padding), *sink)
            return from_boxes(out, self.layout, self.rules, self.box)

        return run

    def _sorted(self, x: Tensor) -> Tensor:
        return to_boxes(x, self.layout, self.rules, self.box)


def _behind(
    zeros: int, key: Tensor, value: Tensor, mask: Tensor | None, padding: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Keys, values and what is said of them, behind so many that are zero and of which nothing is said."""
    mask, padding = _said_behind(zeros, key.shape[2], mask, padding)
    key, value = (F.pad(t, (0, 0, zeros, 0)) for t in (key, value))
    return key, value, mask, padding


def _said_behind(
    zeros: int, keys: int, mask: Tensor | None, padding: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    if not zeros:
        return mask, padding
    if mask is not None:
        mask = F.pad(mask.expand(*mask.shape[:-1], keys), (zeros, 0), value=float(mask.dtype == torch.bool))
    return mask, None if padding is None else F.pad(padding, (zeros, 0), value=True)


def _own(site: AttentionSite, config: Config) -> Formula:
    return of_site(site)


def fits(layout: Layout, query: Tensor, key: Tensor) -> bool:
    """Are these the tokens of the layout?"""
    return layout.endless or (query.shape[2] == layout.length and key.shape[2] == layout.length)
