"""The file of a plan: written whole or not at all, and read with a sentence on whatever is wrong with it.

The parameters of learned variants stand beside the JSON in a safetensors file of the same stem.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
from torch import Tensor

from rewriter.errors import OutputError, PlanError
from rewriter.plan import FIDELITIES, FILE, FORMAT, MIXED, Decision, HeadGroup, Plan, Tried, by_path

T = TypeVar("T")

_OURS = {"format": "pt", "written_by": "rewriter.Plan"}


def write(plan: Plan, path: str | os.PathLike[str]) -> Path:
    """What `Plan.save` does."""
    file = _file(path)
    beside = file.with_suffix(".safetensors")
    content, files = plan.to_json(), {}
    if plan.state:
        if beside == file or (beside.exists() and not _written_here(beside)):
            raise OutputError(f"{beside} is not a plan's file and would be overwritten; choose another name")
        tensors = {name: t.detach().cpu().clone().contiguous() for name, t in sorted(plan.state.items())}
        data = safetensors.torch.save(tensors, metadata=_OURS)
        content["weights"] = {"file": beside.name, "sha256": hashlib.sha256(data).hexdigest()}
        files[beside] = data
    try:
        text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as cause:
        raise OutputError(f"the plan cannot be written as JSON ({cause}); give plain, finite values") from cause
    replace_files({**files, file: text.encode()})
    return file


def read(path: str | os.PathLike[str]) -> Plan:
    """What `Plan.load` does."""
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


def check_told_apart(decisions: Sequence[Decision]) -> None:
    """Raises PlanError where two of them on one path are for calls of one length."""
    for path, own in by_path(decisions).items():
        ranges = sorted(d.lengths for d in own if d.lengths is not None)
        if len(own) - len(ranges) > 1 or any(b[0] <= a[1] for a, b in itertools.pairwise(ranges)):
            raise PlanError(f"it decides more than once on {path or '<root>'} for calls of one length; keep one")


def check_place(path: str | os.PathLike[str]) -> None:
    """Raises OutputError unless a plan can be written there, which is tried, and replaces nothing but a plan."""
    file = Path(path)
    try:
        file = _file(path)
        if file.exists():
            read(file)
        beside = _beside(file)
        beside.touch(exist_ok=False)
        beside.unlink()
    except PlanError as error:
        raise OutputError(f"{file} exists and is not a plan that can be read: name another file") from error
    except OSError as cause:
        raise _unwritable(file, cause) from cause


def _beside(file: Path) -> Path:
    """A place for what becomes this file when it is whole."""
    return file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")


def _unwritable(file: Path, cause: OSError) -> OutputError:
    return OutputError(f"{file} cannot be written ({cause.strerror}); choose another place")


def _file(path: str | os.PathLike[str]) -> Path:
    found = Path(path)
    return found / FILE if found.is_dir() else found


def _written_here(file: Path) -> bool:
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            return dict(opened.metadata() or {}) == _OURS
    except (OSError, safetensors.SafetensorError):
        return False


def replace_files(files: Mapping[Path, bytes]) -> None:
    """Write all beside their places and rename them then, so that a reader sees the old content or the new."""
    written: dict[Path, Path] = {}
    try:
        for file, data in files.items():
            written[file] = _beside(file)
            with written[file].open("xb") as out:
                out.write(data)
                out.flush()
                os.fsync(out.fileno())
        for file, temporary in written.items():
            temporary.replace(file)
    except OSError as cause:
        raise _unwritable(file, cause) from cause
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
    check_told_apart(decisions)
    model = _take(raw, "model", dict, "the plan")
    for name in ("structure", "weights"):
        _take(model, name, str, "model")
    for name in ("tensors", "values"):
        _take(model, name, int, "model")
    parts = model.get("parts", {})
    if not isinstance(parts, dict) or not all(isinstance(p, list) and len(p) == 2 for p in parts.values()):
        raise PlanError("'parts' in model do not name tensors")
    written = model.get("written", [])
    if not isinstance(written, list) or not all(isinstance(name, str) for name in written):
        raise PlanError("'written' in model are not names of buffers")
    for name in ("guard", "search"):
        if raw.get(name) is not None:
            _take(raw, name, dict, "the plan")
    timings = _take(raw, "timings", list, "the plan")
    if not all(isinstance(timing, dict) for timing in timings):
        raise PlanError("'timings' in the plan are not objects")
    return Plan(
        decisions=decisions,
        target=_take(raw, "target", dict, "the plan"),
        model=model,
        goal=_take(raw, "goal", str, "the plan"),
        guard=raw.get("guard"),
        judged=_take(raw, "judged", str, "the plan"),
        search=raw.get("search"),
        timings=tuple(timings),
        created=_take(raw, "created", str, "the plan"),
        rewriter=_take(raw, "rewriter", str, "the plan"),
        state=_state(raw, folder),
    )


def _decision(raw: Any, where: str) -> Decision:
    if not isinstance(raw, dict):
        raise PlanError(f"{where} is not an object")
    texts = {name: _take(raw, name, str, where) for name in ("path", "site", "variant", "reason", "otherwise")}
    fidelity = _take(raw, "fidelity", str, where)
    if fidelity not in FIDELITIES:
        raise PlanError(f"'fidelity' in {where} is {fidelity!r:.40}, not one of {', '.join(FIDELITIES)}")
    lengths = None if raw.get("lengths") is None else _lengths(_take(raw, "lengths", list, where), where)
    heads = _each(raw, "heads", _group, where)
    if bool(heads) != (texts["variant"] == MIXED):
        raise PlanError(f"{where} says {texts['variant']!r:.40} and lists {len(heads)} groups of heads")
    if sorted(head for group in heads for head in group.heads) != list(range(sum(len(g.heads) for g in heads))):
        raise PlanError(f"'heads' in {where} do not hold every head once")
    return Decision(
        **texts,
        config=_map(raw, "config", where),
        evidence=_map(raw, "evidence", where),
        refused=_map(raw, "refused", where),
        fidelity=fidelity,
        heads=heads,
        lengths=lengths,
        tried=_each(raw, "tried", _tried, where),
    )


_VALUES: dict[str, tuple[type, ...]] = {
    "config": (int, float, str, bool), "evidence": (int, float), "refused": (str,)
}  # fmt: skip


def _map(raw: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    found: dict[str, Any] = _take(raw, name, dict, where)
    for key, value in found.items():
        if not isinstance(value, _VALUES[name]) or (isinstance(value, bool) and bool not in _VALUES[name]):
            raise PlanError(f"{key!r:.40} in {name!r} of {where} is a {type(value).__name__}")
    return found


def _each(raw: Mapping[str, Any], name: str, reader: Callable[[Any, str], T], where: str) -> tuple[T, ...]:
    return tuple(reader(each, f"{name} {n} of {where}") for n, each in enumerate(_take(raw, name, list, where)))


def _group(raw: Any, where: str) -> HeadGroup:
    if not isinstance(raw, dict):
        raise PlanError(f"{where} is not an object")
    heads = _take(raw, "heads", list, where)
    if not heads or not all(_is_count(head) for head in heads):
        raise PlanError(f"'heads' in {where} are not numbers of heads")
    return HeadGroup(heads=tuple(heads), variant=_take(raw, "variant", str, where), config=_map(raw, "config", where))


def _tried(raw: Any, where: str) -> Tried:
    if not isinstance(raw, dict):
        raise PlanError(f"{where} is not an object")
    for name in ("cost", "error", "effect"):
        if not (_is_number(raw.get(name)) or (raw.get(name) is None and name != "cost")):
            raise PlanError(f"{name!r} in {where} is not a number")
    return Tried(
        variant=_take(raw, "variant", str, where),
        config=_map(raw, "config", where),
        cost=raw["cost"],
        error=raw.get("error"),
        effect=raw.get("effect"),
    )


def _lengths(found: list[Any], where: str) -> tuple[int, int]:
    if len(found) != 2 or not all(_is_count(length) for length in found) or found[0] > found[1]:
        raise PlanError(f"'lengths' in {where} is not a pair (least, most)")
    return found[0], found[1]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


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
