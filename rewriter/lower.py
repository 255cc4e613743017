"""Replace the canonical operator by what was chosen for each site."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, fx, nn

from rewriter.capture import Graph
from rewriter.pattern import is_call, value_of
from rewriter.raising import Match, Raised
from rewriter.region import hint
from rewriter.site import AttentionSite
from rewriter.variant import Implementation

_ATEN = torch.ops.aten


class Lowered(nn.Module):
    """An implementation where it stands in the graph. One with parameters is a submodule, so that they are trained."""

    def __init__(
        self, implementation: Implementation, site: AttentionSite, axes: tuple[int, ...] | None = None
    ) -> None:
        super().__init__()
        self.implementation: Callable[..., Tensor] = implementation
        self.axes = axes
        self.site = site

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, padding: Tensor | None) -> Tensor:
        """(B, H, Sq, Dv), with the strides that the following nodes rely on."""
        out = self.implementation(query, key, value, mask, padding)
        return out if self.axes is None else laid_out(out, self.axes)

    def extra_repr(self) -> str:
        """The site, for printed graphs."""
        return str(self.site)


def lower(gm: Graph, raised: list[Raised], chosen: Mapping[str, Implementation | None]) -> Graph:
    """Place an implementation at each raised site; None gives the original nodes back. Dead code is removed."""
    for number, place in enumerate(raised):
        implementation = chosen.get(place.match.site.path)
        if implementation is None:
            place.give_back()
        else:
            axes = memory_order(place.match) if needs_strides(place) else None
            call_module(gm, place, Lowered(implementation, place.match.site, axes), f"attention_{number}")
    # Dropout and changes in place count as effects, but these only served what was replaced.
    replaced = [place.original for place in raised if chosen.get(place.match.site.path) is not None]
    return clean(gm, frozenset().union(*replaced))


def call_module(gm: Graph, place: Raised, module: nn.Module, name: str) -> fx.Node:
    """Replace the canonical call by a call of `module` with its tensor arguments."""
    gm.add_submodule(name, module)
    with gm.graph.inserting_before(place.call):
        node = gm.graph.call_module(name, place.call.args[:5])
    node.meta = dict(place.call.meta)
    place.call.replace_all_uses_with(node)
    return node


def clean(gm: Graph, replaced: frozenset[fx.Node] = frozenset()) -> Graph:
    """Remove dead code, that among `replaced` even where it has effects, and regenerate the forward."""
    gm.graph.eliminate_dead_code((lambda node: node not in replaced and node.is_impure()) if replaced else None)
    gm.graph.lint()
    gm.recompile()
    return gm


def needs_strides(place: Raised) -> bool:
    """Does a `view` follow, through views only? It was captured for the strides of the original output."""
    todo: list[fx.Node] = [place.result]
    while todo:
        for user in todo.pop().users:
            if is_call(user, _ATEN.view, _ATEN.as_strided):
                return True
            if is_call(user, *_KEEP_STRIDES):
                todo.append(user)
    return False


def memory_order(match: Match) -> tuple[int, ...]:
    """The axes of the canonical output from the outermost in memory to the innermost, as the original had them."""
    strides = [hint(stride) for stride in value_of(match.output).stride()]
    if len(strides) != 4 or None in strides:
        return (0, 1, 2, 3)
    return tuple(sorted(range(4), key=strides.__getitem__, reverse=True))


def laid_out(out: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The same values, dense in memory, with the axes in this order."""
    return out.permute(axes).contiguous().permute([axes.index(axis) for axis in range(len(axes))])


_KEEP_STRIDES = (
    _ATEN.transpose, _ATEN.permute, _ATEN.mT, _ATEN.swapaxes, _ATEN.movedim, _ATEN.squeeze, _ATEN.unsqueeze,
    _ATEN.slice, _ATEN.select, _ATEN.split, _ATEN.chunk, _ATEN.unbind, _ATEN.expand, _ATEN.dropout, _ATEN.to,
    _ATEN.mul, _ATEN.div, _ATEN.add, _ATEN.sigmoid, operator.getitem,
)  # fmt: skip
"""Views, and what gives its result the strides of its argument."""
