"""Replace the canonical operator by what was chosen for each site."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from rewriter.capture import Graph
from rewriter.nodes import is_call, value_of
from rewriter.ops import attention_math
from rewriter.raising import Operands, Raised, arguments
from rewriter.region import hint
from rewriter.samples import held
from rewriter.sentinel import Sentinel
from rewriter.site import AttentionSite
from rewriter.variant import Implementation

_ATEN = torch.ops.aten


class Lowered(nn.Module):
    """An implementation where it stands in the graph. One with parameters is a submodule, so that they are trained."""

    def __init__(
        self, implementation: Implementation, site: AttentionSite, sentinel: Sentinel | None = None, spare: bool = False
    ) -> None:
        super().__init__()
        self.implementation: Callable[..., Tensor] = implementation
        self.site = site
        self.sentinel = sentinel
        self.spare = spare
        """Is the mask spared while the sentinel's answer is yes?"""

    def forward(self, *tensors: Tensor | None) -> Tensor:
        """(B, H, Sq, Dv) from query, key, value, mask, padding and sink, and what the sentinel looks at."""
        operands, watched = Operands(*tensors[:6]), tensors[6:]
        if self.sentinel is not None:
            if not self.sentinel.holds(watched):  # type: ignore[arg-type]
                return plain(operands, self.site)
            operands = operands._replace(mask=None) if self.spare else operands
        return self.implementation(*operands.given)

    def extra_repr(self) -> str:
        """The site, for printed graphs."""
        return str(self.site)


def plain(operands: Operands, site: AttentionSite) -> Tensor:
    """The mathematics of a site with all of its mask as a tensor: (B, H, Sq, Dv)."""
    return attention_math(*arguments(operands, site))


def lower(gm: Graph, raised: list[Raised], chosen: Mapping[str, Implementation | None]) -> Graph:
    """Place an implementation at each raised site; None gives the original nodes back. Dead code is removed."""
    sentinels: dict[tuple[fx.Node, ...], Sentinel] = {}
    for number, place in enumerate(raised):
        implementation = chosen.get(place.match.site.path)
        if implementation is None:
            place.give_back()
        else:
            match, sentinel = place.match, sentinels.get(place.match.watched)
            if match.watched and sentinel is None:
                sentinel = sentinels[match.watched] = Sentinel.of([held(node) for node in match.watched_buffers])
            module = Lowered(implementation, match.site, sentinel, match.spare)
            call = call_module(gm, place, module, f"attention_{number}")
            result = call if place.result is place.call else place.result
            if needs_strides(result):
                lay_out(gm, result, memory_order(place.match.output))
    # Dropout and changes in place count as effects, but these only served what was replaced.
    replaced = [place.original for place in raised if chosen.get(place.match.site.path) is not None]
    return clean(gm, frozenset().union(*replaced))


def call_module(gm: Graph, place: Raised, module: nn.Module, name: str) -> fx.Node:
    """Replace the canonical call by a call of `module` with its tensor arguments."""
    gm.add_submodule(name, module)
    with gm.graph.inserting_before(place.call):
        node = gm.graph.call_module(name, (*place.operands, *place.match.watched))
    node.meta = dict(place.call.meta)
    place.call.replace_all_uses_with(node)
    return node


def clean(gm: Graph, replaced: frozenset[fx.Node] = frozenset()) -> Graph:
    """Remove dead code, that among `replaced` even where it has effects, and regenerate the forward."""
    gm.graph.eliminate_dead_code((lambda node: node not in replaced and node.is_impure()) if replaced else None)
    gm.graph.lint()
    gm.recompile()
    return gm


def needs_strides(result: fx.Node) -> bool:
    """Does a `view` follow, through views only? It was captured for the strides of the original output; so was what
    follows in another graph.
    """
    todo = [result]
    while todo:
        for user in todo.pop().users:
            if user.op == "output" or is_call(user, _ATEN.view, _ATEN.as_strided):
                return True
            if is_call(user, _ATEN.reshape, _ATEN.flatten, _ATEN.unflatten):
                if _is_view(user):
                    todo.append(user)
            elif is_call(user, *_KEEP_STRIDES) or torch.Tag.pointwise in getattr(user.target, "tags", ()):
                todo.append(user)
    return False


def _is_view(node: fx.Node) -> bool:
    """Did this reshape give a view of the original? Else it made a dense copy, whatever the strides."""
    source, wanted = value_of(node.all_input_nodes[0]), [hint(size) for size in value_of(node).shape]
    sizes, strides = ([hint(number) for number in numbers] for numbers in (source.shape, source.stride()))
    try:
        torch.empty_strided(sizes, strides, device="meta").view(wanted)
    except RuntimeError:
        return False
    return True


def memory_order(node: fx.Node) -> list[int]:
    """The axes of a value from the outermost in memory to the innermost."""
    strides = [hint(stride) for stride in value_of(node).stride()]
    return sorted(range(len(strides)), key=strides.__getitem__, reverse=True)


def lay_out(gm: Graph, result: fx.Node, order: list[int]) -> None:
    """Give a result the order in memory that the original had, on which the nodes below it rely."""
    back = [order.index(axis) for axis in range(len(order))]
    steps: list[tuple[Any, ...]] = [(_ATEN.contiguous.default,)]
    if order != sorted(order):
        steps = [(_ATEN.permute.default, order), *steps, (_ATEN.permute.default, back)]
    node, first = result, None
    for operator_, *rest in steps:
        with gm.graph.inserting_after(node):
            node = gm.graph.call_function(operator_, (node, *rest))
        first = first or node
    node.meta = dict(result.meta)
    result.replace_all_uses_with(node, delete_user_cb=lambda user: user is not first)


_KEEP_STRIDES = (
    _ATEN.transpose, _ATEN.permute, _ATEN.mT, _ATEN.swapaxes, _ATEN.movedim, _ATEN.squeeze, _ATEN.unsqueeze,
    _ATEN.slice, _ATEN.select, _ATEN.split, _ATEN.chunk, _ATEN.unbind, _ATEN.expand, _ATEN.dropout, _ATEN.to,
    _ATEN.clone, _ATEN.alias, operator.getitem,
)  # fmt: skip
"""Views, and what gives its result the strides of its argument."""
