"""Accuracy metrics, scored sample by sample so that original and candidate can be compared in pairs.

A sample is a row of a batch where rows are independent, else the whole batch. A metric sees outputs, never layers.
Padded positions are not scored: what a model writes there is undefined, and an exact rewrite may change it. Large
logits are scored in chunks of rows, so that no float32 copy of them is ever made.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewriter.errors import MetricError

IGNORED = -100
"""The label that asks for no prediction, as in `torch.nn.functional.cross_entropy`."""

CHUNK_ELEMENTS = 2**23
"""Elements of one chunk of rows: 32 MiB in float32, and a few times that while it is scored."""


@dataclass(frozen=True)
class Batch:
    """One call of the model: `model(*args, **kwargs)`. `source` is the batch as the user wrote it; `rows` is how many
    leading rows are known not to see each other, 1 where nothing is known.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    source: Any = field(default=None, repr=False, compare=False)
    rows: int = field(default=1, compare=False)

    @property
    def given(self) -> Any:
        """What a user's metric receives: `source`, or the nearest plain form where there is none."""
        if self.source is not None:
            return self.source
        if not self.args:
            return self.kwargs
        return self.args[0] if len(self.args) == 1 and not self.kwargs else (self.args, self.kwargs)


Score = tuple[float, float] | Sequence[tuple[float, float]]
"""(sum, weight) of a batch, or a list of such pairs, one for each of its independent samples."""


def _same(value: float) -> float:
    return value


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A number for how well a model does, with its direction. Exactly one of `score` and `fn` is given.

    score            (outputs, reference outputs or None, batch) -> (sum, weight) of this batch, or a list of them, one
                     a sample: the more independent samples, the less data is needed for a decision
    fn               (model, batch as the user wrote it) -> number; the mean over the batches counts
    needs_reference  `score` compares with the original model's outputs on the same batch
    absolute         a drop is the difference itself, not relative to the original's value
    counts           sums count what is right among `weight` answers, each right or wrong
    finish           from the weighted mean over the samples to the value that is shown and bounded
    """

    name: str
    higher_is_better: bool
    score: Callable[[Any, Any, Batch], Score] | None = None
    fn: Callable[[nn.Module, Any], Any] | None = None
    needs_reference: bool = False
    absolute: bool = False
    counts: bool = False
    finish: Callable[[float], float] = _same

    def __post_init__(self) -> None:
        if (self.score is None) == (self.fn is None):
            raise MetricError(f"metric {self.name!r} must have either score= or fn=, and not both")


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists, mappings and dataclasses, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for each in dataclasses.fields(value):
            yield from tensors(getattr(value, each.name))


def primary(outputs: Any) -> Tensor:
    """The output that a model is judged by: `logits` if named so, else the first floating tensor with the most say.

    That is the first of two or more dimensions (a loss is not judged), else the first that is not a scalar.
    """
    named = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if isinstance(named, Tensor):
        return named
    floating = [t for t in tensors(outputs) if t.is_floating_point()]
    for least in (2, 1):
        for tensor in floating:
            if tensor.ndim >= least:
                return tensor
    raise MetricError("the model's outputs hold no floating tensor to compare")


def logits_of(outputs: Any) -> Tensor:
    """(B, S, V): `logits`, or the first floating tensor of three dimensions."""
    named = primary(outputs)
    for tensor in (named, *tensors(outputs)):
        if tensor.ndim == 3 and tensor.is_floating_point():
            return tensor
    raise MetricError(f"there are no logits of shape (batch, length, vocabulary), only {tuple(named.shape)}")


def ids_of(batch: Batch) -> Tensor | None:
    """The token ids, integer (B, S): `input_ids`, or the first positional argument."""
    found = batch.kwargs.get("input_ids", batch.args[0] if batch.args else None)
    return found if isinstance(found, Tensor) and found.ndim == 2 and _integer(found) else None


def _integer(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype != torch.bool


def real_positions(output: Tensor, batch: Batch) -> Tensor | None:
    """bool, shaped like the leading dimensions of `output`: False on padding. None where no mask fits."""
    mask = batch.kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim < 2 or output.ndim <= mask.ndim:
        return None
    if output.shape[: mask.ndim] != mask.shape:
        return None
    return (mask != 0).to(output.device)


def targets(logits: Tensor, batch: Batch) -> Tensor | None:
    """int64, shaped like the logits without their last dimension: the class to predict there, or -100.

    From `labels`, else from the token ids, each predicted one position before it. Labels that only repeat the ids are
    predicted one position before, too; all others stand where they are predicted (classes, masked words, shifted ids).
    A prediction from or of a padded position is not asked for.
    """
    ids, labels = ids_of(batch), batch.kwargs.get("labels")
    if not isinstance(labels, Tensor):
        if ids is None:
            return None
        labels, ahead = ids, True
    else:
        # A model that sees the token it has to predict would be trivial: equal labels mean the next token.
        ahead = ids is not None and ids.shape == labels.shape and bool(((labels == ids) | (labels == IGNORED)).all())
    if labels.shape != logits.shape[:-1] or not _integer(labels):
        raise MetricError(
            f"the {'labels' if labels is not ids else 'ids'}, {labels.dtype} of shape {tuple(labels.shape)}, do not "
            f"fit the logits of shape {tuple(logits.shape)}"
        )
    wanted = labels.to(logits.device, torch.int64)
    real = real_positions(logits, batch)
    if real is not None:
        wanted = wanted.masked_fill(~real, IGNORED)
    if ahead:
        wanted = F.pad(wanted[:, 1:], (0, 1), value=IGNORED)
        if real is not None:
            wanted = wanted.masked_fill(~real, IGNORED)
    return wanted


def _chunks(keep: Tensor | None, *outputs: Tensor) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """The kept rows (..., V) of equally shaped tensors, some at a time: flat row numbers, and rows in float32 or 64."""
    rows = [t.reshape(-1, t.shape[-1]) for t in outputs]
    count, width = rows[0].shape
    index = torch.arange(count, device=rows[0].device) if keep is None else keep.flatten().nonzero().flatten()
    for start in range(0, len(index), step := max(1, CHUNK_ELEMENTS // max(1, width))):
        part = index[start : start + step]
        yield part, [r[part].to(torch.promote_types(r.dtype, torch.float32)) for r in rows]


def _summed(scores: Iterable[tuple[Tensor, Tensor]], outputs: Tensor, batch: Batch) -> list[tuple[float, float]]:
    """(sum, count) for each independent row of the batch, from scores of positions with their flat numbers."""
    rows = batch.rows if outputs.ndim > 1 and outputs.shape[0] == batch.rows else 1
    a_row = math.prod(outputs.shape[:-1]) // rows
    totals, counts = [torch.zeros(rows, dtype=torch.float64, device=outputs.device) for _ in range(2)]
    for part, values in scores:
        totals.index_add_(0, part // a_row, values.double())
        counts.index_add_(0, part // a_row, torch.ones_like(values, dtype=torch.float64))
    return list(zip(totals.tolist(), counts.tolist(), strict=True))


def _pair(outputs: Any, reference: Any, batch: Batch) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Chunks of flat numbers, with the rows (n, V) of the primary output and of the original's, without padding."""
    ours, theirs = primary(outputs), primary(reference)
    if ours.shape != theirs.shape:
        raise MetricError(f"the output's shape is {tuple(ours.shape)}, the original's {tuple(theirs.shape)}")
    for part, (a, b) in _chunks(real_positions(ours, batch), ours, theirs.to(ours.device)):
        yield part, a, b


