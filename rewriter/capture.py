"""A model, a dynamo graph or an exported program -> one form of graph: pre-dispatch ATen with module paths.

Functions, methods and operators collapse to one spelling there, autograd still works on the result, and symbolic sizes
survive. It is the IR that `torch.export` also gives.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx.traceback
from torch import fx, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._guards import TracingContext, detect_fake_mode
from torch._subclasses import FakeTensor, FakeTensorMode

from rewriter.errors import CaptureError, RewriterError
from rewriter.nodes import PRODUCTS, is_call, storage, value_of, written
from rewriter.retrace import NotCallByCall, call_by_call, under_vmap, whole

Graph = fx.GraphModule
Backend = Callable[[Graph, Sequence[Any]], Callable[..., Any]]

_ENTRY_NUMBER = itertools.count()


@dataclass(frozen=True)
class Fakes:
    """The inputs of a graph without their data: symbolic sizes are those that dynamo guards."""

    values: Sequence[Any]
    mode: FakeTensorMode

    @staticmethod
    def of(example_inputs: Sequence[Any]) -> Fakes:
        """Of what dynamo hands to a backend, in the mode that it traces in."""
        context = TracingContext.try_get()
        found = context.fake_mode if context is not None else detect_fake_mode(example_inputs)
        mode = FakeTensorMode(allow_non_fake_inputs=True) if found is None else found

        def fake(value: Any) -> Any:
            is_real = isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor)
            return mode.from_tensor(value) if is_real else value

        return Fakes([fake(value) for value in example_inputs], mode)


def to_aten(gm: Graph, example_inputs: Sequence[Any], given: Fakes | None = None) -> Graph:
    """The graph that dynamo hands to a backend, re-traced to pre-dispatch ATen. Placeholders keep their order.

    It is traced on the fakes, which are those of `example_inputs` where none are given.
    """
    given = given or Fakes.of(example_inputs)
    fakes, mode = given.values, given.mode
    with mode, torch.fx.traceback.preserve_node_meta(), transforms_ended():
        try:
            graph = call_by_call(gm, fakes, mode)
        except NotCallByCall:
            graph = call_by_call(gm, fakes, mode, aliased=True) if under_vmap(gm) else whole(gm, fakes)
    graph.graph.eliminate_dead_code()  # Weights whose mean nobody reads are not used twice.
    sources = gm.graph.find_nodes(op="placeholder")
    for node, source, example in zip(graph.graph.find_nodes(op="placeholder"), sources, example_inputs, strict=True):
        node.meta["is_parameter"] = isinstance(example, nn.Parameter)
        if _is_buffer(source) and isinstance(example, torch.Tensor):
            node.meta["is_buffer"], node.meta["buffer"] = True, example
    _forget_written_buffers(graph)
    _write_casts(graph)
    return graph


def _write_casts(graph: Graph) -> None:
    """Products under `torch.autocast` are of a narrower type than their operands: make the casts nodes."""
    for node in graph.graph.nodes:
        if not is_call(node, *PRODUCTS, torch.ops.aten.scaled_dot_product_attention):
            continue
        dtype = value_of(node).dtype

        def narrowed(source: fx.Node, node: fx.Node = node, dtype: torch.dtype = dtype) -> fx.Node:
            value = source.meta.get("val")
            floats = isinstance(value, torch.Tensor) and value.dtype.is_floating_point and dtype.is_floating_point
            if not floats or value_of(source).dtype.itemsize <= dtype.itemsize:
                return source
            with graph.graph.inserting_before(node):
                cast = graph.graph.call_function(torch.ops.aten.to.dtype, (source, dtype))
            cast.meta = {"val": value_of(source).to(dtype)} | {k: node.meta[k] for k in _PLACE if k in node.meta}
            return cast

        node.args, node.kwargs = fx.map_arg((node.args, node.kwargs), narrowed)
    graph.recompile()


_PLACE = ("nn_module_stack", "stack_trace")


def _is_buffer(placeholder: fx.Node) -> bool:
    """Did dynamo take this input from the buffers of a module?"""
    argument = placeholder.meta.get("grapharg")
    name = getattr(getattr(argument, "source", None), "name", "")
    said = str(name() if callable(name) else name)
    return "._buffers[" in said or ".__dict__['_buffers'][" in said  # that of a module with a `__getattr__` of its own


def _forget_written_buffers(graph: Graph) -> None:
    """A buffer that this graph writes into, such as a cache, holds what the model is called with."""
    targets = {storage(target) for node in graph.graph.nodes for target in written(node)} - {None}
    for node in graph.graph.nodes:
        if node.meta.get("is_buffer") and storage(node) in targets:
            node.meta["is_buffer"] = False


@contextmanager
def transforms_ended() -> Iterator[None]:
    """A graph may begin a functorch transform; where tracing fails inside, it would never end."""
    depth = len(torch._C._functorch.get_interpreter_stack() or ())
    try:
        yield
    finally:
        while len(torch._C._functorch.get_interpreter_stack() or ()) > depth:
            torch._C._functorch.pop_dynamic_layer_stack()


def exported(program: torch.export.ExportedProgram) -> Graph:
    """The graph of an exported program, which is pre-dispatch ATen already, with its parameters as attributes."""
    gm = program.module()
    assert isinstance(gm, Graph)
    # They only repeat the types that the export saw, and would count as uses of what they look at.
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        gm.graph.erase_node(node)
    state = {name for name, _ in (*program.named_parameters(), *program.named_buffers())}
    for node in gm.graph.find_nodes(op="get_attr"):
        held: Any = gm
        for name in str(node.target).split("."):
            held = getattr(held, name)
        node.meta["is_parameter"] = isinstance(held, nn.Parameter)
        node.meta["is_state"] = node.target in state
        node.meta["is_buffer"] = node.target in state and not isinstance(held, nn.Parameter)
        if isinstance(held, torch.Tensor):
            node.meta.setdefault("val", held)
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.dropout.default):
        value, probability, training = node.args
        if not training or probability == 0:  # Re-tracing leaves it out; as a random operator it is never dead code.
            node.replace_all_uses_with(value)
            gm.graph.erase_node(node)
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.type_as.default):  # as re-tracing does
        source, other = (value_of(each) for each in node.all_input_nodes[:1] + node.all_input_nodes[-1:])
        if source.device == other.device:
            node.target, node.args = torch.ops.aten.to.dtype, (node.args[0], other.dtype)
    gm.graph.eliminate_dead_code()
    _forget_written_buffers(gm)
    gm.recompile()
    return gm


def module_names(model: nn.Module) -> dict[str, str]:
    """str(id(module)) -> qualified name: the keys that dynamo leaves in `nn_module_stack`."""
    return {str(id(module)): name for name, module in model.named_modules()}


def site_path(node: fx.Node, names: Mapping[str, str], frame: str = "") -> str:
    """The qualified name of the innermost module whose forward made this node ("" for the root).

    `frame` is the name of the module whose forward the graph is of, which the node's own stack leaves out.
    """
    stack: Mapping[str, Any] = node.meta.get("nn_module_stack") or {}
    for key, (path, *_) in reversed(list(stack.items())):
        known = names.get(str(key).partition("@")[0])
        return known if known is not None else ".".join(filter(None, (frame, _in_frame(path))))
    return frame


def frame_path(gm: Graph, names: Mapping[str, str]) -> str:
    """The name of the module whose forward a graph is of: after a graph break the forwards further down have graphs of
    their own.
    """
    for node in gm.graph.nodes:
        for key, (path, *_) in (node.meta.get("nn_module_stack") or {}).items():
            known, inner = names.get(str(key).partition("@")[0], ""), _in_frame(path)
            if inner and f".{known}".endswith(f".{inner}"):
                return known.removesuffix(inner).removesuffix(".")
    return ""


def _in_frame(path: str) -> str:
    path = re.sub(r"__dict__\['_modules'\]\['(\w+)'\]", r"\1", path)  # dynamo's spelling after some ways of access
    return re.sub(r"^L\[\W*\w+\W*\]\.?", "", path)


def source_line(node: fx.Node) -> str:
    """`file:line` of the model's code that made this node, or "" where torch did not keep it."""
    lines = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return f"{lines[-1][0].rpartition('/')[2]}:{lines[-1][1]}" if lines else ""


