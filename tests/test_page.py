"""`rewriter report`: a plan in the terminal, and as one page that needs nothing else."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewriter
from rewriter import cli
from rewriter.plan import Plan, called, decided
from rewriter.report.facts import Facts, drawn
from rewriter.report.page import page
from rewriter.site import Mask

VOID = {"meta", "br"}
HOSTILE = "</text></script><img src=x onerror=alert(1)> $\\frac{$ \x00 \ud800 字 \"'&"


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (2, 4)).transpose(1, 2)
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        weights = (q @ q.transpose(-2, -1)).masked_fill(hidden, float("-inf")).softmax(-1)
        return x + self.out((weights @ q).transpose(1, 2).flatten(2))


class Reader(HTMLParser):
    """Every element with its attributes, and the text; the elements that were left open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan that a search has made."""
    torch.manual_seed(0)
    batches = [torch.randn(1, 300, 8) for _ in range(24)]
    model = rewriter.optimize(nn.Sequential(Layer(), Layer()).eval(), batches, max_drop=0.9, pareto=True)
    plan = rewriter.plan_of(model)
    assert plan is not None
    return plan.save(tmp_path_factory.mktemp("plan") / "plan.json")


def changed(plan: Path, place: Path, **facts: Any) -> Path:
    """The plan with other values at its top, or in its first decision, as if the guard had measured that."""
    raw = json.loads(plan.read_text())
    first = raw["decisions"][0]
    for name, value in facts.items():
        (first if name in first else raw)[name] = value
    place.write_text(json.dumps(raw))
    place.write_text(json.dumps(raw | {"judged": decided(Plan.load(place).decisions)}))
    return place


def test_the_page_has_what_was_measured(tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.html"
    assert cli.run(["report", str(tuned), "--html", str(out)]) == 0
    assert str(out) in capsys.readouterr().out.replace("\n", "")
    plan, written = Plan.load(tuned), out.read_text()
    read = Reader(written)
    assert not read.open and not re.search(r"https?:|//|@import", written)
    assert {tag for tag, _ in read.elements}.isdisjoint({"script", "link", "img", "iframe", "image"})
    links = [v for _, attributes in read.elements for k, v in attributes.items() if k in ("src", "href", "xlink:href")]
    ids = [attributes["id"] for _, attributes in read.elements if "id" in attributes]
    assert links and all(link and link[0] == "#" and link[1:] in ids for link in links) and len(set(ids)) == len(ids)
    labels = {a.get("aria-label") for tag, a in read.elements if tag == "svg"}
    assert {"timeline", "heat-map", "causal(0)"} <= labels and ("front" in labels) == bool((plan.search or {})["front"])
    for decision in plan.decisions:
        assert decision.reason in read.text and all(f"{v:.4g}" in read.text for v in decision.evidence.values())
        assert decision.tried and decision.refused
        for tried in decision.tried:
            assert called(tried.variant, tried.config) in read.text and f"{tried.cost:,.4g} ms" in read.text
            gain = decision.evidence["original_ms"] / tried.cost
            assert f"{gain:.3g}x" in read.text and (tried.error is None or f"{tried.error:.3g}" in read.text)
        for name, why in decision.refused.items():
            assert name in read.text and why in read.text
    assert plan.search is not None and plan.guard is not None
    assert all(stage["stage"] in read.text for stage in plan.search["timeline"])
    assert str(Facts.of(plan).verdict) in read.text
    for timing in plan.timings:
        assert f"{timing['original']:,.4g} ms" in read.text and f"{timing['ratio']:.2f}x faster" in read.text
    assert cli.run(["report", str(tuned), "--html", str(out)]) == 0  # A page may be replaced by another.


def test_the_terminal_shows_the_short_form(tuned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["report", str(tuned)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    facts = Facts.of(Plan.load(tuned))
    assert "plan for latency" in shown and str(facts.verdict) in shown and f"{facts.search['pairs']:g} site" in shown
    assert cli.run(["report", str(tuned.parent / "plan.json"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["plan"]["decisions"] == json.loads(tuned.read_text())["decisions"] and document["html"] is None


@pytest.mark.parametrize(
    "text",
    ["full", "causal(0)", "causal(3)", "sliding_window(255, 0)", "chunked(5) & causal(0)", "prefix_causal(700)",
     "causal(0) & padding", "sliding_window(9000, 100)"],
)  # fmt: skip
def test_a_drawn_mask_is_the_mask(text: str) -> None:
    mask = Mask.parse(text)
    found = drawn(mask)
    assert found is not None
    expected = mask.visible(found.tokens, found.tokens)[:: found.step, :: found.step]
    squares = torch.zeros_like(expected)
    for x, y, width, back in re.findall(r"M(\d+) (\d+)h(\d+)v1h-(\d+)z", found.path):
        assert width == back
        squares[int(y), int(x) : int(x) + int(width)] = True
    assert torch.equal(squares, expected) and (expected.all() or text != "full")
    assert found.reaches_farther == (text == "sliding_window(9000, 100)")
    assert text in ("full", "sliding_window(9000, 100)") or not expected.all()


def test_candidates_are_compared_by_what_was_measured(tuned: Path, tmp_path: Path) -> None:
    def tried(cost: float, window: int, error: float | None = None) -> dict[str, Any]:
        return {"variant": "sliding_window", "config": {"window": window}, "cost": cost, "error": error, "effect": None}

    listed = [tried(4.0, 1), tried(5.0, 2), tried(4.0, 3), tried(2.0, 4, 0.25), tried(2.0, 5)]
    own = {"variant": "sliding_window", "config": {"window": 1}, "fidelity": "approximate", "heads": []}
    plan = changed(
        tuned, tmp_path / "plan.json", **own, tried=listed, evidence={"original_ms": 8.0, "candidate_ms": 4.0}
    )
    facts = Facts.of(Plan.load(plan))
    first = facts.plan.decisions[0]
    assert [facts.compared(first, each) for each in first.tried] == [
        "chosen",
        "slower than what was chosen",
        "no better than what was chosen",
        "faster than what was chosen, but changes what the site computes by 0.25",
        "faster than what was chosen",
    ]
    assert [facts.gain(first, each) for each in first.tried] == [2.0, 1.6, 2.0, 4.0, 4.0]


def test_masks_that_cannot_be_drawn() -> None:
    assert drawn(Mask.parse("padding")) is None and drawn(Mask.parse("dense")) is None
    assert drawn(Mask.parse(f"causal({10**30})")) is None


def test_names_are_text(tuned: Path, tmp_path: Path) -> None:
    tried = [{"variant": HOSTILE, "config": {HOSTILE: HOSTILE}, "cost": 1.0, "error": 0.5, "effect": 0.1}]
    search = json.loads(tuned.read_text())["search"]
    search["timeline"][0] |= {"stage": HOSTILE}
    search["metric"] = HOSTILE
    names = {"path": HOSTILE, "reason": HOSTILE, "refused": {HOSTILE: HOSTILE}, "tried": tried, "goal": HOSTILE}
    plan = changed(tuned, tmp_path / "hostile.json", **names, search=search, created=HOSTILE)
    read = Reader(page(Facts.of(Plan.load(plan))))
    tags = {tag for tag, _ in read.elements}
    assert not read.open and tags.isdisjoint({"img", "script"})
    assert not any(name.startswith("on") for _, attributes in read.elements for name in attributes)
    assert read.text.count("onerror=alert(1)") >= 6
    assert cli.run(["report", str(plan), "--html", str(tmp_path / "hostile.html")]) == 0


def test_what_a_plan_lacks_is_said(tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = json.loads(tuned.read_text())
    for decision in raw["decisions"]:
        decision |= {"tried": [], "refused": {}, "evidence": {}, "site": "nothing that can be read"}
    plan = tmp_path / "bare.json"
    plan.write_text(json.dumps(raw | {"guard": None, "search": None, "timings": []}))
    text = Reader(page(Facts.of(Plan.load(plan)))).text
    for words in ("no comparison", "no verdict", "no front", "no timeline", "does not hold a search", "cannot read",
                  "no measurement of a single site", "No variant was refused"):  # fmt: skip
        assert words in text
    assert cli.run(["report", str(plan)]) == 0 and "does not hold a search" in capsys.readouterr().out


@pytest.mark.parametrize(
    "nonsense",
    [
        {"search": {"front": 3}},
        {"search": {"front": [{"cost": "much", "predicted": 0.1}]}},
        {"search": {"timeline": [{"stage": "search"}]}},
        {"search": {"trials": [7]}},
        {"search": {"seconds": 10**400}},
        {"guard": {"metric": "cosine"}},
        {"guard": {"checks": 1}},
        {"tried": [{"variant": "sdpa", "config": {}, "cost": 10**400}]},
        {"evidence": {"original_ms": 10**400}},
        {"timings": [{"what": "all", "original": 1.0, "result": 0.0, "unit": "ms"}]},
    ],
)
def test_nonsense_is_one_sentence(
    nonsense: dict[str, Any], tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = changed(tuned, tmp_path / "plan.json", **nonsense)
    assert cli.run(["report", str(plan), "--html", str(tmp_path / "out.html")]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "out.html").exists()


def test_a_verdict_on_other_decisions_is_not_shown(
    tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = json.loads(tuned.read_text())
    raw["decisions"][0]["lengths"] = [0, 10**6]
    (tmp_path / "plan.json").write_text(json.dumps(raw))
    assert cli.run(["report", str(tmp_path / "plan.json")]) == 2
    said = capsys.readouterr()
    assert "edited by hand" in said.err and "held" not in said.out
    raw = json.loads(tuned.read_text())
    raw["guard"] |= {"held": False, "reason": "told so"}
    (tmp_path / "plan.json").write_text(json.dumps(raw))
    assert cli.run(["report", str(tmp_path / "plan.json")]) == 0, "a refusal may be read"
    assert "told so" in capsys.readouterr().out


def test_bad_places(
    tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: str) -> str:
        assert cli.run(["report", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    (tmp_path / "text.txt").write_text("no plan")
    before = tuned.read_bytes()
    assert "cannot be read" in refused(str(tmp_path / "none.json"))
    assert "not JSON" in refused(str(tmp_path / "text.txt"))
    assert "replace the plan" in refused(str(tuned), "--html", str(tuned)) and tuned.read_bytes() == before
    assert "not a page" in refused(str(tuned), "--html", str(tmp_path / "text.txt"))
    assert "not a page" in refused(str(tuned), "--html", str(tmp_path))
    assert "cannot be written" in refused(str(tuned), "--html", str(tmp_path / "none" / "out.html"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "rewriter[report]" in refused(str(tuned), "--html", str(tmp_path / "out.html"))


def test_a_browser_shows_it(tuned: Path, tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("there is no Chromium")
    out, picture = tmp_path / "out.html", tmp_path / "out.png"
    assert cli.run(["report", str(tuned), "--html", str(out)]) == 0
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    shown = subprocess.run(
        [browser, *flags, "--window-size=1000,2000", f"--screenshot={picture}", out.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    assert "Refused to" not in shown.stderr and picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 50_000  # a blank page takes a tenth of this
