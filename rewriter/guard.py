"""The guard: what is measured, and what rounding explains. Of tolerances, this is the only place that knows a number.

Tolerances by dtype, and measuring a metric; `rewriter/verdict.py` decides.
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

from rewriter.errors import CalibrationError, GuardError, MetricError, OptionError, brief
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


def check_max_drop(value: Any, name: str = "max_drop") -> float:
    """A bound as a fraction: 0.01, or as text "0.01" or "1%". Raises OptionError on anything else."""
    found = value
    if isinstance(value, str):
        text = re.fullmatch(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(%?)\s*", value)
        found = float(text[1]) / (100 if text[2] else 1) if text else None
    if isinstance(found, bool) or not isinstance(found, numbers.Real) or not math.isfinite(found):
        raise OptionError(f"{name} must be a number such as 0.01 (or 1% on the command line), not {value!r:.40}")
    if found < 0:
        mend = "; 0 allows exact rewrites only" if name == "max_drop" else ""
        raise OptionError(f"{name} must not be negative, but is {value}{mend}")
    return float(found)


@dataclass(frozen=True)
class Measurement:
    """A metric on some batches: (sum, weight) of each sample, in their order, so that two measurements can be paired.

    A sample is an independent row of a batch where the metric tells them apart, else a batch.
    """

    metric: Metric
    samples: tuple[tuple[float, float], ...]

    @property
    def value(self) -> float:
        """The metric over all samples."""
        return self.metric.finish(self.mean)

    @property
    def mean(self) -> float:
        """Before `metric.finish`."""
        return sum(s for s, _ in self.samples) / sum(w for _, w in self.samples)


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
                scored = _score(metric, model, batch, outputs, reference)
            except Exception as cause:
                raise MetricError(
                    f"metric {metric.name!r} failed on batch {index}: {brief(cause)}; mend it or choose another metric"
                ) from cause
            for value, weight in scored:
                if not math.isfinite(value) or not math.isfinite(weight) or weight < 0:
                    raise MetricError(
                        f"metric {metric.name!r} gave {value} on batch {index}; look for empty or damaged data there, "
                        "or choose another metric"
                    )
            samples += scored
    if sum(weight for _, weight in samples) <= 0:
        raise MetricError(f"metric {metric.name!r} found nothing to score; give batches with unpadded, labelled data")
    return Measurement(metric, tuple(samples)), kept


def _score(metric: Metric, model: nn.Module, batch: Batch, outputs: Any, reference: Any) -> list[tuple[float, float]]:
    if metric.score is None:
        assert metric.fn is not None
        return [(float(metric.fn(model, batch.given)), 1.0)]
    found = metric.score(outputs, reference, batch)
    return [(float(total), float(weight)) for total, weight in ([found] if isinstance(found, tuple) else found)]


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


def check_repeats(metric: Metric, model: nn.Module, batch: Batch, dtype: torch.dtype) -> None:
    """Does the original, whose outputs have this type, give the same twice? Raises GuardError where it does not,
    beyond rounding.
    """
    first, references = measure_original(metric, model, [batch])
    second = evaluate(metric, model, [batch], references)
    if abs(drop(metric, first, second)) <= resolution(dtype):
        return
    one, two = (primary(outputs_of(model, batch, 0)) for _ in range(2))
    if relative_rms(two, one) > model_tolerance(dtype):
        raise GuardError(
            "the model does not repeat itself: two calls with the same batch, in eval mode, gave different answers, so "
            "accuracy cannot be compared; take the randomness or the state out of its forward"
        )
    raise GuardError(
        f"the metric does not repeat itself on the original model ({metric.name} {first.value:#.4g}, then "
        f"{second.value:#.4g} on the same batch); make it deterministic"
    )


def drop(metric: Metric, original: Measurement, candidate: Measurement) -> float:
    """How much worse the candidate is, relative to |original|, or the difference itself for an absolute metric.

    Negative is better. Where the original is 0 nothing is relative to it: any worsening is inf, and no improvement
    counts.
    """
    return drop_between(metric, original.value, candidate.value)


def drop_between(metric: Metric, original: float, candidate: float) -> float:
    """`drop` from one value to another."""
    worse = original - candidate if metric.higher_is_better else candidate - original
    if metric.absolute:
        return worse
    if original == 0:
        return math.inf if worse > 0 else 0.0
    return worse / abs(original)
