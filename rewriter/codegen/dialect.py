"""Expressions in the words of a language: Triton's Python, and C++."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import fx
from torch.utils._pytree import tree_leaves

from rewriter.codegen.expression import INDICES, Kind, above, bounds, kind_of, places, spelled


@dataclass(frozen=True)
class Dialect:
    """How a language writes an operation: format strings by operation, literals, and the read of a tensor."""

    words: Mapping[str, str]
    literal: Callable[[Any], str]
    read: Callable[[str, list[str], Kind], str]
    assign: Callable[[str, str, Kind], str]
    operand: Callable[[str, Kind, Kind], str] = lambda text, kind, wanted: text


def word(name: str) -> str:
    """The name of an index, or of a captured tensor, in generated code."""
    return name if name in INDICES else f"in_{name}"


def printed(
    graph: fx.Graph,
    dialect: Dialect,
    results: Sequence[Any] | None = None,
    known: Mapping[fx.Node, str] = MappingProxyType({}),
) -> tuple[list[str], list[str]]:
    """The lines that compute `results`, nodes or numbers (without them what the graph returns), and their texts. What
    is `known` has a text already.
    """
    if results is None:
        (output,) = graph.find_nodes(op="output")
        results = output.args[0] if isinstance(output.args[0], tuple) else (output.args[0],)
    texts = dict(known)
    lines: list[str] = []
    needed = above(results, known)
    read = Counter(tree_leaves([(node.args, node.kwargs) for node in needed if node not in known]))
    read.update(results)

    def text(value: Any) -> str:
        return texts[value] if isinstance(value, fx.Node) else dialect.literal(value)

    for node in graph.nodes:
        if node not in needed or node in known:
            continue
        if node.op == "placeholder":
            texts[node] = word(str(node.target))
            continue
        texts[node] = _written(node, dialect, text)
        if read[node] > 1 and spelled(node) != "constant":
            name = f"t{len(lines)}"
            lines.append(dialect.assign(name, texts[node], kind_of(node)))
            texts[node] = name
    return lines, [text(each) for each in results]


def _written(node: fx.Node, dialect: Dialect, text: Callable[[Any], str]) -> str:
    operation = spelled(node)
    assert operation is not None

    def said(operation: str) -> str:
        return dialect.words.get(f"{operation}:{kind_of(node)}") or dialect.words[operation]

    if operation == "constant":
        return dialect.literal(node.args[1])
    if operation == "getitem":
        return dialect.read(text(node.args[0]), [text(each) for each in places(node)], kind_of(node))
    if operation == "clamp":
        low, high = bounds(node)
        inner = text(node.args[0])
        inner = said("maximum").format(inner, text(low)) if low is not None else inner
        return said("minimum").format(inner, text(high)) if high is not None else inner
    if operation == "mul" and kind_of(node) == "int" and not any(_small(each) for each in node.args):
        operation = "product"
    if operation in ("floordiv", "mod") and all(_natural(each) for each in node.args):
        operation = {"floordiv": "quotient", "mod": "rest"}[operation]
    args = [
        dialect.operand(text(each), kind_of(each), kind_of(node)) if operation in ("add", "sub", "mul", "div") else
        text(each)
        for each in node.args
    ]  # fmt: skip
    if operation in _OF_FLOATS and kind_of(node.args[0]) != "float":
        args = [dialect.words["float"].format(*args)]
    return said(operation).format(*args)


def _small(value: Any) -> bool:
    """May a position be multiplied by it in 32 bits?"""
    return isinstance(value, int) and abs(value) < 128


def _natural(value: Any) -> bool:
    """Is it a whole number of at least 0, whatever the indices are? Divided, it needs no look at signs."""
    if not isinstance(value, fx.Node):
        return isinstance(value, int) and value >= 0
    if value.op == "placeholder":  # a query stands before the first key where there are more queries than keys
        return str(value.target) in ("b", "h", "j", "row")
    kept = ("add", "mul", "floordiv", "mod", "minimum", "maximum")
    return spelled(value) in kept and kind_of(value) == "int" and all(_natural(each) for each in value.args)


_OF_FLOATS = ("tanh", "exp", "sigmoid", "sqrt", "log")


def _python_literal(value: Any) -> str:
    return f'float("{value}")' if isinstance(value, float) and not math.isfinite(value) else repr(value)


TRITON = Dialect(
    words={
        "add": "({} + {})", "sub": "({} - {})", "mul": "({} * {})", "div": "({} / {})", "neg": "(-{})",
        "floordiv": "floor_divided({}, {})", "mod": "remainder({}, {})", "quotient": "({} // {})",
        "rest": "({} % {})", "lt": "({} < {})", "le": "({} <= {})",
        "gt": "({} > {})", "ge": "({} >= {})", "eq": "({} == {})", "ne": "({} != {})", "and": "({} & {})",
        "or": "({} | {})", "not": "(~{})", "abs": "tl.abs({})", "minimum": "tl.minimum({}, {})",
        "maximum": "tl.maximum({}, {})", "where": "tl.where({}, {}, {})", "tanh": "hyperbolic_tangent({})",
        "exp": "tl.exp({})", "sigmoid": "tl.sigmoid({})", "sqrt": "tl.sqrt({})", "log": "tl.log({})",
        "float": "tl.cast({}, tl.float32)", "product": "(tl.cast({}, tl.int64) * {})",
    },
    literal=_python_literal,
    read=lambda name, index, kind: _triton_read(name, index, kind),
    assign=lambda name, text, kind: f"{name} = {text}",
)  # fmt: skip


def _triton_read(name: str, index: list[str], kind: Kind) -> str:
    steps = [f"step({each}, {name}_n{axis}, {name}_s{axis})" for axis, each in enumerate(index)]
    load = f"tl.load({' + '.join([name, *steps])})"
    return f"({load} != 0)" if kind == "bool" else f"{load}.to(tl.float32)" if kind == "float" else f"widened({load})"


CPP = Dialect(
    words={
        **{name: word for name, word in TRITON.words.items() if name not in ("and", "or", "not")},
        "quotient": "({} / {})",
        "and": "({} & {})", "or": "({} | {})", "not": "(!{})", "not:int": "(~{})", "product": "({} * {})",
        "where": "({} ? {} : {})", "abs": "abs({})",
        "abs:int": "std::abs({})", "minimum": "std::min<float>({}, {})", "minimum:int": "std::min<int64_t>({}, {})",
        "maximum": "std::max<float>({}, {})", "maximum:int": "std::max<int64_t>({}, {})", "tanh": "tanh({})",
        "exp": "exp({})", "sigmoid": "sigmoid({})", "sqrt": "std::sqrt({})", "log": "std::log({})",
        "float": "static_cast<float>({})",
    },
    literal=lambda value: _cpp_literal(value),
    read=lambda name, index, kind: _cpp_read(name, index),
    assign=lambda name, text, kind: f"const auto {name} = {text};",
    operand=lambda text, kind, wanted: f"static_cast<float>({text})" if kind != wanted == "float" else text,
)  # fmt: skip


def _cpp_read(name: str, index: list[str]) -> str:
    # A plain index is inside of its axis, which has its length or 1.
    moved = [each if each in INDICES else f"inside({each}, c.{name}_sizes[{axis}])" for axis, each in enumerate(index)]
    return f"{name}({', '.join(moved)})"


def _cpp_literal(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return f"int64_t({value})"
    return "INFINITY" if value == math.inf else "-INFINITY" if value == -math.inf else f"{value!r}f"
