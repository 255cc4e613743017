"""Re-trace a dynamo graph to pre-dispatch ATen, each distinct call once.

Tracing a call costs a millisecond or more, and a deep model repeats the calls of its first layer in every other one. So
a call is traced by itself, on fresh fake tensors, and its ATen nodes are copied wherever the same call stands on inputs
with the same metadata. What cannot be treated call by call raises `NotCallByCall`, and the graph is traced as a whole.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx.experimental.proxy_tensor import fetch_object_proxy, get_proxy_mode, make_fx, track_tensor_tree
from torch.utils._pytree import tree_leaves, tree_map

from rewriter.checkpointed import CHECKPOINT, begins, ends, known
from rewriter.fastpath import WRITTEN_OUT
from rewriter.nodes import DATA_OF, is_transform, storage, written
from rewriter.written_out import SEVERAL

Graph = fx.GraphModule


class NotCallByCall(Exception):
    """A call whose meaning depends on more than its arguments."""


_ATEN = torch.ops.aten
REPLACED = (
    WRITTEN_OUT
    | SEVERAL
    | {
        _ATEN.view_as.default: lambda tensor, other: tensor.view(other.shape),
        _ATEN.reshape_as.default: lambda tensor, other: tensor.reshape(other.shape),
        _ATEN.expand_as.default: lambda tensor, other: tensor.expand(other.shape),
        # It moves to the other's device, too, and then it stays as it is.
        _ATEN.type_as.default: lambda tensor, other: (
            tensor.to(other.dtype) if tensor.device == other.device else NotImplemented
        ),
    }
)
"""What has the shape or the type of another tensor has nothing else of it: a bias does not come from the scores that it
fits.
"""


def whole(gm: Graph, fakes: Sequence[Any]) -> Graph:
    """The graph in pre-dispatch ATen, traced in one piece. To be called inside the fake mode."""

    def run(*inputs: Any) -> Any:
        with ExitStack() as opened:
            return _Run(gm, opened).run(*inputs)

    traced = make_fx(run, pre_dispatch=True, decomposition_table=REPLACED, _allow_non_fake_inputs=True)(*fakes)
    held = [getattr(traced, str(node.target), None) for node in traced.graph.find_nodes(op="get_attr")]
    if any(isinstance(each, FakeTensor) for each in held):
        raise RuntimeError("a part of it was computed and not traced")
    return traced


class _Run(fx.Interpreter):
    def __init__(self, gm: Graph, opened: ExitStack) -> None:
        super().__init__(gm)
        self.opened = opened

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is CHECKPOINT:
            return self._checkpointed(*args, **kwargs)
        if target is _enter_autocast:
            return _tracer().create_proxy("call_function", target, args, {}), _casting(self.opened, args)
        if target is _exit_autocast:
            ((entered, region),) = args
            region.close()
            return _tracer().create_proxy("call_function", target, (entered,), {})
        return _data_of(*args) if target is DATA_OF else super().call_function(target, args, kwargs)

    def _checkpointed(self, body: Graph, *args: Any, **settings: Any) -> Any:
        """What is computed again for the backward, written out between its marks."""
        _tracer().create_proxy("call_function", begins, (), {}).node.meta |= known(body, settings)
        result = _Run(body, self.opened).run(*args)
        _tracer().create_proxy("call_function", ends, (), {})
        return result


def _casting(opened: ExitStack, args: Any) -> ExitStack:
    """A region of automatic casts, begun: they are made while calls are traced."""
    device, dtype, enabled, _ = args
    region = opened.enter_context(ExitStack())
    # A cast that is remembered would be no node where it is used again.
    region.enter_context(torch.autocast(device, dtype, enabled, cache_enabled=False))
    return region


def _tracer() -> Any:
    mode = get_proxy_mode()
    assert mode is not None
    return mode.tracer


def _data_of(value: Tensor) -> Tensor:
    """`value.data`, with the node that tracing does not make of it. `detach` would be another thing: what is written
    into `data` is not told to the backward.
    """
    tracer = _tracer()
    held = fetch_object_proxy(tracer, value)
    proxy = tracer.create_proxy("call_function", DATA_OF, (getattr(held, "proxy", held),), {})
    return track_tensor_tree(value.data, proxy, constant=None, tracer=tracer)


def call_by_call(gm: Graph, fakes: Sequence[Any], mode: FakeTensorMode, *, aliased: bool = False) -> Graph:
    """The graph in pre-dispatch ATen, each distinct call traced once. To be called inside the fake mode.

    With `aliased` each call is traced on the values that stand before it, so that what is a view of what stays known.
    """
    with torch.set_grad_enabled(torch.is_grad_enabled()), ExitStack() as opened:
        return _call_by_call(gm, fakes, mode, aliased, opened)


def under_vmap(gm: Graph) -> bool:
    """Does a part of this graph run under `vmap`? It cannot be traced as a whole."""
    return any(is_transform(node.target) for node in gm.graph.nodes)


def _call_by_call(gm: Graph, fakes: Sequence[Any], mode: FakeTensorMode, aliased: bool, opened: ExitStack) -> Graph:
    if any(isinstance(value, torch.SymInt) for value in fakes):
        raise NotCallByCall("sizes that are computed with must be traced together")
    tracer = _CallTracer(gm, mode, aliased, opened)
    inputs = iter(fakes)
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            tracer.placeholder(node, next(inputs))
        elif node.op == "output":
            tracer.graph.output(fx.map_arg(node.args[0], tracer.copies.__getitem__))
        else:
            tracer.step(node)
    result = Graph(tracer.root, tracer.graph)
    result.graph.eliminate_dead_code()
    result.recompile()
    return result


class _CallTracer:
    def __init__(self, gm: Graph, mode: FakeTensorMode, aliased: bool, opened: ExitStack) -> None:
        self.source, self.mode, self.aliased, self.opened = gm, mode, aliased, opened
        self.casts: list[tuple[Any, ExitStack]] = []
        self.graph, self.root = fx.Graph(), torch.nn.Module()
        self.copies: dict[fx.Node, Any] = {}
        self._known: dict[Any, Graph] = {}
        self._constants: dict[int, str] = {}
        self._vmaps = 0

    def placeholder(self, node: fx.Node, value: Any) -> None:
        copy = self.graph.placeholder(f"arg{len(self.copies)}_1")
        copy.meta["val"] = value
        self.copies[node] = copy

    def attribute(self, node: fx.Node) -> None:
        held = self.source
        for name in str(node.target).split("."):
            held = getattr(held, name)
        if isinstance(held, Graph):  # a function that a call takes as its argument
            name = f"_function{len(self.copies)}"
            setattr(self.root, name, held)
            self.copies[node] = self.graph.get_attr(name)
            return
        if not isinstance(held, Tensor):
            raise NotCallByCall(f"the attribute {node.target}")
        self.copies[node] = self._constant(held)

    def _constant(self, held: Tensor) -> fx.Node:
        name = self._constants.setdefault(id(held), f"_tensor_constant{len(self._constants)}")
        if not hasattr(self.root, name):
            setattr(self.root, name, held)
        copy = self.graph.get_attr(name)
        copy.meta["val"] = held if isinstance(held, FakeTensor) else self.mode.from_tensor(held)
        return copy

    def _copy(self, node: fx.Node) -> Any:
        return self.copies[node]

    def step(self, node: fx.Node) -> None:
        """Copy what stands between the inputs and the output."""
        if node.op == "get_attr":
            self.attribute(node)
        elif node.op in ("call_function", "call_method"):
            self.call(node)
        else:
            raise NotCallByCall(f"a {node.op} of {node.target}")

    def _checkpointed(self, node: fx.Node) -> None:
        """Write out what is computed again for the backward."""
        function, *given = node.args
        assert isinstance(function, fx.Node)
        outer, body = self.source, getattr(self.source, str(function.target))
        self.graph.call_function(begins).meta |= known(body, dict(node.kwargs))
        inputs, self.source = iter(given), body
        for inner in body.graph.nodes:
            if inner.op == "placeholder":
                self.copies[inner] = fx.map_arg(next(inputs), self._copy)
            elif inner.op == "output":
                self.copies[node] = fx.map_arg(inner.args[0], self._copy)
            else:
                self.step(inner)
        self.source = outer
        self.graph.call_function(ends)

    def call(self, node: fx.Node) -> None:
        """Copy the ATen nodes of a call, traced now or known from an equal one."""
        if node.target is CHECKPOINT:
            self._checkpointed(node)
            return
        if node.target is torch._C._set_grad_enabled:
            torch._C._set_grad_enabled(*node.args)  # It holds for the calls that follow, and `call_by_call` ends it.
            self.graph.call_function(node.target, node.args)
            return
        if self._vmaps or is_transform(node.target):
            self._verbatim(node)
            return
        if getattr(node.target, "__module__", "") == torch.nn.attention.__name__:
            assert callable(node.target)
            # Which kernels may serve the calls that follow: it is set when the graph runs.
            fx.node.has_side_effect(node.target)
            self.copies[node] = self.graph.call_function(node.target, *fx.map_arg((node.args, node.kwargs), self._copy))
            return
        if node.target in (_enter_autocast, _exit_autocast):
            self._autocast(node)
            return
        if node.target is DATA_OF:
            (source,) = node.all_input_nodes
            copy = self.graph.call_function(DATA_OF, (self.copies[source],))
            copy.meta = dict(node.meta) | {"val": self.copies[source].meta["val"].data}
            self.copies[node] = copy
            return
        if node.target is torch.ops.higher_order.flex_attention:
            self._with_functions(node)
            return
        if _has_state(node.target):
            raise NotCallByCall(f"a call of {node.target}")
        numbers: dict[fx.Node, int] = {}
        arguments = fx.map_arg((node.args, node.kwargs), self.copies.__getitem__)
        text = fx.map_arg(arguments, lambda source: f"%{numbers.setdefault(source, len(numbers))}")
        sources = list(numbers)
        inputs = tuple(_metadata(source.meta["val"]) for source in sources)
        casts = repr([args for args, _ in self.casts])
        key = (node.op, node.target, repr(text), torch.is_grad_enabled(), casts, inputs)
        traced = None if self.aliased else self._known.get(key)
        if traced is None:
            traced = self._known[key] = self._trace(node, arguments, sources)
        self.copies[node] = self._paste(traced, sources, node)

    def _autocast(self, node: fx.Node) -> None:
        """Copy what opens or closes a region of automatic casts. It holds while the calls inside are traced, so that
        their casts are nodes, and is kept for when the graph runs: inside of another region it may forbid casts.
        """
        if node.target is _exit_autocast:
            _, region = self.casts.pop()
            region.close()
        else:
            region = _casting(self.opened, node.args)
            self.casts.append((node.args, region))
        assert callable(node.target)
        self.copies[node] = self.graph.call_function(node.target, fx.map_arg(node.args, self._copy))

    def _with_functions(self, node: fx.Node) -> None:
        """Copy a call that takes functions of its own, with its results one by one."""
        assert callable(node.target)
        copy = self.graph.call_function(node.target, *fx.map_arg((node.args, node.kwargs), self._copy))
        copy.meta = dict(node.meta)
        results = []
        for place, value in enumerate(node.meta["example_value"]):
            result = self.graph.call_function(operator.getitem, (copy, place))
            result.meta = dict(node.meta) | {"val": value}
            results.append(result)
        self.copies[node] = tuple(results)

    def _verbatim(self, node: fx.Node) -> None:
        """Copy a call as it is: under `vmap`, by which masks are made, nothing can be traced."""
        name = getattr(node.target, "__name__", str(node.target))
        if name in ("_grad_increment_nesting", "_jvp_increment_nesting"):
            raise NotCallByCall(f"a call of {name}")
        self._vmaps += {"_vmap_increment_nesting": 1, "_vmap_decrement_nesting": -1}.get(name, 0)
        if is_transform(node.target):
            assert callable(node.target)
            fx.node.has_side_effect(node.target)
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._copy)
        given, named = fx.map_arg((args, kwargs), lambda source: source.meta["val"])
        copy = self.graph.create_node(node.op, node.target, args, kwargs)
        function = getattr(given[0], node.target) if isinstance(node.target, str) else node.target
        copy.meta = dict(node.meta) | {
            "val": function(*(given[1:] if isinstance(node.target, str) else given), **named)
        }
        self.copies[node] = copy

    def _trace(self, node: fx.Node, arguments: Any, sources: Sequence[fx.Node]) -> Graph:
        fresh = [source.meta["val"] if self.aliased else _fresh(source.meta["val"]) for source in sources]
        if len({id(value) for value in fresh}) < len(fresh):
            raise NotCallByCall("two arguments are one tensor")

        def run(*inputs: Any) -> Any:
            given = dict(zip(sources, inputs, strict=True))
            args, kwargs = fx.map_arg(arguments, given.__getitem__)
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            assert callable(node.target)
            return node.target(*args, **kwargs)

        try:
            traced = make_fx(run, pre_dispatch=True, decomposition_table=REPLACED, _allow_non_fake_inputs=True)(*fresh)
        except DataDependentOutputException as cause:
            # The value of a constant: fresh tensors lack it, and the graph as a whole has it.
            raise NotCallByCall(f"{node.target} reads the value of a tensor") from cause
        for source, value in zip(sources, fresh, strict=True):
            if isinstance(value, Tensor) and _metadata(value) != _metadata(source.meta["val"]):
                raise NotCallByCall(f"{node.target} changes the shape of its argument")
        own = {storage(node) for node in traced.graph.find_nodes(op="placeholder")} - {None}
        for inner in traced.graph.nodes:
            if not self.aliased and any(storage(target) in own for target in written(inner)):
                raise NotCallByCall(f"{node.target} changes its argument, which others read through other views")
            known = inner.op in ("placeholder", "get_attr", "call_function", "output")
            # A fresh tensor begins where its storage begins, which `as_strided` would see.
            if not known or _is_unbacked(inner) or inner.target is torch.ops.aten.as_strided.default:
                raise NotCallByCall(f"{node.target} traces to {inner.op} {inner.target}")
        return traced

    def _paste(self, traced: Graph, sources: Sequence[fx.Node], node: fx.Node) -> Any:
        pasted: dict[fx.Node, fx.Node] = {}
        inputs = iter(sources)
        described: dict[str, Any] = {
            name: node.meta[name] for name in ("nn_module_stack", "stack_trace") if name in node.meta
        }
        for inner in traced.graph.nodes:
            if inner.op == "placeholder":
                pasted[inner] = next(inputs)
            elif inner.op == "get_attr":
                held = getattr(traced, str(inner.target))
                if isinstance(held, FakeTensor):
                    raise NotCallByCall(f"{node.target} computes what is not traced")
                pasted[inner] = self._constant(held)
            elif inner.op == "output":
                return fx.map_arg(inner.args[0], pasted.__getitem__)
            else:
                copy = self.graph.node_copy(inner, pasted.__getitem__)
                copy.meta = {**described, "val": inner.meta.get("val")}
                pasted[inner] = copy
        raise AssertionError("a graph has an output")


def _has_state(target: Any) -> bool:
    """Does this call set a mode for those that follow, or take functions as arguments?"""
    return isinstance(target, torch._ops.HigherOrderOperator) or getattr(target, "__name__", "") in _STATEFUL


_STATEFUL = {"_enter_inference_mode", "_exit_inference_mode"}


def _metadata(value: Any) -> Any:
    """All that tracing can see of a value. Two values of equal metadata give the same trace."""
    if not isinstance(value, Tensor):
        return tree_map(_metadata, value) if isinstance(value, (tuple, list)) else (type(value).__name__, str(value))
    if type(value) not in (FakeTensor, Tensor, torch.nn.Parameter) or value.layout != torch.strided:
        raise NotCallByCall(f"a {type(value).__name__} of layout {value.layout}")
    sizes, strides = tuple(map(str, value.shape)), tuple(map(str, value.stride()))
    return value.dtype, value.device, value.requires_grad, sizes, strides


def _fresh(value: Any) -> Any:
    """Another fake tensor of the same metadata: two arguments must not be taken for one."""
    if not isinstance(value, Tensor):
        return value
    made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    if not value.requires_grad:
        return made  # inside a functorch transform it cannot be set
    made.requires_grad_()
    if value.is_leaf or not torch.is_grad_enabled():
        return made
    inner = made.clone()  # into what an earlier graph has computed may be written, which into a leaf may not
    return inner if inner.stride() == made.stride() else made


def _is_unbacked(node: fx.Node) -> bool:
    """A size that only the data knows: each such call makes its own symbol."""
    sizes = [s for v in tree_leaves(node.meta.get("val")) for s in (v.shape if isinstance(v, Tensor) else [v])]
    return any(isinstance(s, torch.SymInt) and not s.node.has_hint() for s in sizes)
