"""The user's calibration data: read into batches, checked against the model, split in two."""

from __future__ import annotations

import dataclasses
import inspect
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from rewriter.errors import CalibrationError, RewriterError, brief
from rewriter.guard import model_tolerance, outputs_of, relative_rms
from rewriter.metrics import Batch, primary, real_positions, tensors


def batches_from(calibration: Any) -> list[Batch]:
    """The batches of a list, DataLoader or other iterable. Raises CalibrationError.

    A mapping is keyword arguments; a tensor is one positional argument; a tuple or list is positional arguments, and
    the pair (tuple, dict) is both.
    """
    if isinstance(calibration, (Tensor, Mapping, str, bytes)) or not isinstance(calibration, Iterable):
        what = type(calibration).__name__
        raise CalibrationError(f"calibration is a single {what}; give a list of batches, or a DataLoader")
    found: list[Batch] = []
    items = iter(calibration)
    while True:
        try:
            item = next(items)
        except StopIteration:
            break
        except Exception as cause:
            raise CalibrationError(
                f"the calibration data raised at batch {len(found)}: {brief(cause)}; mend what yields it"
            ) from cause
        found.append(_batch(item, len(found)))
    if not found:
        raise CalibrationError("calibration is empty; give at least two batches")
    return found


def _batch(item: Any, index: int) -> Batch:
    if isinstance(item, Batch):
        return item
    if isinstance(item, Tensor):
        batch = Batch((item,), source=item)
    elif isinstance(item, Mapping) and all(isinstance(k, str) for k in item):
        batch = Batch(kwargs=dict(item), source=item)
    elif isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], tuple) and isinstance(item[1], Mapping):
        batch = Batch(item[0], dict(item[1]), source=item)
    elif isinstance(item, (tuple, list)):
        batch = Batch(tuple(item), source=item)
    else:
        raise CalibrationError(
            f"calibration batch {index} is a {type(item).__name__}; give a dict, a tensor or a tuple of tensors"
        )
    if next(tensors((batch.args, batch.kwargs)), None) is None:
        raise CalibrationError(f"calibration batch {index} holds no tensor; tokenise it and convert it to tensors")
    return batch


def check_batches(model: nn.Module, batches: Sequence[Batch]) -> None:
    """Do the batches fit the model's `forward`, lie on its device and hold no NaN? Raises CalibrationError.

    A forward with **kwargs accepts any key here; `evaluate` says so if the model then fails.
    """
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        signature = None
    devices = {t.device for t in (*model.parameters(), *model.buffers())}
    for index, batch in enumerate(batches):
        if signature is not None:
            _check_call(signature, batch, index)
        names = [str(i) for i in range(len(batch.args))] + list(batch.kwargs)
        for name, value in zip(names, (*batch.args, *batch.kwargs.values()), strict=True):
            for tensor in tensors(value):
                if devices and tensor.device not in devices:
                    there = " and ".join(sorted(map(str, devices)))
                    raise CalibrationError(
                        f"argument {name} of calibration batch {index} is on {tensor.device} and the model on {there}; "
                        "move the batches to the model's device"
                    )
                if tensor.is_floating_point() and not tensor.is_meta and bool(tensor.isnan().any()):
                    raise CalibrationError(f"argument {name} of calibration batch {index} has NaN in it; remove it")


def _check_call(signature: inspect.Signature, batch: Batch, index: int) -> None:
    kinds = {name: p.kind for name, p in signature.parameters.items()}
    names = [
        n for n, kind in kinds.items() if kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    ]
    accepted = ", ".join(names) or "nothing"
    wrong = [repr(key) for key in batch.kwargs if key not in names]
    if wrong and inspect.Parameter.VAR_KEYWORD not in kinds.values():
        raise CalibrationError(
            f"calibration batch {index} has {', '.join(wrong)}, which the model does not take; it takes {accepted}"
        )
    try:
        signature.bind(*batch.args, **batch.kwargs)
    except TypeError as cause:
        raise CalibrationError(
            f"calibration batch {index} does not fit the model: {cause}; it takes {accepted}"
        ) from None


def with_rows(model: nn.Module, batches: Sequence[Batch]) -> list[Batch]:
    """The batches with the number of their independent rows, if rows of this model's batches are independent.

    The last row of one batch is computed alone: where tokens come first, or rows see each other, it differs.
    """
    sizes = [leading(batch) for batch in batches]
    index = next((i for i, size in enumerate(sizes) if size > 1), None)
    if index is None or not _independent(model, batches[index], sizes[index]):
        return list(batches)
    return [dataclasses.replace(batch, rows=size) for batch, size in zip(batches, sizes, strict=True)]


def leading(batch: Batch) -> int:
    """How many rows it may have: what all of its tensors begin with, 1 where they differ."""
    sizes = {t.shape[0] for t in tensors((batch.args, batch.kwargs)) if t.ndim > 1}
    return sizes.pop() if len(sizes) == 1 else 1


def _independent(model: nn.Module, batch: Batch, size: int) -> bool:
    def last(value: Any) -> Any:
        return value[-1:] if isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == size else value

    alone = Batch(*tree_map(last, (batch.args, dict(batch.kwargs))))
    try:
        whole, row = (primary(outputs_of(model, each, 0)) for each in (batch, alone))
    except RewriterError:  # one row alone is not something that this model takes
        return False
    if whole.ndim < 2 or whole.shape[0] != size or row.shape != whole[-1:].shape:
        return False
    real = real_positions(row, alone)
    row, expected = (row, whole[-1:]) if real is None else (row[real], whole[-1:][real])
    return relative_rms(row, expected) <= model_tolerance(whole.dtype)


def split(batches: Sequence[Batch], seed: int) -> tuple[list[Batch], list[Batch]]:
    """(search, held out): a random third and the rest. Raises CalibrationError below two batches.

    The search reads its part many times and only ranks with it; confidence in the result grows with what is held out.
    """
    if len(batches) < 2:
        raise CalibrationError(
            f"calibration has {len(batches)} batch, and one part must stay unseen by the search; give at least two"
        )
    order = list(range(len(batches)))
    random.Random(seed).shuffle(order)
    third = max(1, len(order) // 3)
    return [batches[i] for i in sorted(order[:third])], [batches[i] for i in sorted(order[third:])]
