"""The derivatives of an expression, as expressions."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from rewriter.codegen.expression import Expression, bounds, kind_of, spelled


def derivatives(expression: Expression) -> tuple[fx.Graph, list[fx.Node]]:
    """A graph with the outputs (d result / d s, d result / d each element of a captured tensor that is read), and the
    nodes, in the expression's own graph, that read those elements.
    """
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in expression.graph.nodes:
        if node.op != "output":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    build = _Builder(graph)
    read = [node for node in expression.graph.nodes if spelled(node) == "getitem" and kind_of(node) == "float"]
    score = [node for node in expression.graph.nodes if node.op == "placeholder" and node.target == "s"]

    def along(leaf: fx.Node) -> Any:
        """Forwards from the leaf: a branch that is not taken may be infinite, and is never multiplied by 0."""
        slopes: dict[fx.Node, Any] = {leaf: 1.0}
        for node in expression.graph.nodes:
            if node.op != "call_function" and node.op != "call_method":
                continue
            given = [(slopes.get(each, 0.0) if isinstance(each, fx.Node) else 0.0) for each in node.args]
            if node is leaf or all(slope == 0.0 for slope in given):
                continue
            args = [copies[each] if isinstance(each, fx.Node) else each for each in node.args]
            if spelled(node) == "where":
                slopes[node] = build("where", args[0], *given[1:])
                continue
            total: Any = 0.0
            for slope, part in zip(given, _partials(build, spelled(node), args, copies[node]), strict=False):
                total = build("add", total, build("mul", slope, part)) if part is not None else total
            slopes[node] = total
        return slopes.get(expression.result, 0.0)

    found = [along(score[0]) if score else 0.0, *map(along, read)]
    graph.output(tuple(build.node(value) for value in found))
    graph.eliminate_dead_code()
    return graph, read


class _Builder:
    """Adds operations to a graph, folding what is known."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph

    def __call__(self, operation: str, *args: Any) -> Any:
        if all(isinstance(each, (int, float)) for each in args):
            return _FOLDED[operation](*args)
        if operation == "mul" and 0.0 in args:
            return 0.0
        for neutral, name in ((1.0, "mul"), (0.0, "add")):
            if operation == name and neutral in args:
                return args[1] if args[0] == neutral else args[0]
        node = self.graph.call_function(_TARGETS[operation], args)
        node.meta["kind"] = "bool" if operation in ("lt", "gt", "ge", "le") else "float"
        return node

    def node(self, value: Any) -> fx.Node:
        """A node that holds this value."""
        if isinstance(value, fx.Node):
            return value
        node = self.graph.call_function(torch.full, ((), float(value)))
        node.meta["kind"] = "float"
        return node


_TARGETS: dict[str, Any] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv, "neg": operator.neg,
    "where": torch.where, "lt": operator.lt, "gt": operator.gt, "ge": operator.ge, "le": operator.le,
}  # fmt: skip
_FOLDED: dict[str, Callable[..., Any]] = {**_TARGETS, "where": lambda condition, a, b: a if condition else b}


def _partials(build: _Builder, operation: str | None, args: list[Any], out: fx.Node) -> list[Any]:
    """d out / d each argument."""
    x, y, *_ = *args, 0.0, 0.0
    if operation == "add":
        return [1.0, 1.0]
    if operation == "sub":
        return [1.0, -1.0]
    if operation == "mul":
        return [y, x]
    if operation == "div":
        return [build("div", 1.0, y), build("neg", build("div", out, y))]
    if operation == "neg":
        return [-1.0]
    if operation == "float":
        return [1.0]
    if operation == "tanh":
        return [build("sub", 1.0, build("mul", out, out))]
    if operation == "exp":
        return [out]
    if operation == "sigmoid":
        return [build("mul", out, build("sub", 1.0, out))]
    if operation == "log":
        return [build("div", 1.0, x)]
    if operation == "sqrt":
        return [build("div", 0.5, out)]
    if operation == "abs":
        return [build("where", build("gt", x, 0.0), 1.0, build("where", build("lt", x, 0.0), -1.0, 0.0))]
    if operation in ("minimum", "maximum"):
        first = build("le" if operation == "minimum" else "ge", x, y)
        return [build("where", first, 1.0, 0.0), build("where", first, 0.0, 1.0)]
    if operation == "clamp":
        low, high = bounds(out)
        above = build("where", build("ge", x, low), 1.0, 0.0) if low is not None else 1.0
        below = build("where", build("le", x, high), 1.0, 0.0) if high is not None else 1.0
        return [build("mul", above, below)]
    return []
