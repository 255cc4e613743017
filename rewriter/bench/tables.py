"""What the measurement of detection found, as a table for a terminal or for a document."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rewriter.bench.detect import Measured
from rewriter.bench.kernels import Row
from rewriter.bench.variants import Row as VariantRow

if TYPE_CHECKING:
    from rewriter.bench import ahead  # imports Triton, which is for Linux

COLUMNS = (
    "library",
    "models",
    "nodes",
    "sites",
    "found",
    "refused",
    "extra",
    "changed",
    "Inductor",
    "calls",
    "s/1,000",
)
LEGEND = (
    "nodes: of all captured graphs. sites: attentions that one call of each model executes, known from its "
    "configuration. found: by rewriter; extra: beyond what is known. refused: looked like one and was not taken. "
    "changed: models whose outputs an exact rewrite moved by more than rounding. Inductor: sites that its patterns "
    "recognise or that are calls of scaled_dot_product_attention as the model is written; calls: the latter alone. "
    "s/1,000: seconds of detection for 1,000 nodes."
)


def rows(results: Sequence[Measured]) -> list[tuple[str, ...]]:
    """One for each library and, where there are several, one for all."""
    libraries = list(dict.fromkeys(each.library for each in results))
    found = [_row(library, [each for each in results if each.library == library]) for library in libraries]
    return found if len(libraries) == 1 else [*found, _row("all", results)]


def _row(name: str, results: Iterable[Measured]) -> tuple[str, ...]:
    run = [each for each in results if not each.missing]
    known, nodes = sum(each.known for each in run), sum(each.nodes for each in run)
    asked = [each for each in run if each.inductor is not None]
    # A pattern never matches a call, so together they are what Inductor would run fused.
    fused = sum(min(each.known, each.calls + (each.inductor or 0)) for each in asked)
    calls = sum(min(each.known, each.calls) for each in asked)
    return (
        name,
        f"{len(run):,}",
        f"{nodes:,}",
        f"{known:,}",
        _part(sum(each.hit for each in run), known),
        f"{sum(sum(each.refused.values()) for each in run):,}",
        f"{sum(each.extra for each in run):,}",
        f"{sum(each.changed for each in run):,}",
        _part(fused, sum(each.known for each in asked)) if asked else "not run",
        f"{calls:,}" if asked else "",
        f"{1000 * sum(each.detect_seconds for each in run) / nodes:.2f}" if nodes else "",
    )


def _part(part: int, whole: int) -> str:
    return f"{part:,} ({part / whole:.1%})" if whole else f"{part:,}"


def overhead(results: Iterable[Measured]) -> str:
    """One sentence on what the pass costs next to a cold compilation; "" where that was not measured."""
    timed = [each for each in results if each.cold_seconds]
    if not timed:
        return ""
    cold, own = sum(each.cold_seconds or 0.0 for each in timed), sum(each.pass_seconds for each in timed)
    return (
        f"The whole pass took {own:.1f} s on {len(timed)} models, {own / cold:.1%} of a cold torch.compile by Inductor "
        f"({cold:.1f} s)."
    )


def reasons(results: Iterable[Measured], most: int = 3) -> list[tuple[str, int]]:
    """The commonest reasons of refusals."""
    total: Counter[str] = Counter()
    for each in results:
        total.update(each.refused)
    return total.most_common(most)


def as_markdown(columns: Sequence[str], lines: Iterable[Sequence[str]], *below: str) -> str:
    """A table whose first column is text, and what stands below it."""
    numeric = ["---", *["---:"] * (len(columns) - 1)]
    table = [f"| {' | '.join(cells)} |" for cells in (columns, numeric, *lines)]
    return "\n".join([*table, "", *filter(None, below)])


def print_table(columns: Sequence[str], lines: Iterable[Sequence[str]], legend: str, console: Console) -> None:
    """The same for a terminal."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in lines:
        table.add_row(*map(escape, row))
    console.print(table)
    console.print(f"\n[dim]{escape(legend)}[/]", highlight=False)


def markdown(results: Sequence[Measured]) -> str:
    """The table, its legend and the sentence on overhead."""
    return as_markdown(COLUMNS, rows(results), LEGEND, overhead(results))


def print_results(results: Sequence[Measured], console: Console) -> None:
    """The table and all that is not as it should be."""
    print_table(COLUMNS, rows(results), LEGEND, console)
    if sentence := overhead(results):
        console.print(f"\n{sentence}", highlight=False)
    for library in dict.fromkeys(each.library for each in results):
        for reason, number in reasons(each for each in results if each.library == library):
            console.print(f"[bold]refused[/] {number:4}  {library}: {escape(reason)}", highlight=False)
    for title, names in _troubles(results).items():
        if names:
            console.print(f"[bold]{title}[/]  {escape(', '.join(names))}", highlight=False)


def _troubles(results: Sequence[Measured]) -> dict[str, list[str]]:
    missing = Counter(f"{each.library} (library missing: {each.missing})" for each in results if each.missing)
    return {
        "not run": [f"{number} of {what}" for what, number in missing.items()],
        "short": [
            f"{each.name} {each.found}/{each.known}"
            for each in results
            if each.found < each.known and not each.missing and each.nodes
        ],
        "extra": [f"{each.name} {each.found}/{each.known}" for each in results if each.extra],
        "changed": [f"{each.name} ({each.change:.3g} times the tolerance)" for each in results if each.changed],
        "failed": [f"{each.name} ({each.problem})" for each in results if each.problem],
    }


