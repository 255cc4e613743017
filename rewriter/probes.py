"""Does a causal language model still recall what stood far before? An average over all tokens hides that.

Pairs of tokens are planted into real text, each at its distance before the end, where the last tokens ask for them:
after the first of a pair, a model that copies from afar expects the second (induction heads: Olsson et al. 2022,
arXiv:2209.11895). What a pair adds to the logarithm of that probability, against the same text without it, is its gain.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rewriter.guard import Measurement
from rewriter.metrics import Batch, Metric, ids_of, logits_of, real_positions
from rewriter.verdict import Check

_PARTS = (1 / 8, 1 / 4, 1 / 2, 1)
"""The distances, in parts of the text before the questions."""
_PAIRS = 2
"""Of each distance in one text."""
_TEXTS = 6
_SHORTEST = 64
_LEAST = 0.5
"""Nats of gain on average below which the original itself does not recall."""
_QUESTIONS = len(_PARTS) * _PAIRS


@dataclass(frozen=True)
class Planted:
    """What is asked of a text: for each question its place among the tokens, and the token that is wanted."""

    places: Tensor
    wanted: Tensor

    def of(self, values: Tensor) -> Tensor:
        """What these values (B, S, V) are for what is wanted: (B, questions)."""
        asked = values[:, self.places.to(values.device)]
        return asked.gather(-1, self.wanted.to(values.device)[..., None])[..., 0]

    def logits(self, outputs: Any) -> Tensor:
        """(B, questions): how far the logits of what is wanted are above the mean of all."""
        logits = logits_of(outputs).float()
        return self.of(logits - logits.mean(-1, keepdim=True))


def _asked(outputs: Any, reference: Any, batch: Batch) -> list[tuple[float, float]]:
    """For each question the log-probability (nats) of what is wanted, summed over the rows, and their number."""
    asked, logits = batch.source, logits_of(outputs)
    assert isinstance(asked, Planted)
    sums = asked.of(logits.float().log_softmax(-1)).sum(0)
    return [(total, float(len(logits))) for total in sums.tolist()]


RECALL = Metric(name="recall of planted pairs", higher_is_better=True, score=_asked)


def planted(batches: Sequence[Batch], seed: int) -> list[Batch]:
    """Texts with pairs, each followed by the same text without them; none where no batch is long enough, or all have
    padding. What is planted does not occur in the text, if the batches hold so many different tokens.
    """
    suited = [batch for batch in batches if _is_suited(batch)]
    generator = random.Random(seed)
    chosen = [suited[n] for n in sorted(generator.sample(range(len(suited)), min(_TEXTS, len(suited))))]
    vocabulary = sorted({token for batch in suited for token in _ids(batch).unique().tolist()})
    found: list[Batch] = []
    for batch in chosen:
        ids = _ids(batch)
        here = set(ids.unique().tolist())
        new = [token for token in vocabulary if token not in here]
        pool = new if len(new) >= 2 * _QUESTIONS else vocabulary
        if len(pool) < 2 * _QUESTIONS:
            continue
        before = ids.shape[1] - _QUESTIONS
        with_pairs, without = ids.clone(), ids.clone()
        wanted = torch.empty(len(ids), _QUESTIONS, dtype=torch.long)
        for row in range(len(ids)):
            tokens = generator.sample(pool, 2 * _QUESTIONS)
            for question, (first, second) in enumerate(zip(tokens[::2], tokens[1::2], strict=True)):
                part, number = divmod(question, _PAIRS)
                place = before - int(before * _PARTS[part]) + 2 * number
                with_pairs[row, place], with_pairs[row, place + 1] = first, second
                with_pairs[row, before + question] = without[row, before + question] = first
                wanted[row, question] = second
        asked = Planted(torch.arange(before, ids.shape[1]), wanted)
        found += [_with_ids(batch, each, asked) for each in (with_pairs, without)]
    return found


def gain(original: Measurement) -> float:
    """The mean gain in nats where the original recalls; 0 where it does not recall at all."""
    found = [each for each in _gains(original) if each >= _LEAST]
    return sum(found) / len(found) if found else 0.0


def judged(original: Measurement, candidate: Measurement | None, bound: float) -> Check:
    """How much of the original's gain is lost at the distance that loses most. Both were measured on `planted`."""
    before = _gains(original)
    parts = {number: gain for number, gain in enumerate(before) if gain >= _LEAST}
    if not parts:
        return said(bound, "not probed: the original does not recall them")
    if candidate is None:
        return Check(name=RECALL.name, bound=bound, drop=math.inf, held=False, note="the model failed on them")
    after = _gains(candidate)
    worst = max(parts, key=lambda number: 1 - after[number] / before[number])
    drop = 1 - after[worst] / before[worst]
    note = f"at {_PARTS[worst]:.3g} of the text, where a pair adds {before[worst]:.2g} nats"
    return Check(name=RECALL.name, bound=bound, drop=drop, held=drop <= bound, note=note)


TOO_SHORT = f"not probed: it takes held-out texts of at least {_SHORTEST} tokens, without padding and of many words"


def said(bound: float, note: str) -> Check:
    """Nothing could be measured."""
    return Check(name=RECALL.name, bound=bound, note=note)


def _gains(found: Measurement) -> list[float]:
    """The mean gain at each distance, in nats."""
    sums, rows = (torch.tensor(each, dtype=torch.float64) for each in zip(*found.samples, strict=True))
    means = (sums / rows).view(-1, 2, len(_PARTS), _PAIRS).mean((0, 3))
    gains: list[float] = (means[0] - means[1]).tolist()
    return gains


def _ids(batch: Batch) -> Tensor:
    found = ids_of(batch)
    assert found is not None
    return found


def _is_suited(batch: Batch) -> bool:
    ids = ids_of(batch)
    if ids is None or ids.shape[1] < _SHORTEST:
        return False
    real = real_positions(ids[..., None], batch)
    return real is None or bool(real.all())


def _with_ids(batch: Batch, ids: Tensor, asked: Planted) -> Batch:
    if "input_ids" in batch.kwargs:
        return dataclasses.replace(batch, kwargs={**batch.kwargs, "input_ids": ids}, source=asked)
    return dataclasses.replace(batch, args=(ids, *batch.args[1:]), source=asked)
