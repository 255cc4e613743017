"""Values of a part of a graph, computed with real tensors: at several sizes, and for several inputs.

What a mask or a bias means is decided by what it is, whatever operators spell it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import is_fake

from rewriter.axes import Atom
from rewriter.capture import transforms_ended
from rewriter.nodes import PRODUCTS, constant, depends_on_data, is_call, is_transform, storage, value_of, written

_ATEN = torch.ops.aten
_MOST_ELEMENTS = 1 << 28
"""No tensor larger than this is evaluated."""
_MOST_TOKENS = 1 << 20
"""No number in a mask above this is taken for a number of tokens."""
_MOST_NODES = 2000

Sizes = Mapping[sympy.Symbol, int]
Values = dict[fx.Node, Any]

FAILURES = (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError)
"""What an operator may raise on values that the model would not give it."""


@dataclass(frozen=True)
class Part:
    """All that a node is made from, in the order of the graph, and where it begins: `data` is what the model is called
    with or computes from that, `weights` are parameters, `buffers` hold values that may change between calls.
    """

    order: tuple[fx.Node, ...]
    data: tuple[fx.Node, ...]
    weights: tuple[fx.Node, ...]
    buffers: tuple[fx.Node, ...]
    changed: bool
    """Does the order matter, because something in it is changed in place or is under a transform?"""


def part_of(node: fx.Node) -> Part | None:
    """What this node is made from; None where chance has a part in it, or it is changed after its first use."""
    leaves: dict[fx.Node, str] = {}
    needed: set[fx.Node] = set()
    todo = [node]
    while todo:
        while todo:
            current = todo.pop()
            if current in needed:
                continue
            needed.add(current)
            if len(needed) > _MOST_NODES or _is_chance(current):
                return None
            kind = _leaf(current)
            if kind is not None:
                leaves[current] = kind
            else:
                todo += [source for source in sources(current) if source not in needed]
        own = {storage(each) for each in needed if not isinstance(each.meta.get("val"), _NUMBERS)} - {None}
        todo = [other for other in _writers(node) if other not in needed and own & {storage(t) for t in written(other)}]
    changed = any(written(each) for each in needed)
    if any(is_transform(each.target) for each in needed):
        # It is evaluated where it stands, between the calls that open and close the levels.
        named = [each for each in node.graph.nodes if is_transform(each.target)]
        levels = [each for each in named if "nesting" in getattr(each.target, "__name__", "")]
        needed |= {*levels, *(size for each in levels for size in each.all_input_nodes)}
        changed = True
    users = [user for user in node.users if user not in needed]
    first = min(users, default=None)
    inner = [each for each in node.graph.nodes if each in needed]
    if first is not None and any(first < each for each in inner if not is_transform(each.target)):
        return None
    targets = {storage(target) for each in inner for target in written(each)} - {None}
    if changed and any(storage(leaf) in targets for leaf, kind in leaves.items() if kind != "number"):
        return None
    found = {kind: tuple(n for n in inner if leaves.get(n) == kind) for kind in ("data", "weights", "buffers")}
    return Part(tuple(inner), **found, changed=changed)


def _is_chance(node: fx.Node) -> bool:
    if is_call(node, _ATEN.dropout) and not (node.args[2] and node.args[1]):
        return False
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _writers(node: fx.Node) -> list[fx.Node]:
    return [each for each in node.graph.nodes if written(each)]


def _leaf(node: fx.Node) -> str | None:
    if isinstance(node.meta.get("val"), _NUMBERS):
        return "number"
    if node.op in ("placeholder", "get_attr"):
        if node.meta.get("is_parameter"):
            return "weights"
        if node.meta.get("is_buffer"):
            return "buffers"
        if node.op == "get_attr":
            return "weights" if isinstance(node.meta.get("val"), torch.nn.Parameter) else "constant"
        return "data"
    # An einsum of one tensor is a view.
    is_product = is_call(node, *PRODUCTS) and len(node.all_input_nodes) > 1
    return "data" if depends_on_data(node) and (is_product or is_call(node, *_OPAQUE)) else None


_NUMBERS = (torch.SymInt, torch.SymFloat, torch.SymBool, int, float)
_OPAQUE = (
    _ATEN.linear, _ATEN.addmm, _ATEN.embedding, _ATEN.softmax, _ATEN.layer_norm, _ATEN.native_layer_norm,
    _ATEN.convolution, _ATEN.conv1d, _ATEN.conv2d, _ATEN.conv3d, _ATEN.scaled_dot_product_attention, _ATEN.rms_norm,
    _ATEN.group_norm,
)  # fmt: skip


def sources(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values go into this one. A tensor that only lends its shape or type lends no values."""
    lender = _lender(node)
    return [source for source in node.all_input_nodes if source is not lender]


