"""From a normaliser up to the product of queries and keys, and down to the product with the values.

Both ways the patterns say what each node is. The walks only find the way; what it means is read in `rewriter.reading`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from torch import fx

from rewriter.capture import source_line
from rewriter.nodes import depends_on_data, is_parameter
from rewriter.pattern import Contraction, Step, ask
from rewriter.site import Refusal

Way = tuple[tuple[fx.Node, Step], ...]
"""The elements passed, each with its node, in the order in which they are computed."""

_LONGEST = 48
"""No attention has more elements than this on one way."""


@dataclass(frozen=True)
class Product:
    """A product of two activations, and the way to it or from it."""

    node: fx.Node
    contraction: Contraction
    way: Way


@dataclass(frozen=True)
class Stop:
    """The best partial reading of a walk that ended without a product: why it ended, and the elements passed."""

    reason: str
    passed: tuple[str, ...] = ()
    outside: bool = False
    """Are the scores an input of this graph, so that nobody can say here whether they are those of an attention?"""

    @property
    def refusal(self) -> Refusal:
        """The reason, and what had been understood before."""
        understood = f", after {', '.join(self.passed)}" if self.passed else ""
        return Refusal(self.reason + understood)


class Walk:
    """The walks over one graph. What was found above a node is remembered: masks and biases are shared by layers."""

    def __init__(self) -> None:
        self._above: dict[fx.Node, Product | Stop] = {}

    def up(self, node: fx.Node, depth: int = 0) -> Product | Stop:
        """The product of queries and keys that these scores were made from."""
        if node not in self._above:
            if depth > _LONGEST:
                return Stop("the way to a product of queries and keys is too long")
            self._above[node] = self._up(node, depth)
        return self._above[node]

    def _up(self, node: fx.Node, depth: int) -> Product | Stop:
        contraction = product(node)
        if contraction is not None:
            return Product(node, contraction, ())
        steps = steps_at(node)
        if isinstance(steps, Refusal):
            return Stop(steps.reason)
        if node.op == "placeholder" and not is_parameter(node):
            return Stop("the scores are made before this graph, outside or before a break of it", outside=True)
        found: list[Product] = []
        stops = [Stop(f"the reading of the scores stopped at {described(node)}")]
        for step in steps:
            above = self.up(step.source, depth + 1)
            if isinstance(above, Stop):
                stops.append(Stop(above.reason, (step.name or step.kind, *above.passed), above.outside))
            else:
                found.append(Product(above.node, above.contraction, (*above.way, (node, step))))
        if found:
            # Of two products that are added, one is a bias: the one whose keys are made from positions.
            return min(found, key=lambda each: not _both_from_data(each.contraction))
        return max(stops, key=lambda stop: len(stop.passed))

    def down(self, weights: fx.Node) -> list[Product] | Stop:
        """The products of these weights with values, the nearest first."""
        found = sorted(_down(weights, (), set()), key=lambda each: len(each.way))
        if found:
            return found
        return Stop(f"the reading of the weights stopped at {described(_last(weights))}")


def product(node: fx.Node) -> Contraction | None:
    """The contraction of two activations at this node; a product with a parameter is a linear layer."""
    contraction: Contraction | None = ask("contraction", node)
    if contraction is None or is_parameter(contraction.left) or is_parameter(contraction.right):
        return None
    return contraction


def steps_at(node: fx.Node) -> Sequence[Step] | Refusal:
    """What this node can be, as an element."""
    answer: Step | Sequence[Step] | Refusal | None = ask("element", node)
    if answer is None:
        return ()
    return (answer,) if isinstance(answer, Step) else answer


def step_at(node: fx.Node) -> Step | None:
    """What this node is, where it can be one element only."""
    steps = steps_at(node)
    return steps[0] if not isinstance(steps, Refusal) and len(steps) == 1 else None


def is_linear_attention(node: fx.Node, outputs: Collection[fx.Node]) -> bool:
    """A product of three activations without a normaliser between (Katharopoulos et al. 2020, arXiv:2006.16236,
    equation 4). What comes out of an attention (`outputs`) is none of them.
    """
    contraction = product(node) if node.op == "call_function" else None
    if contraction is None or not _both_from_data(contraction):
        return False
    for side in (contraction.left, contraction.right):
        for _ in range(_LONGEST):
            inner = None if side in outputs else product(side)
            if inner is not None and _both_from_data(inner):
                return True
            steps = () if side in outputs else steps_at(side)
            if isinstance(steps, Refusal) or not steps or steps[0].kind not in ("view", "same", "scale", "mul", "div"):
                break
            side = steps[0].source
    return False


def _both_from_data(contraction: Contraction) -> bool:
    return depends_on_data(contraction.left) and depends_on_data(contraction.right)


def _down(node: fx.Node, way: Way, seen: set[fx.Node]) -> Iterator[Product]:
    if len(way) > _LONGEST:
        return
    for user in _users(node):
        # A product that is spelled as a multiplication and a sum is seen at the sum.
        for end in (user, *user.users):
            contraction = product(end)
            if contraction is not None and (contraction.left is node) != (contraction.right is node):
                if end not in seen:
                    seen.add(end)
                    yield Product(end, contraction, way)
                break
        else:
            if user in seen:
                continue
            seen.add(user)
            steps = steps_at(user)
            for step in () if isinstance(steps, Refusal) else steps:
                if step.source is node:
                    yield from _down(user, (*way, (user, step)), seen)
                    break


def _users(node: fx.Node) -> Iterator[fx.Node]:
    """What reads a tensor; the parts of a split each by itself."""
    for user in node.users:
        yield from user.users if isinstance(user.meta.get("val"), (list, tuple)) else (user,)


def _last(node: fx.Node) -> fx.Node:
    """The first node below that is no element."""
    for _ in range(_LONGEST):
        user = next(iter(node.users), None)
        if user is None or user.op == "output":
            return node
        steps = steps_at(user)
        if isinstance(steps, Refusal) or not any(step.source is node for step in steps):
            return user
        node = user
    return node


def described(node: fx.Node) -> str:
    """The operator and the line of the model's code."""
    where = source_line(node)
    return f"{node.target}" + (f" ({where})" if where else "")
