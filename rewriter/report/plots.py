"""The plots of the page, as SVG that needs nothing else: no fonts, no scripts, no network."""

from __future__ import annotations

import io
import math
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree

from rewriter.errors import OptionError
from rewriter.plan import called
from rewriter.report.facts import Facts
from rewriter.report.tables import scale_of

_BLUE, _GREY, _RED = "#2b6cb0", "#9aa5b1", "#c53030"


@contextmanager
def _figure(name: str, width: float, height: float) -> Iterator[tuple[Any, list[str]]]:
    """A figure of matplotlib, and a list that holds its SVG afterwards."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as cause:
        raise OptionError("the plots of --html need matplotlib: pip install 'rewriter[report]'") from cause
    settings: dict[Any, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False, "font.size": 9,
        "font.family": "sans-serif", "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": _GREY,
    }  # fmt: skip
    out: list[str] = []
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that the font which text is measured with does not have
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, out
        written = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(written, format="svg", metadata=nothing, transparent=True)
        out.append(_inline(written.getvalue(), name))


def _inline(svg: str, name: str) -> str:
    """What can stand in a page beside others: no namespaces, no style for the whole page, names of its own."""
    root = ElementTree.fromstring(svg.encode())
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for key, value in list(element.attrib.items()):
            short = key.rpartition("}")[2]
            value = f"{name}-{value}" if short == "id" else value.replace("url(#", f"url(#{name}-")
            value = f"#{name}-{value[1:]}" if short == "href" else value
            del element.attrib[key]
            element.set(short, value)
        for child in [c for c in element if c.tag.rpartition("}")[2] in ("style", "metadata")]:
            element.remove(child)
    root.set("stroke-linejoin", "round")
    root.set("role", "img")
    root.set("aria-label", name)
    return ElementTree.tostring(root, encoding="unicode")


def label(text: str, most: int = 44) -> str:
    """One line that XML can hold, cut in its middle."""
    line = "".join("\ufffd" if unicodedata.category(c)[0] == "C" else c for c in text)
    return line if len(line) <= most else f"{line[: most // 2]}\u2026{line[-most // 2 + 1 :]}"


def front(facts: Facts) -> str:
    """Cost against drop: predicted, measured, the chosen plan and the bound."""
    scale, unit = scale_of(max(p.cost for p in facts.front), facts.unit)
    with _figure("front", 9.2, 3.4) as (figure, out):
        axes = figure.subplots()
        for key, marker, colour in (("predicted", "o", _GREY), ("measured", "D", _BLUE)):
            points = [(p.cost * scale, getattr(p, key)) for p in facts.front if getattr(p, key) is not None]
            if points:
                face = "none" if key == "predicted" else colour
                axes.plot(*zip(*points, strict=True), marker, color=colour, mfc=face, ms=6, label=key)
                axes.plot(*zip(*points, strict=True), color=colour, lw=0.8, alpha=0.6)
        for point in facts.front:
            height = point.measured if point.measured is not None else point.predicted
            if point.chosen and height is not None:
                axes.plot(
                    [point.cost * scale], [height], "o", color=_RED, mfc="none", ms=13, mew=1.6, label="this plan"
                )
        bound = facts.search.get("bound")
        highest = max((v for p in facts.front for v in (p.predicted, p.measured) if v is not None), default=0.0)
        if bound is not None and bound <= 20 * highest:
            axes.axhline(bound, color=_RED, ls="--", lw=0.9, label="bound")
        axes.set_xlabel(f"cost of all sites together ({unit})")
        axes.set_ylabel(label(f"drop of {facts.search.get('metric', 'the metric')}"))
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return out[0]


def timeline(facts: Facts) -> str:
    """When the stages of the search ran: one row a stage."""
    rows: dict[str, list[tuple[float, float]]] = {}
    for stage in facts.timeline:
        rows.setdefault(stage.stage, []).append((stage.begin, stage.seconds))
    with _figure("timeline", 9.2, 0.9 + 0.27 * len(rows)) as (figure, out):
        axes = figure.subplots()
        until = max(begin + lasted for spans in rows.values() for begin, lasted in spans)
        for number, spans in enumerate(rows.values()):
            axes.broken_barh(spans, (number - 0.35, 0.7), color=_BLUE, lw=0)
            end, taken = max(b + s for b, s in spans), sum(s for _, s in spans)
            axes.text(end + until * 0.01, number, f"{taken:,.3g} s", va="center", fontsize=8, color="#4a5568")
        axes.set_yticks(range(len(rows)), [label(name) for name in rows])
        axes.set_xlim(0, until * 1.12 or 1.0)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("seconds since the search began")
        axes.grid(axis="x", alpha=0.25)
    return out[0]


def heat_map(facts: Facts) -> str:
    """Sites by candidates: how many times cheaper, and how far from what the original computes; chosen ones framed."""
    gains, errors = _grids(facts)
    paths = [label(facts.plan.place(d), 32) for d in facts.plan.decisions]
    names = [label(name, 32) for name in facts.columns]
    many = len(names)
    with _figure("heat-map", 2.4 + 2 * max(3.4, 0.62 * many), 1.9 + 0.27 * len(paths)) as (figure, out):
        left, right = figure.subplots(1, 2, sharey=True)
        widest = max((abs(v) for row in gains for v in row if v == v), default=1.0) or 1.0
        unit = "smaller" if facts.unit == "bytes" else "faster"
        _grid(
            left, [[0.5 + 0.3 * v / widest for v in row] for row in gains], "RdYlBu", f"times {unit} than the original"
        )
        highest = max((v for row in errors for v in row if v == v), default=1.0) or 1.0
        _grid(
            right, [[0.6 * v / highest for v in row] for row in errors], "YlOrRd", "relative error of the site's output"
        )
        for axes, grid, written in ((left, gains, _times), (right, errors, "{:.2g}".format)):
            axes.set_xticks(range(many), names, rotation=35, ha="right", rotation_mode="anchor", fontsize=8)
            axes.set_yticks(range(len(paths)), paths, fontsize=8)
            axes.tick_params(length=0)
            for i, row in enumerate(grid):
                for j, value in enumerate(row):
                    axes.text(
                        j, i, written(value) if value == value else "\u2013", ha="center", va="center", fontsize=8
                    )
        for i, decision in enumerate(facts.plan.decisions):
            for j, name in enumerate(facts.columns):
                if name in facts.chosen(decision):
                    for axes in (left, right):
                        box = (j - 0.45, i - 0.42)
                        axes.add_patch(_frame(box))
    return out[0]


def _frame(corner: tuple[float, float]) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(corner, 0.9, 0.84, fill=False, edgecolor="black", lw=1.6)


def _grids(facts: Facts) -> tuple[list[list[float]], list[list[float]]]:
    """(log2 of the gain, local error) of each site and candidate; NaN where it was not measured."""
    gains, errors = [], []
    for decision in facts.plan.decisions:
        tried = {called(t.variant, t.config): t for t in decision.tried}
        row = [(facts.gain(decision, tried[name]) if name in tried else None) for name in facts.columns]
        gains.append([math.log2(gain) if gain is not None else math.nan for gain in row])
        found = [tried[name].error if name in tried else None for name in facts.columns]
        errors.append([v if v is not None and math.isfinite(v) and abs(v) < 1e300 else math.nan for v in found])
    return gains, errors


def _times(power: float) -> str:
    return f"{2**power:.3g}x"


def _grid(axes: Any, values: Sequence[Sequence[float]], colours: str, title: str) -> None:
    import matplotlib
    import numpy as np

    table = np.ma.masked_invalid(np.array(values, dtype=float))
    edges = [np.arange(n + 1) - 0.5 for n in reversed(table.shape)]
    shades = matplotlib.colormaps[colours].with_extremes(bad="#edf2f7")
    axes.pcolormesh(*edges, table, cmap=shades, vmin=0.0, vmax=1.0, edgecolors="white", lw=1.0)
    axes.set_ylim(table.shape[0] - 0.5, -0.5)
    axes.set_title(title, fontsize=9)
    for spine in axes.spines.values():
        spine.set_visible(False)
