"""What stands at a site: which calls a decision is for, which candidates there are, and what is measured once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewriter
from rewriter import exact
from rewriter.candidates import candidates
from rewriter.capture import exported
from rewriter.detect import detect
from rewriter.errors import OptionError, PlanError
from rewriter.exact import bench, decide_exact
from rewriter.kernels.exact.sdpa import VARIANT as SDPA
from rewriter.plan import MIXED, Decision, HeadGroup, Plan, module_name
from rewriter.plan_check import read_plan
from rewriter.raising import Match
from rewriter.region import Region
from rewriter.select import Selector, fits
from rewriter.site import AttentionSite, Causal, Dense, Full, Mask, Padding, SlidingWindow
from rewriter.target import Target
from rewriter.tune.measure import SiteBench
from rewriter.variant import Config

SITE = AttentionSite(
    path="a.b", heads=4, kv_heads=2, head_dim=8, v_head_dim=8, dtype="float32", scale=0.5, mask=Causal(),
    batch=1, q_len=600, kv_len=600,
)  # fmt: skip
TARGET = Target.current()


class Attention(nn.Module):
    """Causal, of a (B, H, S, D) tensor with itself."""

    def __init__(self, scale: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.scale, self.dropout = scale, dropout

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool).triu(1)
        scores = (self.scale * x @ x.transpose(-2, -1)).masked_fill(hidden, float("-inf"))
        return nn.functional.dropout(scores.softmax(-1), self.dropout) @ x


class Twice(nn.Module):
    """The same computation at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Attention(), Attention()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.two(self.one(x))
        return out


def matches(module: nn.Module, length: int = 24) -> list[Match]:
    return detect(exported(torch.export.export(module, (torch.randn(1, 4, length, 8),)))).matches


def decision(**facts: Any) -> Decision:
    known: dict[str, Any] = {
        "path": "a.b", "site": SITE.key(), "variant": "sdpa", "config": {}, "fidelity": "exact", "reason": "told so",
    }  # fmt: skip
    return Decision(**(known | facts))


def plan(*decisions: Decision) -> Plan:
    return Plan(decisions=decisions, target=Target.current().to_json(), model={}, goal="latency")


