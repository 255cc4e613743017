"""What the measurement of the guard found, as a table for a terminal or for a document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.markup import escape

from rewriter.bench.guarded import MOST_EXCEEDED, MOST_TIMES, Summary
from rewriter.bench.hosts import title_of
from rewriter.bench.simple import Compared
from rewriter.bench.tables import as_markdown, print_table

COLUMNS = ("model", "runs", "approximate", "original", "exceeded", "worst", "faster", "calls")
LEGEND = (
    "runs: guarded searches, each with a bound and a seed. approximate: returned a model whose answers changed; "
    "original: returned it as it was; the others placed exact variants only. exceeded: beyond the bound on fresh data, "
    f"which may be {MOST_EXCEEDED:.0%} of the runs; worst: the largest drop there, in bounds, which may be "
    f"{MOST_TIMES:g}. faster: the original's time over the result's, end to end, median. calls: how many times fewer "
    "calls of the model a search needs (a backward pass counts as two) than to try each candidate at each head end to "
    "end, median."
)


def rows(totals: Sequence[Summary]) -> list[tuple[str, ...]]:
    """One for each summary."""
    return [
        (
            title_of(total.model),
            f"{total.runs:,}",
            f"{total.approximate:,}",
            f"{total.original:,}",
            f"{total.exceeded:,} ({total.exceeded / total.runs:.0%})",
            f"{total.worst:.2f}",
            f"{total.faster:.2f}x",
            f"{total.spared:.1f}x",
        )
        for total in totals
    ]


def not_run(missing: Mapping[str, str]) -> str:
    """The models that were left out, and why; "" where none was."""
    return "".join(f"Not run: {name} ({reason}). " for name, reason in missing.items()).strip()


SIMPLE_COLUMNS = ("model", "bound", "plan", "predicted", "measured", "drop", "fresh", "tried")
SIMPLE_LEGEND = (
    "The plans of one model keep the same bound on the same data, those that guide the search (drop), before the guard "
    "looks at them; fresh: on other data. exact: the same mathematics only. rank and revert: everywhere the cheapest, "
    "then back at the sites that cost the most for what they gain. one setting: the same at every site. predicted and "
    "measured: how many times faster than the original, end to end, all in alternation. tried: plans measured."
)


def simple_rows(plans: Sequence[Compared]) -> list[tuple[str, ...]]:
    """One for each plan."""
    return [
        (
            title_of(plan.model),
            f"{plan.bound:.3g}",
            f"{plan.how} ({plan.setting})" if plan.setting else plan.how,
            f"{plan.predicted:.2f}x",
            f"{plan.measured:.2f}x",
            f"{plan.searched:.2g}",
            f"{plan.fresh:.2g}",
            f"{plan.tried}",
        )
        for plan in plans
    ]


def markdown(totals: Sequence[Summary], plans: Sequence[Compared], missing: Mapping[str, str]) -> str:
    """The tables, their legends, and what is not in them."""
    guard = as_markdown(COLUMNS, rows(totals), LEGEND, not_run(missing))
    return f"{guard}\n\n{as_markdown(SIMPLE_COLUMNS, simple_rows(plans), SIMPLE_LEGEND)}" if plans else guard


def show(totals: Sequence[Summary], plans: Sequence[Compared], missing: Mapping[str, str], console: Console) -> None:
    """The same for a terminal."""
    print_table(COLUMNS, rows(totals), LEGEND, console)
    if plans:
        console.print()
        print_table(SIMPLE_COLUMNS, simple_rows(plans), SIMPLE_LEGEND, console)
    if sentence := not_run(missing):
        console.print(f"\n{escape(sentence)}", highlight=False)
