"""Commands: `rewriter explain | tune | report | convert | variants | simulate | doctor | demo | bench | kernels`.

A command returns a JSON document; without `--json` it has printed the same for a person. `run` turns every error into
one line on stderr and an exit status: 2 for bad input, 1 for a guard that failed, 3 for a defect of the library.
"""

from __future__ import annotations

import inspect
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from rewriter import debug
from rewriter.bench.cli import bench
from rewriter.codegen.cli import kernels, simulate
from rewriter.errors import GuardError, OptionError, RewriterError
from rewriter.options import (
    CALIBRATION,
    DEVICE,
    DROP_TYPE,
    DTYPE,
    GOAL,
    LENGTH,
    MAX_DROP,
    METRIC,
    RECALL_DROP,
    RESUME,
    SEED,
    TARGET,
    TIME_BUDGET,
    VARIANTS,
    WORST_DROP,
    Goal,
    dtype_of,
    metric_of,
    seconds,
    variant_names,
)
from rewriter.report.cli import report
from rewriter.terminal import JSON, Document, as_text, calm, progress, stdout
from rewriter.tune.cli import tune

app = typer.Typer(
    help="Finds every attention in a PyTorch model and replaces it by efficient variants, under an accuracy guard.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench, name="bench")
app.add_typer(kernels, name="kernels")
app.command()(tune)
app.command()(report)
app.command()(simulate)


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
        loaded = load_target(target, length=length, dtype=dtype_of(dtype), device=device, seed=seed)
        advance("capturing", 0, None)
        args, kwargs = loaded.example
        report = rewriter.explain(loaded.model, *args, **kwargs)
    report.notes[:0] = loaded.notes
    found = candidates([*report.sites, *report.sampled])
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
    calibration: CALIBRATION = None,
    max_drop: MAX_DROP = "1%",
    drop_type: DROP_TYPE = None,
    worst_drop: WORST_DROP = None,
    recall_drop: RECALL_DROP = None,
    metric: METRIC = None,
    goal: GOAL = Goal.latency,
    time_budget: TIME_BUDGET = None,
    length: LENGTH = None,
    dtype: DTYPE = None,
    device: DEVICE = None,
    variants: VARIANTS = None,
    plan: Annotated[Path | None, typer.Option(help="A plan of `rewriter tune`: nothing is searched.")] = None,
    revalidate: Annotated[
        bool, typer.Option("--revalidate", help="Measure the plan on the calibration data first: for other weights.")
    ] = False,
    resume: RESUME = True,
    seed: SEED = 0,
    as_json: JSON = False,
) -> Document:
    """Write a faster checkpoint, no less accurate than the bound allows; exact without --calibration or --plan."""
    import rewriter
    from rewriter.convert import check_output, load_target, read_calibration, write
    from rewriter.report.tables import outcome, print_report
    from rewriter.verdict import Limits

    check_output(out)
    if revalidate != (plan is not None and calibration is not None):
        raise OptionError("--revalidate measures a --plan on --calibration data: give all three, or --plan by itself")
    limits = Limits.checked(max_drop, drop_type, worst_drop, recall_drop)
    budget, names = seconds(time_budget), variant_names(variants)
    with progress() as advance:
        advance("loading", 0, None)
        loaded = load_target(target, length=length, dtype=dtype_of(dtype), device=device, seed=seed)
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
            plan=plan,
            resume=resume,
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
        {
            "name": v.name,
            "fidelity": v.fidelity,
            "paper": v.paper,
            "limits": v.limits,
            "elements": sorted(v.elements),
            "file": _file_of(v.applies),
        }
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
