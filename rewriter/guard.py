"""The guard: what decides whether a model's accuracy is acceptable. The only place that knows a number.

Tolerances and bounds by dtype, measuring a metric, and the verdict.
"""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.errors import CalibrationError, MetricError, OptionError, brief
from rewriter.metrics import Batch, Metric, primary

_TOLERANCES = {
    # Half types: two roundings of one unit in the last place, of the probabilities and of the output.
    torch.bfloat16: 2 * 2.0**-7,
    torch.float16: 2 * 2.0**-10,
    # Full types: sums over thousands of keys in another order, about 80 and 4,500 units in the last place.
    torch.float32: 1e-5,
    torch.float64: 1e-12,
}


def tolerance(dtype: torch.dtype) -> float:
    """Largest `error` of an exact rewrite whose inputs and outputs have this type."""
    if dtype not in _TOLERANCES:
        known = ", ".join(str(d).removeprefix("torch.") for d in _TOLERANCES)
        raise OptionError(f"there is no tolerance for {dtype}; use a model in one of {known}")
    return _TOLERANCES[dtype]


def model_tolerance(dtype: torch.dtype) -> float:
    """Largest `relative_rms` between a model's outputs before and after exact rewrites.

    Rounding is amplified by depth: the logits of one 30-layer language model in bf16 differ from its own float32 logits
    by 0.01 to 0.2, and between its eager and SDPA forms by as much, though each site agrees to `tolerance`. What is
    left to find here is an output in the wrong place, which differs by about 1.
    """
    return 0.25 if torch.finfo(dtype).bits < 32 else 10 * tolerance(dtype)


def resolution(dtype: torch.dtype) -> float:
    """How far a metric may fall by rounding alone when only exact variants were placed: a quarter of the tolerance.

    Measured between the eager and the SDPA attention of one 135M-parameter language model, both exact: bf16 moves
    perplexity by up to 1% on 64 tokens (0.5% on 512), agreement of the largest class by 2%, KL by 2e-3; fp16 by 0.3%,
    0.3% and 3e-5; fp32 by 1e-6, 0 and 1e-8. Never applied when anything approximate or learned is in the plan.
    """
    return tolerance(dtype) / 4


def error(actual: Tensor, expected: Tensor) -> float:
    """max |actual - expected| / max |expected|. Positions where `expected` is NaN are not compared.

    inf where `actual` alone is NaN or infinite, or where the shapes differ.
    """
    return _compared(actual, expected, lambda diff, size: (diff.abs().max().item(), size.abs().max().item()))


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||, the local error of a variant's output; NaN and shapes as in `error`."""
    norm = torch.linalg.vector_norm
    return _compared(actual, expected, lambda diff, size: (norm(diff).item(), norm(size).item()))


def _compared(actual: Tensor, expected: Tensor, measure: Callable[[Tensor, Tensor], tuple[float, float]]) -> float:
    if actual.shape != expected.shape:
        return math.inf
    actual, expected = actual.detach().to(expected.device), expected.detach()
    kept = ~expected.isnan() & (actual != expected)
    if not bool(kept.any()):
        return 0.0
    wide = torch.promote_types(torch.promote_types(actual.dtype, expected.dtype), torch.float32)
    difference = (actual.to(wide) - expected.to(wide))[kept]
    if not bool(difference.isfinite().all()):
        return math.inf
    numerator, denominator = measure(difference, expected.to(wide)[expected.isfinite()])
    return numerator / max(denominator, torch.finfo(torch.float32).tiny)


