"""Each match is re-executed against the canonical operator, on random and adversarial inputs, before it counts.

Sizes are shrunk where the graph allows it, and equal regions are proved once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx

from rewriter.guard import error, tolerance
from rewriter.nodes import packet_of
from rewriter.raising import Match
from rewriter.region import Region, Sizes, region_of
from rewriter.sampled import SampledMatch
from rewriter.site import Refusal

_ATEN = torch.ops.aten
_SMALL = (19, 23)
"""Query and key lengths of a shrunk region: different primes, so that no axis is taken for another."""
_WORTH_SHRINKING = 32
_MOST_SCORES = 1 << 25
"""A region that cannot be shrunk is run at its own size up to this many scores."""
_FEW_SCORES = 1 << 20
"""With fewer scores than this, one thread is the fastest."""


class Proof:
    """Remembers which regions were proved."""

    def __init__(self) -> None:
        self._known: dict[str, Refusal | None] = {}

    def check(self, match: Match | SampledMatch) -> Refusal | None:
        """None where the match computes what its site says, else the disagreement with its numbers."""
        region = region_of(match)
        if isinstance(region, Refusal):
            return region
        identity = region.identity()
        if identity not in self._known:
            self._known[identity] = _prove(region)
        return self._known[identity]


def _prove(region: Region) -> Refusal | None:
    q_len, kv_len = region.lengths
    if max(q_len, kv_len) > _WORTH_SHRINKING:
        small = region.resized(_SMALL[0], _SMALL[q_len != kv_len])
        try:
            with _one_thread():
                if small and _compare(region, small) is None:
                    return None
        except (RuntimeError, IndexError, ValueError):
            pass
        # A number depends on the length in a way of its own, or only looks like it: run the region as it is.
    scores = region.scores
    if scores > _MOST_SCORES:
        return Refusal(f"a region of {scores:,} scores is too large to be proved, and its sizes cannot be shrunk")
    try:
        with _one_thread() if scores < _FEW_SCORES else nullcontext():
            return _compare(region, {})
    except (RuntimeError, IndexError, ValueError) as failure:
        return Refusal(f"the region could not be run by itself ({str(failure).splitlines()[0]})")


@contextmanager
def _one_thread() -> Iterator[None]:
    """On a busy machine, threads that wait for each other make a small region take thirty times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _compare(region: Region, sizes: Sizes) -> Refusal | None:
    match = region.match
    original = region.module(sizes, proof=True)
    for name, settings in region.trials.items():
        values = region.values(sizes, proof=True, **settings)
        with torch.no_grad(), torch._C._DisableAutocast():  # which may be on around the call that is being compiled
            expected = _Exact(original).run(*(values[node].clone() for node in match.inputs))
            actual = region.canonical(values, sizes)
        if actual.shape != expected.shape:
            return Refusal(f"proof failed on {name} inputs: shape {tuple(actual.shape)}, not {tuple(expected.shape)}")
        difference = error(actual, expected)
        if not difference <= tolerance(torch.float32):
            return Refusal(
                f"proof failed on {name} inputs: the results differ by {difference:.3g} of the largest value"
            )
    return None


class _Exact(fx.Interpreter):
    """Runs a region, and makes NaN of what has lost its digits: nothing can be compared with it.

    That is a quotient by a number below the normal range of its type, as exp(s) / sum(exp(s)) where all s are far below
    zero: the sum has few digits there, or one.
    """

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        operator = packet_of(target)
        divisor = args[1] if operator == _ATEN.div else args[0] if operator == _ATEN.reciprocal else None
        lost = None
        if isinstance(divisor, Tensor) and divisor.is_floating_point():
            lost = divisor.ne(0) & (divisor.abs() < torch.finfo(divisor.dtype).tiny)
        result = super().call_function(target, args, kwargs)
        return result if lost is None else result.masked_fill(lost, float("nan"))
