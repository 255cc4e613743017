"""The program that chooses a plan: against all plans that there are."""

from __future__ import annotations

import ctypes
import itertools
import os
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import milp

from rewriter.tune.solve import Choice, Column, Table, cost_of, effect_of, front, solve

costs = st.floats(0.1, 20.0)
effects = st.just(0.0) | st.floats(1e-6, 1.0)


@st.composite
def tables(draw: st.DrawFn) -> Table:
    groups = draw(st.integers(1, 2))
    exact = Column(draw(costs), [0.0] * groups)
    others = [Column(draw(costs), [draw(effects) for _ in range(groups)]) for _ in range(draw(st.integers(0, 2)))]
    wholes = [
        Column(draw(costs), [0.0]),
        *(Column(draw(costs), [draw(effects)]) for _ in range(draw(st.integers(0, 1)))),
    ]
    return Table(wholes, [exact, *others], groups, draw(st.floats(0.0, 2.0)))


def choices(table: Table) -> list[Choice]:
    by_heads = itertools.product(range(len(table.columns)), repeat=table.groups)
    return [*(Choice(n) for n in range(len(table.whole))), *(Choice(None, each) for each in by_heads)]


@settings(max_examples=60)
@given(sites=st.lists(tables(), min_size=1, max_size=3), budget=st.floats(0.0, 2.0), largest=st.booleans())
def test_nothing_within_the_budget_is_cheaper(sites: list[Table], budget: float, largest: bool) -> None:
    together = max if largest else sum
    solution = solve(sites, budget, largest=largest)

    def cost(each: tuple[Choice, ...]) -> float:
        return together(cost_of(*pair) for pair in zip(sites, each, strict=True))

    def effect(each: tuple[Choice, ...]) -> float:
        return sum(effect_of(*pair) for pair in zip(sites, each, strict=True))

    possible = [each for each in itertools.product(*map(choices, sites)) if effect(each) <= budget]
    assert effect(solution) <= budget * (1 + 1e-6) + 1e-6
    assert cost(solution) <= min(map(cost, possible)) * 1.002 + 1e-6


def test_heads_differ_where_it_pays() -> None:
    exact, window = Column(10.0, [0.0, 0.0, 0.0]), Column(4.0, [0.1, 5.0, 0.1])
    assert solve([Table([Column(12.0, [0.0])], [exact, window], 3, 0.5)], 0.5) == (Choice(None, (1, 0, 1)),)
    # And do not where a second implementation costs more than it spares.
    assert solve([Table([Column(12.0, [0.0])], [exact, window], 3, 5.0)], 0.5) == (Choice(None, (0, 0, 0)),)


def test_the_same_program_has_the_same_answer() -> None:
    site = Table([Column(2.0, [0.0])], [Column(2.0, [0.0] * 4), *(Column(1.0, [0.1] * 4) for _ in range(5))], 4)
    assert len({solve([site] * 6, 1.3) for _ in range(5)}) == 1


def test_the_front_goes_down() -> None:
    site = Table([Column(10.0, [0.0])], [Column(9.0 - x, [x**2 / 10]) for x in range(6)])
    found = [(cost_of(site, each[0]), effect_of(site, each[0])) for each in front([site], [0, 0.1, 0.1, 0.5, 9.0])]
    assert found == sorted(found, reverse=True) and [e for _, e in found] == sorted(e for _, e in found)
    assert found[0][1] == 0.0 and found[-1][0] == 4.0


def test_nothing_to_choose() -> None:
    assert solve([], 1.0) == ()
    assert solve([Table([Column(3.0, [0.0])])], 1.0) == (Choice(0),)


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e12])
def test_the_unit_of_cost_does_not_matter(unit: float) -> None:
    sites = [Table([Column(unit * 3, [0.0])], [Column(unit * (2 - x), [0.2 * x]) for x in range(2)]) for _ in range(3)]
    assert [choice.columns for choice in solve(sites, 0.45)].count((1,)) == 2


def test_what_the_solver_prints_is_not_in_the_output(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def chatty(*args: Any, **options: Any) -> Any:
        ctypes.CDLL(None).puts(b"tmpSolver.run();")
        os.write(1, b"more")
        return milp(*args, **options)

    monkeypatch.setattr("rewriter.tune.solve.milp", chatty)
    print("before")
    test_heads_differ_where_it_pays()
    print("after")
    assert capfd.readouterr().out == "before\nafter\n"
