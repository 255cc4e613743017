"""The fastest plan within a budget of error, as a mixed-integer program over what was measured.

For each site either one choice stands for the whole of it (its original code, a learned variant), or each group of
heads has one of the columns:

    minimise    sum_s [ whole_s,w z_s,w + sum_g,c cost_s,c / groups_s x_s,g,c + split_s (sum_c y_s,c - 1) ]
    subject to  sum_w z_s,w + sum_c x_s,g,c = 1 for each group g,    x_s,g,c <= y_s,c <= 1 - sum_w z_s,w
                sum of the effects of all that is chosen <= budget

`split_s` is what each further implementation at a site costs. For memory the largest site counts instead of the sum.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

_GAP = 1e-3
"""Plans closer to the best than this cannot be told apart by their measured times."""
_MOST_NODES = 2000
"""Where the solver ends with the best that it has. Not a time: one machine's plan is the same on its next run."""


@dataclass(frozen=True)
class Column:
    """One candidate at a site: its cost for all heads, and its effect by group of heads."""

    cost: float
    effects: Sequence[float]


@dataclass(frozen=True)
class Table:
    """What can stand at one site: `whole` choices, or `columns` by group of heads."""

    whole: Sequence[Column]
    columns: Sequence[Column] = ()
    groups: int = 1
    split: float = 0.0


@dataclass(frozen=True)
class Choice:
    """What stands at a site: the number of a whole choice, or the number of a column for each group of heads."""

    whole: int | None
    columns: tuple[int, ...] = ()


Solution = tuple[Choice, ...]


@dataclass
class _Program:
    """Variables and constraints of one program, as they are added."""

    objective: list[float] = field(default_factory=list)
    effects: list[float] = field(default_factory=list)
    rows: list[dict[int, float]] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)

    def variable(self, cost: float, effect: float = 0.0) -> int:
        self.objective.append(cost)
        self.effects.append(effect)
        return len(self.objective) - 1

    def constrain(self, row: dict[int, float], low: float, high: float) -> None:
        self.rows.append(row)
        self.low.append(low)
        self.high.append(high)


def solve(tables: Sequence[Table], budget: float, *, largest: bool = False) -> Solution:
    """The cheapest choice at every site whose effects are together within the budget.

    `largest`: the cost of the largest site counts, not the sum. Every table needs a whole choice or a column without
    effect, which is taken where the program has no better answer.
    """
    if not tables:
        return ()
    program = _Program()
    # The scale of costs is the machine's: the solver's tolerances are absolute.
    unit = max(max(c.cost for c in (*t.whole, *t.columns)) for t in tables) or 1.0
    top = program.variable(1.0) if largest else None
    weight = 1e-6 if largest else 1.0
    places: list[tuple[list[int], list[list[int]]]] = []
    for table in tables:
        costs: dict[int, float] = {}
        wholes = [_add(program, costs, c.cost / unit, sum(c.effects), weight) for c in table.whole]
        cells = [
            [
                _add(program, costs, c.cost / unit / table.groups, c.effects[group], weight)
                for c in table.columns
            ]
            for group in range(table.groups)
        ] if table.columns else []  # fmt: skip
        for cell in cells or [[]]:
            program.constrain(dict.fromkeys((*wholes, *cell), 1.0), 1.0, 1.0)
        shift = table.split / unit if cells and table.groups > 1 else 0.0
        if shift:
            _count_splits(program, costs, wholes, cells, shift, weight)
        if top is not None:
            program.constrain({**{v: -c for v, c in costs.items()}, top: 1.0}, -shift, np.inf)
        places.append((wholes, cells))
    scale = max(max(program.effects), budget) or 1.0
    program.constrain({v: e / scale for v, e in enumerate(program.effects) if e}, -np.inf, budget / scale)
    answer = _answer(program, top)
    if answer is None:
        return tuple(_safest(table) for table in tables)
    return tuple(_read(answer, *place) for place in places)