def _lender(node: fx.Node) -> Any:
    if is_call(node, *_LIKE_FIRST):
        return node.args[0]
    return node.args[1] if is_call(node, *_LIKE_SECOND) or _is_to_other(node) else None


def _is_to_other(node: fx.Node) -> bool:
    return node.target is _ATEN.to.other


_LIKE_FIRST = (
    _ATEN.new_ones, _ATEN.new_zeros, _ATEN.new_full, _ATEN.new_empty, _ATEN.ones_like, _ATEN.zeros_like,
    _ATEN.full_like, _ATEN.empty_like,
)  # fmt: skip
_LIKE_SECOND = (_ATEN.expand_as, _ATEN.view_as, _ATEN.reshape_as, _ATEN.type_as)


# --- sizes -----------------------------------------------------------------------------------------------------------


def number(size: Any, sizes: Sizes) -> int:
    """A size, or an atom's, as a number where the symbols have these values."""
    expression = size.node.expr if isinstance(size, torch.SymInt) else size.size if isinstance(size, Atom) else size
    return int(expression) if isinstance(expression, int) else int(expression.subs(sizes))


def symbols_of(axis: Iterable[Atom]) -> set[sympy.Symbol]:
    """The symbols in the lengths of some atoms."""
    return {symbol for atom in axis if not isinstance(atom.size, int) for symbol in atom.size.free_symbols}


def size_assignments(part: Part, few: Collection[sympy.Symbol] = ()) -> list[list[Sizes]]:
    """Values for the symbols: all beyond the largest constant in the part; each a little larger; and as captured.

    Of each there are alternatives, for where it fails: symbols that nothing relates may still belong together, as the
    lengths of a mask and of a cache do. A buffer that is cut to a length is not longer than it is. `few` are symbols of
    which all values are alike: batches.
    """
    held = [node.meta.get("val") for node in part.order]
    held += [size for value in held if isinstance(value, Tensor) for size in value.shape]
    symints = [value for value in held if isinstance(value, torch.SymInt)]
    symbols = sorted({symbol for value in symints for symbol in value.node.expr.free_symbols}, key=str)
    if not symbols:
        return [[{}]]
    shape_env = symints[0].node.shape_env
    assert shape_env is not None
    hints = {symbol: int(shape_env.backed_var_to_val.get(symbol, 8)) for symbol in symbols}
    beyond = int(max((abs(n) for n in constants(part) if abs(n) < _MOST_TOKENS), default=0)) + 13
    lengths = [int(n) for node in part.buffers for n in value_of(node).shape if isinstance(n, int) and n > 1]
    most = min((n for n in lengths if n >= max(hints.values())), default=_MOST_TOKENS)
    more = max(beyond - min(hints.values()), 0)
    tried: list[list[dict[sympy.Symbol, int]]] = [
        [
            {symbol: max(hint, beyond) + i for i, (symbol, hint) in enumerate(hints.items())},
            {symbol: hint + more for symbol, hint in hints.items()},
        ],
        [
            {symbol: hint + 3 + 2 * i for i, (symbol, hint) in enumerate(hints.items())},
            {symbol: hint + 3 for symbol, hint in hints.items()},
        ],
        [hints],
    ]
    return [
        [
            {symbol: 2 if symbol in few else min(n, max(most - i, 1)) for i, (symbol, n) in enumerate(each.items())}
            for each in alternatives
        ]
        for alternatives in tried
    ]


def constants(part: Part) -> list[float]:
    """The numbers that stand in a part."""
    given = [constant(value) for node in part.order for value in (node, *node.args, *node.kwargs.values())]
    return [n for n in given if n is not None and abs(n) != float("inf") and n == n]


# --- values ----------------------------------------------------------------------------------------------------------


def held(node: fx.Node) -> Tensor:
    """The real value of a constant or a buffer. Raises ValueError where it is not known."""
    value: Any = node.meta.get("buffer")
    if value is None and node.op == "get_attr":
        value = node.graph.owning_module
        for name in str(node.target).split("."):
            value = getattr(value, name)
    if not isinstance(value, Tensor) or is_fake(value):
        raise ValueError(f"the value of {node.name} is not known")
    return value.detach()


def evaluate(
    part: Part, sizes: Sizes, given: Mapping[fx.Node, Tensor], known: Mapping[fx.Node, Any] | None = None
) -> Values:
    """Run the part, with these values of its data and weights; sizes come from their expressions, so that related sizes
    stay related. `known` are values that need not be computed again.
    """
    values: Values = dict(known or {})
    with torch.no_grad(), transforms_ended():
        for node in part.order:
            if node not in values:
                values[node] = _value(node, sizes, values, given)
    return values