def _nll(outputs: Any, reference: Any, batch: Batch) -> Score:
    """Negative log-likelihood (nats) summed over the predicted tokens, and their count."""
    logits = logits_of(outputs)
    wanted = targets(logits, batch)
    if wanted is None:
        raise MetricError("there are no labels and no token ids in the batch")
    flat = wanted.flatten()
    losses = (
        (part, F.cross_entropy(rows, flat[part], reduction="none"))
        for part, (rows,) in _chunks(wanted != IGNORED, logits)
    )
    return _summed(losses, logits, batch)


def _exp(nll: float) -> float:
    # math.exp raises beyond 709; a perplexity of e^700 is as bad as any.
    return math.exp(min(nll, 700.0))


def _cosine(outputs: Any, reference: Any, batch: Batch) -> Score:
    """Cosine similarity with the original's vectors (last dimension) summed over positions, and their count."""
    if primary(reference).shape[-1] < 2:
        raise MetricError("outputs of width 1 have no direction to compare")

    def similarity(ours: Tensor, theirs: Tensor) -> Tensor:
        # In float32 the norm of a row as wide as a vocabulary is off by more than an exact rewrite changes.
        similar = F.cosine_similarity(ours.double(), theirs.double(), dim=-1, eps=0.0)
        # Zero vectors have no direction: two of them agree, one alone does not.
        zeros = (ours == 0).all(-1).int() + (theirs == 0).all(-1).int()
        return torch.where(zeros == 2, 1.0, torch.where(zeros == 1, 0.0, similar))

    pairs = _pair(outputs, reference, batch)
    return _summed(((part, similarity(a, b)) for part, a, b in pairs), primary(outputs), batch)