def _add(program: _Program, costs: dict[int, float], cost: float, effect: float, weight: float) -> int:
    number = program.variable(weight * cost, effect)
    costs[number] = cost
    return number


def _count_splits(
    program: _Program, costs: dict[int, float], wholes: list[int], cells: list[list[int]], split: float, weight: float
) -> None:
    """y_c: does column c stand at the site? Each beyond the first costs `split`."""
    used = [_add(program, costs, split, 0.0, weight) for _ in cells[0]]
    for cell in cells:
        for x, y in zip(cell, used, strict=True):
            program.constrain({x: 1.0, y: -1.0}, -np.inf, 0.0)
    # The first is free: all costs of the site are then too high by one `split`, those of whole choices too.
    for z in wholes:
        program.objective[z] += weight * split
        costs[z] += split


def _answer(program: _Program, top: int | None) -> np.ndarray | None:
    count = len(program.objective)
    rows, columns, values = [], [], []
    for number, row in enumerate(program.rows):
        for variable, value in row.items():
            rows.append(number)
            columns.append(variable)
            values.append(value)
    matrix = coo_array((values, (rows, columns)), shape=(len(program.rows), count))
    integral, upper = np.ones(count), np.ones(count)
    if top is not None:
        integral[top], upper[top] = 0, np.inf
    with _silenced():
        result = milp(
            np.array(program.objective),
            integrality=integral,
            bounds=Bounds(np.zeros(count), upper),
            constraints=LinearConstraint(matrix.tocsr(), program.low, program.high),
            options={"mip_rel_gap": _GAP, "node_limit": _MOST_NODES},
        )
    found: np.ndarray | None = result.x
    return found


@contextmanager
def _silenced() -> Iterator[None]:
    """HiGHS has lines that it prints whatever it was told, into what may have to be one JSON document."""
    try:
        kept = os.dup(1)
    except OSError:  # a process without an output
        yield
        return
    sys.stdout.flush()
    _flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        _flush()
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _flush() -> None:
    """What C code printed, and holds back."""
    if os.name == "posix":
        ctypes.CDLL(None).fflush(None)


def _read(answer: np.ndarray, wholes: list[int], cells: list[list[int]]) -> Choice:
    taken = [number for number, z in enumerate(wholes) if answer[z] > 0.5]
    if taken:
        return Choice(taken[0])
    return Choice(None, tuple(int(np.argmax(answer[cell])) for cell in cells))


def _safest(table: Table) -> Choice:
    """The cheapest without effect."""
    wholes = [(c.cost, n) for n, c in enumerate(table.whole) if sum(c.effects) == 0]
    columns = [(c.cost, n) for n, c in enumerate(table.columns) if sum(c.effects) == 0]
    if columns and (not wholes or min(columns) < min(wholes)):
        return Choice(None, (min(columns)[1],) * table.groups)
    return Choice(min(wholes)[1])


def cost_of(table: Table, choice: Choice) -> float:
    """What a site costs."""
    if choice.whole is not None:
        return table.whole[choice.whole].cost
    shares = sum(table.columns[c].cost for c in choice.columns) / table.groups
    return shares + table.split * (len(set(choice.columns)) - 1)


def effect_of(table: Table, choice: Choice) -> float:
    """What a site adds to the drop."""
    if choice.whole is not None:
        return sum(table.whole[choice.whole].effects)
    return sum(table.columns[c].effects[group] for group, c in enumerate(choice.columns))


def front(tables: Sequence[Table], budgets: Sequence[float], *, largest: bool = False) -> Iterator[Solution]:
    """The solutions of rising budgets, each once."""
    seen: set[Solution] = set()
    for budget in sorted(budgets):
        solution = solve(tables, budget, largest=largest)
        if solution not in seen:
            seen.add(solution)
            yield solution


Tables = Mapping[str, Table]