def _value(node: fx.Node, sizes: Sizes, values: Values, given: Mapping[fx.Node, Tensor]) -> Any:
    meta = node.meta.get("val")
    is_size = not is_transform(node.target)  # A level is a number too, and opened by the call.
    if isinstance(meta, (torch.SymInt, int)) and not isinstance(meta, bool) and is_size:
        return number(meta, sizes)
    if isinstance(meta, _NUMBERS) and is_size:
        raise ValueError(f"{node.name} is no size")
    if node in given:
        return given[node]
    if node.op in ("get_attr", "placeholder"):
        return held(node).clone()
    count = 1
    for size in meta.shape if isinstance(meta, Tensor) else ():
        count *= number(size, sizes)
    if count > _MOST_ELEMENTS:
        raise ValueError(f"{node.name} is too large")

    def concrete(source: fx.Node) -> Any:
        if source in values:
            return values[source]
        fake = value_of(source)  # It lends its shape or its type.
        shape = [number(size, sizes) for size in fake.shape]
        return torch.empty((), dtype=fake.dtype, device=fake.device).expand(shape)

    args, kwargs = fx.map_arg((node.args, node.kwargs), concrete)
    if isinstance(node.target, str):
        return getattr(args[0], node.target)(*args[1:], **kwargs)
    return node.target(*args, **kwargs)


def fixed_values(part: Part, sizes: Sizes) -> Values:
    """The values that do not depend on data or weights, which are the same in every draw."""
    loose = {*part.data, *part.weights}
    for node in part.order:
        if any(source in loose for source in sources(node)):
            loose.add(node)
    if part.changed:  # A tensor that is changed in place must be made anew.
        return {}
    steady = tuple(node for node in part.order if node not in loose)
    return evaluate(Part(steady, (), (), part.buffers, False), sizes, {})


# --- inputs ----------------------------------------------------------------------------------------------------------

FIRST = 4
"""So many draws are made of the largest masks too: all, none, and some."""
BINARY = ("ones", "zeros", "even", "mostly", "even", "rarely", "even", "even")
"""Draws of masks: integers and floats hold 0 and 1."""
GENERAL = (
    "ones", "zeros", "longest", "last", "even", "small", "sorted", "counting", "constants", "even", "small", "normal",
)  # fmt: skip
"""Draws of what may be anything: numbers of segments, lengths, positions, tokens."""


def draws(part: Part, sizes: Sizes, kinds: Sequence[str], seed: int = 0) -> Iterator[dict[fx.Node, Tensor]]:
    """Values of the data, one draw for each kind; weights are normal."""
    generator = torch.Generator().manual_seed(seed)
    numbers = sorted({int(n) for n in constants(part) if n == int(n) and abs(n) < _MOST_TOKENS} | {0, 1})
    shapes = [node.meta["val"].shape for node in part.order if isinstance(node.meta.get("val"), Tensor)]
    longest = max((number(size, sizes) for shape in shapes for size in shape), default=8)
    for kind in kinds:
        given: dict[fx.Node, Tensor] = {}
        for node in (*part.data, *part.weights):
            fake = value_of(node)
            shape = [number(size, sizes) for size in fake.shape]
            drawn = "normal" if node in part.weights else kind
            given[node] = _drawn(drawn, shape, fake.dtype, numbers, longest, generator).to(fake.device)
        yield given


def _drawn(
    kind: str, shape: list[int], dtype: torch.dtype, numbers: list[int], longest: int, generator: torch.Generator
) -> Tensor:
    if kind == "normal" and dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    if kind in ("ones", "zeros"):
        return torch.full(shape, kind == "ones").to(dtype)
    if dtype != torch.bool:
        if kind == "small":
            return torch.randint(-1, 4, shape, generator=generator).to(dtype)
        if kind == "sorted":
            return torch.randint(0, 4, shape, generator=generator).sort(-1).values.to(dtype)
        if kind in ("longest", "last"):  # a length, and a place
            return torch.full(shape, longest - (kind == "last")).to(dtype)
        if kind == "counting":
            return torch.randint(0, longest + 1, shape, generator=generator).to(dtype)
        if kind == "constants":
            return torch.tensor(numbers)[torch.randint(0, len(numbers), shape, generator=generator)].to(dtype)
    chance = {"mostly": 0.85, "rarely": 0.15}.get(kind, 0.5)
    return (torch.rand(shape, generator=generator) < chance).to(dtype)
