"""What an operator does to the layout of its operands, when tokens are followed through a graph.

What a convolution slides over is a grid, and so is a mesh of positions. Most operators keep layouts, and what is not
known to keep them ends the knowledge.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import fx

from rewriter.axes import Size, shape_of, size_of
from rewriter.nodes import argument, is_call, is_parameter, packet_of
from rewriter.pieces import (
    Axis,
    Known,
    Layout,
    agreed,
    among_others,
    as_shape,
    cut,
    given_at,
    is_grid,
    length_of,
    new,
    rank,
    sized,
    total,
    without,
)
from rewriter.walk import step_at

_Rule = Callable[[fx.Node, Known], Layout | None]

_ATEN = torch.ops.aten
_VIEWS = (
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as",
    "permute", "transpose", "swapaxes", "swapdims", "t", "mT", "numpy_T", "adjoint", "movedim", "moveaxis", "expand",
    "expand_as", "broadcast_to",
)  # fmt: skip
_KEEPS = (
    "to", "_to_copy", "clone", "contiguous", "alias", "detach", "detach_", "lift_fresh_copy", "type_as", "dropout",
    "dropout_", "feature_dropout", "alpha_dropout", "softmax", "_softmax", "log_softmax",
    "layer_norm", "group_norm", "instance_norm", "rms_norm", "batch_norm", "hardswish", "hardswish_",
    "prelu", "float_power", "requires_grad_",
)  # fmt: skip
_EMPTY = (_ATEN.empty, _ATEN.empty_like, _ATEN.new_empty, _ATEN.zeros, _ATEN.zeros_like, _ATEN.new_zeros)
_RESIZES = ("pad", "constant_pad_nd", "reflection_pad2d", "replication_pad2d", "reflection_pad3d", "replication_pad3d")
_RESAMPLES = (
    "max_pool2d", "max_pool3d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
    "upsample_nearest2d", "_upsample_nearest_exact2d", "upsample_bilinear2d",
    "_upsample_bilinear2d_aa", "upsample_bicubic2d", "_upsample_bicubic2d_aa", "upsample_nearest3d",
    "upsample_trilinear3d", "pixel_shuffle", "pixel_unshuffle",
)  # fmt: skip
_CONVOLVES = ("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose2d", "conv_transpose3d")
_FIRST_OF = {
    _ATEN.native_layer_norm, _ATEN.native_group_norm, _ATEN.native_batch_norm, _ATEN.native_dropout,
    _ATEN._fused_rms_norm, _ATEN._native_batch_norm_legit,
}  # fmt: skip
_SPLITS = {_ATEN.split, _ATEN.split_with_sizes, _ATEN.chunk, _ATEN.tensor_split}


def convolved(node: fx.Node, known: Known) -> Layout | None:
    """Space begins where a kernel slides over it."""
    source, weight = node.args[:2]
    assert isinstance(source, fx.Node) and isinstance(weight, fx.Node)
    before, after, kernel = shape_of(source), shape_of(node), shape_of(weight)[2:]
    if len(before) != len(kernel) + 2:
        return None
    given = given_at(source, known)
    axes: list[Axis] = [given[0], new(after[1])]
    for axis, size, old, width in zip(given[2:], after[2:], before[2:], kernel, strict=True):
        if size == old and (rank(axis) > 1 or len(kernel) == 1 or (width == 1 and not rank(axis))):
            axes.append(axis)
        else:
            axes.append(new(size, "grid" if len(kernel) > 1 or is_grid(axis) else "plain"))
    return tuple(axes)


def fill(node: fx.Node, known: Known) -> None:
    """A tensor that is made empty, and written into: it is what all that is written agrees on."""
    base, source = node.args[:2]
    assert isinstance(base, fx.Node)
    layout = given_at(source, known) if isinstance(source, fx.Node) else ()
    same = []
    while base.op == "call_function" and rule_of(base.target) in (_sliced, _selected, _narrowed, _viewed, _copied):
        part, base = base, base.args[0]
        assert isinstance(base, fx.Node)
        if rule_of(part.target) is _copied:
            same.append(part)
        elif rule_of(part.target) is _sliced and len(layout) == len(shape_of(part)):
            sizes = zip(layout, shape_of(part), shape_of(base), strict=True)
            layout = tuple(axis if size == whole else new(whole) for axis, size, whole in sizes)
        else:
            layout = ()
    if is_call(base, *_EMPTY):
        layout = layout if len(layout) == len(shape_of(base)) else tuple(new(size) for size in shape_of(base))
        for each in (base, *same):
            known[each] = _common(known[each], layout) if each in known else layout


def _common(first: Layout, second: Layout) -> Layout:
    """What is known by both."""
    both = zip(first, second, strict=True)
    return tuple(a if [p.shape for p in a] == [p.shape for p in b] and rank(b) else new(length_of(a)) for a, b in both)


def _same(node: fx.Node, known: Known) -> Layout | None:
    return known.get(node.args[0])  # type: ignore[arg-type]


def _copied(node: fx.Node, known: Known) -> Layout | None:
    """Where nothing is known of what is written over, it is what is written."""
    target, source = node.args[:2]
    if target in known or source not in known:
        return _same(node, known)
    return known[source] if shape_of(source) == shape_of(node) else None  # type: ignore[index, arg-type]


def _elementwise(node: fx.Node, known: Known) -> Layout | None:
    """What is known of one operand holds; where two are known to lie differently, nothing is."""
    shape, sources = shape_of(node), [source for source in node.all_input_nodes if source in known]
    if len(sources) == 1 and len(known[sources[0]]) == len(shape) and shape_of(sources[0]) == shape:
        return known[sources[0]]
    every = [((),) * (len(shape) - len(known[each])) + known[each] for each in sources]
    return tuple(agreed(size, axes) for size, *axes in zip(shape, *every, strict=True))


def _rolled(node: fx.Node, known: Known) -> Layout | None:
    """Rolled or flipped, a map is a map; what several axes were folded into is none."""
    given, dims = known.get(node.args[0]), argument(node, "dims")  # type: ignore[arg-type]
    if given is None or not dims:
        return None
    moved = {int(axis) % len(given) for axis in ([dims] if isinstance(dims, int) else dims)}
    return tuple(
        sized(axis, length_of(axis)) if i in moved and not (is_grid(axis) and axis[0].whole) else axis
        for i, axis in enumerate(given)
    )


def _viewed(node: fx.Node, known: Known) -> Layout | None:
    step = step_at(node)
    if step is None or step.view is None or step.source not in known:
        return None
    given, view = known[step.source], step.view
    if view.order is not None:
        return tuple(given[axis] for axis in view.order)
    if view.repeats:
        return None
    return _expanded(node, given) if view.expands else as_shape(given, shape_of(node))


def _expanded(node: fx.Node, given: Layout) -> Layout | None:
    shape = shape_of(node)
    padded = ((),) * (len(shape) - len(given)) + given
    return tuple(axis or new(size) for size, axis in zip(shape, padded, strict=True))


def _repeated(node: fx.Node, known: Known) -> Layout | None:
    given = known.get(node.args[0])  # type: ignore[arg-type]
    if given is None:
        return None
    before, after = shape_of(node.args[0]), shape_of(node)  # type: ignore[arg-type]
    added = len(after) - len(before)
    old = zip(after[added:], before, given, strict=True)
    return (*(new(size) for size in after[:added]), *(axis if size == own else new(size) for size, own, axis in old))


def _interleaved(node: fx.Node, known: Known) -> Layout | None:
    given, dim = known.get(node.args[0]), argument(node, "dim")  # type: ignore[arg-type]
    if given is None or dim is None or len(given) != len(shape_of(node)):
        return None
    place = int(dim) % len(given)
    return (*given[:place], new(shape_of(node)[place]), *given[place + 1 :])


def _stacked(node: fx.Node, known: Known) -> Layout | None:
    sources: Any = node.args[0]
    shape, place = shape_of(node), int(argument(node, "dim", 0)) % len(shape_of(node))
    sizes = (*shape[:place], *shape[place + 1 :])
    every = [known[each] for each in sources if each in known]
    others = [agreed(size, [axes[i] for axes in every]) for i, size in enumerate(sizes)]
    return (*others[:place], new(shape[place]), *others[place:])


def _linear(node: fx.Node, known: Known) -> Layout | None:
    given = known.get(node.args[0])  # type: ignore[arg-type]
    return (*given[:-1], new(shape_of(node)[-1])) if given is not None else None


def _product(node: fx.Node, known: Known) -> Layout | None:
    """A linear layer, spelled as a product with a matrix of weights."""
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    return _linear(node, known) if len(shape_of(weight)) == 2 and is_parameter(weight) else None


def _added_product(node: fx.Node, known: Known) -> Layout | None:
    given = known.get(node.args[1])  # type: ignore[arg-type]
    weight = node.args[2]
    if given is None or not isinstance(weight, fx.Node) or not is_parameter(weight):
        return None
    return given[0], new(shape_of(node)[-1])


def _resized(node: fx.Node, known: Known) -> Layout | None:
    """A map with more or fewer places along some axes is a new map."""
    return _of_sizes(node, known, image=False)


def _resampled(node: fx.Node, known: Known) -> Layout | None:
    """The same, by an operator that is for images."""
    return _of_sizes(node, known, image=True)


def _of_sizes(node: fx.Node, known: Known, *, image: bool) -> Layout | None:
    given, shape = known.get(node.args[0]), shape_of(node)  # type: ignore[arg-type]
    if given is None or len(given) != len(shape):
        return None
    before = shape_of(node.args[0])  # type: ignore[arg-type]
    sizes = enumerate(zip(given, shape, before, strict=True))
    return tuple(
        axis if size == old else sized(axis, size, image=image and place > 1) for place, (axis, size, old) in sizes
    )


def _sliced(node: fx.Node, known: Known) -> Layout | None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if source not in known:
        return None
    axis = int(argument(node, "dim")) % len(known[source])
    if argument(node, "step") != 1:
        return _resized(node, known)
    whole, length = shape_of(source)[axis], shape_of(node)[axis]
    start, end = _number(argument(node, "start")), argument(node, "end")
    if end is None or end == sys.maxsize:
        start = whole - length
    elif isinstance(start, int) and start < 0:
        start = whole + start
    return cut(known[source], axis, start, length)


def _number(given: Any) -> Size:
    """Where a slice starts."""
    return size_of(given.meta["val"] if isinstance(given, fx.Node) else given or 0)


def _narrowed(node: fx.Node, known: Known) -> Layout | None:
    source, start = node.args[0], argument(node, "start")
    if not isinstance(source, fx.Node) or source not in known or not isinstance(start, int) or start < 0:
        return None
    axis = int(argument(node, "dim")) % len(known[source])
    return cut(known[source], axis, start, shape_of(node)[axis])


def _selected(node: fx.Node, known: Known) -> Layout | None:
    given = known.get(node.args[0])  # type: ignore[arg-type]
    return without(given, int(argument(node, "dim"))) if given is not None else None


def _unfolded(node: fx.Node, known: Known) -> Layout | None:
    """Patches that lie side by side: `x.unfold(axis, size, size)`."""
    given = known.get(node.args[0])  # type: ignore[arg-type]
    if given is None:
        return None
    shape, axis, (size, step) = shape_of(node), int(argument(node, "dimension")) % len(given), node.args[2:4]
    outer, inner = sized(given[axis], shape[axis]), new(shape[-1])
    if size == step and length_of(given[axis]) == shape[axis] * shape[-1]:
        outer, inner = as_shape((given[axis],), (shape[axis], shape[-1]))
    return (*given[:axis], outer, *given[axis + 1 :], inner)


def _columns(node: fx.Node, known: Known) -> Layout | None:
    """`F.unfold`: the places that its window takes stand on the last axis."""
    given = known.get(node.args[0])  # type: ignore[arg-type]
    if given is None or len(given) != 4:
        return None
    before = shape_of(node.args[0])[2:]  # type: ignore[arg-type]
    windows = [argument(node, name) for name in ("kernel_size", "dilation", "padding", "stride")]
    each = zip(before, *windows, strict=True)
    spans = [(old + 2 * pad - dilation * (size - 1) - 1) // stride + 1 for old, size, dilation, pad, stride in each]
    shape = shape_of(node)
    places = tuple(piece for span in spans for piece in new(span, "grid"))
    return given[0], new(shape[1]), places


def _folded(node: fx.Node, known: Known) -> Layout | None:
    """`F.fold`: windows put back into a map."""
    given, shape = known.get(node.args[0]), shape_of(node)  # type: ignore[arg-type]
    return (given[0], new(shape[1]), *(new(size, "grid") for size in shape[2:])) if given is not None else None


def _joined(node: fx.Node, known: Known) -> Layout | None:
    sources: Any = node.args[0]
    shape, place = shape_of(node), int(argument(node, "dim", 0)) % len(shape_of(node))
    given = [known.get(each) for each in sources]
    if any(len(shape_of(each)) != len(shape) for each in sources):
        return None
    others = [agreed(size, [axes[i] for axes in given if axes is not None]) for i, size in enumerate(shape)]
    parts = [axes[place] if axes is not None else () for axes in given]
    lengths = [shape_of(each)[place] for each in sources]
    tokens = [i for i, part in enumerate(parts) if rank(part) > 1]
    whole = new(shape[place])
    if len(tokens) == 1:
        front, back = total(lengths[: tokens[0]]), total(lengths[tokens[0] + 1 :])
        whole = among_others(parts[tokens[0]], front, back, shape[place])
    elif len(tokens) == len(sources) and all(map(is_grid, parts)):
        whole = new(shape[place], "grid")
    return (*others[:place], whole, *others[place + 1 :])


def item(node: fx.Node, known: Known) -> Layout | None:
    """One of the tensors that a call returns."""
    source, index = node.args
    if not isinstance(source, fx.Node) or not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    whole = source.args[0] if source.args else None
    target = packet_of(source.target)
    if target is _ATEN.meshgrid:
        return tuple(new(size, "grid") for size in shape_of(node))
    if not isinstance(whole, fx.Node) or whole not in known or not isinstance(index, int):
        return None
    given = known[whole]
    if target in _FIRST_OF:
        same = index == 0 and shape_of(node) == shape_of(whole)
        return given if same else None
    if target is _ATEN.unbind:
        return without(given, int(argument(source, "dim", 0)))
    if target in _SPLITS:
        axis = int(argument(source, "dim", 0)) % len(given)
        pieces = source.meta.get("val")
        if isinstance(pieces, (list, tuple)):
            index %= len(pieces)
            start = total(size_of(piece.shape[axis]) for piece in pieces[:index])
            return cut(given, axis, start, shape_of(node)[axis])
    return None


def _unknown(node: fx.Node, known: Known) -> Layout | None:
    return None


# --- which operator --------------------------------------------------------------------------------------------------

_NAMED: dict[str, _Rule] = {
    **dict.fromkeys(_VIEWS, _viewed), **dict.fromkeys(_KEEPS, _same), **dict.fromkeys(_RESIZES, _resized),
    **dict.fromkeys(_RESAMPLES, _resampled), **dict.fromkeys(_CONVOLVES, convolved), "linear": _linear,
    "matmul": _product, "mm": _product, "addmm": _added_product, "slice": _sliced, "narrow": _narrowed,
    "select": _selected, "cat": _joined, "concat": _joined, "concatenate": _joined, "stack": _stacked,
    "repeat_interleave": _interleaved, "unfold": _unfolded,
    "copy_": _copied, "im2col": _columns, "col2im": _folded, "repeat": _repeated, "roll": _rolled, "flip": _rolled,
}  # fmt: skip


@cache
def rule_of(target: Any) -> _Rule:
    """What is done at calls of this operator."""
    packet = packet_of(target)
    if packet is None or getattr(target, "namespace", "") != "aten":
        return _unknown
    named = _NAMED.get(packet.__name__)
    return named or (_elementwise if torch.Tag.pointwise in target.tags else _unknown)
