"""Masks that the data of a call make: what draws of one of them have in common. All are bool (B, Sq, Skv), True where a
query sees a key.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rewriter.site import Causal, Chunked, DataChunked, DataPrefix, Documents, Full, Mask, Padding
from rewriter.structure import aligned, classify, components

_MOST_COMPARED = 1 << 30
"""How many entries are compared to find where blocks begin."""


def agrees(mask: Mask, seen: Tensor) -> bool:
    """Is this bool (Sq, Skv) what the mask says?"""
    return torch.equal(mask.visible(seen.shape[0], seen.shape[1], seen.device), seen)


def is_padded(seen: list[Tensor], structure: Mask) -> bool:
    """Is each draw, bool (B, Sq, Skv), this structure with some keys hidden?"""
    whole = torch.stack([each.any(0) for each in seen]).any(0)
    return agrees(structure, whole) and all(torch.equal(each, whole & each.any(-2, keepdim=True)) for each in seen)


def prefixed(seen: list[Tensor]) -> Mask | None:
    """A causal mask, and keys at the beginning that are visible to all."""
    least = torch.stack([each.all(0) for each in seen]).all(0)
    if least.shape[0] == 1 or not agrees(Causal(0), least):
        return None
    for each in seen:
        keys = each.all(-2)
        if not torch.equal(each, least | keys[:, None, :]) or bool((keys[:, 1:] & ~keys[:, :-1]).any()):
            return None
    return DataPrefix()


def chunked(seen: list[Tensor], chunk: DataChunked | None = None) -> Iterator[Mask]:
    """Blocks of one size, each batch row's with a beginning of its own."""
    sizes = {part.size for each in seen for part in (classify(each[0]) or Full()).parts() if isinstance(part, Chunked)}
    for size in [chunk.size] if chunk is not None else sorted(sizes):
        for band in (Causal(), Full()):
            kinds = [_blocks(each, band, size) for each in seen]
            if all(kind is not None for kind in kinds):
                yield band & DataChunked(size) & (Padding() if any(kinds) else Full())


def _blocks(seen: Tensor, band: Mask, size: int) -> bool | None:
    """Are there tokens that are hidden besides? None where it is not a mask of blocks of this size."""
    q_len, kv_len = seen.shape[-2:]
    if q_len > kv_len or size * seen.numel() > _MOST_COMPARED:
        return None
    keys = torch.arange(kv_len, device=seen.device)
    whole, tokens = band.visible(q_len, kv_len, seen.device), seen.any(-2)
    fits = torch.zeros(len(seen), dtype=torch.bool, device=seen.device)
    for offset in range(size):
        blocks = whole & aligned((keys + offset) // size, q_len)
        fits |= (seen == (blocks & tokens[:, None, :])).flatten(1).all(-1)
    return not bool(tokens[:, kv_len - q_len :].all()) if bool(fits.all()) else None


def documents(seen: list[Tensor], structure: Mask | None) -> Iterator[Mask]:
    """Tokens of one segment see each other, under a structure that is the same for all draws."""
    for band in dict.fromkeys((structure or Full(), Causal(), Full())):
        kinds = [_segments(each, band) for each in seen]
        if all(kind is not None for kind in kinds) and any(kind and kind[0] for kind in kinds):
            yield band & Documents() & (Padding() if any(kind and kind[1] for kind in kinds) else Full())


def _segments(seen: Tensor, band: Mask) -> tuple[bool, bool] | None:
    """Is bool (B, Sq, Skv) of more than one segment, and are there hidden tokens? None where it is no partition."""
    q_len, kv_len = seen.shape[-2:]
    if q_len > kv_len:
        return None
    whole = band.visible(q_len, kv_len, seen.device)
    together = aligned(components(seen), q_len)
    # A token that does not see itself is seen by nobody.
    tokens = torch.ones(len(seen), kv_len, dtype=torch.bool, device=seen.device)
    tokens[:, kv_len - q_len :] = seen.diagonal(kv_len - q_len, -2, -1) | ~whole.diagonal(kv_len - q_len)
    if not torch.equal(seen, whole & together & tokens[:, None, :]):
        return None
    both = tokens[:, kv_len - q_len :, None] & tokens[:, None, :]
    return bool((whole & both & ~together).any()), not bool(tokens.all())


def is_still(mask: Mask, seen: list[Tensor]) -> bool:
    """Is it so at this size too, where there may be less to see?"""
    band = mask.positional
    if mask.has(DataPrefix):
        return prefixed(seen) is not None
    for part in mask.parts():
        if isinstance(part, DataChunked):
            return any(found.positional == band for found in chunked(seen, part))
    return all(_segments(each, band) is not None for each in seen)
