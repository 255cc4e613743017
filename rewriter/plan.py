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
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
from torch import Tensor, nn

from rewriter.errors import OutputError, PlanError
from rewriter.fingerprint import fingerprint
from rewriter.site import AttentionSite, Refusal
from rewriter.target import Target
from rewriter.variant import Config, variants

FORMAT = 1
FILE = "rewriter_plan.json"
"""The plan's name in a folder."""

Fidelity = Literal["exact", "approximate", "learned"]
_FIDELITIES: tuple[Fidelity, ...] = ("exact", "approximate", "learned")
_OURS = {"format": "pt", "written_by": "rewriter.Plan"}


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What to do at one site.

    site      the `AttentionSite.key()` that the decision was made for
    reason    a sentence: why this variant
    evidence  plain numbers, such as original_ms; those that are not finite are left out of the file
    refused   a sentence for each variant that was not taken
    """

    path: str
    site: str
    variant: str
    config: Config = field(default_factory=dict)
    fidelity: Fidelity
    reason: str
    evidence: Mapping[str, float] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values, in the order of the fields; mappings sorted."""
        facts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        facts["evidence"] = {k: v for k, v in self.evidence.items() if math.isfinite(v)}
        return {k: dict(sorted(v.items())) if isinstance(v, Mapping) else v for k, v in facts.items()}


def _version() -> str:
    try:
        return importlib.metadata.version("rewriter")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All decisions for one model.

    target   the machine that it was measured on (`Target.to_json()`)
    model    `fingerprint(model)`
    goal     what was made small: "latency" or "memory"
    guard    the verdict on held-out data (`Verdict.to_json()`), None without calibration data
    created  when, ISO 8601
    state    parameters of learned variants by name, saved beside the JSON
    """

    decisions: tuple[Decision, ...]
    target: Mapping[str, Any]
    model: Mapping[str, Any]
    goal: str
    guard: Mapping[str, Any] | None = None
    created: str = field(default_factory=_now)
    rewriter: str = field(default_factory=_version)
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
        return max((d.fidelity for d in self.decisions), key=_FIDELITIES.index, default="exact")

    def decision_for(self, path: str) -> Decision | None:
        """The decision on the site at this module path."""
        return next((d for d in self.decisions if d.path == path), None)

    def to_json(self) -> dict[str, Any]:
        """Plain values, without `state`."""
        facts = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("decisions", "state")
        }
        head = {k: _plain(facts[k]) for k in ("format", "rewriter", "created", "goal", "target", "model", "guard")}
        return {**head, "decisions": [d.to_json() for d in self.decisions]}

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the plan, whole or not at all; a folder means `rewriter_plan.json` in it. Raises OutputError."""
        file = _file(path)
        beside = file.with_suffix(".safetensors")
        content, files = self.to_json(), {}
        if self.state:
            if beside == file or (beside.exists() and not _written_here(beside)):
                raise OutputError(f"{beside} is not a plan's file and would be overwritten; choose another name")
            tensors = {name: t.detach().cpu().clone().contiguous() for name, t in sorted(self.state.items())}
            data = safetensors.torch.save(tensors, metadata=_OURS)
            content["weights"] = {"file": beside.name, "sha256": hashlib.sha256(data).hexdigest()}
            files[beside] = data
        try:
            text = json.dumps(content, indent=2, allow_nan=False) + "\n"
        except (TypeError, ValueError) as cause:
            raise OutputError(f"the plan cannot be written as JSON ({cause}); give plain, finite values") from cause
        _write({**files, file: text.encode()})
        return file

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Plan:
        """Read what `save` wrote. Raises PlanError with a sentence on anything else."""
        file = _file(path)
        try:
            raw = json.loads(file.read_bytes().decode(), parse_constant=_no_constant)
        except OSError as cause:
            raise PlanError(f"the plan {file} cannot be read ({cause.strerror}); check the path") from cause
        except (ValueError, RecursionError) as cause:
            raise PlanError(f"the plan {file} is not JSON, or is cut off ({cause}); make it again") from cause
        try:
            return _read(raw, file.parent)
        except PlanError as cause:
            raise PlanError(f"the plan {file} is damaged or foreign: {cause}") from None

    def __str__(self) -> str:
        lines = [f"plan for {self.goal}, {self.fidelity}, {len(self.decisions)} sites, made {self.created}"]
        rows = []
        for d in self.decisions:
            config = ", ".join(f"{k}={v}" for k, v in sorted(d.config.items()))
            rows.append((d.path or "<root>", d.variant + (f"({config})" if config else ""), d.fidelity, d.reason))
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
        for row in rows:
            lines.append("  ".join((*(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=False)), row[3])))
        return "\n".join(lines)


def _file(path: str | os.PathLike[str]) -> Path:
    found = Path(path)
    return found / FILE if found.is_dir() else found


