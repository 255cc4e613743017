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
_ENOUGH = 12
"""Pairs at each distance, over all rows of all texts."""
_FEWEST, _MOST = 2, 8
"""Pairs at each distance in one row."""
_SHORTEST = 64
_TOKENS_A_PAIR = 64
"""More tokens than these for each pair at a distance leave the text what it was."""
_LEAST = 0.5
"""Nats of gain on average below which the original itself does not recall."""


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
    """For each distance the log-probability (nats) of what is wanted, summed over rows and pairs, and their number."""
    asked, logits = batch.source, logits_of(outputs)
    assert isinstance(asked, Planted)
    found = asked.of(logits.float().log_softmax(-1))
    return [(float(part.sum()), float(part.numel())) for part in found.chunk(len(_PARTS), dim=1)]


RECALL = Metric(name="recall of planted pairs", higher_is_better=True, score=_asked)


def planted(batches: Sequence[Batch], seed: int) -> list[Batch]:
    """Texts with pairs, each followed by the same text without them; none where no batch is long enough, or all have
    padding. What is planted does not occur in the text, if the batches hold so many different tokens.
    """
    suited = [batch for batch in batches if _is_suited(batch)]
    generator = random.Random(seed)
    generator.shuffle(suited)
    vocabulary = sorted({token for batch in suited for token in _ids(batch).unique().tolist()})
    found, pairs = list[Batch](), 0
    for batch in suited:
        texts = _with_pairs(batch, vocabulary, generator)
        if texts is None:
            continue
        found += texts
        pairs += texts[0].source.wanted.numel() // len(_PARTS)
        if pairs >= _ENOUGH:
            break
    return found


def _with_pairs(batch: Batch, vocabulary: Sequence[int], generator: random.Random) -> tuple[Batch, Batch] | None:
    """The batch with pairs and without them; None where there are too few tokens to choose from."""
    ids = _ids(batch)
    here = set(ids.unique().tolist())
    new = [token for token in vocabulary if token not in here]
    pairs = min(max(ids.shape[1] // _TOKENS_A_PAIR, _FEWEST), _MOST)
    questions = len(_PARTS) * pairs
    pool = new if len(new) >= 2 * questions else vocabulary
    if len(pool) < 2 * questions:
        return None
    before = ids.shape[1] - questions
    planted, without = ids.clone(), ids.clone()
    wanted = torch.empty(len(ids), questions, dtype=torch.long)
    for row in range(len(ids)):
        tokens = generator.sample(pool, 2 * questions)
        for question, (first, second) in enumerate(zip(tokens[::2], tokens[1::2], strict=True)):
            part, number = divmod(question, pairs)
            place = before - int(before * _PARTS[part]) + 2 * number
            planted[row, place], planted[row, place + 1] = first, second
            planted[row, before + question] = without[row, before + question] = first
            wanted[row, question] = second
    asked = Planted(torch.arange(before, ids.shape[1]), wanted)
    return _with_ids(batch, planted, asked), _with_ids(batch, without, asked)


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
    sums, pairs = (torch.tensor(each, dtype=torch.float64) for each in zip(*found.samples, strict=True))
    means = sums.view(-1, 2, len(_PARTS)).sum(0) / pairs.view(-1, 2, len(_PARTS)).sum(0)
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
