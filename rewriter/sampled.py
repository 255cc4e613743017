"""An attention to places in maps as a match: its axes by their roles, its region, and the operator in its place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from rewriter.axes import Axis, Placed, as_captured, refined
from rewriter.canonical import Emit, SizeOf, gathered, run, scattered, sizes_from
from rewriter.capture import Graph
from rewriter.lower import lay_out, memory_order, needs_strides
from rewriter.nodes import value_of
from rewriter.raising import Value, emitter
from rewriter.region import Region, Sizes, hint, proof_dtype, whole
from rewriter.sampling import sampled
from rewriter.site import AttentionSite
from rewriter.variant import Implementation

_ATEN = torch.ops.aten


class Samples(NamedTuple):
    """The arguments of the operator."""

    maps: list[Any]
    grids: list[Any]
    weights: Any

    @property
    def given(self) -> tuple[Any, ...]:
        """As an implementation is called."""
        return tuple(self)


@dataclass(frozen=True)
class Level:
    """One map, where it is read, and the axes that only they have. Of a tensor that holds all maps it is a `part`:
    along that axis, from that pixel on.
    """

    map: Placed
    grid: Placed
    height: Axis
    width: Axis
    points: Axis
    xy: Axis
    part: tuple[int, int] | None = None

    def pixels(self, emit: Emit, value: Value) -> Any:
        """The map's own tensor, whose axes `map` tells."""
        whole = value(self.map.node)
        if self.part is None:
            return whole
        axis, start = self.part
        length = math.prod(atom.size for atom in self.map.layout[axis] if isinstance(atom.size, int))
        return emit(_ATEN.slice.Tensor, whole, axis, start, start + length)


@dataclass
class SampledMatch:
    """One such attention in one graph. Beside those of the levels, the axes are those of (B, H, Q, points, D)."""

    site: AttentionSite
    levels: list[Level]
    weights: Placed
    result: Placed
    batch: Axis
    heads: Axis
    queries: Axis
    points: Axis
    channels: Axis

    @property
    def output(self) -> fx.Node:
        """The node whose value it computes."""
        return self.result.node

    @property
    def tensors(self) -> list[Placed]:
        """Maps, places and weights."""
        return [*(each.map for each in self.levels), *(each.grid for each in self.levels), self.weights]

    @property
    def inputs(self) -> list[fx.Node]:
        """The nodes at its border, each once."""
        return list(dict.fromkeys(placed.node for placed in self.tensors))

    def sizes(self, emit: Emit, value: Value, replaced: Mapping[int, int] | None = None) -> SizeOf:
        """How long each atom is in this call."""
        maps = [(each.map, each.pixels(emit, value)) for each in self.levels]
        rest = [(each, value(each.node)) for each in self.tensors[len(maps) :]]
        return sizes_from(emit, [*maps, *rest], replaced)

    def samples(self, emit: Emit, value: Value, size: SizeOf) -> Samples:
        """The operator's arguments from the values of the inputs."""

        def gather(placed: Placed, tensor: Any, *rest: Axis) -> Any:
            groups = [refined(axis) for axis in (self.batch, self.heads, *rest)]
            return gathered(emit, tensor, placed.layout, groups, size, (True,) * len(groups))

        return Samples(
            [
                gather(each.map, each.pixels(emit, value), each.height, each.width, self.channels)
                for each in self.levels
            ],
            [gather(each.grid, value(each.grid.node), self.queries, each.points, each.xy) for each in self.levels],
            gather(self.weights, value(self.weights.node), self.queries, self.points),
        )

    def scattered(self, emit: Emit, out: Any, size: SizeOf) -> Any:
        """The operator's result in the shape that the rest of the graph expects."""
        groups = [refined(axis) for axis in (self.batch, self.heads, self.queries, self.channels)]
        return scattered(emit, out, groups, self.result.layout, size)


