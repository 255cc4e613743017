"""A metric on one set of batches, for the original and for any plan, measured batch by batch and each once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from rewriter.errors import CalibrationError, MetricError
from rewriter.guard import Measurement, evaluate, measure_original
from rewriter.metrics import Batch, Metric, is_built_in
from rewriter.tune.record import Ledger, Record, digest_of

Original = Callable[[], AbstractContextManager[None]]
"""Within it, calls of the model run the code of its author."""


class Scores:
    """`about` is what the model's answers depend on: its weights. What a user's own metric depends on nobody knows, so
    its values are not kept for another run. `guarding`: are the batches held out?
    """

    def __init__(
        self,
        metric: Metric,
        model: nn.Module,
        batches: Sequence[Batch],
        about: Sequence[Any],
        *,
        original: Original,
        record: Record,
        fresh: bool = False,
        kept: bool | None = None,
        guarding: bool = False,
    ) -> None:
        self.metric, self.batches = metric, batches
        self._model, self._original, self._record, self._guarding = model, original, record, guarding
        self.ledger = Ledger(about, fresh, kept=is_built_in(metric) if kept is None else kept)
        self._names = [digest_of(batch) for batch in batches]
        self._references: dict[int, Any] = {}
        self.seconds_a_batch = 0.0

    def original(self) -> Measurement:
        """Of the model as its author wrote it. Raises as `evaluate` does."""

        def measure(index: int) -> Measurement:
            with self._original():
                found, kept = measure_original(self.metric, self._model, [self.batches[index]])
            if kept:
                self._references[index] = kept[0]
            return found

        return self._measured("original", measure)

    def of(self, plan: Any, lost: Callable[[Measurement], bool] = lambda _: False) -> Measurement | None:
        """Of what the model runs now, which `plan` names in plain values; None where it crashes or gives no number,
        which is as bad as can be. Where what was measured of it is `lost`, the rest of the batches is left out.
        """

        def measure(index: int) -> Measurement:
            references = [self._reference(index)] if self.metric.needs_reference else None
            return evaluate(self.metric, self._model, [self.batches[index]], references)

        try:
            return self._measured(plan, measure, lost)
        except (MetricError, CalibrationError):
            return None

    def _reference(self, index: int) -> Any:
        if index not in self._references:
            with self._original():
                self._references[index] = measure_original(self.metric, self._model, [self.batches[index]])[1][0]
                self._record.evaluations += 1
        return self._references[index]

    def _measured(
        self, plan: Any, measure: Callable[[int], Measurement], lost: Callable[[Measurement], bool] = lambda _: False
    ) -> Measurement:
        samples: list[tuple[float, float]] = []
        for index, name in enumerate(self._names):

            def made(index: int = index) -> Any:
                start = time.perf_counter()
                found = measure(index)
                self.seconds_a_batch = time.perf_counter() - start
                self._record.evaluations += 1
                return found.samples

            what = [self.metric.name, name, plan]
            if not self.ledger.knows("metric", what):
                self._record.needed += 1
                self._record.guarding += self._guarding
            found = self.ledger.measured("metric", what, made)
            samples += [(float(total), float(weight)) for total, weight in found]
            if lost(Measurement(self.metric, tuple(samples))):
                break
        return Measurement(self.metric, tuple(samples))
