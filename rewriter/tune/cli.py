"""`rewriter tune`: search for a plan, and write nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rewriter.errors import OptionError
from rewriter.options import (
    CALIBRATION,
    DEVICE,
    DROP_TYPE,
    DTYPE,
    GOAL,
    LENGTH,
    MAX_DROP,
    METRIC,
    RAY,
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
)  # fmt: skip
from rewriter.terminal import JSON, Document, progress, stdout


def tune(
    target: TARGET,
    calibration: CALIBRATION = None,
    out: Annotated[Path, typer.Option(help="The plan to write, or its folder; one that is there is replaced.")] = Path(
        "rewriter_plan.json"
    ),
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
    resume: RESUME = True,
    pareto: Annotated[bool, typer.Option("--pareto", help="Measure the front of cost against accuracy.")] = False,
    ray: RAY = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be measured, no more.")] = False,
    seed: SEED = 0,
    as_json: JSON = False,
) -> Document:
    """Search for the fastest plan within a bound on accuracy. Ctrl-C ends the search with the best so far."""
    import rewriter
    from rewriter.convert import load_target, read_calibration
    from rewriter.planfile import check_place
    from rewriter.report.tables import outcome, print_report
    from rewriter.tune.deadline import Deadline
    from rewriter.tune.rehearsal import rehearsed
    from rewriter.verdict import Limits

    if calibration is None:
        raise OptionError("a search needs --calibration data like those the model will see")
    if ray is not None and not resume:
        raise OptionError("what --ray measures reaches the search through the cache, which --fresh does not believe")
    limits = Limits.checked(max_drop, drop_type, worst_drop, recall_drop)
    budget, names = seconds(time_budget), variant_names(variants)
    check_place(out)
    with progress() as advance:
        advance("loading", 0, None)
        loaded = load_target(target, length=length, dtype=dtype_of(dtype), device=device, seed=seed)
        batches, notes = read_calibration(calibration, loaded, length)
        if dry_run:
            found = rehearsed(
                loaded.model,
                batches,
                goal=goal.value,
                variants=names,
                metric=metric_of(metric),
                seed=seed,
                progress=advance,
            )
        else:
            if ray is not None:
                from rewriter.tune.spread import Order, measure_ahead

                order = Order(
                    target=target,
                    calibration=calibration,
                    length=length,
                    dtype=dtype_of(dtype),
                    device=next((p.device.type for p in loaded.model.parameters()), "cpu"),
                    metric=metric,
                    goal=goal.value,
                    variants=names,
                    limits=limits,
                    seed=seed,
                )
                deadline = Deadline(budget)
                notes.append(str(measure_ahead(ray, order, deadline, advance)))
                budget = None if budget is None else max(deadline.left, 1.0)
            model = rewriter.optimize(
                loaded.model,
                batches,
                max_drop=limits.max_drop,
                drop_type=limits.drop_type,
                worst_drop=limits.worst_drop,
                recall_drop=limits.recall_drop,
                metric=metric_of(metric),
                goal=goal.value,
                time_budget=budget,
                variants=names,
                resume=resume,
                pareto=pareto,
                seed=seed,
                progress=advance,
            )
    if dry_run:
        if not as_json:
            stdout().print(str(found), soft_wrap=True, highlight=False)
        return found.to_json()
    report, plan = rewriter.report_of(model), rewriter.plan_of(model)
    assert report is not None and plan is not None
    report.notes[:0] = [*loaded.notes, *notes]
    out = plan.save(out)
    if not as_json:
        console = stdout()
        print_report(report, console)
        console.print(f"\n{outcome(report)} The plan is in {out}.", soft_wrap=True)
    return report.to_json() | {"out": str(out), "outcome": outcome(report)}
