"""Writing a rewritten model as a checkpoint folder, whole or not at all, and reading it back."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
from torch import Tensor, nn

import rewriter
from rewriter.convert.checkpoint import cause, load_model, quiet
from rewriter.errors import CheckpointError, OutputError
from rewriter.plan import Plan
from rewriter.report import Report

STATE_FILE = "model.safetensors"
REPORT_FILE = "rewriter_report.json"
COPIED = {".json", ".md", ".txt", ".model", ".jinja", ".tiktoken", ".bpe", ".spm"}
LEARNED = "rewriter."
"""The submodule with the parameters of learned variants: it belongs to the plan, not to the checkpoint."""


def check_output(out: Path) -> None:
    """Raises OutputError unless a new folder can be written at `out`; an empty one is taken over."""
    if out.is_dir() and any(out.iterdir()):
        raise OutputError(f"the output folder {out} exists and is not empty: name a new one, or empty it")
    if out.exists() and not out.is_dir():
        raise OutputError(f"the output {out} is a file: name a new folder")
    above = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise OutputError(f"the output folder {out} cannot be made, because {above} cannot be written to: name another")


def write(model: nn.Module, out: Path, *, source: Path | None = None, report: Report | None = None) -> None:
    """Save the model with its plan and report; `source` is the folder whose tokenizer files come along.

    The checkpoint holds the original modules, so that it loads without this library. Raises OutputError, and then
    leaves nothing behind.
    """
    plan, report = rewriter.plan_of(model), report or rewriter.report_of(model)
    state = {name: value for name, value in model.state_dict().items() if not name.startswith(LEARNED)}
    with _beside(out) as folder:
        if hasattr(model, "save_pretrained"):
            with quiet():
                model.save_pretrained(folder, state_dict=state)  # type: ignore[operator]
        else:
            safetensors.torch.save_file(_unshared(state), folder / STATE_FILE)
        if plan is not None:
            plan.save(folder)
        if report is not None:
            (folder / REPORT_FILE).write_text(json.dumps(report.to_json(), indent=2) + "\n", "utf-8")
        if source is not None:
            _bring_along(source, folder)


def load(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The rewritten model of a folder that `rewriter convert` wrote, fast again.

    `model` is needed where the folder holds weights only (its TARGET was a function): an instance to load them into.
    Raises CheckpointError or PlanError.
    """
    folder = Path(folder)
    if model is None:
        model, _ = load_model(folder)
    else:
        try:
            model.load_state_dict(safetensors.torch.load_file(folder / STATE_FILE))
        except Exception as error:
            raise CheckpointError(f"the weights in {folder} do not fit this model: {cause(error)}") from error
    return rewriter.apply(model, Plan.load(folder))


def _bring_along(source: Path, folder: Path) -> None:
    """Copy the small files of a checkpoint that `save_pretrained` did not write: tokenizer, processors, licence."""
    for file in sorted(source.rglob("*")):
        wanted = file.suffix in COPIED or file.stem.upper() in ("LICENSE", "NOTICE")
        there = folder / file.relative_to(source)
        if wanted and file.is_file() and not file.name.endswith(".index.json") and not there.exists():
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, there)


def _unshared(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same values with storage of their own, which the file format asks for; tied weights are written twice."""
    return {name: value.detach().clone().contiguous() for name, value in state.items()}


@contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that becomes `out` when all went well, and vanishes otherwise."""
    check_output(out)
    made = Path()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        yield made
        for path in (made, *made.rglob("*")):
            path.chmod(0o777 & ~_umask() if path.is_dir() else 0o666 & ~_umask())  # mkdtemp made it private
        if out.exists():
            out.rmdir()  # it is empty, and not every system renames over a folder
        made.replace(out)
    except Exception as error:
        raise OutputError(f"the result cannot be written to {out}: {cause(error)}") from error
    finally:
        if made != Path():
            shutil.rmtree(made, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