def _kl(outputs: Any, reference: Any, batch: Batch) -> Score:
    """KL(original || candidate) in nats over the last dimension, summed over positions, and their count."""

    def divergence(ours: Tensor, theirs: Tensor) -> Tensor:
        log_q, log_p = ours.log_softmax(-1), theirs.log_softmax(-1)
        # A class that the original rules out (-inf) contributes nothing, whatever the candidate gives it.
        terms = torch.where(log_p == -math.inf, 0.0, log_p.exp() * (log_p - log_q))
        return terms.sum(-1, dtype=torch.float64).clamp(min=0)

    pairs = _pair(outputs, reference, batch)
    return _summed(((part, divergence(a, b)) for part, a, b in pairs), primary(outputs), batch)


def _top1(outputs: Any, reference: Any, batch: Batch) -> Score:
    """Positions whose largest class is the label, or without labels the original's largest class; and their count."""
    if not isinstance(batch.kwargs.get("labels"), Tensor):
        pairs = _pair(outputs, reference, batch)
        return _summed(((part, a.argmax(-1) == b.argmax(-1)) for part, a, b in pairs), primary(outputs), batch)
    logits = primary(outputs)
    wanted = targets(logits, batch)
    assert wanted is not None
    flat = wanted.flatten()
    right = ((part, rows.argmax(-1) == flat[part]) for part, (rows,) in _chunks(wanted != IGNORED, logits))
    return _summed(right, logits, batch)


BUILT_IN: dict[str, Metric] = {
    m.name: m
    for m in (
        Metric(name="perplexity", higher_is_better=False, score=_nll, finish=_exp),
        Metric(name="top1", higher_is_better=True, score=_top1, needs_reference=True, counts=True),
        Metric(name="cosine", higher_is_better=True, score=_cosine, needs_reference=True),
        Metric(name="kl", higher_is_better=False, score=_kl, needs_reference=True, absolute=True),
    )
}


def is_built_in(metric: Metric) -> bool:
    """Is it one of BUILT_IN, perhaps with another `drop_type`?"""
    return metric.name in BUILT_IN and metric.score is BUILT_IN[metric.name].score


def resolve_metric(metric: Any, batch: Batch, outputs: Any, *, causal: bool) -> Metric:
    """The metric that the user means: a name, a `Metric`, or `(callable, "higher" | "lower")`.

    None picks perplexity for a causal language model (integer ids in, `causal`, logits over a vocabulary that holds
    every id out), else cosine. `outputs` are the original model's for `batch`. Raises MetricError.
    """
    if isinstance(metric, Metric):
        return metric
    if isinstance(metric, str):
        if metric not in BUILT_IN:
            raise MetricError(f"there is no metric {metric!r}; choose one of {', '.join(BUILT_IN)}")
        return BUILT_IN[metric]
    if isinstance(metric, tuple) and len(metric) == 2 and callable(metric[0]) and metric[1] in ("higher", "lower"):
        name = getattr(metric[0], "__name__", type(metric[0]).__name__)
        return Metric(name=name, higher_is_better=metric[1] == "higher", fn=metric[0])
    if callable(metric):
        raise MetricError('a metric needs its direction; give metric=(fn, "higher") or metric=(fn, "lower")')
    if metric is not None:
        raise MetricError(
            f'a metric is one of {", ".join(BUILT_IN)}, a Metric, or (fn, "higher" | "lower"), not {metric!r:.60}'
        )
    if causal and predicts_ids(batch, outputs):
        return BUILT_IN["perplexity"]
    mend = 'give metric=(fn, "higher") or metric=(fn, "lower") with fn(model, batch)'
    try:
        width = primary(outputs).shape[-1]
    except MetricError as error:
        raise MetricError(f"{error}; {mend}") from None
    if width < 2:
        raise MetricError(f"outputs of width 1 have no direction, so cosine cannot judge them; {mend}")
    return BUILT_IN["cosine"]


def with_drop_type(metric: Metric, drop_type: str | None) -> Metric:
    """The metric with its drop "relative" or "absolute"; None leaves it as it is."""
    absolute = metric.absolute if drop_type is None else drop_type == "absolute"
    return metric if absolute == metric.absolute else dataclasses.replace(metric, absolute=absolute)


def predicts_ids(batch: Batch, outputs: Any) -> bool:
    """Integer ids (B, S) in, and out logits (B, S, V) over a vocabulary that holds every id?"""
    ids = ids_of(batch)
    try:
        logits = logits_of(outputs)
    except MetricError:
        return False
    if ids is None or ids.numel() == 0 or logits.shape[:2] != ids.shape:
        return False
    return int(ids.max()) < logits.shape[-1]
