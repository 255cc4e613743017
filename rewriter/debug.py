"""One ladder, `REWRITER_DEBUG=1..4`, on stderr: decisions; refusals and timings; graphs by pass; generated source."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rewriter.capture import Graph
    from rewriter.detect import Detection


def level() -> int:
    """The rung, read at every use so that a test or a notebook can change it."""
    text = os.environ.get("REWRITER_DEBUG", "0")
    return int(text) if text.isdigit() else 0


def say(rung: int, text: str) -> None:
    """Print from this rung on."""
    if level() >= rung:
        print(f"rewriter: {text}", file=sys.stderr)


def sites(detection: Detection) -> None:
    """What was found in a graph, and what was refused."""
    for site in detection.sites:
        say(1, str(site))
    for refusal in detection.refusals:
        say(2, f"refused: {refusal}")


def graph(name: str, gm: Graph) -> None:
    """A graph after a pass."""
    if level() >= 3:
        say(3, f"after {name}:\n{gm.print_readable(print_output=False)}")
