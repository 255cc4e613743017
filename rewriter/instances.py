"""Whose graph is it? Behind a graph break dynamo runs one graph for all equal layers and hands it their parameters, and
one forward has several graphs.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
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


@dataclass
class Frames:
    """Numbers the attentions of a module over all of its graphs, as if they were one: what a resumed forward finds
    comes after what was found before the break, and a graph for other sizes finds the same again.
    """

    _first: dict[str, dict[str, int]] = field(default_factory=dict)
    _count: dict[str, int] = field(default_factory=dict)

    def number(self, graph: Graph, detection: Detection) -> None:
        """Give the sites of one graph their numbers."""
        frame = _frame(graph)
        found: list[Match | SampledMatch] = [*detection.matches, *detection.kept, *detection.sampled]
        for match in found:
            base, _, number = match.site.path.partition("#")
            first = self._first.setdefault(base, {}).setdefault(frame, self._count.get(base, 0))
            own = first + int(number or 0)
            self._count[base] = max(self._count.get(base, 0), own + 1)
            match.site = dataclasses.replace(match.site, path=f"{base}#{own}" if own else base)


def _frame(graph: Graph) -> str:
    """The function that a graph begins in, as dynamo names it: a resumed one has a name of its own."""
    traces = (str(node.meta.get("stack_trace") or "") for node in graph.graph.nodes)
    found = (re.search(r'File "([^"]+)", line \d+, in (\w+)', trace) for trace in traces)
    return next((":".join(match.groups()) for match in found if match), "")