def _plain(value: Any) -> Any:
    """Mappings sorted, and null for a number that JSON does not have."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in sorted(value.items())}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _written_here(file: Path) -> bool:
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            return dict(opened.metadata() or {}) == _OURS
    except (OSError, safetensors.SafetensorError):
        return False


def _write(files: Mapping[Path, bytes]) -> None:
    """Write all beside their places and rename them then, so that a reader sees the old content or the new."""
    written: dict[Path, Path] = {}
    try:
        for file, data in files.items():
            written[file] = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
            with written[file].open("xb") as out:
                out.write(data)
                out.flush()
                os.fsync(out.fileno())
        for file, temporary in written.items():
            temporary.replace(file)
    except OSError as cause:
        raise OutputError(f"{file} cannot be written ({cause.strerror}); choose another place") from cause
    finally:
        for temporary in written.values():
            temporary.unlink(missing_ok=True)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _read(raw: Any, folder: Path) -> Plan:
    if not isinstance(raw, dict):
        raise PlanError("it holds no object at its top")
    if raw.get("format") != FORMAT or isinstance(raw.get("format"), bool):
        raise PlanError(
            f"its format is {raw.get('format')!r:.40} and this version of rewriter reads {FORMAT}; install the version "
            "that wrote it, or tune again"
        )
    listed = _take(raw, "decisions", list, "the plan")
    decisions = tuple(_decision(each, f"decision {index}") for index, each in enumerate(listed))
    paths = [d.path for d in decisions]
    if twice := [path for path in dict.fromkeys(paths) if paths.count(path) > 1]:
        raise PlanError(f"it decides more than once on {twice[0]!r}; keep one")
    model = _take(raw, "model", dict, "the plan")
    for name in ("structure", "weights"):
        _take(model, name, str, "model")
    for name in ("tensors", "values"):
        _take(model, name, int, "model")
    guard = raw.get("guard")
    if guard is not None and not isinstance(guard, dict):
        raise PlanError("'guard' in the plan is neither an object nor null")
    return Plan(
        decisions=decisions,
        target=_take(raw, "target", dict, "the plan"),
        model=model,
        goal=_take(raw, "goal", str, "the plan"),
        guard=guard,
        created=_take(raw, "created", str, "the plan"),
        rewriter=_take(raw, "rewriter", str, "the plan"),
        state=_state(raw, folder),
    )


def _decision(raw: Any, where: str) -> Decision:
    if not isinstance(raw, dict):
        raise PlanError(f"{where} is not an object")
    texts = {name: _take(raw, name, str, where) for name in ("path", "site", "variant", "reason")}
    fidelity = _take(raw, "fidelity", str, where)
    if fidelity not in _FIDELITIES:
        raise PlanError(f"'fidelity' in {where} is {fidelity!r:.40}, not one of {', '.join(_FIDELITIES)}")
    allowed = {"config": (int, float, str, bool), "evidence": (int, float), "refused": (str,)}
    maps = {name: _take(raw, name, dict, where) for name in allowed}
    for name, kinds in allowed.items():
        for key, value in maps[name].items():
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                raise PlanError(f"{key!r:.40} in {name!r} of {where} is a {type(value).__name__}")
    return Decision(**texts, **maps, fidelity=fidelity)


def _take(raw: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    if name not in raw:
        raise PlanError(f"{where} has no {name!r}")
    value = raw[name]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise PlanError(f"{name!r} in {where} is a {type(value).__name__}, not a {kind.__name__}")
    return value


def _state(raw: Mapping[str, Any], folder: Path) -> dict[str, Tensor]:
    """The tensors of the file that `weights` names, {} where it names none."""
    if raw.get("weights") is None:
        return {}
    weights = _take(raw, "weights", dict, "the plan")
    name, expected = _take(weights, "file", str, "weights"), _take(weights, "sha256", str, "weights")
    if not name or Path(name).name != name:
        raise PlanError(f"its weights {name!r:.60} are not a file name in the plan's folder")
    try:
        data = (folder / name).read_bytes()
    except OSError as cause:
        raise PlanError(f"its weights {name} cannot be read ({cause.strerror}); copy them beside the plan") from cause
    if hashlib.sha256(data).hexdigest() != expected:
        raise PlanError(f"its weights {name} are damaged or belong to another plan; copy them again")
    try:
        return safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError) as cause:
        raise PlanError(f"its weights {name} are not a safetensors file ({cause}); copy them again") from cause


def check_model(plan: Plan, model: nn.Module, *, check_weights: bool = True) -> None:
    """Raises PlanError where the plan is not for this model: another structure, or, when the plan holds decisions that
    are not exact, other weights (their effect on the accuracy was measured on those).
    """
    ours, theirs = fingerprint(model), plan.model
    if ours["structure"] != theirs["structure"]:
        modules = {name.replace("_orig_mod.", "") for name, _ in model.named_modules()}
        missing = [d.path for d in plan.decisions if d.path not in modules]
        hint = f"; this one has no {', '.join(missing[:3])}" if missing else ""
        raise PlanError(
            f"the plan is for another model: of {theirs['tensors']} tensors with {theirs['values']:,} values, where "
            f"this one has {ours['tensors']} with {ours['values']:,}{hint}; tune this model"
        )
    if check_weights and plan.fidelity != "exact" and ours["weights"] != theirs["weights"]:
        raise PlanError(
            "the plan is for other weights of this architecture, and its accuracy was measured on those; tune again, "
            "or apply(..., check_weights=False)"
        )
