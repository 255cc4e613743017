"""Whose graph is it? Behind a graph break dynamo runs one graph for all equal layers and hands it their parameters, and
one forward has several graphs.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn
from torch._guards import TracingContext, tracing
from torch.utils.weak import WeakIdKeyDictionary

from rewriter.capture import Fakes, Graph, module_names
from rewriter.detect import Detection
from rewriter.raising import Match
from rewriter.sampled import SampledMatch

Run = Callable[..., Any]


@dataclass(frozen=True)
class Names:
    """What the modules and the parameters of a model are called. Holds neither.

    modules  str(id(module)) -> qualified name: the keys that dynamo leaves in `nn_module_stack`
    """

    modules: Mapping[str, str] = field(default_factory=dict)
    parameters: Mapping[Tensor, str] = field(default_factory=WeakIdKeyDictionary)

    @staticmethod
    def of(model: nn.Module) -> Names:
        """Of this model."""
        return Names(module_names(model), WeakIdKeyDictionary({each: name for name, each in model.named_parameters()}))

    def moved(self, parameter: str, to: str) -> Names:
        """The names for a graph that was captured with one parameter and is called with another: those of the module
        around the first are those of the module around the second.
        """
        ours, others = parameter.split("."), to.split(".")
        while ours and others and ours[-1] == others[-1]:
            ours.pop()
            others.pop()
        old, new = ".".join(ours), ".".join(others)

        def renamed(name: str) -> str:
            inside = name == old or name.startswith(f"{old}.")
            return (new + name.removeprefix(old)).removeprefix(".") if inside else name

        return Names({key: renamed(name) for key, name in self.modules.items()}, self.parameters)


@dataclass(frozen=True)
class Inputs:
    """Of a graph, for one instance.

    values  what it is called with: the parameters and buffers are the instance's own
    moved   was the graph captured for another instance?
    """

    values: Sequence[Any]
    fakes: Fakes
    moved: bool = False

    @property
    def to_compile(self) -> Sequence[Any]:
        """For another compiler: of a graph that is called already, the values have lost their symbolic sizes."""
        return self.fakes.values if self.moved else self.values


def served(gm: Graph, example_inputs: Sequence[Any], names: Names, make: Callable[[Graph, Inputs, Names], Run]) -> Run:
    """What dynamo is to call for a graph: for each instance of the module that it is of, what is made for it."""
    inputs, place = Inputs(example_inputs, Fakes.of(example_inputs)), _telling(example_inputs, names)
    first = make(gm, inputs, names)
    if place is None:
        return first
    name, fakes = names.parameters[example_inputs[place]], inputs.fakes  # the values would keep the model alive
    runs = {name: first}

    def run(*args: Any) -> Any:
        own = names.parameters.get(args[place], name)
        if own not in runs:
            with tracing(TracingContext(fakes.mode)):
                runs[own] = make(gm, Inputs(args, fakes, moved=True), names.moved(name, own))
        return runs[own](*args)

    return run


def _telling(example_inputs: Sequence[Any], names: Names) -> int | None:
    """The place of a parameter that tells an instance from another."""
    found = (n for n, each in enumerate(example_inputs) if isinstance(each, nn.Parameter) and each in names.parameters)
    return next(found, None)


_CALL = re.compile(r'File "([^"]+)", line (\d+), in (\w+)')
Line = tuple[str, str]


@dataclass
class Frames:
    """Numbers the attentions of a module over all of its graphs, as if they were one: what a resumed forward finds
    comes after what was found before the break, and a graph for other sizes, or one that begins elsewhere, finds the
    same again.
    """

    _first: dict[tuple[str, str], int] = field(default_factory=dict)
    _known: dict[str, dict[int, Sequence[Line]]] = field(default_factory=dict)

    def number(self, graph: Graph, detection: Detection) -> None:
        """Give the sites of one graph their numbers."""
        frame = _frame(graph)
        found: list[Match | SampledMatch] = [*detection.matches, *detection.kept, *detection.sampled]
        for match in found:
            base, _, place = match.site.path.partition("#")
            known, lines = self._known.setdefault(base, {}), _lines(match.output)
            if (base, frame) not in self._first:
                same = next((own for own, other in known.items() if _same(lines, other)), None)
                new = max(known, default=-1) + 1
                self._first[base, frame] = new if same is None else max(same - int(place or 0), 0)
            own = self._first[base, frame] + int(place or 0)
            known.setdefault(own, lines)
            match.site = dataclasses.replace(match.site, path=f"{base}#{own}" if own else base)


def _frame(graph: Graph) -> str:
    """The function that a graph begins in, as dynamo names it: a resumed one has a name of its own."""
    found = (_CALL.search(node.meta.get("stack_trace") or "") for node in graph.graph.nodes)
    return next((f"{match[1]}:{match[3]}" for match in found if match), "")


def _lines(node: fx.Node) -> list[Line]:
    """(file, line) of the calls that made a node, the innermost last."""
    return [(match[1], match[2]) for match in _CALL.finditer(node.meta.get("stack_trace") or "")]


def _same(one: Sequence[Line], other: Sequence[Line]) -> bool:
    """Is it one place in the code? A graph that begins further in knows less of the way there."""
    least = min(len(one), len(other))
    return least > 0 and [*one[-least:]] == [*other[-least:]]
