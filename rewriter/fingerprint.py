"""What a plan is for: the structure of a model and its weights, as hashes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.code_of import code_of
from rewriter.paths import shape_of

_AT_ONCE = 1 << 20
"""Values: a part of a tensor that stays in the cache while it is converted and summed."""


def fingerprint(model: nn.Module, written: Iterable[str] = ()) -> dict[str, Any]:
    """What a plan is for: {"structure", "weights", "tensors", "values", "parts", "written", "code"}.

    structure  hash of the sorted names and shapes of parameters and persistent buffers, without those in `rewriter`
    weights    hash of sums over all their values as float32, so that the type of loading does not matter
    tensors, values  how many there are, for messages
    parts      name, numbers as #, -> [number and shape, hash of weights] of the tensors of that name, for `differences`
    written    the buffers of these names are left out: what calls of the model write, such as the keys of a cache, says
               nothing about which model it is. `optimize` finds them by looking at all buffers before and after its own
               calls, and the plan names them
    code       `code_of(model)`
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            # Caches such as position tables come and go with the calls.
            if name not in module._non_persistent_buffers_set:
                named[f"{prefix}.{name}" if prefix else name] = buffer
    # torch.compile wraps a module under a name of its own.
    named = {name.replace("_orig_mod.", ""): tensor for name, tensor in named.items()}
    calls = {id(named[name]) for each in written if (name := each.replace("_orig_mod.", "")) in named}
    left_out = sorted(name for name, tensor in named.items() if id(tensor) in calls)
    named = {name: named[name] for name in sorted(named) if not name.startswith("rewriter.") and name not in left_out}
    structure, weights = hashlib.sha256(), hashlib.sha256()
    parts: dict[str, tuple[list[str], Any]] = {}
    sums: dict[int, bytes] = {}  # tied tensors are read once
    for name, tensor in named.items():
        shape = "x".join(map(str, tensor.shape)) or "1"
        structure.update(f"{name}{tuple(tensor.shape)}\n".encode())
        shapes, own = parts.setdefault(".".join(shape_of(name)), ([], hashlib.sha256()))
        shapes.append(shape)
        if id(tensor) not in sums:
            sums[id(tensor)] = hashlib.sha256(_sums(tensor)).digest()
        for found in (weights, own):
            found.update(name.encode() + sums[id(tensor)])
    return {
        "structure": structure.hexdigest(),
        "weights": weights.hexdigest(),
        "tensors": len(named),
        "values": sum(t.numel() for t in named.values()),
        "parts": {
            name: [f"{len(shapes)} of {', '.join(dict.fromkeys(shapes))}", own.hexdigest()[:12]]
            for name, (shapes, own) in parts.items()
        },
        "written": left_out,
        "code": code_of(model),
    }


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What differs between two fingerprints, a phrase for each part."""
    ours, theirs = one.get("parts"), other.get("parts")
    if not isinstance(ours, Mapping) or not isinstance(theirs, Mapping):
        return []
    said = [f"{name} is missing" for name in theirs if name not in ours]
    said += [f"{name} is new" for name in ours if name not in theirs]
    for name in ours:
        if name in theirs and list(ours[name]) != list(theirs[name]):
            (shape, _), (before, _) = ours[name], theirs[name]
            said.append(f"{name} has other values" if shape == before else f"{name} is {shape}, and was {before}")
    return said


def _sums(tensor: Tensor) -> bytes:
    """Of each row and each column, of all values' bits as whole numbers that wrap around: a sum that is the same in any
    order, on any device. Nothing of a tensor without readable values (meta, sparse).
    """
    if tensor.is_meta or tensor.layout != torch.strided or tensor.numel() == 0:
        return b""
    values = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    splits = (math.prod(values.shape[:axis]) for axis in range(values.dim() + 1))
    table = values.reshape(min(splits, key=lambda rows: rows + values.numel() // rows), -1)
    wide = torch.int64 if values.element_size() == 8 else torch.int32
    rows, columns = [], torch.zeros(1, dtype=torch.int32, device=values.device)
    for part in table.split(max(1, _AT_ONCE // table.shape[1])):
        bits = (part.float() if part.is_floating_point() else part.to(wide)).contiguous().view(torch.int32)
        rows.append(bits.sum(1, dtype=torch.int32))
        columns = columns + bits.sum(0, dtype=torch.int32)
    return torch.cat([*rows, columns]).cpu().numpy().tobytes()
