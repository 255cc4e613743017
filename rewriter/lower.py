"""Replace the canonical operator by what was chosen for each site."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from rewriter.capture import Graph
from rewriter.raising import Raised
from rewriter.site import AttentionSite
from rewriter.variant import Implementation

_ATEN = torch.ops.aten


class Lowered(nn.Module):
    """An implementation where it stands in the graph. One with parameters is a submodule, so that they are trained."""

    def __init__(self, implementation: Implementation, site: AttentionSite, contiguous: bool = False) -> None:
        super().__init__()
        self.implementation: Callable[..., Tensor] = implementation
        self.contiguous = contiguous
        self.site = site

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, padding: Tensor | None) -> Tensor:
        """(B, H, Sq, Dv), with the strides that the following nodes rely on."""
        out = self.implementation(query, key, value, mask, padding)
        return out.contiguous() if self.contiguous else out

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
            call_module(
                gm, place, Lowered(implementation, place.match.site, needs_strides(place)), f"attention_{number}"
            )
    return clean(gm)


def call_module(gm: Graph, place: Raised, module: nn.Module, name: str, extra: tuple[fx.Node, ...] = ()) -> fx.Node:
    """Replace the canonical call by a call of `module` with its tensor arguments and the `extra` ones."""
    gm.add_submodule(name, module)
    with gm.graph.inserting_before(place.call):
        node = gm.graph.call_module(name, (*place.call.args[:5], *extra))
    node.meta = dict(place.call.meta)
    place.call.replace_all_uses_with(node)
    return node


def clean(gm: Graph) -> Graph:
    """Remove dead code and regenerate the forward."""
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    return gm


def needs_strides(place: Raised) -> bool:
    """Does a `view` follow, through permutations only? It was captured for the strides of the original output."""
    todo: list[fx.Node] = [place.result]
    while todo:
        for user in todo.pop().users:
            if user.target in (_ATEN.view.default, _ATEN.as_strided.default):
                return True
            if user.target in _RESTRIDED:
                todo.append(user)
    return False


_RESTRIDED: set[Any] = {
    _ATEN.transpose.int, _ATEN.permute.default, _ATEN.squeeze.dim, _ATEN.unsqueeze.default, _ATEN.slice.Tensor,
    _ATEN.select.int, _ATEN.dropout.default,
}  # fmt: skip
