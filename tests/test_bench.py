"""`rewriter bench detect`: what is counted, and that one bad model costs one model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rewriter import cli
from rewriter.bench import tables
from rewriter.bench.detect import Measured, change
from rewriter.bench.entries import load, spread
from rewriter.errors import OptionError

MODELS = """
import dataclasses, os, time
import torch
from torch import nn
from torch.nn import functional as F

class Attention(nn.Module):
    def __init__(self, fused, breaks):
        super().__init__()
        self.queries, self.fused, self.breaks = nn.Linear(8, 8), fused, breaks

    def forward(self, x):
        q = self.queries(x)
        if self.breaks:  # what follows is one graph, which runs for every layer
            torch._dynamo.graph_break()
        return F.scaled_dot_product_attention(q, q, x) if self.fused else torch.softmax(q @ q.mT / 8**0.5, -1) @ x

def shared(fused=False, breaks=False):
    layer = Attention(fused, breaks)
    return nn.Sequential(layer, layer)

def fused(): return shared(fused=True)
def eager(): return shared()
def none(): return nn.Linear(8, 8)
def broken(): return shared(breaks=True)
def dies(): os._exit(3)
def hangs(): time.sleep(60)
def missing(): import a_library_that_nobody_has

@dataclasses.dataclass
class Entry:
    name: str
    library: str
    sites: int
    function: object

    def build(self):
        return self.function(), (torch.randn(1, 2, 5, 8),), {}
"""


@pytest.fixture
def declared(tmp_path: Path) -> Callable[..., Path]:
    """A file that declares entries, each (function, library, sites)."""

    def write(*entries: tuple[str, str, int]) -> Path:
        listed = ", ".join(f"Entry({name!r}, {library!r}, {sites}, {name})" for name, library, sites in entries)
        file = tmp_path / "some_models.py"
        file.write_text(f"{MODELS}\ndef entries():\n    return [{listed}]\n")
        return file

    return write


def measured(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, dict[str, Any]]:
    status = cli.run(["bench", "detect", *map(str, arguments), "--json"])
    out = capsys.readouterr().out
    assert status == 0, out
    return {each["name"]: each for each in json.loads(out)["results"]}


def test_what_is_counted(declared: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    file = declared(("eager", "a", 2), ("fused", "a", 2), ("none", "b", 0), ("broken", "b", 2))
    found = measured(capsys, file)
    assert {name: each["found"] for name, each in found.items()} == {"eager": 2, "fused": 2, "none": 0, "broken": 2}
    assert {name: each["calls"] for name, each in found.items()} == {"eager": 0, "fused": 2, "none": 0, "broken": 0}
    assert (found["eager"]["inductor"], found["fused"]["inductor"], found["none"]["inductor"]) == (2, 0, 0)
    assert all(each["change"] <= 1 and each["nodes"] > 0 and not each["problem"] for each in found.values())
    assert found["eager"]["detect_seconds"] > 0 and found["eager"]["cold_seconds"] is None


def test_a_bad_model_costs_one_model(declared: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    file = declared(("dies", "a", 1), ("hangs", "a", 1), ("missing", "b", 1), ("eager", "b", 2))
    found = measured(capsys, file, "--no-inductor", "--timeout", 5)
    assert "died (status 3)" in found["dies"]["problem"] and "after 5 s" in found["hangs"]["problem"]
    assert found["missing"]["missing"] == "a_library_that_nobody_has"
    assert found["eager"]["found"] == 2 and found["eager"]["inductor"] is None


def test_the_table_for_the_readme(declared: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    file = declared(("eager", "a", 2), ("none", "b", 0))
    assert cli.run(["bench", "detect", str(file), "--library", "a", "--no-inductor", "--markdown"]) == 0
    header, rule, row, *_ = capsys.readouterr().out.splitlines()
    assert header.startswith("| library |") and set(rule) <= set("|-: ")
    assert row.startswith("| a | 1 |") and "| 2 (100.0%) |" in row


def test_rows_and_troubles() -> None:
    results = [
        Measured(name="x", library="a", known=4, found=3, nodes=1000, calls=1, inductor=1, detect_seconds=0.5),
        Measured(name="y", library="a", known=2, found=3, nodes=1000, inductor=0, change=7.0, refused={"odd": 2}),
        Measured(name="z", library="b", known=5, missing="b"),
        Measured(name="w", library="c", known=4, problem="not done after 1 s"),
    ]
    a, b, _, total = tables.rows(results)
    assert a == ("a", "2", "2,000", "6", "5 (83.3%)", "2", "1", "1", "2 (33.3%)", "1", "0.25")
    assert b[:5] == ("b", "0", "0", "0", "0")
    assert total[4] == "5 (50.0%)", "what failed was not found"
    assert tables.reasons(results) == [("odd", 2)]


def test_a_changed_output_is_a_failure(
    declared: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = Measured(name="x", library="a", known=1, found=1, nodes=9, change=3.0)
    monkeypatch.setattr("rewriter.bench.isolated.stream", lambda *_: iter([bad]))
    assert cli.run(["bench", "detect", str(declared(("eager", "a", 1)))]) == 1
    assert "changed the outputs of x" in capsys.readouterr().err


def test_change_is_in_multiples_of_the_tolerance() -> None:
    x = torch.ones(8)
    assert change((x, {"ids": torch.arange(3)}), (x, {"ids": torch.arange(3)})) == 0
    assert change(x * 1.001, x) > 1 > change(x * 1.001, x, [torch.bfloat16])
    assert change([x], [x, x]) == float("inf")


def test_a_folder_and_what_is_no_list_of_models(tmp_path: Path) -> None:
    folder = tmp_path / "some_more_models"
    folder.mkdir()
    (folder / "shared.py").write_text("from types import SimpleNamespace as Entry\n")
    (folder / "entries.py").write_text(
        "from some_more_models.shared import Entry\ndef entries(): yield from (Entry(name=str(i)) for i in range(10))\n"
    )
    found = load(folder)
    assert [entry.name for entry in spread(found, 3)] == ["0", "3", "6"] and len(spread(found, None)) == 10
    (tmp_path / "twice.py").write_text("class E: name = 'x'\ndef entries(): return [E, E]\n")
    for name, reason in {"twice.py": "called x", "absent.py": "neither", "torch": "another package"}.items():
        (tmp_path / "torch").mkdir(exist_ok=True)
        with pytest.raises(OptionError, match=reason):
            load(tmp_path / name)
