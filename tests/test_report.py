"""The report as text and as JSON: grouped paths, every section, nothing that a column cuts off."""

from __future__ import annotations

import io
import json
from itertools import chain

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from rewriter.paths import grouped, joined, shape_of
from rewriter.plan import Decision, Plan
from rewriter.report import Report, Timing
from rewriter.report.candidates import candidates
from rewriter.report.tables import WIDTH, changed, outcome, print_report, render
from rewriter.site import AttentionSite, Causal, Refusal
from rewriter.verdict import Verdict


def site(path: str, **facts: object) -> AttentionSite:
    known = {"heads": 9, "kv_heads": 3, "head_dim": 64, "v_head_dim": 64, "dtype": "bfloat16", "scale": 0.125}
    return AttentionSite(path=path, mask=Causal(), q_len=2048, kv_len=2048, **{**known, **facts})  # type: ignore[arg-type]


def decision(path: str, variant: str = "sdpa") -> Decision:
    config = {"window": 512, "sinks": 4} if variant == "sliding_window" else {}
    return Decision(path=path, site="key", variant=variant, config=config, fidelity="exact", reason="it is [faster]")


def plan(*decisions: Decision) -> Plan:
    return Plan(decisions=decisions, target={}, model={}, goal="latency")


def verdict() -> Verdict:
    return Verdict(
        metric="perplexity", direction="lower", absolute=False, max_drop=0.01, original=12.0, candidate=12.06,
        drop=0.005, upper=0.0072, confidence=0.96, samples=8, rounding=0.0, held=True,
    )  # fmt: skip


PATHS = [f"model.layers.{i}.self_attn" for i in range(30)]


def full() -> Report:
    return Report(
        sites=[site(path) for path in PATHS],
        refusals=[Refusal("the softmax runs over the heads [dim=1]", path="model.mixer", source="model.py:12")],
        graphs=1,
        plan=plan(*(decision(path, "sliding_window" if i % 2 else "sdpa") for i, path in enumerate(PATHS))),
        verdict=verdict(),
        timings=[Timing("prefill", 25150.0, 5370.0), Timing("peak", 2e9, 1e9, "bytes")],
        notes=["one graph of two was [not] captured"],
        seconds={"capture": 0.5},
    )


def test_equal_layers_share_a_line() -> None:
    text = render(full())
    assert "30 attentions in 1 graph" in text
    assert text.count("model.layers.{0..29}.self_attn") == 1
    assert "9/3 of 64" in text and "2048x2048" in text and "causal(0)" in text


def test_every_section_is_there_and_nothing_is_markup() -> None:
    text = render(full())
    expected = [
        *("1 not taken", "[dim=1]", "model.py:12"),
        *("plan", "it is [faster]", "window 512, sinks 4"),
        *("25.15 s", "5.37 s", "4.68x", "2,000 MB"),
        *("perplexity 12.00 -> 12.06", "held", "[not] captured"),
    ]
    for part in expected:
        assert part in text.replace("\n", " "), part
    assert all(len(line) <= WIDTH for line in text.splitlines())
    assert "\x1b" not in text and text == str(full())


def test_an_empty_report() -> None:
    assert render(Report()).strip() == "no attentions in 0 graphs"
    assert outcome(Report()) == "No gain here, left as it is."


def test_the_outcome_counts_what_changed() -> None:
    kept = plan(decision("a", "original"), decision("b"))
    assert changed(kept) == 1 and changed(None) == 0
    report = Report(sites=[site("a"), site("b")], plan=kept, timings=[Timing("prefill", 300.0, 100.0)])
    assert outcome(report) == "1 of 2 attentions replaced: prefill 3.00 times faster."


def test_json_is_plain() -> None:
    made = json.loads(json.dumps(full().to_json(), allow_nan=False))
    assert len(made["sites"]) == 30 and made["sites"][0]["mask"] == "causal(0)"
    assert made["guard"]["held"] is True and made["timings"][1]["ratio"] == 2.0


def test_a_narrow_console_folds_and_keeps_every_word() -> None:
    console = Console(width=40, record=True, file=io.StringIO())
    print_report(full(), console)
    text = console.export_text()
    assert "…" not in text and max(map(len, text.splitlines())) <= 40


def test_paths() -> None:
    assert joined(["a.0.b", "a.1.b", "a.3.b"]) == "a.{0..1, 3}.b"
    assert joined(["a.0.b.2", "a.1.b.2"]) == "a.{0..1}.b.2"
    assert joined(["one"]) == "one" and joined(["", "x"]) == "<root>, x"
    assert shape_of("a.0.b") == shape_of("a.17.b") != shape_of("a.b.0")


@given(st.lists(st.lists(st.integers(0, 12), min_size=2, max_size=2), min_size=1, max_size=8))
def test_joined_names_every_number(numbers: list[list[int]]) -> None:
    text = joined([f"m.{a}.n.{b}" for a, b in numbers])
    assert text.startswith("m.") and text.count(".n.") == 1


@given(st.lists(st.text("ab", max_size=2)))
def test_grouping_loses_nothing(words: list[str]) -> None:
    groups = grouped(words, len)
    assert sorted(chain(*groups)) == sorted(words)
    assert all(len({len(w) for w in group}) == 1 for group in groups)


def test_candidates_give_a_reason_for_every_no() -> None:
    found = candidates([site(path) for path in PATHS])
    assert found and all(each.sites == "model.layers.{0..29}.self_attn" for each in found)
    assert all(each.applies != bool(each.reason) for each in found)
    assert "original" not in {each.variant for each in found}
