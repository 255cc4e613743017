"""The local error of every candidate at every site, and its predicted effect on the metric, for each head.

The original runs on some batches of the search part; at each site the candidates are computed on the same operands.
Local errors are measured, and effects follow from the gradients of `effects.py`. Where there is no way back through the
model, the squared local error stands in, of which only the order is right: the search corrects its scale.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.guard import evaluating, relative_rms
from rewriter.metrics import Batch, Metric
from rewriter.probes import RECALL
from rewriter.raising import Operands
from rewriter.recover import fit
from rewriter.site import AttentionSite
from rewriter.tune.choices import SiteChoices
from rewriter.tune.deadline import Deadline
from rewriter.tune.effects import effects, gradients, losses
from rewriter.tune.record import Ledger, Progress, Record, digest_of
from rewriter.tune.slots import Switches, detached

_MOST_SAMPLES = 2
"""Batches kept for fitting a learned variant at a site."""
_MOST_BATCHES = 4
"""Batches on which effects are predicted."""
CALLS_A_BATCH = 4
"""Of the model, to predict effects: there and back, which counts as two, and once more beside the candidates."""
MOST_PLANTED = 2
"""Texts on which the loss of recall is predicted."""


def sampled(batches: Sequence[Batch]) -> Sequence[Batch]:
    """Those on which effects are predicted."""
    return batches[:: max(1, len(batches) // _MOST_BATCHES)][:_MOST_BATCHES]


@dataclass
class Predictor:
    """One pass over the candidates of a model whose calls run through slots."""

    model: nn.Module
    switches: Switches
    choices: Mapping[str, SiteChoices]
    deadline: Deadline
    progress: Progress
    record: Record
    ledger: Ledger

    def run(self, metric: Metric, batches: Sequence[Batch], seed: int) -> None:
        """Fill in `error` and `effects` of every candidate that is not exact; learned variants are fitted first."""
        learned = any(c.variant.fidelity == "learned" for choices in self.choices.values() for c in choices.others)
        if learned:
            self._fit(batches[:_MOST_SAMPLES])
            self.ledger = dataclasses.replace(self.ledger, kept=False)
        chosen = sampled(batches)
        found: list[dict[str, Any]] = []
        for number, batch in enumerate(chosen):
            if number and self.deadline.over():
                break
            self.progress("predict effects", number, len(chosen))
            found.append(self.measured(metric, batch, seed, number))
        self.record.effects = "gradients" if all(each["gradients"] for each in found) else "local errors"
        for path, choices in self.choices.items():
            for number, candidate in enumerate(choices.others):
                seen = [pair for each in found for pair in each["sites"].get(path, {}).get(str(number), ())]
                errors = [math.inf if error is None else error for error, _ in seen]
                candidate.error = sum(errors) / len(errors) if errors else math.inf
                if candidate.error < math.inf:
                    candidate.effects = [sum(column) / len(found) for column in zip(*(e for _, e in seen), strict=True)]

    def recall(self, texts: Sequence[Batch], worth: float) -> None:
        """Add to the effects what planted tokens lose, times `worth`: so much of the metric's drop is a nat of one."""
        for number, text in enumerate(texts[:MOST_PLANTED]):
            if self.deadline.over():
                return
            self.progress("predict recall", number, MOST_PLANTED)
            found = self.measured(RECALL, text, 0, number)
            if not found["gradients"]:
                return
            for path, choices in self.choices.items():
                for index, candidate in enumerate(choices.others):
                    for _, lost in found["sites"].get(path, {}).get(str(index), ()):
                        if candidate.effects and lost:
                            shares = zip(candidate.effects, lost, strict=True)
                            candidate.effects = [own + worth * each / MOST_PLANTED for own, each in shares]

    def measured(self, metric: Metric, batch: Batch, seed: int, number: int) -> dict[str, Any]:
        """What is seen on the batch of that number among those sampled, in the form of `_effects_on`."""
        named = {
            path: [[c.variant.name, dict(c.config)] for c in choices.others] for path, choices in self.choices.items()
        }
        what = [digest_of(batch), metric.name, named, seed]
        if not self.ledger.knows("effects", what):
            self.record.needed += CALLS_A_BATCH
        found: dict[str, Any] = self.ledger.measured(
            "effects", what, lambda: self._effects_on(metric, batch, seed + number)
        )
        return found

    def _effects_on(self, metric: Metric, batch: Batch, seed: int) -> dict[str, Any]:
        """{"gradients": were there any, "sites": path -> number of the candidate -> [[error, effect by head]]}."""
        exact = {path: c.base.implementation for path, c in self.choices.items() if c.base is not None}
        self.switches.active = exact  # keeps less for the way back than scores that are written out
        generator = torch.Generator().manual_seed(seed)
        way_back = gradients(self.model, self.switches, metric, batch, generator)
        self.record.evaluations += CALLS_A_BATCH
        sites: dict[str, dict[str, list[Any]]] = {}
        calls: dict[str, int] = {}

        def compare(site: AttentionSite, operands: Operands, out: Tensor) -> None:
            choices = self.choices.get(site.path)
            call = calls[site.path] = calls.get(site.path, -1) + 1
            gradient = way_back[0].get((site.path, call)) if way_back else None
            for number, candidate in enumerate(choices.others if choices is not None else ()):
                try:
                    made = candidate.implementation(*operands.given)
                    error = relative_rms(made, out)
                except Exception:  # It worked at the size that was timed, and not at this one.
                    error = math.inf
                pairs = sites.setdefault(site.path, {}).setdefault(str(number), [])
                if not math.isfinite(error):
                    pairs.append([None, []])
                elif gradient is not None and way_back is not None:
                    shares = (losses if metric is RECALL else effects)(gradient, made - out, site.kv_heads)
                    pairs.append([error, [share / way_back[1] for share in shares]])
                else:
                    pairs.append([error, [error**2 / site.kv_heads] * site.kv_heads])

        self._observe([batch], compare)
        return {"gradients": way_back is not None, "sites": sites}

    def _observe(self, batches: Sequence[Batch], observer: Any) -> None:
        self.switches.active, self.switches.observer = {}, observer
        try:
            with evaluating(self.model):
                for batch in batches:
                    self.model(*batch.args, **batch.kwargs)
        finally:
            self.switches.observer = None

    def _fit(self, batches: Sequence[Batch]) -> None:
        samples: dict[str, list[tuple[Operands, Tensor]]] = {}

        def collect(site: AttentionSite, operands: Operands, out: Tensor) -> None:
            choices = self.choices.get(site.path)
            learned = choices is not None and any(c.variant.fidelity == "learned" for c in choices.others)
            if learned and len(samples.setdefault(site.path, [])) < _MOST_SAMPLES:
                samples[site.path].append((detached(operands), out.detach().clone()))

        self.progress("collect activations", 0, None)
        self._observe(batches, collect)
        for number, (path, kept) in enumerate(samples.items()):
            self.progress("fit learned variants", number, len(samples))
            for candidate in self.choices[path].others:
                if candidate.variant.fidelity == "learned" and not self.deadline.over():
                    assert isinstance(candidate.implementation, nn.Module)
                    fit(candidate.implementation, kept)
