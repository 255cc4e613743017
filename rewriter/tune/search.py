"""Search for the fastest (or smallest) plan that the guard accepts.

Every candidate is timed at its site and its local error is measured on the search half of the data. One threshold on
the local error then makes a plan: at each site the cheapest candidate below it. The largest threshold whose plan keeps
the metric within the bound is found by bisection on the search half; whether it holds is decided on the other half.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from rewriter.backend import GraphRewriter
from rewriter.errors import CalibrationError, CaptureError, MetricError, NoAttentionError
from rewriter.guard import Measurement, drop, evaluate, evaluating, relative_rms
from rewriter.metrics import Batch, Metric, tensors
from rewriter.plan import Decision
from rewriter.raising import Operands
from rewriter.recover import fit
from rewriter.region import Region
from rewriter.select import WORTH_IT, bench, candidates, working
from rewriter.site import AttentionSite
from rewriter.target import Target
from rewriter.tune.slots import SlotRewriter, Switches, detached
from rewriter.variant import ORIGINAL, Config, Implementation, Variant

_SECONDS_A_KEY = 4.0
_MARGIN = 0.9
"""The part of the bound that the search half may use: the other half of the data is not the same data."""
_WORTH_A_TRIAL = 0.99
"""The search ends where the best that is left would cost more than this part of what is held."""
_MOST_SAMPLES = 2
"""Batches kept for fitting a learned variant at a site."""
_UNKNOWN = {"exact": 0.0, "approximate": float("inf"), "learned": float("inf")}
"""The local error of a candidate that was not run on data."""
Progress = Callable[[str, int, int | None], None]


@dataclass
class Candidate:
    """One way to compute one site, built. `cost` in the goal's unit; `error` is local and relative, once measured."""

    variant: Variant
    config: Config
    implementation: Implementation
    cost: float
    error: float


@dataclass
class SiteChoices:
    """A site with what may stand there. `original` is the cost of its own code; `exact` the best exact candidate."""

    site: AttentionSite
    original: float
    exact: Candidate | None
    others: list[Candidate]
    refused: dict[str, str]

    def best(self, threshold: float) -> Candidate | None:
        """The cheapest candidate whose local error is within the threshold; None is the original code.

        At 0 nothing but exact candidates: a local error of 0 on some data does not make one exact.
        """
        allowed = [c for c in self.others if threshold > 0 and c.error <= threshold]
        allowed += [self.exact] if self.exact else []
        return min(allowed, key=lambda c: c.cost, default=None)


class Deadline:
    """A time budget in seconds; None never ends."""

    def __init__(self, budget: float | None) -> None:
        self._end = None if budget is None else time.monotonic() + budget

    @property
    def left(self) -> float:
        """Seconds that remain."""
        return float("inf") if self._end is None else self._end - time.monotonic()

    def over(self, needed: float = 0.0) -> bool:
        """Is there less than this left?"""
        return self.left <= needed


