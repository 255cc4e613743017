"""Gradient checkpointing (`torch.utils.checkpoint`): parts of a graph whose values are computed again for the backward.

dynamo hands on such a part as a graph of its own. It is written out between two marks, so that attentions are read and
rewritten across its border, and made a graph of its own again in the end.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import checkpoint

CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint
_CONTEXTS = "_checkpoint_context_fn"
"""Where dynamo keeps, beside the part, what chooses among its values those that are kept."""


def begins() -> None:
    """The mark before a part. Its node knows the settings of the call, and what chooses the values that are kept."""


def ends() -> None:
    """The mark behind a part."""


for _mark in (begins, ends):
    fx.node.has_side_effect(_mark)


def known(body: fx.GraphModule, settings: dict[str, Any]) -> dict[str, Any]:
    """What the node of the mark before a part has to know, as its `meta`."""
    return {"checkpoint": (settings, body.meta.get(_CONTEXTS))}


def outlined(gm: fx.GraphModule) -> None:
    """Make what stands between two marks a graph of its own, called as dynamo does."""
    begun: list[fx.Node] = []
    for node in list(gm.graph.nodes):
        if node.target is begins:
            begun.append(node)
        elif node.target is ends:
            _outline(gm, begun.pop(), node)


def _outline(gm: fx.GraphModule, begin: fx.Node, end: fx.Node) -> None:
    inner: list[fx.Node] = []
    while (node := inner[-1].next if inner else begin.next) is not end:
        inner.append(node)
    inside = set(inner)
    taken = list(dict.fromkeys(source for node in inner for source in node.all_input_nodes if source not in inside))
    given = [node for node in inner if any(user not in inside for user in node.users)]
    body, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in taken:
        copies[node] = body.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in inner:
        copies[node] = body.node_copy(node, copies.__getitem__)
    body.output(tuple(copies[node] for node in given))
    settings, contexts = begin.meta["checkpoint"]
    with gm.graph.inserting_before(begin):
        name = f"checkpointed_{begin.name}"
        part = fx.GraphModule(gm, body)
        part.meta |= {_CONTEXTS: contexts} if contexts is not None else {}
        gm.add_submodule(name, part)
        call = gm.graph.call_function(CHECKPOINT, (gm.graph.get_attr(name), *taken), settings)
        call.meta = {"val": tuple(node.meta["val"] for node in given)}
        for place, node in enumerate(given):
            result = gm.graph.call_function(operator.getitem, (call, place))
            result.meta = dict(node.meta)
            node.replace_all_uses_with(result, delete_user_cb=lambda user: user not in inside)
    for node in (end, *reversed(inner), begin):
        gm.graph.erase_node(node)


def runnable(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph as it can be run by itself. torch's own call counts on a compiler that gives dropout the same random
    numbers again.
    """
    calls = gm.graph.find_nodes(op="call_function", target=CHECKPOINT)
    for node in calls:
        node.target = recomputed
    if calls:
        for node in calls:
            runnable(getattr(gm, str(node.args[0].target)))
        gm.recompile()
    return gm


def recomputed(body: fx.GraphModule, *args: Any, **settings: Any) -> Any:
    """The values of a part, which the backward computes again, with the same random numbers."""
    contexts = body.meta.get(_CONTEXTS)
    chosen = {} if contexts is None else {"context_fn": contexts}
    return checkpoint(body, *args, **{**settings, "use_reentrant": False, **chosen})
