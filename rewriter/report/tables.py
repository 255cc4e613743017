"""The report as text: tables of sites and decisions, what was measured, and what the guard says."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rewriter.paths import grouped, joined, shape_of
from rewriter.plan import Decision, Plan
from rewriter.report import Report, Timing
from rewriter.report.candidates import Candidate
from rewriter.site import AttentionSite, Refusal
from rewriter.variant import ORIGINAL
from rewriter.verdict import Verdict

if TYPE_CHECKING:
    from rewriter.report.facts import Facts

WIDTH = 100


def render(report: Report) -> str:
    """The whole report as plain text."""
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None, force_terminal=False)
    print_report(report, console)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def print_report(report: Report, console: Console) -> None:
    """The sites, then what there is of refusals, plan, timings, verdict and notes."""
    graphs = f"{report.graphs} graph{'s' if report.graphs != 1 else ''}"
    many = len(report.sites)
    console.print(f"[bold]{many or 'no'} attention{'s' if many != 1 else ''}[/] in {graphs}", highlight=False)
    if report.sites:
        console.print(site_table(report.sites))
    if report.sampled:
        console.print(f"\n[bold]{len(report.sampled)} to places in maps[/], without scores", highlight=False)
        console.print(site_table(report.sampled))
    if report.refusals:
        console.print(f"\n[bold]{len(report.refusals)} not taken[/]", highlight=False)
        console.print(refusal_table(report.refusals))
    if report.plan is not None:
        console.print("\n[bold]plan[/]")
        console.print(plan_table(report.plan))
    _print_measured(report.timings, report.verdict, console)
    for note in report.notes:
        console.print(f"[bold]note[/]    {escape(note)}", highlight=False)


def print_plan(facts: Facts, console: Console) -> None:
    """The same of a plan alone, and how it was found."""
    plan = facts.plan
    machine = plan.target.get("processor") or plan.target.get("device") or "a machine that it does not name"
    head = f"{plan.sites} sites, {plan.fidelity}, made {plan.created} on {machine}"
    console.print(f"[bold]plan for {escape(plan.goal)}[/]: {escape(head)}", highlight=False)
    console.print(plan_table(plan))
    _print_measured(facts.timings, facts.verdict, console)
    console.print(f"\n[bold]search[/]  {escape(searched(facts))}", highlight=False)


def searched(facts: Facts) -> str:
    """How a plan was found, in a sentence."""
    if facts.plan.search is None:
        return "The plan does not hold a search."
    counts = {name: facts.search[name] for name in ("pairs", "evaluations", "seconds") if name in facts.search}
    words = {"pairs": "site and candidate pairs timed", "evaluations": "calls of the model for accuracy",
             "seconds": "seconds"}  # fmt: skip
    said = [f"{value:,.4g} {words[name]}" for name, value in counts.items()]
    return ", ".join([*said, f"{len(facts.trials)} tried as a whole"]) + "." + _spared(facts.search)


def _spared(search: Mapping[str, Any]) -> str:
    """What the search needs beside trying everything; nothing where nothing changes the result."""
    whole, by_heads = (search.get(name, 0) for name in ("exhaustive", "exhaustive_by_heads"))
    if not whole or "needed" not in search:
        return ""
    calls = search["needed"] - search.get("guarding", 0)
    heads = f", each head by itself {by_heads:,.0f}" if by_heads and by_heads != whole else ""
    return (
        f" To search takes {calls:,.0f} calls without a cache, a backward pass counted as two; to try each pair that "
        f"changes the result end to end would take {whole:,.0f}{heads}."
    )


def _print_measured(timings: Sequence[Timing], verdict: Verdict | None, console: Console) -> None:
    if timings:
        console.print("\n[bold]measured[/]")
        console.print(timing_table(timings))
    if verdict is not None:
        console.print(f"\n[bold]guard[/]   {escape(str(verdict))}", highlight=False)
        for check in verdict.checks:
            console.print(f"[bold]guard[/]   {escape(str(check))}", highlight=False)


def site_table(sites: Iterable[AttentionSite]) -> Table:
    """One line for equal sites."""
    table = _table("sites", "number", "heads", "tokens", "mask", "scale", "type", "spelling")
    groups = grouped(sites, lambda s: (shape_of(s.path), s.key(), s.edits, s.batch, s.q_len, s.kv_len, s.spelling))
    for group in groups:
        site = group[0]
        heads = f"{site.heads}" if site.kv_heads == site.heads else f"{site.heads}/{site.kv_heads}"
        width = f"{site.head_dim}" if site.head_dim == site.v_head_dim else f"{site.head_dim}>{site.v_head_dim}"
        tokens = "x".join("?" if n is None else str(n) for n in (site.q_len, site.kv_len))
        dropped = (f"dropout {site.dropout_p}",) if site.dropout_p else ()
        mask = ", ".join((f"{site.mask}", *dropped, *site.beyond))
        _row(
            table, joined([s.path for s in group]), str(len(group)), f"{heads} of {width}", tokens, mask,
            f"{site.scale:.4g}", site.dtype, site.spelling,
        )  # fmt: skip
    return table


def refusal_table(refusals: Iterable[Refusal]) -> Table:
    """One line for equal sentences."""
    table = _table("where", "number", "why not")
    for group in grouped(refusals, lambda r: (shape_of(r.path), r.reason)):
        place = joined([r.path for r in group])
        source = group[0].source
        _row(table, f"{place} ({source})" if source else place, str(len(group)), group[0].reason)
    return table


def candidate_table(candidates: Sequence[Candidate]) -> Table:
    """What could stand at the sites, and why not."""
    table = _table("sites", "variant", "fidelity", "could stand there")
    for before, each in zip([None, *candidates], candidates, strict=False):
        place = each.sites if before is None or before.sites != each.sites else ""
        _row(table, place, each.variant, each.fidelity, "yes" if each.applies else f"no: {each.reason}")
    return table


def plan_table(plan: Plan) -> Table:
    """One line for equal decisions."""
    table = _table("sites", "number", "variant", "settings", "why")

    def decided(decision: Decision) -> object:
        return shape_of(decision.path), decision.variant, sorted(decision.config.items()), plan.keys_of(decision)

    for group in grouped(plan.decisions, lambda d: str(decided(d))):
        first = group[0]
        settings = ", ".join(f"{name} {value}" for name, value in first.config.items())
        settings = "; ".join(filter(None, (settings, plan.keys_of(first))))
        # Reasons quote measurements of their own site: the first stands for the group.
        _row(table, joined([d.path for d in group]), str(len(group)), first.variant, settings, first.reason)
    return table


def timing_table(timings: Iterable[Timing]) -> Table:
    """Original, result and their ratio."""
    table = _table("", "original", "result", "ratio", right=1)
    for timing in timings:
        scale, unit = scale_of(max(timing.original, timing.result), timing.unit)
        before, after = (f"{value * scale:,.4g} {unit}" for value in (timing.original, timing.result))
        _row(table, timing.what, before, after, f"{timing.ratio:.2f}x")
    return table


def variant_table(rows: Iterable[Mapping[str, Any]]) -> Table:
    """What can stand in for an attention, from name, fidelity, paper, limits and the elements that it computes."""
    table = _table("name", "fidelity", "paper", "for", "also computes")
    for row in rows:
        _row(table, row["name"], row["fidelity"], row["paper"], row["limits"], ", ".join(row["elements"]))
    return table


def changed(plan: Plan | None) -> int:
    """How many sites run something else than their original code."""
    return (
        len({decision.path for decision in plan.decisions if decision.variant != ORIGINAL}) if plan is not None else 0
    )


def outcome(report: Report) -> str:
    """One sentence: what was gained."""
    return gained(report.plan, len(report.sites) + len(report.sampled), report.timings)


def gained(plan: Plan | None, sites: int, timings: Iterable[Timing]) -> str:
    """The same of a plan for so many sites."""
    number = changed(plan)
    if number == 0:
        return "No gain here, left as it is."
    gains = [f"{t.what} {t.ratio:.2f} times {'smaller' if t.unit == 'bytes' else 'faster'}" for t in timings]
    return f"{number} of {sites} attentions replaced{': ' if gains else ''}{', '.join(gains)}."


def amount(value: float, unit: str) -> str:
    """A cost with its unit."""
    scale, unit = scale_of(value, unit)
    return f"{value * scale:,.4g} {unit}"


def scale_of(largest: float, unit: str) -> tuple[float, str]:
    """One unit for both numbers of a line."""
    if unit == "bytes":
        return 1e-6, "MB"
    return (1e-3, "s") if unit == "ms" and largest >= 1e4 else (1.0, unit)


def _table(*columns: str, right: int | None = None) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for index, column in enumerate(columns):
        numeric = column == "number" or (right is not None and index >= right)
        table.add_column("" if column == "number" else column, justify="right" if numeric else "left", overflow="fold")
    return table


def _row(table: Table, *cells: str) -> None:
    table.add_row(*map(escape, cells))
