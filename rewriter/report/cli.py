"""`rewriter report`: what a plan says, in the terminal and as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rewriter.terminal import JSON, Document, stdout


def report(
    plan: Annotated[
        Path, typer.Argument(metavar="PLAN", help="A plan of `rewriter tune`, or a folder that holds one.")
    ],
    html: Annotated[Path | None, typer.Option(help="Write one page that needs no network.")] = None,
    as_json: JSON = False,
) -> Document:
    """Show what was decided, what was measured, and what was refused and why."""
    from rewriter.plan import FILE, Plan
    from rewriter.report.facts import Facts
    from rewriter.report.page import write_page
    from rewriter.report.tables import gained, print_plan

    facts = Facts.of(Plan.load(plan))
    outcome = gained(facts.plan, facts.plan.sites, facts.timings)
    if html is not None:
        write_page(facts, html, plan / FILE if plan.is_dir() else plan)
    if not as_json:
        console = stdout()
        print_plan(facts, console)
        written = f" The page is in {html}." if html is not None else ""
        console.print(f"\n{outcome}{written}", soft_wrap=True, markup=False, highlight=False)
    return {"plan": facts.plan.to_json(), "outcome": outcome, "html": None if html is None else str(html)}
