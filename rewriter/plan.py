"""What was decided: site -> (variant, config), with the evidence and the model's fingerprint, as readable JSON.

The parameters of learned variants stand beside the JSON in a safetensors file of the same stem.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from rewriter.errors import PlanError
from rewriter.fingerprint import fingerprint
from rewriter.site import AttentionSite, Refusal
from rewriter.target import Target
from rewriter.variant import Config, variants

FORMAT = 3
GOALS = ("latency", "memory")
FILE = "rewriter_plan.json"
"""The plan's name in a folder."""

Fidelity = Literal["exact", "approximate", "learned"]
FIDELITIES: tuple[Fidelity, ...] = ("exact", "approximate", "learned")

MIXED = "mixed"
"""The `variant` of a decision whose heads differ: `heads` says what each group runs."""


@dataclass(frozen=True, kw_only=True)
class HeadGroup:
    """What some heads of a site run. `heads` counts key/value heads; the query heads that share one stay with it."""

    heads: tuple[int, ...]
    variant: str
    config: Config = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Tried:
    """One candidate that was measured at a site.

    cost    of the whole site, in the goal's unit (ms or bytes)
    error   local: relative RMS of the site's output, None where it was not run on data
    effect  predicted share of the drop of the metric if it stood here alone, None likewise
    """

    variant: str
    config: Config = field(default_factory=dict)
    cost: float
    error: float | None = None
    effect: float | None = None


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What to do at one site.

    site       the `AttentionSite.key()` that the decision was made for
    variant    the name of a variant, or `MIXED`
    reason     a sentence: why this variant
    evidence   plain numbers, such as original_ms; those that are not finite are left out of the file
    refused    a sentence for each variant that was not taken
    heads      what each group of heads runs where they differ: every key/value head once
    lengths    (least, most) keys of the calls that the decision is for, None for all; others run `otherwise`, but for
               those that another decision on this path is for
    otherwise  an exact variant, or the original
    tried      all that was measured here
    """

    path: str
    site: str
    variant: str
    config: Config = field(default_factory=dict)
    fidelity: Fidelity
    reason: str
    evidence: Mapping[str, float] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    heads: tuple[HeadGroup, ...] = ()
    lengths: tuple[int, int] | None = None
    otherwise: str = "original"
    tried: tuple[Tried, ...] = ()

    @property
    def most(self) -> float:
        """Keys of the longest call that it is for."""
        return math.inf if self.lengths is None else self.lengths[1]

    @property
    def named(self) -> tuple[str, ...]:
        """The variants that it uses."""
        own = tuple(group.variant for group in self.heads) or (self.variant,)
        return tuple(dict.fromkeys((*own, self.otherwise) if self.lengths else own))

    def to_json(self) -> dict[str, Any]:
        """Plain values, in the order of the fields; mappings sorted. What is empty and new in a format is left out."""
        facts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        facts["evidence"] = {k: v for k, v in self.evidence.items() if math.isfinite(v)}
        facts["heads"] = [dataclasses.asdict(group) for group in self.heads]
        facts["tried"] = [dataclasses.asdict(each) for each in self.tried]
        return {k: plain(v) for k, v in facts.items()}


def own_version() -> str:
    """Of this library."""
    try:
        return importlib.metadata.version("rewriter")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


_HEAD = ("format", "rewriter", "created", "goal", "target", "model", "guard", "judged", "timings", "search")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All decisions for one model.

    target   the machine that it was measured on (`Target.to_json()`)
    model    `fingerprint(model)`
    goal     what was made small: "latency" or "memory"
    guard    the verdict on held-out data (`Verdict.to_json()`), None without calibration data
    judged   `decided(decisions)` of the decisions that the guard measured: changed by hand they are others
    search   how it was found (`Search.to_json()` of rewriter.tune.record), None where nothing was searched
    timings  original and result end to end (`Timing.to_json()`)
    created  when, ISO 8601
    state    parameters of learned variants by name, saved beside the JSON
    """

    decisions: tuple[Decision, ...]
    target: Mapping[str, Any]
    model: Mapping[str, Any]
    goal: str
    guard: Mapping[str, Any] | None = None
    judged: str = ""
    search: Mapping[str, Any] | None = None
    timings: tuple[Mapping[str, Any], ...] = ()
    created: str = field(default_factory=_now)
    rewriter: str = field(default_factory=own_version)
    format: int = FORMAT
    state: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def for_model(model: nn.Module, choices: Mapping[AttentionSite, str | tuple[str, Config]]) -> Plan:
        """A plan written by hand: for each site (of `explain`) the name of a variant, or (name, config).

        Without a config the variant's first one is taken. Nothing is measured: the accuracy is the author's business.
        Raises PlanError where there is no such variant, or where it does not apply.
        """
        decisions = []
        for site, choice in choices.items():
            name, config = (choice, None) if isinstance(choice, str) else choice
            variant, target = variants().get(name), Target.current(site.device)
            if variant is None:
                raise PlanError(f"there is no variant {name!r}; choose one of {', '.join(variants())}")
            if isinstance(answer := variant.takes(site, target), Refusal):
                raise PlanError(f"{name} does not apply at {site.path}: {answer.reason}; choose another variant")
            if config is None:
                config = next(iter(variant.configs(site, target)), {})
            decisions.append(
                Decision(
                    path=site.path,
                    site=site.key(),
                    variant=name,
                    config=config,
                    fidelity=variant.fidelity,
                    reason="chosen by hand",
                )
            )
        device = next((site.device for site in choices), "cpu")
        return Plan(
            decisions=tuple(decisions),
            target=Target.current(device).to_json(),
            model=fingerprint(model),
            goal="latency",
        )

    @property
    def fidelity(self) -> Fidelity:
        """The worst of the decisions."""
        return max((d.fidelity for d in self.decisions), key=FIDELITIES.index, default="exact")

    def decision_for(self, path: str) -> Decision | None:
        """The decision on the site at this module path; where there are several, that for the longest calls."""
        return max((d for d in self.decisions if d.path == path), key=lambda d: d.most, default=None)

    @property
    def by_length(self) -> frozenset[str]:
        """The paths on which short calls and long ones have decisions of their own."""
        return frozenset(path for path, own in by_path(self.decisions).items() if len(own) > 1)

    def keys_of(self, decision: Decision) -> str:
        """How many keys its calls have, in words; "" where no other decision is on its path."""
        if decision.path not in self.by_length:
            return ""
        return "longer" if decision.lengths is None else f"{decision.lengths[0]:,} to {decision.lengths[1]:,} keys"

    def place(self, decision: Decision) -> str:
        """The path of a decision in words, with its lengths where others are decided on their own."""
        keys = self.keys_of(decision)
        return f"{decision.path or '<root>'}{f' ({keys})' if keys else ''}"

    @property
    def sites(self) -> int:
        """How many sites it decides on."""
        return len({d.path for d in self.decisions})

    def to_json(self) -> dict[str, Any]:
        """Plain values, without `state`."""
        facts = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("decisions", "state")
        }
        head = {k: plain(facts[k]) for k in _HEAD}
        return {**head, "decisions": [d.to_json() for d in self.decisions]}

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the plan, whole or not at all; a folder means `rewriter_plan.json` in it. Raises OutputError."""
        from rewriter.planfile import write

        return write(self, path)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Plan:
        """Read what `save` wrote. Raises PlanError with a sentence on anything else."""
        from rewriter.planfile import read

        return read(path)

    def __str__(self) -> str:
        lines = [f"plan for {self.goal}, {self.fidelity}, {self.sites} sites, made {self.created}"]
        rows = []
        for d in self.decisions:
            what = "; ".join(f"heads {named_heads(g.heads)}: {called(g.variant, g.config)}" for g in d.heads)
            rows.append((self.place(d), what or called(d.variant, d.config), d.fidelity, d.reason))
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
        for row in rows:
            lines.append("  ".join((*(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=False)), row[3])))
        return "\n".join(lines)


def by_path(decisions: Sequence[Decision]) -> dict[str, list[Decision]]:
    """The decisions on each site, that for the longest calls first."""
    found: dict[str, list[Decision]] = {}
    for decision in decisions:
        found.setdefault(decision.path, []).append(decision)
    return {path: sorted(own, key=lambda d: d.most, reverse=True) for path, own in found.items()}


def decided(decisions: Sequence[Decision]) -> str:
    """A hash of what decisions do; what is said about them does not count."""
    facts = [dataclasses.replace(d, reason="", evidence={}, refused={}, tried=()).to_json() for d in decisions]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def called(variant: str, config: Config) -> str:
    """`window(size=256)`."""
    settings = ", ".join(f"{k}={v}" for k, v in sorted(config.items()))
    return f"{variant}({settings})" if settings else variant


def named_heads(heads: Sequence[int]) -> str:
    """`0-2, 5`: runs of numbers as their ends."""
    runs: list[list[int]] = []
    for head in sorted(heads):
        if runs and head == runs[-1][-1] + 1:
            runs[-1].append(head)
        else:
            runs.append([head])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def plain(value: Any) -> Any:
    """Mappings sorted, and null for a number that JSON does not have."""
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in sorted(value.items())}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def module_name(path: str) -> str:
    """A path as the name of a submodule, which cannot hold dots."""
    return path.replace(".", "__") or "root"
