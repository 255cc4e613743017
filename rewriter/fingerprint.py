"""What a plan is for: the structure of a model and its weights, as hashes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.paths import shape_of

_SAMPLES = 256


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """What a plan is for: {"structure", "weights", "tensors", "values"}.

    structure  hash of the sorted names and shapes of parameters and persistent buffers, without those in `rewriter`
    weights    hash of up to 256 values of each parameter, as bfloat16, so that the type of loading does not matter;
               it tells a trained model from an untrained one, not a single changed weight in a million
    tensors, values  how many there are, for messages
    parts      name, numbers as #, -> [number and shape, hash of weights] of the tensors of that name, for `differences`
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            # Caches such as position tables come and go with the calls.
            if name not in module._non_persistent_buffers_set:
                named[f"{prefix}.{name}" if prefix else name] = buffer
    # torch.compile wraps a module under a name of its own.
    named = {name.replace("_orig_mod.", ""): tensor for name, tensor in named.items()}
    named = {name: named[name] for name in sorted(named) if not name.startswith("rewriter.")}
    structure, weights = hashlib.sha256(), hashlib.sha256()
    parts: dict[str, tuple[list[str], Any]] = {}
    for name, tensor in named.items():
        shape = "x".join(map(str, tensor.shape)) or "1"
        structure.update(f"{name}{tuple(tensor.shape)}\n".encode())
        shapes, own = parts.setdefault(".".join(shape_of(name)), ([], hashlib.sha256()))
        shapes.append(shape)
        if isinstance(tensor, nn.Parameter):
            sample = name.encode() + _sample(tensor)
            weights.update(sample)
            own.update(sample)
    return {
        "structure": structure.hexdigest(),
        "weights": weights.hexdigest(),
        "tensors": len(named),
        "values": sum(t.numel() for t in named.values()),
        "parts": {
            name: [f"{len(shapes)} of {', '.join(dict.fromkeys(shapes))}", own.hexdigest()[:12]]
            for name, (shapes, own) in parts.items()
        },
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


def _sample(tensor: Tensor) -> bytes:
    """Evenly spaced values as bytes; none of a tensor without readable ones (meta, sparse)."""
    if tensor.is_meta or tensor.layout != torch.strided or tensor.numel() == 0:
        return b""
    flat = tensor.detach().reshape(-1)
    chosen = flat[:: max(1, flat.numel() // _SAMPLES)]
    if chosen.is_floating_point():
        chosen = chosen.to(torch.bfloat16)
    return chosen.cpu().contiguous().view(torch.uint8).numpy().tobytes()
