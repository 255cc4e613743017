"""The pipeline: named functions that a graph goes through, each printed on request."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rewriter import debug
from rewriter.capture import Fakes, Graph, to_aten
from rewriter.checkpointed import outlined
from rewriter.detect import Detection, detect
from rewriter.lower import lower
from rewriter.raising import raise_sites
from rewriter.sampled import place
from rewriter.variant import Implementation

Choose = Callable[[Any], Implementation | None]
"""What to place at a match, a `Match` or a `SampledMatch`; None leaves the original."""


@dataclass
class Rewrite:
    """One graph on its way. `seconds` holds how long each pass took."""

    graph: Graph
    names: Mapping[str, str]
    detection: Detection = field(default_factory=Detection)
    seconds: dict[str, float] = field(default_factory=dict)

    def step(self, name: str, function: Callable[[], Any]) -> Any:
        """Run one named pass."""
        start = time.perf_counter()
        result = function()
        self.seconds[name] = time.perf_counter() - start
        debug.graph(name, self.graph)
        return result


def captured(
    gm: Graph,
    example_inputs: Sequence[Any],
    names: Mapping[str, str],
    fakes: Fakes | None = None,
    *,
    observe: bool = True,
) -> Rewrite:
    """Capture and detect: the graph in ATen, with its sites known and nothing changed. See `to_aten` for `fakes`, and
    `detect` for `observe`.
    """
    work = Rewrite(gm, names)
    work.graph = work.step("capture", lambda: to_aten(gm, example_inputs, fakes))
    work.detection = work.step("detect", lambda: detect(work.graph, names, observe=observe))
    debug.sites(work.detection)
    return work


def rewritten(work: Rewrite, choose: Choose) -> Graph | None:
    """Raise, select and lower: the graph with the chosen implementations; None where every site stays as it is."""
    matches, sampled = work.detection.matches, work.detection.sampled
    chosen = {each.site.path: choose(each) for part in (matches, sampled) for each in part}
    taken = [match for match in matches if chosen[match.site.path] is not None]
    places = [match for match in sampled if chosen[match.site.path] is not None]
    if not taken and not places:
        return None
    work.step("place", lambda: place(work.graph, places, chosen))
    raised = work.step("raise", lambda: raise_sites(work.graph, taken))
    graph: Graph = work.step("lower", lambda: lower(work.graph, raised, chosen))
    outlined(graph)
    return graph
