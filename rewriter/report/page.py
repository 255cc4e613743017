"""One self-contained page about a plan: all that it shows was measured and stands in the plan."""

from __future__ import annotations

from pathlib import Path

import jinja2

from rewriter.errors import OptionError, OutputError
from rewriter.plan import called, named_heads
from rewriter.planfile import replace_files
from rewriter.report import plots
from rewriter.report.facts import Facts, drawn, site_of
from rewriter.report.tables import amount, gained, searched

_MARK = '<meta name="generator" content="rewriter">'


def page(facts: Facts) -> str:
    """The page as HTML."""
    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=folder, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    measured = bool(facts.columns)
    # The plots are SVG in which all text is escaped: only they are `safe` in the template, which escapes the rest.
    return environment.get_template("page.html.jinja").render(
        facts=facts,
        plan=facts.plan,
        mark=_MARK,
        outcome=gained(facts.plan, facts.plan.sites, facts.timings),
        front=plots.front(facts) if facts.front else None,
        heat_map=plots.heat_map(facts) if measured else None,
        timeline=plots.timeline(facts) if facts.timeline else None,
        amount=amount,
        called=called,
        named_heads=named_heads,
        drawn=drawn,
        site_of=site_of,
        searched=searched,
    )


def write_page(facts: Facts, out: Path, plan: Path) -> None:
    """Write the page, whole or not at all. Raises OptionError or OutputError."""
    if out.resolve() == plan.resolve():
        raise OptionError("--html would replace the plan: name another file")
    if out.exists() and not _is_page(out):
        raise OutputError(f"{out} exists and is not a page of this command: name another file")
    # A name in JSON may hold half of a character, which no file can.
    replace_files({out: page(facts).encode("utf-8", "replace")})


def _is_page(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            return _MARK.encode() in opened.read(1000)
    except OSError:
        return False
