"""`rewriter bench detect | kernels | variants | ahead | guard`: the library measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from rewriter.errors import GuardError, OptionError
from rewriter.options import RESUME, TIME_BUDGET, VARIANTS, seconds, variant_names
from rewriter.terminal import JSON, Document, progress, stdout

bench = typer.Typer(help="Measure the library itself.", no_args_is_help=True)
Row = TypeVar("Row")


@bench.command("detect")
def bench_detect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Python whose `entries()` yields models with sites.")],
    library: Annotated[str | None, typer.Option(help="Only the models of this one.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many, evenly over the list.")] = None,
    inductor: Annotated[bool, typer.Option(help="Also what PyTorch Inductor recognises.")] = True,
    overhead: Annotated[int, typer.Option(min=0, help="Compare so many with a cold torch.compile, which is slow.")] = 0,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for each model.")] = 150.0,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
    as_json: JSON = False,
) -> Document:
    """Count the attentions found in models with a known number of them."""
    from rewriter.bench import tables
    from rewriter.bench.detect import Options, chosen, serve
    from rewriter.bench.isolated import stream

    options = Options(library=library, limit=limit, inductor=inductor, overhead=overhead, timeout=timeout)
    total = len(chosen(file, options))
    if total == 0:
        raise OptionError(f"{file} declares no models of {library}")
    results = _gathered("measuring", stream(serve, file, options), total)
    if markdown:
        print(tables.markdown(results))
    elif not as_json:
        tables.print_results(results, stdout())
    changed = [measured.name for measured in results if measured.changed]
    if changed and not as_json:  # the document says so itself
        raise GuardError(f"an exact rewrite changed the outputs of {', '.join(changed)}")
    return {"results": [measured.to_json() for measured in results], "changed": changed}


@bench.command("kernels")
def bench_kernels(
    tokens: Annotated[int, typer.Option(min=512, help="Of the local window; the other cases go with it.")] = 4096,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds in which all run in turn.")] = 7,
    flex: Annotated[bool, typer.Option(help="Also flex_attention, which takes half a minute to compile.")] = True,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
    as_json: JSON = False,
) -> Document:
    """Time generated kernels on this CPU beside PyTorch's own."""
    from rewriter.bench import tables
    from rewriter.bench.kernels import measured

    rows = _gathered("measuring", measured(tokens=tokens, repeats=repeats, flex=flex))
    if markdown:
        print(tables.kernels_markdown(rows))
    elif not as_json:
        tables.print_kernels(rows, stdout())
    return {"rows": [row.to_json() for row in rows]}


@bench.command("variants")
def bench_variants(
    variant: Annotated[list[str] | None, typer.Option(help="Only this one; may be repeated.")] = None,
    size: Annotated[
        list[str] | None, typer.Option(help="Tokens, as 4096, or a grid of them, as 64x64; may be repeated.")
    ] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32 or bfloat16; may be repeated.")] = None,
    configs: Annotated[
        bool, typer.Option("--configs", help="Every config of each variant, not the first only.")
    ] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds in which all run in turn, at most.")] = 5,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
    as_json: JSON = False,
) -> Document:
    """Time every variant on this CPU beside PyTorch's fused attention, with what is ideal."""
    from rewriter.bench import tables
    from rewriter.bench.variants import DTYPES, SIZES, measured

    if wrong := [each for each in dtype or () if each not in DTYPES]:
        raise OptionError(f"{wrong[0]!r} is none of {', '.join(DTYPES)}")
    found = measured(variant or (), size or SIZES, dtype or DTYPES, repeats=repeats, every=configs)
    rows = _gathered("measuring", found)
    if markdown:
        print(tables.variants_markdown(rows))
    elif not as_json:
        tables.print_variants(rows, stdout())
    return {"rows": [row.to_json() for row in rows]}


@bench.command("ahead")
def bench_ahead(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
    as_json: JSON = False,
) -> Document:
    """Compile the generated kernel for sm_90, without a GPU, beside flash-linear-attention's at the same tile."""
    from rewriter.bench import tables
    from rewriter.bench.ahead import compiled, peer_kernel

    peer, missing = None, None
    try:
        peer = peer_kernel()
    except OptionError as error:  # the generated kernel is looked at all the same
        missing = str(error)
    rows = _gathered("compiling", compiled(peer))
    if markdown:
        print(tables.ahead_markdown(rows, missing))
    elif not as_json:
        tables.print_ahead(rows, missing, stdout())
    return {"rows": [row.to_json() for row in rows], "missing": missing}


@bench.command("guard")
def bench_guard(
    runs: Annotated[int, typer.Option(min=1, help="Guarded searches, over models, bounds and seeds.")] = 50,
    models: Annotated[str | None, typer.Option(help="Only these, by name, with commas between.")] = None,
    tokens: Annotated[int | None, typer.Option(min=64, help="In a piece of data, for all models.")] = None,
    time_budget: TIME_BUDGET = None,
    variants: VARIANTS = None,
    simple: Annotated[bool, typer.Option("--simple", help="Also compare the search's plans with simple ones.")] = False,
    resume: RESUME = True,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
    as_json: JSON = False,
) -> Document:
    """Measure what guarded searches return on data that they have never seen. A killed bench goes on where it was."""
    from rewriter.bench import guard_tables as tables
    from rewriter.bench.guarded import Hosts, Settings, measured, summaries
    from rewriter.bench.hosts import named
    from rewriter.bench.simple import comparisons

    chosen = named([name.strip() for name in models.split(",")] if models else [])
    missing = {host.name: host.missing for host in chosen if host.missing}
    there = [host for host in chosen if not host.missing]
    if not there:
        raise OptionError(f"no model can be measured: {'; '.join(missing.values())}")
    settings = Settings(tokens=tokens, budget=seconds(time_budget))
    if names := variant_names(variants):
        settings = replace(settings, variants=tuple(names))
    among = Hosts(settings)
    found = _gathered("measuring", measured(there, runs, among, fresh=not resume), runs)
    plans = _gathered("comparing", comparisons(there, among, fresh=not resume)) if simple else []
    totals = summaries(found)
    if markdown:
        print(tables.markdown(totals, plans, missing))
    elif not as_json:
        tables.show(totals, plans, missing, stdout())
    if not totals[-1].holds and not as_json:  # the document says so itself
        raise GuardError("the guard does not hold what it promises on fresh data")
    return {
        "runs": [run.to_json() for run in found],
        "models": [total.to_json() for total in totals],
        "plans": [plan.to_json() for plan in plans],
        "missing": missing,
    }


def _gathered(stage: str, rows: Iterable[Row], total: int | None = None) -> list[Row]:
    """All of them, with a bar while they come."""
    gathered: list[Row] = []
    with progress() as advance:
        advance(stage, 0, total)
        for row in rows:
            gathered.append(row)
            advance(stage, len(gathered), total)
    return gathered
