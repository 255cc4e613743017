"""Find every attention in a graph by meaning: anchors, the walk, the facts.

From a normaliser the walk goes up through scale, mask and casts to the product of queries and keys, and down through
casts and dropout to the product with the values; calls that are an attention already are read from their arguments.
What it meets and does not understand is a refusal. What it understood is proved (`rewriter.proof`) before it counts;
what it understood, and the canonical operator cannot say, is recognised and kept as it is.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from rewriter.capture import Graph, frame_path, site_path, source_line
from rewriter.description import Describer
from rewriter.facts import Reading
from rewriter.nodes import comes_from_product, is_parameter, mark_data
from rewriter.operands import is_changed
from rewriter.pattern import Call, Normaliser, ask
from rewriter.proof import Proof
from rewriter.raising import ChangedInPlace, Match
from rewriter.reading import read_call, read_ways
from rewriter.sampled import SampledMatch
from rewriter.sampled_reading import read_samples
from rewriter.site import AttentionSite, Refusal
from rewriter.tokens import place_tokens
from rewriter.walk import Product, Stop, Walk, is_linear_attention


@dataclass
class Detection:
    """What one graph holds: `matches` can be rewritten, `kept` are recognised and left as they are; `sampled` are those
    without scores, to places in maps.
    """

    matches: list[Match] = field(default_factory=list)
    kept: list[Match] = field(default_factory=list)
    sampled: list[SampledMatch] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)

    @property
    def sites(self) -> list[AttentionSite]:
        """The sites with scores, in the order of the graph."""
        every = sorted(self.matches + self.kept, key=_place)
        return [match.site for match in every]


def _place(match: Match | SampledMatch) -> Any:
    return match.output


def detect(gm: Graph, names: Mapping[str, str] | None = None, *, observe: bool = True) -> Detection:
    """Every attention in a pre-dispatch graph, and what looked like one and was not taken. The graph is not changed.

    `names` maps str(id(module)) to the module's qualified name (see `capture.module_names`). With `observe`, facts that
    hold for the values at hand are used where a sentinel can ask for them again.
    """
    found, detector = Detection(), _Detector(observe)
    frame = frame_path(gm, names or {})
    mark_data(gm.graph)
    taken: dict[tuple[fx.Node, fx.Node | None], Match] = {}
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        read: Reading | SampledMatch | Refusal | None = detector.read(node)
        read = read_samples(node) if read is None else read
        if read is None:
            continue
        path = site_path(node, names or {}, frame)
        match = detector.match(read, path) if isinstance(read, Reading) else detector.proved(read, path)
        if isinstance(match, SampledMatch):
            found.sampled.append(match)
        elif isinstance(match, Match) and (match.output, match.reading.weights) not in taken:
            if (part := taken.pop((match.output, match.reading.inner), None)) is not None:
                found.kept.remove(part)  # more was done to its weights, and so it is none of the matches
            taken[match.output, match.reading.weights] = match
            detector.outputs.add(match.output)
            (found.kept if match.site.edits else found.matches).append(match)
        elif isinstance(match, Refusal):
            found.refusals.append(dataclasses.replace(match, path=path, source=source_line(node)))
    outputs = {match.output for match in taken.values()}
    for node in gm.graph.nodes:
        if node not in outputs and is_linear_attention(node, outputs):
            path = site_path(node, names or {}, frame)
            reason = "queries times (keys times values), which is linear attention already"
            found.refusals.append(Refusal(reason, path=path, source=source_line(node)))
    _number_repeated_paths(sorted([*taken.values(), *found.sampled], key=_place))
    place_tokens(gm.graph, taken.values())
    return found


def _number_repeated_paths(matches: Sequence[Match | SampledMatch]) -> None:
    """One module may hold several attentions: the second at a path is called path#1."""
    seen: dict[str, int] = {}
    for match in matches:
        path = match.site.path
        count = seen.get(path, 0)
        seen[path] = count + 1
        if count:
            match.site = dataclasses.replace(match.site, path=f"{path}#{count}")


class _Detector:
    """What is remembered while one graph is read."""

    def __init__(self, observe: bool) -> None:
        self.walk, self.proof, self.describer = Walk(), Proof(), Describer(observe)
        self.outputs: set[fx.Node] = set()
        """Of what is known to be an attention so far."""

    def read(self, node: fx.Node) -> Reading | Refusal | None:
        """The attention at this node; None where nothing is like attention."""
        call: Call | Refusal | None = ask("call", node)
        if call is not None:
            return call if isinstance(call, Refusal) else read_call(node, call)
        normaliser: Normaliser | None = ask("normaliser", node)
        if normaliser is None:
            return None
        # A router or a classifier: its scores come from a linear layer, and it is none of our business.
        up = self.walk.up(normaliser.scores)
        if isinstance(up, Stop) and (normaliser.kind != "softmax" or not comes_from_product(normaliser.scores)):
            if normaliser.kind != "softmax" or not _meets_values(node):
                return None
            if is_changed(normaliser.scores):
                return Refusal("the scores are written in place, piece by piece")
            return up.refusal if up.outside and _AS_SCORES.intersection(up.passed) else None
        if normaliser.kind != "softmax" and isinstance(up, Product) and up.node in self.outputs:
            return None  # What an attention gives goes through an activation as all layers do.
        down = self.walk.down(node)
        if isinstance(down, Stop):
            return down.refusal if normaliser.kind == "softmax" and _meets_values(node) else None
        if isinstance(up, Stop):
            return up.refusal
        refusal: Refusal | None = None
        for each in down:
            read = read_ways(node, normaliser, up, each)
            if isinstance(read, Reading):
                return read
            refusal = refusal or read
        return refusal if normaliser.kind == "softmax" else None

    def match(self, reading: Reading, path: str) -> Match | Refusal:
        """The site with its facts, proved."""
        match = self.describer.match(reading, path)
        if isinstance(match, Refusal) or match.site.edits:
            return match
        try:
            refusal = self.proof.check(match)
        except ChangedInPlace:
            return _kept(match, ["changed_in_place"])
        if refusal is None:
            return match
        if reading.doubts:
            return _kept(match, reading.doubts)
        return refusal

    def proved(self, read: SampledMatch | Refusal, path: str) -> SampledMatch | Refusal:
        """What was read of an attention to places, where it computes that."""
        if isinstance(read, Refusal):
            return read
        read.site = dataclasses.replace(read.site, path=path)
        try:
            refusal = self.proof.check(read)
        except ChangedInPlace as reason:
            return Refusal(str(reason))
        return read if refusal is None else refusal


def _kept(match: Match, edits: list[str]) -> Match:
    site = dataclasses.replace(match.site, edits=(*match.site.edits, *edits))
    return dataclasses.replace(match, site=site)


_AS_SCORES = {"scale", "shift", "mul", "div", "add", "keep", "drop", "cap"}
"""What is done to scores, and to little else, on the way to a softmax."""
_FEW = 12
"""Steps from weights to their product with the values: padding, casts, dropout, and views into windows and back."""


def _meets_values(weights: fx.Node) -> bool:
    """Do these weights reach a product within a few steps? Otherwise they are a classifier's or a router's."""
    todo, seen = deque([(weights, 0)]), {weights}
    while todo:
        node, depth = todo.popleft()
        for user in node.users.keys() - seen:
            seen.add(user)
            contraction = ask("contraction", user) if user.op != "output" else None
            if contraction is not None and not is_parameter(contraction.left) and not is_parameter(contraction.right):
                return True
            if contraction is None and depth < _FEW:
                todo.append((user, depth + 1))
    return False