class SampledRegion(Region):
    """The original code of such an attention, as something that runs by itself."""

    match: SampledMatch  # type: ignore[assignment]

    @property
    def lengths(self) -> tuple[int, int]:
        """Queries, and pixels of all maps."""
        areas = [self._count(each.height) * self._count(each.width) for each in self.match.levels]
        return self._count(self.match.queries), sum(areas)

    @property
    def trials(self) -> dict[str, dict[str, Any]]:
        """Within the maps and beyond their borders."""
        return {"random": {}, "far": {"magnitude": 3.0}}

    @property
    def scores(self) -> int:
        """Numbers that are sampled: they take the place of scores."""
        match = self.match
        axes = (match.batch, match.heads, match.queries, match.points, match.channels)
        return math.prod(map(self._count, axes))

    @property
    def batch(self) -> int:
        """B as captured."""
        return self._count(self.match.batch)

    def resized(self, q_len: int, kv_len: int) -> Sizes:
        """Another number of queries, where it is no other number's too; the maps stay as large as they are."""
        own, queries = self._count(self.match.queries), refined(self.match.queries)
        inner = [atom for each in self.match.tensors for atom in each.atoms if atom not in queries]
        others = {as_captured(atom.size, self.match.inputs) for atom in inner} | {0, 1, self.match.site.heads}
        return {} if len(queries) != 1 or {own, q_len} & others else {own: q_len}

    def values(
        self, sizes: Sizes | None = None, *, proof: bool = False, magnitude: float = 1.0, seed: int = 0, **_: Any
    ) -> dict[fx.Node, Tensor]:
        """Random values of the inputs; of places, some lie outside."""
        generator = torch.Generator().manual_seed(seed)
        grids = {each.grid.node for each in self.match.levels}
        values: dict[fx.Node, Tensor] = {}
        for node in self.match.inputs:
            fake = value_of(node)
            shape = [(sizes or {}).get(hint(n), hint(n)) for n in fake.shape]
            made = torch.rand(shape, generator=generator) * 2.4 - 1.2 if node in grids else None
            made = torch.randn(shape, generator=generator) if made is None else made * magnitude
            values[node] = made.to(fake.device, proof_dtype(fake.dtype) if proof else fake.dtype)
        return values

    def operands(self, values: Mapping[fx.Node, Tensor], sizes: Sizes | None = None, **_: Any) -> Samples:  # type: ignore[override]
        """The operator's arguments from the values of the inputs."""
        return self.match.samples(run, values.__getitem__, self.size(values, sizes))

    def canonical(self, values: Mapping[fx.Node, Tensor], sizes: Sizes) -> Tensor:
        """What the operator makes of these inputs, in the shape of the original's output."""
        out = sampled(*self.operands(values, sizes).given)
        made: Tensor = self.match.scattered(run, out, self.size(values, sizes))
        return made

    def _reading(self, names: Mapping[fx.Node, str]) -> str:
        """What the operator is called with."""
        atoms: dict[Any, str] = {}
        match = self.match
        axes = [axis for each in match.levels for axis in (each.height, each.width, each.points, each.xy)]
        axes += [match.batch, match.heads, match.queries, match.points, match.channels, *match.result.layout]
        text = [[atoms.setdefault(atom, f"a{len(atoms)}") for atom in refined(axis)] for axis in axes]
        placed = [(names[each.node], [[atoms[a] for a in axis] for axis in each.layout]) for each in match.tensors]
        return f"{text} {placed} {[each.part for each in match.levels]}"


@whole.register
def _(match: SampledMatch) -> SampledRegion:
    return SampledRegion(match)  # type: ignore[arg-type]


class Sampled(nn.Module):
    """An implementation where it stands in the graph."""

    def __init__(self, implementation: Implementation, site: AttentionSite) -> None:
        super().__init__()
        self.implementation: Any = implementation
        self.site = site

    def forward(self, maps: list[Tensor], grids: list[Tensor], weights: Tensor) -> Tensor:
        """(B, H, Q, D)."""
        out: Tensor = self.implementation(maps, grids, weights)
        return out

    def extra_repr(self) -> str:
        """The site, for printed graphs."""
        return str(self.site)


def place(gm: Graph, matches: list[SampledMatch], chosen: Mapping[str, Implementation | None]) -> None:
    """Put what was chosen in the place of each match. The original nodes stay, unused, until dead code is removed."""
    emit = emitter(gm)
    for number, match in enumerate(matches):
        implementation = chosen[match.site.path]
        assert implementation is not None
        name = f"sampled_{number}"
        gm.add_submodule(name, Sampled(implementation, match.site))
        with gm.graph.inserting_before(match.output):
            size = match.sizes(emit, lambda node: node)
            given = match.samples(emit, lambda node: node, size)
            call = gm.graph.call_module(name, given.given)
            level, (batch, heads, queries, _) = value_of(given.maps[0]), value_of(given.weights).shape
            call.meta = {k: v for k, v in match.output.meta.items() if k in ("stack_trace", "nn_module_stack")}
            call.meta["val"] = level.new_empty(batch, queries, heads, level.shape[4]).transpose(1, 2)
            result = match.scattered(emit, call, size)
        match.output.replace_all_uses_with(result)
        if needs_strides(result):
            lay_out(gm, result, memory_order(match.output))