def check_max_drop(value: Any) -> float:
    """The bound as a fraction: 0.01, or as text "0.01" or "1%". Raises OptionError on anything else."""
    found = value
    if isinstance(value, str):
        text = re.fullmatch(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(%?)\s*", value)
        found = float(text[1]) / (100 if text[2] else 1) if text else None
    if isinstance(found, bool) or not isinstance(found, numbers.Real) or not math.isfinite(found):
        raise OptionError(f"max_drop must be a number such as 0.01 (or 1% on the command line), not {value!r:.40}")
    if found < 0:
        raise OptionError(f"max_drop must not be negative, but is {value}; 0 allows exact rewrites only")
    return float(found)


@dataclass(frozen=True)
class Measurement:
    """A metric on some batches: (sum, weight) of each, in their order, so that two measurements can be paired."""

    metric: Metric
    samples: tuple[tuple[float, float], ...]

    @property
    def value(self) -> float:
        """The metric over all batches."""
        return self.metric.finish(sum(s for s, _ in self.samples) / sum(w for _, w in self.samples))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode and without gradients; every submodule's mode is put back afterwards."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        # Not inference_mode: graphs compiled here are reused for training.
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def evaluate(
    metric: Metric, model: nn.Module, batches: Sequence[Batch], references: Sequence[Any] | None = None
) -> Measurement:
    """Measure the model. `references` are the original's outputs, one a batch, where the metric needs them.

    Raises CalibrationError when the model raises, MetricError when the metric does or gives no finite number.
    """
    if metric.needs_reference and (references is None or len(references) != len(batches)):
        raise MetricError(f"metric {metric.name!r} compares with the original's outputs; give one a batch")
    return _measure(metric, model, batches, references or ())[0]


def measure_original(metric: Metric, model: nn.Module, batches: Sequence[Batch]) -> tuple[Measurement, list[Tensor]]:
    """Measure the original in one pass, and keep the outputs that `evaluate` needs as references (else none)."""
    return _measure(metric, model, batches, None)


def _measure(
    metric: Metric, model: nn.Module, batches: Sequence[Batch], references: Sequence[Any] | None
) -> tuple[Measurement, list[Tensor]]:
    samples: list[tuple[float, float]] = []
    kept: list[Tensor] = []
    with evaluating(model):
        for index, batch in enumerate(batches):
            outputs = outputs_of(model, batch, index) if metric.score is not None else None
            try:
                reference = None
                if metric.needs_reference:
                    if references is None:
                        kept.append(primary(outputs))
                    reference = (kept if references is None else references)[index]
                value, weight = _score(metric, model, batch, outputs, reference)
            except Exception as cause:
                raise MetricError(
                    f"metric {metric.name!r} failed on batch {index}: {brief(cause)}; mend it or choose another metric"
                ) from cause
            if not math.isfinite(value) or not math.isfinite(weight) or weight < 0:
                raise MetricError(
                    f"metric {metric.name!r} gave {value} on batch {index}; look for empty or damaged data there, or "
                    "choose another metric"
                )
            samples.append((value, weight))
    if sum(weight for _, weight in samples) <= 0:
        raise MetricError(f"metric {metric.name!r} found nothing to score; give batches with unpadded, labelled data")
    return Measurement(metric, tuple(samples)), kept


def _score(metric: Metric, model: nn.Module, batch: Batch, outputs: Any, reference: Any) -> tuple[float, float]:
    if metric.score is not None:
        total, weight = metric.score(outputs, reference, batch)
        return float(total), float(weight)
    assert metric.fn is not None
    return float(metric.fn(model, batch.given)), 1.0


def outputs_of(model: nn.Module, batch: Batch, index: int) -> Any:
    """What the model gives for a batch, in eval mode. Raises CalibrationError when it raises."""
    try:
        with evaluating(model):
            return model(*batch.args, **batch.kwargs)
    except Exception as cause:
        keys = ", ".join([*(f"#{i}" for i in range(len(batch.args))), *batch.kwargs])
        raise CalibrationError(
            f"the model failed on calibration batch {index} (arguments {keys}): {brief(cause)}; mend the batch"
        ) from cause


def drop(metric: Metric, original: Measurement, candidate: Measurement) -> float:
    """How much worse the candidate is, relative to |original| (kl: the difference itself). Negative is better.

    Where the original is 0 nothing is relative to it: any worsening is inf, and no improvement counts.
    """
    worse = candidate.value - original.value
    worse = -worse if metric.higher_is_better else worse
    if metric.absolute:
        return worse
    if original.value == 0:
        return math.inf if worse > 0 else 0.0
    return worse / abs(original.value)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the guard says of a candidate on held-out batches. `rounding` is the allowance of an exact plan, else 0."""

    metric: str
    direction: str
    absolute: bool
    max_drop: float
    original: float
    candidate: float
    drop: float
    rounding: float
    held: bool
    batches: int

    def to_json(self) -> dict[str, Any]:
        """Plain values; a drop from 0 (infinite) is null."""
        return {**vars(self), "drop": self.drop if math.isfinite(self.drop) else None}

    def __str__(self) -> str:
        def unit(x: float) -> str:
            return f"{x:.3g}" if self.absolute else f"{100 * x:.3g}%"

        # The sign of the change, not of the drop: what went down is shown going down.
        change = self.drop if self.direction == "lower" else -self.drop
        signed = f"{change:+.2g}" if self.absolute or math.isinf(change) else f"{change:+.2%}"
        rounding = f" or {unit(self.rounding)} by rounding" if self.rounding > self.max_drop else ""
        return (
            f"{self.metric} {self.original:#.4g} -> {self.candidate:#.4g} ({signed}, bound {unit(self.max_drop)}"
            f"{rounding}): {'held' if self.held else 'not held'}"
        )


def judge(
    original: Measurement, candidate: Measurement, max_drop: float, *, exact: torch.dtype | None = None
) -> Verdict:
    """The verdict on a candidate measured on the same batches as the original.

    `exact` is the model's type when only exact variants were placed: the metric may then move by `resolution`.
    """
    metric = original.metric
    if len(original.samples) != len(candidate.samples) or candidate.metric.name != metric.name:
        raise MetricError("original and candidate were not measured by one metric on the same batches; measure again")
    rounding = resolution(exact) if exact is not None else 0.0
    worse = drop(metric, original, candidate)
    return Verdict(
        metric=metric.name,
        direction="higher" if metric.higher_is_better else "lower",
        absolute=metric.absolute,
        max_drop=max_drop,
        original=original.value,
        candidate=candidate.value,
        drop=worse,
        rounding=rounding,
        held=worse <= max(max_drop, rounding),
        batches=len(original.samples),
    )
