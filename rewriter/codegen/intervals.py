"""What an expression can be where its indices lie in intervals: from which it follows what a mask hides for certain."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from rewriter.codegen.expression import Expression, bounds, kind_of, places, spelled

Interval = tuple[Any, Any]


def interval(expression: Expression, given: Mapping[str, Interval], tensors: Mapping[str, Tensor]) -> Interval:
    """The least and the greatest value of the expression where each index lies in its interval; of bools, whether it
    must be True and whether it may be. Never too narrow.
    """
    values: dict[fx.Node, Interval] = {}

    def of(value: Any) -> Interval:
        return values[value] if isinstance(value, fx.Node) else (value, value)

    for node in expression.graph.nodes:
        if node.op == "placeholder":
            values[node] = given.get(str(node.target), (None, None))
        elif node.op == "output":
            return of(node.args[0])
        elif spelled(node) == "getitem":
            source = node.args[0]
            assert isinstance(source, fx.Node)
            read = tensors[str(source.target)]
            if read.dtype != torch.bool:  # as kernels calculate, without wrapping around
                read = read.float() if read.is_floating_point() else read.long()
            values[node] = _read(read, [of(place) for place in places(node)])
        elif spelled(node) == "constant":
            values[node] = of(node.args[1])
        elif spelled(node) == "clamp":
            low, high = bounds(node)
            inner = of(node.args[0])
            inner = inner if low is None else _RULES["maximum"](inner, of(low))
            values[node] = inner if high is None else _RULES["minimum"](inner, of(high))
        else:
            operation = spelled(node)
            assert operation is not None
            kind = "bool" if operation in ("and", "or", "not") and kind_of(node) == "bool" else ""
            values[node] = _RULES[operation + kind](*map(of, node.args))
    raise AssertionError("a graph has an output")


def _least(*values: Any) -> Any:
    result = torch.as_tensor(values[0])
    for value in values[1:]:
        result = torch.minimum(*torch.broadcast_tensors(result, torch.as_tensor(value)))
    return result


def _greatest(*values: Any) -> Any:
    result = torch.as_tensor(values[0])
    for value in values[1:]:
        result = torch.maximum(*torch.broadcast_tensors(result, torch.as_tensor(value)))
    return result


def _corners(operation: Callable[[Any, Any], Any]) -> Callable[[Interval, Interval], Interval]:
    """Of an operation that is monotone in each argument: it is extreme at the corners."""

    def rule(x: Interval, y: Interval) -> Interval:
        corners = [operation(a, b) for a in x for b in y]
        return _least(*corners), _greatest(*corners)

    return rule


def _quotient(operation: Callable[[Any, Any], Any]) -> Callable[[Interval, Interval], Interval]:
    def rule(x: Interval, y: Interval) -> Interval:
        if isinstance(y[0], (int, float)) and y[0] == y[1] and y[0] != 0:
            return _corners(operation)(x, y)
        return (-float("inf"), float("inf"))

    return rule


def _remainder(x: Interval, y: Interval) -> Interval:
    if not isinstance(y[0], (int, float)) or y[0] != y[1] or y[0] <= 0:
        return (-float("inf"), float("inf"))
    size = y[0]
    low, high = torch.as_tensor(x[0]), torch.as_tensor(x[1])
    same = torch.eq(low // size, high // size)
    return torch.where(same, low % size, 0), torch.where(same, high % size, size - 1 if isinstance(size, int) else size)


def _where(condition: Interval, x: Interval, y: Interval) -> Interval:
    must, may = (torch.as_tensor(end) for end in condition)
    low = torch.where(must, x[0], torch.where(may, _least(x[0], y[0]), torch.as_tensor(y[0])))
    high = torch.where(must, x[1], torch.where(may, _greatest(x[1], y[1]), torch.as_tensor(y[1])))
    return low, high


def _equal(x: Interval, y: Interval) -> Interval:
    point = (x[0] == x[1]) & (y[0] == y[1]) & (x[0] == y[0])
    return point, (x[0] <= y[1]) & (y[0] <= x[1])


def _not(x: Interval) -> Interval:
    return torch.logical_not(torch.as_tensor(x[1])), torch.logical_not(torch.as_tensor(x[0]))


def _absolute(x: Interval) -> Interval:
    low, high = torch.as_tensor(x[0]), torch.as_tensor(x[1])
    spans = (low <= 0) & (high >= 0)
    least, greatest = _least(low.abs(), high.abs()), _greatest(low.abs(), high.abs())
    return torch.where(spans, torch.zeros_like(least), least), greatest


def _increasing(operation: Callable[[Tensor], Tensor]) -> Callable[[Interval], Interval]:
    return lambda x: (operation(torch.as_tensor(x[0])), operation(torch.as_tensor(x[1])))


_RULES: dict[str, Callable[..., Interval]] = {
    "add": lambda x, y: (x[0] + y[0], x[1] + y[1]),
    "sub": lambda x, y: (x[0] - y[1], x[1] - y[0]),
    "mul": _corners(lambda a, b: a * b),
    "div": _quotient(lambda a, b: a / b),
    "floordiv": _quotient(lambda a, b: a // b),
    "mod": _remainder,
    "neg": lambda x: (-x[1], -x[0]),
    "float": lambda x: x,
    "abs": _absolute,
    "minimum": lambda x, y: (_least(x[0], y[0]), _least(x[1], y[1])),
    "maximum": lambda x, y: (_greatest(x[0], y[0]), _greatest(x[1], y[1])),
    "where": _where,
    "lt": lambda x, y: (x[1] < y[0], x[0] < y[1]),
    "le": lambda x, y: (x[1] <= y[0], x[0] <= y[1]),
    "gt": lambda x, y: (x[0] > y[1], x[1] > y[0]),
    "ge": lambda x, y: (x[0] >= y[1], x[1] >= y[0]),
    "eq": _equal,
    "ne": lambda x, y: _not(_equal(x, y)),
    "andbool": lambda x, y: (x[0] & y[0], x[1] & y[1]),
    "orbool": lambda x, y: (x[0] | y[0], x[1] | y[1]),
    "notbool": _not,
    "and": lambda x, y: (-float("inf"), float("inf")),
    "or": lambda x, y: (-float("inf"), float("inf")),
    "not": lambda x: (-x[1] - 1, -x[0] - 1),
    "tanh": _increasing(torch.tanh),
    "exp": _increasing(torch.exp),
    "sigmoid": _increasing(torch.sigmoid),
    "sqrt": _increasing(torch.sqrt),
    "log": _increasing(torch.log),
}


def _read(tensor: Tensor, index: list[Interval]) -> Interval:
    """The extremes of a tensor over a box of indices: over all of an axis, where more than one is no point."""
    ends = [
        tuple(torch.as_tensor(end).clamp(0, n - 1) for end in pair) for pair, n in zip(index, tensor.shape, strict=True)
    ]
    wide = [axis for axis, (low, high) in enumerate(ends) if not torch.equal(*torch.broadcast_tensors(low, high))]
    least = greatest = tensor
    for axis in wide[:-1]:
        least, greatest = least.amin(axis, True), greatest.amax(axis, True)
        ends[axis] = (torch.tensor(0), torch.tensor(0))
    low, high = (end.long()[..., None] for end in ends[wide[-1]]) if wide else (torch.zeros(1, dtype=torch.long),) * 2
    along = torch.minimum(low + torch.arange(int((high - low).max()) + 1), high)
    at = tuple(along if axis in wide[-1:] else end[0].long()[..., None] for axis, end in enumerate(ends))
    found = least[at]
    return found.amin(-1), (found if greatest is least else greatest[at]).amax(-1)
