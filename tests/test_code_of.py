"""A plan is of the code that it was measured on: what counts as other code, and what does not."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewriter
from rewriter.code_of import changes, code_of
from rewriter.errors import PlanError
from rewriter.plan import Plan

SOURCE = '''
"""A model."""
import functools
import torch
from torch import nn
import {package}.helpers as helpers
from {package}.helpers import double, Scale

SHIFT = 0.5
UNUSED = 1

def kept(function):
    @functools.wraps(function)
    def inner(*args):
        return function(*args)
    return inner

class Base(nn.Module):
    def scores(self, x):
        return x.softmax(-1)

    def unused(self):
        return 1

class Layer(Base):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    @property
    def slope(self):
        return 3

    @kept
    def forward(self, x, factor=2.0):
        """Of x."""
        nearby = [each for each in (x, x)]
        return self.scores(double(self.linear(nearby[0]))) * factor + SHIFT + Scale().of(x) * self.slope
'''
HELPERS = """
def double(x):
    return twice(x)

def twice(x):
    return 2 * x

class Scale:
    def of(self, x):
        return x.abs() if x.dtype in {{1, 2, 3}} else x
"""
UNCHANGED: dict[str, tuple[str, str]] = {
    "a comment": ("        nearby =", "        # Twice.\n        nearby ="),
    "a docstring": ("Of x.", "Of another."),
    "what forward does not reach": ("return 1", "return 2"),
    "a number that nothing reads": ("UNUSED = 1", "UNUSED = 2"),
    "the name of a variable": ("nearby", "closest"),
}
CHANGED: dict[str, tuple[str, str]] = {
    "forward": ("* factor", "/ factor"),
    "a default": ("factor=2.0", "factor=2.5"),
    "a method of a base": ("softmax", "sigmoid()  #"),
    "a number of the module": ("SHIFT = 0.5", "SHIFT = 0.25"),
    "a property": ("return 3", "return 4"),
    "a function of the package": ("2 * x", "3 * x"),
    "a class of the package": ("abs", "neg"),
    "a constant": ("for each in (x, x)", "for each in (x, None)"),
    "a decorator": ("return function(*args)", "return -function(*args)"),
}

Made = Callable[..., nn.Module]


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Made]:
    """The layer of a package, with some of its text replaced."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    packages: list[str] = []

    def make(old: str = "", new: str = "") -> nn.Module:
        package = f"code_{len(packages)}"
        packages.append(package)
        (tmp_path / package).mkdir()
        for name, text in (("__init__", SOURCE), ("helpers", HELPERS)):
            (tmp_path / package / f"{name}.py").write_text(text.format(package=package).replace(old, new))
        module = __import__(package)
        layer: nn.Module = module.Layer()
        return layer

    yield make
    for package in packages:
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            del sys.modules[name]


def differ(one: nn.Module, other: nn.Module) -> bool:
    return bool(changes(code_of(other), code_of(one)))


@pytest.mark.parametrize("what", UNCHANGED)
def test_what_is_no_other_code(made: Made, what: str) -> None:
    assert not differ(made("\0", ""), made(*UNCHANGED[what]))


@pytest.mark.parametrize("what", CHANGED)
def test_what_is_other_code(made: Made, what: str) -> None:
    assert differ(made("\0", ""), made(*CHANGED[what]))


def test_a_forward_that_was_put_into_a_module(made: Made) -> None:
    plain, changed = made("\0", ""), made("\0", "")
    before = changed.forward
    changed.forward = lambda x: before(x) * 2
    assert differ(plain, changed)
    assert not differ(plain, plain) and code_of(plain)["classes"].keys() == {"code_0.Layer"}


def test_other_versions_of_python_and_old_plans_are_not_compared(made: Made) -> None:
    one, other = code_of(made("\0", "")), code_of(made("* factor", "/ factor"))
    assert changes(other, one) == ["code_1.Layer"]
    assert (
        not changes(other, one | {"python": "3.0"}) and not changes(other, None) and not changes(other, {"python": 3})
    )


def test_it_is_the_same_in_another_process(made: Made, tmp_path: Path, root: Path) -> None:
    own = code_of(made("\0", ""))
    program = "import sys; from rewriter.code_of import code_of; import code_0; print(code_of(code_0.Layer()))"
    for seed in ("1", "2"):
        found = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path,
            env={"PYTHONPATH": f"{root}:{tmp_path}", "PYTHONHASHSEED": seed, "PATH": ""},
        )  # fmt: skip
        assert found.stdout.strip() == str(own)


class Attention(nn.Module):
    """Exact where it stands alone."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.linear(x).chunk(3, -1))
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        weights = (q @ k.transpose(-2, -1)).masked_fill(hidden, float("-inf")).softmax(-1)
        out: Tensor = (weights @ v).transpose(1, 2).flatten(2)
        return out


class Doubled(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_an_inexact_plan_is_of_its_code(tmp_path: Path) -> None:
    x = torch.randn(1, 300, 16)
    model = Attention().eval()
    sites = rewriter.explain(model, x).sites
    choices: dict[str, Any] = {"sliding_window": ("sliding_window", {"window": 32, "sinks": 0}), "sdpa": "sdpa"}
    for name, choice in choices.items():
        Plan.for_model(model, {sites[0]: choice}).save(tmp_path)
        other = Doubled().eval()
        other.load_state_dict(model.state_dict())
        assert rewriter.apply(Attention().eval(), Plan.load(tmp_path), check_weights=False)
        if name == "sdpa":
            rewriter.apply(other, Plan.load(tmp_path))
            continue
        with pytest.raises(PlanError, match=r"other code: that of .*Doubled is not what it was"):
            rewriter.apply(other, Plan.load(tmp_path))
        rewriter.apply(other, Plan.load(tmp_path), check_weights=False)
        rewriter.restore(other)