KERNEL_COLUMNS = ("case", "tokens", "type", "implementation", "ms", "µs/token", "faster", "ideal", "MiB")
KERNEL_LEGEND = (
    "1 sequence, 8 heads of 64. ms: median. faster: the median of the ratios to the first of its case, round by round. "
    "ideal: what the kept share of the scores allows. MiB: peak of the process beyond operands and result."
)


def kernel_rows(measured: Iterable[Row]) -> list[tuple[str, ...]]:
    """One for each implementation."""
    return [
        (
            row.case,
            f"{row.tokens:,}",
            row.dtype,
            row.implementation,
            *((f"{ms:.1f}", f"{ms / row.tokens * 1e3:.2f}") if (ms := row.milliseconds) is not None else ("-", "-")),
            f"{row.faster:.2f}x" if row.faster else "",
            f"{row.ideal:.1f}x" if row.ideal else "",
            f"{row.memory:.1f}" if row.memory is not None else "",
        )
        for row in measured
    ]


def kernels_markdown(measured: Sequence[Row]) -> str:
    """The table of the kernels' bench."""
    return as_markdown(KERNEL_COLUMNS, kernel_rows(measured), _kernel_legend(measured))


def print_kernels(measured: Sequence[Row], console: Console) -> None:
    """The same for a terminal."""
    print_table(KERNEL_COLUMNS, kernel_rows(measured), _kernel_legend(measured), console)


def _kernel_legend(measured: Iterable[Row]) -> str:
    """And, once each, why some have no time."""
    return " ".join([KERNEL_LEGEND, *dict.fromkeys(f"-: {row.reason}." for row in measured if row.reason)])


VARIANT_COLUMNS = ("case", "tokens", "type", "variant", "ms", "faster", "work", "ideal", "reached", "MiB")
VARIANT_LEGEND = (
    "1 sequence, 8 heads of 64, random operands, each variant with its first config. ms: median. faster: the median of "
    "the ratios to SDPA, round by round. work: the pairs of a query and a key that are computed, of those that the "
    "case's mask shows; of linear attention, its products beside those of the softmax. ideal: what the computed pairs "
    "allow. reached: of the ideal; more than 100% where SDPA itself is slower than the generated kernel. MiB: peak of "
    "the process beyond operands and result. -: not defined."
)


def variant_rows(measured: Iterable[VariantRow]) -> list[tuple[str, ...]]:
    """One for each variant at each site; below the first of a variant with several configs, these."""

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    return [
        (
            row.case,
            f"{row.tokens:,}",
            row.dtype,
            row.variant,
            number(row.milliseconds, ".1f"),
            number(row.faster, ".2f") + "x" * (row.faster is not None),
            number(row.work, ".1%"),
            number(row.ideal, ".1f") + "x" * (row.ideal is not None),
            number(row.reached, ".0%"),
            number(row.memory, ".1f"),
        )
        for row in measured
        if not row.reason
    ]


def left_out(measured: Iterable[VariantRow]) -> str:
    """What was not measured, and why; "" where all was."""
    found = [
        f"{row.variant} at {row.case} of {row.tokens:,} in {row.dtype} ({row.reason})" for row in measured if row.reason
    ]
    return f"Not measured: {'; '.join(found)}." if found else ""


def variants_markdown(measured: Sequence[VariantRow]) -> str:
    """The table of the variants' bench, and what is missing in it."""
    return as_markdown(VARIANT_COLUMNS, variant_rows(measured), VARIANT_LEGEND, left_out(measured))


def print_variants(measured: Sequence[VariantRow], console: Console) -> None:
    """The same for a terminal."""
    print_table(VARIANT_COLUMNS, variant_rows(measured), VARIANT_LEGEND, console)
    if sentence := left_out(measured):
        console.print(f"\n{escape(sentence)}", highlight=False)


AHEAD_COLUMNS = ("kernel", "head", "tile", "warps", "stages", "registers", "spills", "KiB", "wgmma", "loop", "ratio")
AHEAD_LEGEND = (
    "sm_90, bfloat16, causal, forward. parallel_attn: flash-linear-attention's. head: its size. tile: queries x keys, "
    "first the shipped config, then what parallel_attn is launched with. registers: of a thread; spills: its bytes; "
    "KiB: shared memory of a block. wgmma and loop: tensor-core instructions, and all instructions, in the main loop "
    "for one tile that no mask touches. ratio: of the generated loop to the other; below 1 it is shorter."
)


def ahead_rows(compiled: Iterable[ahead.Row]) -> list[tuple[str, ...]]:
    """One for each kernel."""
    return [
        (
            row.implementation,
            f"{row.head_dim}",
            f"{row.blocks.block_m} x {row.blocks.block_n}",
            f"{row.blocks.num_warps}",
            f"{row.blocks.num_stages}",
            f"{row.registers}",
            f"{row.spills}",
            f"{row.shared / 1024:.4g}",
            f"{row.wgmma:.4g}",
            f"{row.instructions:.4g}",
            f"{row.ratio:.2f}" if row.ratio is not None else "",
        )
        for row in compiled
    ]


def ahead_markdown(compiled: Iterable[ahead.Row], missing: str | None) -> str:
    """The table of the kernels compiled ahead; `missing` says why there is nothing beside the generated ones."""
    return as_markdown(AHEAD_COLUMNS, ahead_rows(compiled), AHEAD_LEGEND, missing or "")


def print_ahead(compiled: Iterable[ahead.Row], missing: str | None, console: Console) -> None:
    """The same for a terminal."""
    print_table(AHEAD_COLUMNS, ahead_rows(compiled), AHEAD_LEGEND, console)
    if missing:
        console.print(f"\n{escape(missing)}", highlight=False)
