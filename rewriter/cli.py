"""The command line: `rewriter explain | convert | variants | doctor | demo | bench | kernels`.

A command returns a JSON document; without `--json` it has printed the same for a person. `run` turns every error into
one line on stderr and an exit status: 2 for bad input, 1 for a guard that failed, 3 for a defect of the library.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from rewriter import debug
from rewriter.bench.cli import bench
from rewriter.codegen.cli import kernels
from rewriter.errors import GuardError, OptionError, RewriterError
from rewriter.terminal import JSON, Document, as_text, calm, progress, stdout

app = typer.Typer(
    help="Finds every attention in a PyTorch model and replaces it by efficient variants, under an accuracy guard.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench, name="bench")
app.add_typer(kernels, name="kernels")


class Goal(StrEnum):
    """What `convert` makes small."""

    latency = "latency"
    memory = "memory"


class DropType(StrEnum):
    """What a drop is measured by."""

    relative = "relative"
    absolute = "absolute"


class Dtype(StrEnum):
    """The type to load the weights in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


TARGET = Annotated[
    str, typer.Argument(metavar="TARGET", help="A Hugging Face checkpoint folder, or package.module:function.")
]
LENGTH = Annotated[int | None, typer.Option(min=1, help="Tokens in a sequence.")]
DEVICE = Annotated[str | None, typer.Option(help="cpu or cuda; without it, the GPU if there is one.")]
DTYPE = Annotated[Dtype | None, typer.Option(help="Load the weights in this type instead of the checkpoint's.")]
MAX_DROP = Annotated[str, typer.Option(help="How much accuracy may fall: 1% or 0.01; with 0 only exact variants.")]
SEED = Annotated[int, typer.Option(help="Of everything random.")]


@app.command()
def explain(
    target: TARGET,
    length: LENGTH = None,
    dtype: DTYPE = None,
    device: DEVICE = None,
    seed: SEED = 0,
    as_json: JSON = False,
) -> Document:
    """Show every attention of a model, what could stand in for it, and why not."""
    import rewriter
    from rewriter.convert import load_target
    from rewriter.report.candidates import candidates
    from rewriter.report.tables import candidate_table, print_report

    with progress() as advance:
        advance("loading", 0, None)
        loaded = load_target(target, length=length, dtype=_dtype(dtype), device=device, seed=seed)
        advance("capturing", 0, None)
        args, kwargs = loaded.example
        report = rewriter.explain(loaded.model, *args, **kwargs)
    report.notes[:0] = loaded.notes
    found = candidates(report.sites)
    if not as_json:
        out = stdout()
        print_report(report, out)
        if found:
            out.print(candidate_table(found))
    return report.to_json() | {"candidates": [each.to_json() for each in found]}