def compiled(model: nn.Module, backend: Backend, *, dynamic: bool | None = None) -> Callable[..., Any]:
    """`model` as a dynamo-compiled callable that leaves the module itself untouched.

    dynamo keeps its cache on the code object, and many modules share one (a decorator's wrapper, `Module._call_impl`):
    the limit on recompilations would be shared by unrelated models. So each gets an entry with its own code object.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return model._call_impl(*args, **kwargs)

    call.__code__ = call.__code__.replace(co_name=f"rewriter_entry_{next(_ENTRY_NUMBER)}")
    run: Callable[..., Any] = torch.compile(call, backend=backend, dynamic=dynamic)
    return run


@contextmanager
def capture_errors() -> Iterator[None]:
    """Turn what dynamo raises into one sentence. Errors of the model's own code pass through."""
    try:
        yield
    except BackendCompilerFailed as error:
        inner = error.inner_exception
        if isinstance(inner, RewriterError):
            raise inner from None
        raise CaptureError(f"the captured graph could not be processed ({_first_line(inner)})") from error
    except torch._dynamo.exc.TorchDynamoException as error:
        raise CaptureError(
            f"torch.compile cannot capture this model ({_first_line(error)}); "
            "run torch.compile(model) by itself to see where, and keep that part out with torch.compiler.disable"
        ) from error


@contextmanager
def graph_breaks() -> Iterator[list[str]]:
    """Why dynamo cut what is captured inside, each reason once, once that is over."""
    counted: Counter[str] = torch._dynamo.utils.counters["graph_break"]
    before, reasons = Counter(counted), list[str]()
    try:
        yield reasons
    finally:
        for text, times in counted.items():
            if times > before[text]:
                first, *others = (line.strip() for line in text.splitlines())
                said = (line.removeprefix("Explanation:") for line in others if line.startswith("Explanation:"))
                reasons.append(next(said, first).strip().rstrip("."))


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
