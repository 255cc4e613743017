"""What was only observed when a graph was captured, asked again in every call.

A mask that is a buffer is classified by what the buffer held, and a mask of integers as one of 0s and 1s. Where that
no longer holds, a call takes the whole mask, as a tensor, through the plain mathematics. The question costs a
comparison of addresses and versions, and one of values after a change. It needs real tensors: where a graph is traced
once more, as by an inner compiler, the answer is always no.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake


@dataclass(frozen=True)
class _Seen:
    """What changes when a tensor does."""

    tensor: weakref.ref[Tensor]
    address: int
    version: int

    def is_still(self, tensor: Tensor) -> bool:
        """Is it this one, and as it was?"""
        return self.tensor() is tensor and (self.address, self.version) == (tensor.data_ptr(), tensor._version)


@dataclass
class Sentinel:
    """Do the tensors of this call fit? `captured` are what the buffers held; flags, which follow them, are 0 or 1."""

    captured: Sequence[Tensor]
    _known: dict[int, tuple[_Seen, bool]] = field(default_factory=dict, repr=False)

    @staticmethod
    def of(buffers: Sequence[Tensor]) -> Sentinel:
        """For buffers as they are now, which may change later."""
        return Sentinel([buffer.detach().clone() for buffer in buffers])

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Ask again: buffers, then flags."""
        return all(self._fits(place, tensor) for place, tensor in enumerate(tensors))

    def _fits(self, place: int, tensor: Tensor) -> bool:
        if is_fake(tensor) or type(tensor) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer):
            return False
        if tensor.is_inference():  # Its versions are not counted.
            return self._compared(place, tensor)
        known = self._known.get(place)
        if known is None or not known[0].is_still(tensor):
            known = _Seen(weakref.ref(tensor), tensor.data_ptr(), tensor._version), self._compared(place, tensor)
            self._known[place] = known
        return known[1]

    def _compared(self, place: int, tensor: Tensor) -> bool:
        if place >= len(self.captured):
            return bool(((tensor == 0) | (tensor == 1)).all())
        wanted = self.captured[place]
        same = wanted.shape == tensor.shape and wanted.dtype == tensor.dtype
        return same and torch.equal(tensor.detach(), wanted.to(tensor.device))

    def __getstate__(self) -> dict[str, Any]:
        return {"captured": self.captured, "_known": {}}