@app.command()
def convert(
    target: TARGET,
    out: Annotated[Path, typer.Option(help="The folder to write; it must be new or empty.")],
    calibration: Annotated[
        str | None, typer.Option(help=".txt, .jsonl or .pt file, or package.module:function; without it, exact only.")
    ] = None,
    max_drop: MAX_DROP = "1%",
    drop_type: Annotated[
        DropType | None, typer.Option(help="Relative to the original's value, as all metrics but kl are, or absolute.")
    ] = None,
    worst_drop: Annotated[
        str | None, typer.Option(help="How much the worst sample may fall; without it, three times as much.")
    ] = None,
    recall_drop: Annotated[
        str | None, typer.Option(help="How much of a language model's recall may go; 10% without it, 100%: not probed.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="A built-in metric, or package.module:name of a (function, direction) pair.")
    ] = None,
    goal: Annotated[Goal, typer.Option(help="What to make small.")] = Goal.latency,
    time_budget: Annotated[str | None, typer.Option(help="Time for the search: 90s, 5m, 1h.")] = None,
    length: LENGTH = None,
    dtype: DTYPE = None,
    device: DEVICE = None,
    variants: Annotated[str | None, typer.Option(help="Only these, by name, with commas between.")] = None,
    seed: SEED = 0,
    as_json: JSON = False,
) -> Document:
    """Write a faster checkpoint, no less accurate than the bound allows."""
    import rewriter
    from rewriter.convert import check_output, load_target, read_calibration, write
    from rewriter.report.tables import outcome, print_report
    from rewriter.verdict import Limits

    check_output(out)
    limits = Limits.checked(max_drop, drop_type, worst_drop, recall_drop)
    budget, names = seconds(time_budget), variant_names(variants)
    with progress() as advance:
        advance("loading", 0, None)
        loaded = load_target(target, length=length, dtype=_dtype(dtype), device=device, seed=seed)
        batches, notes = read_calibration(calibration, loaded, length) if calibration else (None, [])
        model = rewriter.optimize(
            loaded.model,
            batches,
            example=loaded.example,
            max_drop=limits.max_drop,
            drop_type=limits.drop_type,
            worst_drop=limits.worst_drop,
            recall_drop=limits.recall_drop,
            metric=metric_of(metric),
            goal=goal.value,
            time_budget=budget,
            variants=names,
            seed=seed,
            progress=advance,
        )
        report = rewriter.report_of(model)
        assert report is not None
        report.notes[:0] = [*loaded.notes, *notes]
        if report.verdict is not None and not report.verdict.held:
            raise GuardError(f"{report.verdict}; nothing was written")
        advance("writing", 0, None)
        write(model, out, source=loaded.folder, report=report)
    if not as_json:
        console = stdout()
        print_report(report, console)
        console.print(f"\n{outcome(report)} Written to {out}.", soft_wrap=True)
    return report.to_json() | {"out": str(out), "outcome": outcome(report)}


@app.command()
def variants(as_json: JSON = False) -> Document:
    """List what can stand in for an attention."""
    from rewriter.report.tables import variant_table
    from rewriter.variant import variants as all_variants

    rows = [
        {"name": v.name, "fidelity": v.fidelity, "paper": v.paper, "file": _file_of(v.applies)}
        for v in all_variants().values()
    ]
    if not as_json:
        stdout().print(variant_table(rows))
    return {"variants": rows}


@app.command()
def doctor(as_json: JSON = False) -> Document:
    """Look at versions, device, compilers and caches."""
    from rewriter.doctor import examine

    out, checks = stdout(), []
    with progress() as advance:
        advance("examining", 0, None)
        for check in examine():
            checks.append(check)
    if not as_json:
        for check in checks:
            mark = "[green]ok  [/]" if check.ok else "[yellow]warn[/]"
            out.print(f"{mark} {check.name:15} {check.found}", soft_wrap=True, highlight=False)
    return {"checks": [check.to_json() for check in checks]}


@app.command()
def demo(
    max_drop: MAX_DROP = "1%",
    model: Annotated[str, typer.Option(help="lm, encoder or all.")] = "all",
    quick: Annotated[bool, typer.Option("--quick", help="Short sequences: a minute instead of several.")] = False,
    as_json: JSON = False,
) -> Document:
    """Do the whole job on two real pretrained models."""
    from rewriter.demo import run as run_demo
    from rewriter.guard import check_max_drop

    console = Console(quiet=True) if as_json else stdout()
    return run_demo(max_drop=check_max_drop(max_drop), model=model, quick=quick, working=progress, console=console)


def seconds(text: str | None) -> float | None:
    """A duration: 90, 90s, 5m or 1h. Raises OptionError."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip())
    if found is None or float(found[1]) == 0:
        raise OptionError(f"{text!r} is not a time: write 90s, 5m or 1h")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]


def variant_names(text: str | None) -> list[str] | None:
    """The names between commas, all of which must exist. Raises OptionError."""
    from rewriter.variant import variants as all_variants

    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in all_variants()]
    if unknown or not names:
        missing = f"there is no variant {unknown[0]!r}" if unknown else "no variant is named"
        raise OptionError(f"{missing}: choose among {', '.join(all_variants())}")
    return names


def metric_of(text: str | None) -> Any:
    """A built-in name as it is, or the object that package.module:name stands for."""
    from rewriter.convert.target import is_function, lookup

    return lookup(text) if text is not None and is_function(text) else text


def _dtype(choice: Dtype | None) -> Any:
    import torch

    return None if choice is None else getattr(torch, choice.value)


def _file_of(function: Callable[..., Any]) -> str:
    try:
        return str(Path(inspect.getsourcefile(inspect.unwrap(function)) or "?").resolve())
    except TypeError:
        return "?"


def run(arguments: Sequence[str]) -> int:
    """One command; the exit status."""
    as_json, real = "--json" in arguments, sys.stdout
    try:
        # What models and libraries print must not get between the lines of a JSON document.
        with calm(), redirect_stdout(sys.stderr) if as_json else nullcontext():
            result = app(args=list(arguments), prog_name="rewriter", standalone_mode=False)
        if not isinstance(result, int):
            if as_json:
                print(as_text(result), file=real)
            return 0
        status, problem = result, "stopped"  # Typer turns an interrupt into its status, and --help into 0
    except GuardError as error:
        status, problem = 1, str(error)
    except RewriterError as error:
        status, problem = 2, str(error)
    except (KeyboardInterrupt, typer.Abort):
        status, problem = 130, "stopped"
    except BrokenPipeError:
        raise
    except Exception as error:
        if debug.level() > 0:
            traceback.print_exc()
        if hasattr(error, "format_message"):  # a usage error of Typer, whose classes have no public name
            status, problem = 2, f"{error.format_message()} (see rewriter --help)"
        else:
            what = (str(error).strip().splitlines() or ["no message"])[0]
            status, problem = 3, f"a defect of rewriter, {type(error).__name__}: {what} (REWRITER_DEBUG=1 shows where)"
    if status != 0:
        line = " ".join(problem.split())
        if as_json:
            print(as_text({"error": line}), file=real)
        print(f"error: {line}", file=sys.stderr)
    return status


def main() -> None:
    """The console entry."""
    try:
        status = run(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader, `head` for one, has seen enough; Python flushes once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status)