@dataclass
class Tuning:
    """The state of one search on one model, whose calls run through slots while it lasts."""

    model: nn.Module
    slots: SlotRewriter
    goal: str
    allowed: frozenset[str] | None
    deadline: Deadline
    progress: Progress
    choices: dict[str, SiteChoices] = field(default_factory=dict)
    seconds_a_batch: float = 0.0

    @property
    def switches(self) -> Switches:
        """What the slots do."""
        return self.slots.switches

    def capture(self, batches: Sequence[Batch]) -> None:
        """Run every kind of batch once, so that all graphs exist and each site is known at its largest size.

        The largest goes first: a later one may run in a graph that was captured for any size, and is not seen.
        """
        with evaluating(self.model):
            kinds = {kind_of(batch): batch for batch in sorted(batches, key=size_of)}
            for number, batch in enumerate(reversed(kinds.values())):
                self.progress("capture", number, len(kinds))
                self.model(*batch.args, **batch.kwargs)
                if number == 0 and not self.slots.replaceable:
                    raise no_attention(self.slots)

    def measure_sites(self) -> None:
        """Time the candidates of every site; equal sites once."""
        known: dict[str, tuple[list[float], list[tuple[Variant, Config]], dict[str, str]]] = {}
        for number, (path, region) in enumerate(self.slots.regions.items()):
            self.progress("measure sites", number, len(self.slots.regions))
            identity = region.identity()
            if identity not in known:
                known[identity] = self._measure(region)
            costs, found, refused = known[identity]
            site = region.match.site
            built = [
                Candidate(variant, config, _built(variant, site, config), cost, _UNKNOWN[variant.fidelity])
                for (variant, config), cost in zip(found, costs[1:], strict=True)
            ]
            self.choices[path] = _choices(site, costs[0], built, dict(refused))

    def _measure(self, region: Region) -> tuple[list[float], list[tuple[Variant, Config]], dict[str, str]]:
        site = region.match.site
        q_len, kv_len = region.lengths
        sized = site.sized(batch=region.batch, q_len=q_len, kv_len=kv_len)
        # Learned variants take part when they are asked for by name: fitting them costs minutes.
        fidelities = {"exact", "approximate"} | ({"learned"} if self.allowed is not None else set())
        found, refused = candidates(sized, Target.current(site.device), self.allowed, frozenset(fidelities))
        trial = bench(region)
        built = working(trial, found, refused)
        budget = min(_SECONDS_A_KEY, max(self.deadline.left / 4, 0.0))
        costs = trial.compare([implementation for _, _, implementation in built], goal=self.goal, budget=budget)
        return costs, [(variant, config) for variant, config, _ in built], refused

    def measure_errors(self, batches: Sequence[Batch]) -> None:
        """The local error of what is not exact, on the original's own activations. Fits learned variants first."""
        samples: dict[str, list[tuple[Operands, Tensor]]] = {}
        sums: dict[int, list[float]] = {}

        def collect(site: AttentionSite, operands: Operands, out: Tensor) -> None:
            choices = self.choices.get(site.path)
            learned = choices is not None and any(c.variant.fidelity == "learned" for c in choices.others)
            if learned and len(samples.setdefault(site.path, [])) < _MOST_SAMPLES:
                samples[site.path].append((detached(operands), out.detach().clone()))

        def compare(site: AttentionSite, operands: Operands, out: Tensor) -> None:
            choices = self.choices.get(site.path)
            for candidate in choices.others if choices is not None else ():
                try:
                    found = relative_rms(candidate.implementation(*operands.given), out)
                except Exception:  # It worked at the size that was timed, and not at this one.
                    found = float("inf")
                sums.setdefault(id(candidate), []).append(found)

        if any(c.variant.fidelity == "learned" for choices in self.choices.values() for c in choices.others):
            self._observe(batches[:_MOST_SAMPLES], collect, "collect activations")
            self._fit(samples)
        self._observe(batches, compare, "measure errors")
        for choices in self.choices.values():
            for candidate in choices.others:
                errors = sums.get(id(candidate), [])
                candidate.error = sum(errors) / len(errors) if errors else float("inf")

    def _observe(self, batches: Sequence[Batch], observer: Any, stage: str) -> None:
        self.switches.active, self.switches.observer = {}, observer
        try:
            with evaluating(self.model):
                for number, batch in enumerate(batches):
                    if number and self.deadline.over():
                        break
                    self.progress(stage, number, len(batches))
                    self.model(*batch.args, **batch.kwargs)
        finally:
            self.switches.observer = None

    def _fit(self, samples: dict[str, list[tuple[Operands, Tensor]]]) -> None:
        for number, (path, kept) in enumerate(samples.items()):
            self.progress("fit learned variants", number, len(samples))
            for candidate in self.choices[path].others:
                if candidate.variant.fidelity == "learned" and not self.deadline.over():
                    assert isinstance(candidate.implementation, nn.Module)
                    fit(candidate.implementation, kept)

    def place(self, threshold: float) -> None:
        """Switch every slot to what a threshold chooses."""
        chosen = {path: choices.best(threshold) for path, choices in self.choices.items()}
        self.switches.active = {path: c.implementation for path, c in chosen.items() if c is not None}

    def thresholds(self) -> list[float]:
        """The local errors at which the plan changes, ascending; 0 is the exact plan."""
        errors = (c.error for choices in self.choices.values() for c in choices.others if c.error < float("inf"))
        return [0.0, *sorted({max(error, 1e-30) for error in errors})]

    def search(
        self, metric: Metric, original: Any, batches: Sequence[Batch], references: Sequence[Tensor], bound: float
    ) -> list[float]:
        """Thresholds in the order to try them on held-out data, the best first; 0 (exact) is always the last."""
        levels = self.thresholds()
        accepted, low, high = [0.0], 0, len(levels)
        steps = 0
        while high - low > 1 and not self.deadline.over(2 * self.seconds_a_batch * len(batches)):
            if self.cost(levels[high - 1]) > _WORTH_A_TRIAL * self.cost(levels[low]):
                break
            middle = high - 1 if steps == 0 and len(levels) <= 2 else (low + high) // 2
            self.progress("search", steps, max(1, len(levels).bit_length()))
            start = time.monotonic()
            self.place(levels[middle])
            found = measured(metric, self.model, batches, references)
            within = found is not None and drop(metric, original, found) <= _MARGIN * bound
            self.seconds_a_batch = (time.monotonic() - start) / len(batches)
            steps += 1
            if within:
                low = middle
                accepted.append(levels[middle])
            else:
                high = middle
        return _descending(accepted, levels)

    def cost(self, threshold: float) -> float:
        """What all sites cost together under the plan that a threshold makes."""
        chosen = ((choices, choices.best(threshold)) for choices in self.choices.values())
        return sum(choices.original if best is None else best.cost for choices, best in chosen)

    def decisions(self, threshold: float) -> list[Decision]:
        """The plan that a threshold makes."""
        return [_decision(choices, choices.best(threshold), self.goal) for choices in self.choices.values()]

    def modules(self, threshold: float) -> dict[str, nn.Module]:
        """The fitted modules that a threshold's plan uses, by path."""
        chosen = {path: choices.best(threshold) for path, choices in self.choices.items()}
        return {
            path: c.implementation
            for path, c in chosen.items()
            if c is not None and c.variant.fidelity == "learned" and isinstance(c.implementation, nn.Module)
        }


