"""The user's calibration data: read into batches, checked against the model, split in two."""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from rewriter.errors import CalibrationError, brief
from rewriter.metrics import Batch, tensors


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


def split(batches: Sequence[Batch], seed: int) -> tuple[list[Batch], list[Batch]]:
    """(search, held out): a random half each, the odd one held out. Raises CalibrationError below two batches."""
    if len(batches) < 2:
        raise CalibrationError(
            f"calibration has {len(batches)} batch, and one part must stay unseen by the search; give at least two"
        )
    order = list(range(len(batches)))
    random.Random(seed).shuffle(order)
    half = len(order) // 2
    return [batches[i] for i in sorted(order[:half])], [batches[i] for i in sorted(order[half:])]
