"""Functions of indices, written once in Python, as an expression that every target prints in its own words.

A mask or a score function is called with symbols in place of its arguments; what it does to them is the expression.
The function itself, called with tensors of indices, is the reference: the two cannot drift apart.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map

from rewriter.errors import OptionError, brief

Kind = Literal["bool", "int", "float"]

INDICES = ("s", "b", "h", "i", "j", "row")
"""What a function may ask for by name: the score, the batch row, the query head, the positions of query and key among
the keys (the last query stands at the last key), and the query's place in this call.
"""


@dataclass(frozen=True)
class Expression:
    """What a function of indices computes: the last node of `graph` is its result.

    `captured` names the tensors that it reads with the kind of their elements and their number of axes.
    """

    name: str
    graph: fx.Graph
    captured: Mapping[str, tuple[Kind, int]]

    @property
    def result(self) -> fx.Node:
        """The node of the result."""
        (node,) = self.graph.find_nodes(op="output")
        found = node.args[0]
        assert isinstance(found, fx.Node)
        return found

    def uses(self, index: str) -> bool:
        """Does the result depend on this index?"""
        return any(node.target == index for node in self.graph.find_nodes(op="placeholder"))

    @cached_property
    def reads_pairs(self) -> bool:
        """Is a tensor read at another place for each query and key?"""
        reads = [node for node in self.graph.nodes if node.target is operator.getitem]
        return any({"i", "j"} <= set(axes_of(node)) for node in reads)


def parameters(function: Callable[..., Any]) -> list[str]:
    """The names of what a function of indices is given."""
    return list(inspect.signature(function).parameters)


def asking(function: Callable[..., Any], names: Iterable[str], name: str) -> Callable[..., Any]:
    """The function as one that asks for these by name."""

    def named(**given: Any) -> Any:
        return function(**given)

    named.__name__ = name
    named.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(each, inspect.Parameter.KEYWORD_ONLY) for each in names]
    )
    return named


def traced(function: Callable[..., Any], numbers: Mapping[str, Any], kinds: Mapping[str, Kind]) -> Expression:
    """The expression of a function. `numbers` are put in; `kinds` are those of the elements of captured tensors.

    Raises OptionError with a sentence where the function does what no kernel can.
    """
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    name = getattr(function, "__name__", "function")
    given: dict[str, Any] = {}
    for parameter in parameters(function):
        if parameter in numbers:
            given[parameter] = tree_map(lambda each: each.item() if hasattr(each, "item") else each, numbers[parameter])
            continue
        if parameter not in INDICES and parameter not in kinds:
            raise OptionError(
                f"{name} asks for {parameter!r}, which is no index, no number and no tensor that is given"
            )
        given[parameter] = fx.Proxy(graph.placeholder(parameter), tracer)
    try:
        result = function(**given)
    except fx.proxy.TraceError as cause:
        raise OptionError(f"{name} decides something by a value; write `&`, `|` and torch.where instead") from cause
    except Exception as cause:
        raise OptionError(f"{name} does with its arguments what no kernel can: {brief(cause)}") from cause
    if not isinstance(result, fx.Proxy):
        # The same for all indices: a tensor of no axes, so that every target sees one form.
        result = fx.Proxy(graph.call_function(torch.full, ((), result)), tracer)
    graph.output(result.node)
    graph.eliminate_dead_code()
    for node in list(graph.find_nodes(op="placeholder")):
        if not node.users:
            graph.erase_node(node)
    captured: dict[str, tuple[Kind, int]] = {}
    for node in graph.nodes:
        _order_arguments(node, name)
        node.meta["kind"] = _kind(node, kinds, name)
        if node.target is operator.getitem:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            captured[str(source.target)] = kinds[str(source.target)], len(places(node))
        elif whole := [each for each in node.all_input_nodes if each.op == "placeholder" and each.target in kinds]:
            raise OptionError(f"{name} reads {whole[0].target} whole: take an element, as in {whole[0].target}[h]")
    return Expression(name, graph, captured)


def places(node: fx.Node) -> tuple[Any, ...]:
    """The indices at which a captured tensor is read."""
    index = node.args[1]
    return index if isinstance(index, tuple) else (index,)


def axes_of(node: fx.Node) -> str:
    """Over which of the queries, "i", and the keys, "j", the place differs at which a captured tensor is read."""
    used = {str(each.target) for each in above(places(node)) if each.op == "placeholder"}
    return ("i" if used & {"i", "row"} else "") + ("j" if "j" in used else "")


def above(values: Iterable[Any], known: Container[fx.Node] = ()) -> set[fx.Node]:
    """The nodes among these values, and those that they are computed from; nothing behind what is `known`."""
    found: set[fx.Node] = set()
    todo = [value for value in values if isinstance(value, fx.Node)]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += [] if node in known else node.all_input_nodes
    return found


def bounds(node: fx.Node) -> tuple[Any, Any]:
    """Of a clamp: the lowest and the highest value, None where there is none."""
    low, high, *_ = *node.args[1:], None, None
    return low, high


def kind_of(value: Any) -> Kind:
    """Of a node or a literal."""
    if isinstance(value, fx.Node):
        found: Kind = value.meta["kind"]
        return found
    return "bool" if isinstance(value, bool) else "int" if isinstance(value, int) else "float"


def spelled(node: fx.Node) -> Any:
    """The operation at a node, by one name for all its spellings."""
    target = str(node.target) if node.op == "call_method" else node.target
    return _SPELLINGS.get(target)


def _order_arguments(node: fx.Node, name: str) -> None:
    """What is given by name takes its place among the others; OptionError where it changes what is computed."""
    if not node.kwargs or (operation := spelled(node)) in (None, "constant"):
        return
    args, given = list(node.args), {key: value for key, value in node.kwargs.items() if _NEUTRAL.get(key, ()) != value}
    for key in _PARAMETERS.get(str(operation), ("input", "other"))[len(args) :]:
        args.append(given.pop(key, None))
    while args and args[-1] is None:
        args.pop()
    if given:
        raise OptionError(f"{name} calls {operation} with {', '.join(given)}, for which no kernel has a word")
    node.args, node.kwargs = tuple(args), {}


def _kind(node: fx.Node, kinds: Mapping[str, Kind], name: str) -> Kind:
    if node.op == "placeholder":
        if node.target in kinds:
            return kinds[str(node.target)]
        return "float" if node.target == "s" else "int"
    if node.op == "output":
        return kind_of(node.args[0])
    operation = spelled(node)
    if operation is None:
        called = getattr(node.target, "__name__", node.target)
        raise OptionError(f"{name} calls {called}, for which no kernel has a word (known: {', '.join(_KNOWN)})")
    if operation == "getitem":
        source = node.args[0]
        if not isinstance(source, fx.Node) or source.op != "placeholder" or source.target not in kinds:
            raise OptionError(f"{name} takes an element of something that is no tensor that is given")
        for place in places(node):
            if not isinstance(place, (fx.Node, int)) or kind_of(place) != "int":
                raise OptionError(f"{name} reads {source.target} at {place}, which is no whole number")
        return kinds[str(source.target)]
    if operation == "constant":
        return kind_of(node.args[1])
    if operation in ("lt", "le", "gt", "ge", "eq", "ne"):
        return "bool"
    given = [kind_of(each) for each in node.args if isinstance(each, (fx.Node, int, float))]
    if operation == "where":
        if given.pop(0) != "bool":
            raise OptionError(f"{name} decides by a number; compare it, as in x != 0")
    elif operation in ("and", "or", "not"):
        if set(given) == {"bool"}:
            return "bool"
        if "float" in given or node.target in _OF_BOOLS:
            raise OptionError(f"{name} takes a number for a bool; compare it, as in x != 0")
    elif set(given) == {"bool"} and operation not in ("div", "float"):
        raise OptionError(f"{name} calculates with bools alone; write `&`, `|` and `~`")
    elif operation in ("floordiv", "mod") and "float" in given:
        raise OptionError(f"{name} divides with remainder what is no whole number")
    if operation in _FLOATING or "float" in given:
        return "float"
    return "int"


_SPELLINGS: dict[Any, str] = {
    "abs": "abs", "tanh": "tanh", "exp": "exp", "sigmoid": "sigmoid", "sqrt": "sqrt", "log": "log",
    "logical_and": "and", "logical_or": "or", "logical_not": "not", "clamp": "clamp", "float": "float",
    torch.full: "constant", operator.getitem: "getitem", torch.where: "where",
    operator.add: "add", torch.add: "add", operator.sub: "sub", torch.sub: "sub", operator.mul: "mul",
    torch.mul: "mul", operator.truediv: "div", torch.div: "div", operator.floordiv: "floordiv",
    torch.floor_divide: "floordiv", operator.mod: "mod", torch.remainder: "mod", operator.neg: "neg", torch.neg: "neg",
    operator.lt: "lt", operator.le: "le", operator.gt: "gt", operator.ge: "ge", operator.eq: "eq", operator.ne: "ne",
    operator.and_: "and", torch.logical_and: "and", operator.or_: "or", torch.logical_or: "or", operator.invert: "not",
    operator.inv: "not", torch.logical_not: "not", operator.abs: "abs", torch.abs: "abs", torch.minimum: "minimum",
    torch.maximum: "maximum", torch.clamp: "clamp", torch.tanh: "tanh", torch.exp: "exp", torch.sigmoid: "sigmoid",
    torch.sqrt: "sqrt", torch.log: "log",
}  # fmt: skip
_OF_BOOLS = (torch.logical_and, torch.logical_or, torch.logical_not, "logical_and", "logical_or", "logical_not")
_PARAMETERS = {"where": ("condition", "input", "other"), "clamp": ("input", "min", "max")}
_NEUTRAL = {"alpha": 1, "rounding_mode": None}
_FLOATING = ("div", "tanh", "exp", "sigmoid", "sqrt", "log", "float")
_KNOWN = tuple(dict.fromkeys(_SPELLINGS.values()))


def kinds_of(tensors: Mapping[str, Tensor]) -> dict[str, Kind]:
    """What the elements of captured tensors are."""
    return {name: kind_of_type(tensor.dtype) for name, tensor in tensors.items()}


def kind_of_type(dtype: torch.dtype) -> Kind:
    """What the elements of tensors of this type are."""
    return "bool" if dtype == torch.bool else "float" if dtype.is_floating_point else "int"
