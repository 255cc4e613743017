"""Questions about the nodes of a pre-dispatch graph: what they call, hold, write, and are made from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import is_fake

_ATEN = torch.ops.aten
DATA_OF: Callable[..., Any] = torch._C._autograd._get_data_attr  # type: ignore[attr-defined]
"""How dynamo writes `x.data`: no operator, and so traced by hand."""
PRODUCTS = (_ATEN.matmul, _ATEN.bmm, _ATEN.baddbmm, _ATEN.einsum, _ATEN.mm)
_VIEWS = (
    _ATEN.transpose, _ATEN.t, _ATEN.mT, _ATEN.numpy_T, _ATEN.permute, _ATEN.swapaxes, _ATEN.view, _ATEN.reshape,
    _ATEN.expand, _ATEN.unsqueeze, _ATEN.squeeze, _ATEN.to, _ATEN._to_copy, _ATEN.clone, _ATEN.contiguous,
    _ATEN.alias, _ATEN.slice, _ATEN.select, _ATEN.detach, DATA_OF,
)  # fmt: skip
_BARRIERS = (
    _ATEN.linear, _ATEN.addmm, _ATEN.embedding, _ATEN.softmax, _ATEN.layer_norm, _ATEN.native_layer_norm,
    _ATEN.convolution, _ATEN.conv2d, _ATEN.conv1d, _ATEN.scaled_dot_product_attention, _ATEN.rms_norm,
)  # fmt: skip
_SHAPED = _ATEN.view_as, _ATEN.reshape_as, _ATEN.expand_as, _ATEN.type_as
_FILLED = (
    _ATEN.sym_size, _ATEN.zeros_like, _ATEN.ones_like, _ATEN.full_like, _ATEN.empty_like, _ATEN.new_zeros,
    _ATEN.new_ones, _ATEN.new_full, _ATEN.new_empty,
)  # fmt: skip
"""What asks its second tensor, or its first one, for a shape and a type alone."""
_HARMLESS = (_ATEN.detach_.default, _ATEN.requires_grad_.default)


def packet_of(target: Any) -> Any:
    """The operator that a target of a call is one overload of; None where it is none."""
    return getattr(target, "overloadpacket", None)


def is_call(node: Any, *targets: Any) -> bool:
    """Is this a call of one of these operators (packets match all their overloads)?"""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    packet = packet_of(node.target)
    return any(node.target is target or packet is target for target in targets)


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """An argument of an operator call by its name in the schema."""
    if name in node.kwargs:
        return node.kwargs[name]
    assert isinstance(node.target, torch._ops.OpOverload)
    for position, declared in enumerate(node.target._schema.arguments):
        if declared.name == name:
            if position < len(node.args):
                return node.args[position]
            return declared.default_value if declared.has_default_value() else default
    return default


def value_of(node: fx.Node) -> Tensor:
    """The fake tensor that stands for this node's value."""
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return value


def is_number(value: Any) -> bool:
    """A Python number, not a tensor and not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def fixed(number: Any) -> Any:
    """A size or factor as a plain number. A symbolic one is fixed to its value where dynamo is compiling, since dynamo
    then guards it and compiles again for another; elsewhere it is None.
    """
    if not isinstance(number, (torch.SymInt, torch.SymFloat)):
        return number
    if TracingContext.try_get() is None or not number.node.has_hint():
        return None
    return int(number) if isinstance(number, torch.SymInt) else float(number)


def written(node: fx.Node) -> list[fx.Node]:
    """The tensors that this call changes in place."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.is_mutable or node.target in _HARMLESS:
        return []
    found: list[Any] = []
    for position, declared in enumerate(schema.arguments):
        if declared.alias_info is not None and declared.alias_info.is_write:
            value = node.args[position] if position < len(node.args) else node.kwargs.get(declared.name)
            found += value if isinstance(value, (list, tuple)) else [value]
    return [each for each in found if isinstance(each, fx.Node)]


def is_transform(target: Any) -> bool:
    """Is this a call of functorch, of which masks are made element by element?"""
    return "functorch" in (getattr(target, "__module__", None) or "")


def storage(node: fx.Node) -> int | None:
    """What nodes that are views of one another have in common."""
    value = node.meta.get("val")
    try:
        return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None
    except (NotImplementedError, RuntimeError):  # nested, sparse
        return None


def unsliced(node: fx.Node) -> fx.Node:
    """Through slices that keep everything: `x[:, None]` writes them where sizes are symbolic."""
    while is_call(node, torch.ops.aten.slice) and value_of(node).shape == value_of(node.all_input_nodes[0]).shape:
        node = node.all_input_nodes[0]
    return node