def measured(
    metric: Metric, model: nn.Module, batches: Sequence[Batch], references: Sequence[Tensor]
) -> Measurement | None:
    """The metric of a candidate; None where it crashes or gives no number, which is as bad as can be."""
    try:
        return evaluate(metric, model, batches, references)
    except (MetricError, CalibrationError):
        return None


def kind_of(batch: Batch) -> str:
    """Equal for batches that run in the same graph: their form with shapes and types in place of the tensors."""
    return repr(
        tree_map(lambda v: (v.dtype, v.shape) if isinstance(v, Tensor) else v, (batch.args, dict(batch.kwargs)))
    )


def size_of(batch: Batch) -> int:
    """How many numbers it holds."""
    return sum(tensor.numel() for tensor in tensors((batch.args, batch.kwargs)))


def no_attention(seen: GraphRewriter) -> CaptureError | NoAttentionError:
    """The error for a model without attention, with the nearest miss; or one that torch.compile sees nothing of."""
    if not seen.graphs:
        return CaptureError(
            "torch.compile captures nothing of this model, which is TorchScript, kept out by torch.compiler.disable, "
            "or computes nothing; give the module as it was written"
        )
    if seen.sites:
        kept = next(iter(seen.sites.values()))
        return NoAttentionError(
            f"no attention in this model can be replaced; the one at {kept.path or '<root>'} is recognised and stays "
            f"as it is ({', '.join(kept.edits)}); see rewriter.explain"
        )
    if seen.refusals:
        return NoAttentionError(
            f"no attention in this model could be taken; the nearest was {seen.refusals[0]}; see rewriter.explain"
        )
    return NoAttentionError("there is no attention in this model, so there is nothing to rewrite")


def _descending(accepted: Iterable[float], levels: Sequence[float]) -> list[float]:
    """The accepted thresholds from the largest down, with steps between them to cut a plan back gently."""
    tries: list[float] = []
    place = levels.index(max(accepted))
    while place > 0:
        tries.append(levels[place])
        place = int(place * 0.7)
    return [*tries, 0.0]


def _built(variant: Variant, site: AttentionSite, config: Config) -> Implementation:
    implementation = variant.build(site, config)
    if isinstance(implementation, nn.Module):
        implementation.to(torch.device(site.device))
    return implementation


def _choices(site: AttentionSite, original: float, built: list[Candidate], refused: dict[str, str]) -> SiteChoices:
    exact = min((c for c in built if c.variant.fidelity == "exact"), key=lambda c: c.cost, default=None)
    if exact is not None and exact.cost > WORTH_IT * original:
        refused[exact.variant.name] = f"no gain here: {exact.cost / original:.2f} of the original's cost"
        exact = None
    floor = exact.cost if exact is not None else original
    others = [c for c in built if c.variant.fidelity != "exact" and c.cost <= WORTH_IT * floor]
    for name in {c.variant.name for c in built if c.variant.fidelity != "exact"} - {c.variant.name for c in others}:
        cheapest = min(c.cost for c in built if c.variant.name == name)
        refused[name] = f"no gain here: {cheapest / floor:.2f} of the best exact cost at this size"
    return SiteChoices(site, original, exact, others, refused)


def _decision(choices: SiteChoices, chosen: Candidate | None, goal: str) -> Decision:
    site, unit = choices.site, "bytes" if goal == "memory" else "ms"
    if chosen is None:
        return Decision(
            path=site.path, site=site.key(), variant=ORIGINAL, fidelity="exact", refused=choices.refused,
            reason="no gain within the bound here, left as it is", evidence={f"original_{unit}": choices.original},
        )  # fmt: skip
    return Decision(
        path=site.path,
        site=site.key(),
        variant=chosen.variant.name,
        config=chosen.config,
        fidelity=chosen.variant.fidelity,
        reason=f"cheapest within the bound: {chosen.cost / choices.original:.2f} of the original's {unit}",
        evidence={
            f"original_{unit}": choices.original,
            f"candidate_{unit}": chosen.cost,
            "local_error": chosen.error,
        },
        refused=choices.refused,
    )
