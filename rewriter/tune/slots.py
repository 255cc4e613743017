"""Graphs whose sites can be switched between implementations, without capturing the model again.

Each match becomes a call of a `Slot`, which holds the original code and whatever stands in for it at the moment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from rewriter.backend import GraphRewriter
from rewriter.canonical import SizeOf, run
from rewriter.capture import Graph
from rewriter.checkpointed import outlined, runnable
from rewriter.instances import Inputs, Names, Run
from rewriter.lower import clean
from rewriter.raising import Match, Operands, Raised, raise_sites
from rewriter.region import Region
from rewriter.select import fits
from rewriter.site import AttentionSite
from rewriter.variant import Implementation

Observer = Callable[[AttentionSite, Operands, Tensor], None]
"""Sees a site, its canonical operands and the output of its original code, as (B, H, Sq, Dv)."""


Probe = Callable[[str, Tensor, Callable[[Tensor], Tensor]], Tensor]
"""Takes a path and what the site gives to the graph, and gives what goes on in its place; the function brings a tensor
of that form into (B, H, Sq, Dv).
"""


class Slot(nn.Module):
    """One attention that can be switched: `switches.active[path]` computes it, or else its original code."""

    def __init__(self, region: Region, switches: Switches) -> None:
        super().__init__()
        self.original = region.module(live=True)
        self.region = region
        self.match: Match = region.match
        self.switches = switches

    def forward(self, *arguments: Any) -> Tensor:
        """The canonical operands, and the inputs of the original code; the output in the form of the graph."""
        operands, inputs = Operands(*arguments[:6]), arguments[6:]
        site = self.match.site
        self.switches.see(site.path, operands.key.shape[2])
        implementation = self.switches.active.get(site.path)
        size = self._size(inputs)
        if implementation is not None and fits(site, self.switches.keys[site.path]):
            made: Tensor = self.match.result(run, implementation(*operands.given), size)
            out = made.contiguous()
        else:
            out = self.original(*inputs)
            if self.switches.observer is not None:
                self.switches.observer(site, operands, self.match.canonical_output(out, size))
        if self.switches.probe is not None:
            out = self.switches.probe(site.path, out, lambda value: self.match.canonical_output(value, size))
        return out

    def _size(self, inputs: Sequence[Any]) -> SizeOf:
        values = dict(zip(self.match.inputs, inputs, strict=False))  # sizes from outside follow
        return self.region.size(values)


@dataclass
class Switches:
    """What the slots of one model do now. `keys` are the sites' keys, by path, that `active` was made for; `lengths`
    the fewest and the most keys of the calls so far.
    """

    active: dict[str, Implementation] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    lengths: dict[str, tuple[int, int]] = field(default_factory=dict)
    observer: Observer | None = None
    probe: Probe | None = None

    def see(self, path: str, keys: int) -> None:
        """A call of so many keys."""
        least, most = self.lengths.get(path, (keys, keys))
        self.lengths[path] = min(least, keys), max(most, keys)


@dataclass(repr=False)
class SlotRewriter(GraphRewriter):
    """The backend that puts slots into every graph. `regions` holds the largest region seen at each path."""

    switches: Switches = field(default_factory=Switches)
    regions: dict[str, Region] = field(default_factory=dict)

    def made(self, gm: Graph, inputs: Inputs, names: Names) -> Run:
        """The graph with a slot at each site."""
        work = self.look(gm, inputs, names)
        if work is None:
            return runnable(gm).forward
        # Before the graph is changed: a slot keeps the code as it was.
        slots = [Slot(Region(match), self.switches) for match in work.detection.matches]
        for region in (slot.region for slot in slots):
            path = region.match.site.path
            known = self.regions.get(path)
            if known is None or _scores(region) > _scores(known):
                self.regions[path] = region
                self.switches.keys[path] = region.match.site.key()
                self.sites[path] = region.match.site
        raised = raise_sites(work.graph, work.detection.matches)
        _place(work.graph, raised, slots)
        outlined(work.graph)
        return runnable(clean(work.graph)).forward


def _scores(region: Region) -> int:
    q_len, kv_len = region.lengths
    return q_len * kv_len * region.batch


def _place(gm: Graph, raised: list[Raised], slots: list[Slot]) -> None:
    outputs: dict[fx.Node, fx.Node] = {}
    for number, (place, slot) in enumerate(zip(raised, slots, strict=True)):
        name = f"slot_{number}"
        gm.add_submodule(name, slot)
        inputs = [outputs.get(node, node) for node in (*place.match.inputs, *slot.region.sizes)]
        with gm.graph.inserting_before(place.call):
            node = gm.graph.call_module(name, (*place.operands, *inputs))
        node.meta = dict(place.match.output.meta)
        place.result.replace_all_uses_with(node)
        outputs[place.match.output] = node


def detached(operands: Operands) -> Operands:
    """Copies that outlive the call."""
    return Operands(*(t.detach().clone() if isinstance(t, torch.Tensor) else None for t in operands))