@pytest.fixture(autouse=True)
def compared(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(goal, number of candidates) of every comparison; each candidate costs half of the original."""
    seen: list[tuple[str, int]] = []

    def compare(self: SiteBench, implementations: Sequence[Any], *, goal: str, budget: float) -> list[float]:
        seen.append((goal, len(implementations)))
        return [4.0] + [2.0] * len(implementations)

    monkeypatch.setattr(SiteBench, "compare", compare)
    monkeypatch.setattr(exact, "_MEASURED", {})
    return seen


@pytest.fixture
def registered() -> Iterator[Callable[..., None]]:
    def register(**facts: Any) -> None:
        rewriter.register(dataclasses.replace(SDPA, name="new", **facts))

    yield register
    rewriter.unregister("new")


# --- which calls a decision is for -----------------------------------------------------------------------------------

PADDED = Causal() & Padding()
LOCAL = Causal() & SlidingWindow(9, 0)
FITS: dict[str, tuple[bool, Mask, Mask, dict[str, Any]]] = {
    "the same": (True, Causal(), Causal(), {}),
    "another length": (True, Causal(), Causal(), {"q_len": 7, "kv_len": 7}),
    "symbolic": (True, Causal(), Causal(), {"q_len": None, "kv_len": None, "batch": None}),
    "another place": (True, Causal(), Causal(), {"path": "c", "source": "x.py:1", "spelling": "sdpa"}),
    "padding that was not measured": (True, PADDED, Causal(), {}),
    "padding that is not there": (True, Causal(), PADDED, {}),
    "padding both times": (True, PADDED, PADDED, {}),
    "a padded encoder": (True, Padding(), Full(), {}),
    "the step of a cache": (True, Full(), Causal(), {"q_len": 1}),
    "the padded step of a cache": (True, Padding(), Causal(), {"q_len": 1}),
    "the step of a cache, measured with padding": (True, Full(), PADDED, {"q_len": 1}),
    "a window": (True, LOCAL, LOCAL, {}),
    "a padded window": (True, LOCAL & Padding(), LOCAL, {}),
    "not causal": (False, Full(), Causal(), {}),
    "not causal, with padding": (False, Padding(), Causal(), {}),
    "causal after all": (False, Causal(), Full(), {}),
    "two queries": (False, Full(), Causal(), {"q_len": 2}),
    "an unknown number of queries": (False, Full(), Causal(), {"q_len": None}),
    "an unknown mask": (False, Dense(), Causal(), {}),
    "an unknown mask besides": (False, Causal() & Dense(), Causal(), {}),
    "an unknown mask besides the padding": (False, PADDED & Dense(), PADDED, {}),
    "an unknown mask of one query": (False, Dense(), Causal(), {"q_len": 1}),
    "an unknown mask both times": (True, Dense(), Dense(), {}),
    "another window": (False, SlidingWindow(8, 0) & Causal(), LOCAL, {}),
    "a window that was not measured": (False, LOCAL, Causal(), {}),
    "another offset": (False, Causal(1), Causal(), {}),
    "another type": (False, Causal(), Causal(), {"dtype": "bfloat16"}),
    "another scale": (False, Causal(), Causal(), {"scale": 0.25}),
    "dropout": (False, Causal(), Causal(), {"dropout_p": 0.1}),
    "other heads": (False, Causal(), Causal(), {"kv_heads": 4}),
    "another device": (False, Causal(), Causal(), {"device": "cuda"}),
}


@pytest.mark.parametrize("case", FITS)
def test_what_a_decision_fits(case: str) -> None:
    expected, mask, measured, facts = FITS[case]
    key = dataclasses.replace(SITE, mask=measured).key()
    assert fits(dataclasses.replace(SITE, mask=mask, **facts), key) is expected


def test_nonsense_fits_nothing() -> None:
    assert not fits(SITE, "") and not fits(SITE, "nonsense")


def test_paths_as_names_of_submodules() -> None:
    assert module_name("model.layers.0.attn") == "model__layers__0__attn"
    assert module_name("") == "root" and "." not in module_name("a.b#1")
    nn.ModuleDict({module_name(path): nn.Identity() for path in ("", "a.b", "a.b#1")})


# --- candidates ------------------------------------------------------------------------------------------------------


def test_candidates_and_why_the_others_are_none() -> None:
    everything = frozenset({"exact", "approximate", "learned"})
    found, refused = candidates(SITE, TARGET, None, everything)
    assert [(v.name, dict(c)) for v, c in found if v.name in ("linear", "sdpa", "sliding_window")] == [
        ("linear", {"feature_map": "hedgehog"}),
        ("sdpa", {}),
        ("sliding_window", {"window": 256, "sinks": 4}),
        ("sliding_window", {"window": 128, "sinks": 4}),
    ]
    assert not refused.keys() & {"linear", "sdpa", "sliding_window"}
    found, refused = candidates(SITE, TARGET, None, frozenset({"exact"}))
    assert "sdpa" in {v.name for v, _ in found} and {v.fidelity for v, _ in found} == {"exact"}
    assert set(refused) >= {"linear", "sliding_window"}
    assert "calibration" in refused["sliding_window"] and "by name" in refused["linear"]
    found, refused = candidates(SITE, TARGET, frozenset({"sliding_window"}), everything)
    assert {v.name for v, _ in found} == {"sliding_window"} and "not among" in refused["sdpa"]
    found, refused = candidates(dataclasses.replace(SITE, dropout_p=0.1), TARGET, None, everything)
    assert not found and all("dropout" in reason for reason in refused.values())
    assert "original" not in refused


def test_a_variant_without_a_setting_is_refused(registered: Any) -> None:
    registered(configs=lambda site, target: ())
    _, refused = candidates(SITE, TARGET, frozenset({"new"}), frozenset({"exact"}))
    assert "no setting" in refused["new"]


# --- measuring -------------------------------------------------------------------------------------------------------


def test_equal_sites_are_measured_once(compared: list[tuple[str, int]]) -> None:
    one, two = matches(Twice())
    first, second = (decide_exact(match, "latency", None) for match in (one, two))
    assert compared == [("latency", 1)]
    assert (first.path, second.path) == ("one", "two") and dataclasses.replace(second, path="one") == first
    assert (first.variant, first.evidence) == ("sdpa", {"original_ms": 4.0, "candidate_ms": 2.0})


def test_what_differs_is_measured_again(compared: list[tuple[str, int]], registered: Any) -> None:
    (match,) = matches(Attention())
    decide_exact(match, "latency", None)
    assert decide_exact(match, "memory", None).evidence == {"original_bytes": 4.0, "candidate_bytes": 2.0}
    decide_exact(match, "latency", frozenset({"sdpa"}))
    decide_exact(matches(Attention(scale=0.5))[0], "latency", None)
    decide_exact(matches(Attention(), length=25)[0], "latency", None)
    assert [goal for goal, _ in compared] == ["latency", "memory", "latency", "latency", "latency"]
    registered()
    decide_exact(match, "latency", None)
    decide_exact(match, "latency", frozenset({"sdpa"}))
    assert compared[5:] == [("latency", 2)]


@pytest.mark.parametrize(("costs", "variant"), [((1.0, 0.96), "sdpa"), ((1.0, 0.98), "original"), ((0.0, 0.0), None)])
def test_noise_is_no_gain(costs: tuple[float, float], variant: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SiteBench, "compare", lambda *args, **options: list(costs))
    found = decide_exact(matches(Attention())[0], "memory", None)
    assert found.variant == variant or variant is None
    assert ("no gain" in found.reason) == (found.variant == "original")


def test_a_site_without_candidates_is_not_measured(compared: list[tuple[str, int]]) -> None:
    (match,) = matches(Attention(dropout=0.5))
    found = decide_exact(match, "latency", None)
    assert found.variant == "original" and "dropout" in found.refused["sdpa"] and not found.evidence and not compared


def test_short_captures_are_measured_at_a_nominal_length() -> None:
    def length(captured: int) -> int:
        shape = bench(Region(matches(Attention(), captured)[0])).original().shape
        assert shape[:2] == (1, 4) and shape[3] == 8
        return int(shape[2])

    assert length(24) == exact.NOMINAL_TOKENS and length(1500) == 1500
    assert length(8) == 8, "as many tokens as a head is wide: which is which is not known"


# --- the selector ----------------------------------------------------------------------------------------------------


def test_a_plan_decides_and_nothing_else(compared: list[tuple[str, int]]) -> None:
    one, two = matches(Twice())
    selector = Selector.replaying(plan(decision(path="one", site=one.site.key())))
    implementation = selector.choose(one)
    assert implementation is not None
    x = torch.randn(1, 4, 24, 8)
    assert torch.allclose(implementation(x, x, x, None, None), Attention()(x), atol=1e-5)
    assert selector.choose(two) is None and selector.choose(two) is None
    assert selector.notes == ["two: not in the plan, so it runs its original code"] and not compared
    assert list(selector.decisions) == ["one"]


def test_unknown_sites_are_decided_and_remembered(compared: list[tuple[str, int]]) -> None:
    one, two = matches(Twice())
    selector = Selector(decisions={"one": decision(path="one", variant="original", site=one.site.key())})
    assert selector.choose(one) is None and selector.choose(two) is not None
    assert {path: d.variant for path, d in selector.decisions.items()} == {"one": "original", "two": "sdpa"}
    assert not selector.notes and len(compared) == 1


def test_what_does_not_fit_runs_its_original_code() -> None:
    (match,) = matches(Attention(), 600)
    window = {"variant": "sliding_window", "fidelity": "approximate", "config": {"window": 128, "sinks": 4}}
    site = match.site
    cases = {
        site.key(): None,
        site.key().replace("causal(0)", "full"): "not the one that the plan was made for",
    }
    for key, note in cases.items():
        selector = Selector.replaying(plan(decision(path=site.path, site=key, **window)))
        assert (selector.choose(match) is None) == (note is not None)
        assert len(selector.notes) == (note is not None) and all(note in text for text in selector.notes if note)
    # Exact ones need no such care.
    selector = Selector.replaying(plan(decision(path=site.path, site="of another")))
    assert selector.choose(match) is not None and not selector.notes


def test_one_module_for_all_graphs_of_a_site() -> None:
    site = matches(Attention())[0].site
    state = {"root.query_map": torch.randn(4, 8, 8), "root.key_map": torch.randn(4, 8, 8), "other.x": torch.ones(1)}
    chosen = decision(path=site.path, site=site.key(), variant="linear", fidelity="learned")
    selector = Selector.replaying(dataclasses.replace(plan(chosen), state=state))
    modules = [selector.choose(matches(Attention(), length)[0]) for length in (24, 30)]
    assert modules[0] is modules[1] is selector.modules[""] and isinstance(modules[0], nn.Module)
    for name, value in modules[0].state_dict().items():
        assert torch.equal(value, state[f"root.{name}"])


@pytest.mark.parametrize("state", [{"root.query_map": torch.ones(4, 8, 8)}, {"root.nothing": torch.ones(1)}])
def test_parameters_that_do_not_fit_are_a_broken_plan(state: dict[str, Tensor]) -> None:
    site = matches(Attention())[0].site
    chosen = decision(path=site.path, site=site.key(), variant="linear", fidelity="learned")
    selector = Selector.replaying(dataclasses.replace(plan(chosen), state=state))
    with pytest.raises(PlanError, match="cannot be built") as told:
        selector.learned(chosen)
    assert "\n" not in str(told.value) and not selector.modules


def test_plans_are_checked_before_use(tmp_path: Any) -> None:
    good = plan(decision(), decision(path="c", variant="original"))
    assert read_plan(good) is good
    with pytest.raises(PlanError, match="'flash', which is not installed"):
        read_plan(plan(decision(variant="flash")))
    with pytest.raises(PlanError, match=r"calls linear at a\.b exact"):
        read_plan(plan(decision(variant="linear")))
    with pytest.raises(PlanError, match="cannot be read"):
        read_plan(tmp_path / "nothing.json")
    with pytest.raises(OptionError, match="not a list"):
        read_plan([])  # type: ignore[arg-type]
    for facts, words in (
        ({"goal": "beauty"}, "goal 'beauty', not one of latency, memory"),
        ({"target": {"device": "abacus"}}, "'abacus', which is no device"),
        ({"target": {"device": 3}}, "3, which is no device"),
    ):
        with pytest.raises(PlanError, match=words):
            read_plan(dataclasses.replace(good, **facts))
    with pytest.raises(PlanError, match="'heads=two', which is no attention"):
        read_plan(plan(decision(site="heads=two")))


WINDOW = {"variant": "sliding_window", "fidelity": "approximate"}
SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    **{
        f"window {window!r:.9}": (
            {**WINDOW, "config": {"window": window, "sinks": 4}}, f"sliding_window has no window of {window!r:.40};"
        )
        for window in (-5, 0, 10**30, 1.5, float("nan"), True, "128", "wide")
    },
    "sinks": ({**WINDOW, "config": {"window": 128, "sinks": -4}}, "has no sinks of -4"),
    "nothing": ({**WINDOW, "config": {}}, "needs a setting 'window'"),
    "one": ({**WINDOW, "config": {"window": 128}}, "needs a setting 'sinks'"),
    "unknown": ({**WINDOW, "config": {"window": 128, "sinks": 4, "x": 1}}, "no setting 'x'; it has window, sinks"),
    "none": ({"config": {"x": 1}}, "sdpa has no setting 'x'; it has none"),
    "text": (
        {"variant": "linear", "fidelity": "learned", "config": {"feature_map": "xx"}}, "no feature_map of 'xx'"
    ),
    "shape": (
        {"variant": "neighborhood", "fidelity": "approximate", "config": {"window": "8y8"}}, "no window of '8y8'"
    ),
    "truth": (
        {"variant": "axial", "fidelity": "approximate", "config": {"axis": 0, "causal": 1}}, "no causal of 1"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_no_variant_has(case: str) -> None:
    facts, words = SETTINGS[case]
    with pytest.raises(PlanError, match=words) as told:
        read_plan(plan(decision(**facts)))
    assert "\n" not in str(told.value)


def test_settings_that_a_variant_shows() -> None:
    for name, variant in rewriter.variants().items():
        for case in variant.cases:
            for config in case.configs or variant.configs(case.site, TARGET):
                chosen = decision(site=case.site.key(), variant=name, fidelity=variant.fidelity, config=config)
                read_plan(plan(chosen))
    others = {
        "sliding_window": {"window": 77, "sinks": 0}, "sale": {**dict(config_of("sale")), "tau": 1},
        "neighborhood": {"window": "16x3x4", "stride": 2}, "axial": {"axis": 1, "causal": False},
        "block_sparse": {"mask": "share_question", "documents": "1,2,3,4,5", "seed": 0},
    }  # fmt: skip
    for name, config in others.items():
        read_plan(plan(decision(variant=name, fidelity="approximate", config=config)))


def config_of(name: str) -> Config:
    return next(iter(rewriter.variants()[name].configs(SITE, TARGET)))


def test_heads_of_a_plan_are_those_of_the_site() -> None:
    def mixed(*heads: tuple[int, ...], **facts: Any) -> Plan:
        groups = tuple(HeadGroup(heads=each, variant="sdpa") for each in heads)
        return plan(decision(variant=MIXED, heads=groups, **facts))

    read_plan(mixed((0,), (1,)))
    for heads in (((0,),), ((0,), (0,)), ((0,), (1, 2)), ((0, 1), (1,))):
        with pytest.raises(PlanError, match="does not hold each of its 2 heads once"):
            read_plan(mixed(*heads))
    with pytest.raises(PlanError, match="heads that differ cannot have"):
        read_plan(mixed((0,), (1,), config={"window": 3}))


def test_a_measured_plan_has_its_parameters() -> None:
    fitted = decision(variant="linear", fidelity="learned", config={"feature_map": "hedgehog"})
    read_plan(plan(fitted))  # by hand, to be fitted
    measured = dataclasses.replace(plan(fitted), guard={"held": True})
    with pytest.raises(PlanError, match=r"no parameters for linear at a\.b"):
        read_plan(measured)
    read_plan(dataclasses.replace(measured, state={"a__b.query_map": torch.ones(1)}))


def test_a_plan_of_another_version_is_checked_again() -> None:
    (match,) = matches(Attention(), 600)
    made = plan(decision(path=match.site.path, site=match.site.key()))
    assert not Selector.replaying(made).doubted
    selector = Selector.replaying(dataclasses.replace(made, rewriter="0.0.0"))
    assert selector.doubted and "(rewriter differ)" in selector.notes[0]