def constant(value: Any) -> float | None:
    """The number that a literal, a constant-filled node or a float attribute of the model holds."""
    if is_number(value):
        return float(value)
    if isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.SymFloat):
        held: float | None = fixed(value.meta["val"])
        return held
    if is_call(value, _ATEN.full, _ATEN.full_like, _ATEN.scalar_tensor):
        filled = value.args[0] if is_call(value, _ATEN.scalar_tensor) else value.args[1]
        return float(filled) if is_number(filled) else None
    if is_call(value, _ATEN.zeros, _ATEN.zeros_like, _ATEN.new_zeros):
        return 0.0
    if is_call(value, _ATEN.ones, _ATEN.ones_like, _ATEN.new_ones):
        return 1.0
    if is_call(value, _ATEN.neg, _ATEN.mul):  # of numbers that are written as tensors
        product = -1.0 if is_call(value, _ATEN.neg) else 1.0
        for each in value.args:
            if (factor := constant(each)) is None:
                return None
            product *= factor
        return product
    if is_call(value, _ATEN.to, _ATEN.expand, _ATEN.lift_fresh_copy, _ATEN.detach_, _ATEN.clone, _ATEN.alias):
        return constant(value.args[0])
    if is_call(value, _ATEN.sqrt, _ATEN.rsqrt, _ATEN.reciprocal):
        inner = constant(value.args[0])
        if inner is None or inner <= 0:
            return None
        power = 0.5 if is_call(value, _ATEN.sqrt) else -0.5 if is_call(value, _ATEN.rsqrt) else -1.0
        return float(inner**power)
    if isinstance(value, fx.Node) and value.op == "get_attr" and not value.meta.get("is_state"):
        return _element(_attribute(value))
    return None


def buffered(value: Any) -> tuple[fx.Node, float] | None:
    """A buffer of one element, seen through casts, and the number that it holds now."""
    while is_call(value, _ATEN.to, _ATEN._to_copy, _ATEN.detach, _ATEN.alias):
        value = value.all_input_nodes[0]
    if not isinstance(value, fx.Node) or not value.meta.get("is_buffer"):
        return None
    number = _element(value.meta.get("buffer", _attribute(value)))
    return (value, number) if number is not None else None


def _attribute(node: fx.Node) -> Any:
    """What a node of an exported graph holds, which may be of an inner module; None where it is no attribute."""
    try:
        return attrgetter(str(node.target))(node.graph.owning_module) if node.op == "get_attr" else None
    except AttributeError:
        return None


def _element(value: Any) -> float | None:
    return float(value) if isinstance(value, Tensor) and value.numel() == 1 and not is_fake(value) else None


def is_parameter(node: fx.Node) -> bool:
    """Does this node hold weights, directly or through views? Then a product with it is a linear layer."""
    while is_call(node, *_VIEWS):
        node = node.all_input_nodes[0]
    if node.op not in ("placeholder", "get_attr"):
        return False
    return isinstance(node.meta.get("val"), torch.nn.Parameter) or bool(node.meta.get("is_parameter"))


def values_of(node: fx.Node) -> list[fx.Node]:
    """What a node has its values from, and not only its shape or type."""
    sources = node.all_input_nodes
    return sources[:1] if is_call(node, *_SHAPED) else sources[1:] if is_call(node, *_FILLED) else sources


def mark_data(graph: fx.Graph) -> None:
    """Note at every node whether its value depends on what the model is called with, beyond sizes and weights."""
    views: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            is_tensor = isinstance(node.meta.get("val"), torch.Tensor)
            node.meta["from_data"] = is_tensor and not (node.meta.get("is_parameter") or node.meta.get("is_buffer"))
        else:
            node.meta["from_data"] = any(source.meta.get("from_data") for source in values_of(node))
        if (own := storage(node)) is not None:
            views.setdefault(own, []).append(node)
        if node.meta["from_data"]:  # into an empty tensor, say, of which all is read that shares its storage
            for each in (each for target in written(node) for each in views.get(storage(target) or 0, [])):
                each.meta["from_data"] = True


def depends_on_data(node: fx.Node) -> bool:
    """Does the value differ with what the model is called with? (`mark_data` has to have run.)"""
    return bool(node.meta.get("from_data"))


def above(
    node: fx.Node,
    enters: Callable[[fx.Node], bool],
    limit: int | None = None,
    sources: Callable[[fx.Node], Sequence[fx.Node]] = lambda each: each.all_input_nodes,
) -> Iterator[fx.Node]:
    """This node and all that it is computed from, as far as `enters` lets through and up to so many nodes. `sources` of
    a node are those that count.
    """
    seen, todo = {node}, [node] if enters(node) else []
    while todo and (limit is None or len(seen) < limit):
        current = todo.pop()
        yield current
        for source in sources(current):
            if source not in seen and enters(source):
                seen.add(source)
                todo.append(source)


def is_bias(node: fx.Node, limit: int = 400) -> bool:
    """Is this made from weights, or from a product, and so more than a mask?"""
    made_from = above(node, lambda source: isinstance(source.meta.get("val"), Tensor), limit)
    return any(is_parameter(each) or is_call(each, *PRODUCTS, _ATEN.linear) for each in made_from)


def comes_from_product(node: fx.Node, limit: int = 400) -> bool:
    """Does a product of two activations stand above this node, with only elementwise steps and views between?"""

    def is_product(each: fx.Node) -> bool:
        return is_call(each, *PRODUCTS) and not any(isinstance(a, fx.Node) and is_parameter(a) for a in each.args)

    def passes(each: fx.Node) -> bool:
        return each.op == "call_function" and not is_call(each, *_BARRIERS, *PRODUCTS)

    return any(is_product(each) for each in above(node, lambda each: passes(each) or is_product(each), limit))
