"""`rewriter bench guard`: what is measured on fresh data, that it goes on where it was, and what is counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from rewriter import cli
from rewriter.bench import guard_tables, hosts
from rewriter.bench.guarded import Hosts, Loaded, Run, Settings, measured, planned, summaries
from rewriter.bench.hosts import Host, articles, distinct, named
from rewriter.bench.simple import Simple, compared
from rewriter.bench.speech import spoken
from rewriter.demo.assets import ENCODER, TEXTS, Package, encoder_folder, news_lines
from rewriter.errors import OptionError
from rewriter.metrics import BUILT_IN
from rewriter.session import session_of
from rewriter.tune import measure, record, whole
from rewriter.tune.search import MARGIN
from rewriter.tune.solve import Choice, Column, Solution, Table, effect_of

PIECES = 60
SETTINGS = Settings(tokens=300, calibration=9, fresh=7)


@pytest.fixture
def tiny(tiny_lm: Callable[..., torch.nn.Module]) -> Host:
    def pieces(tokens: int) -> list[dict[str, Any]]:
        generator = torch.Generator().manual_seed(0)
        return [{"input_ids": torch.randint(3, 128, (1, tokens), generator=generator)} for _ in range(PIECES)]

    return Host(
        name="tiny", title="tiny", packages=(), load=lambda: tiny_lm("eager"), pieces=pieces, tokens=300,
        metric="perplexity", bounds=(0.5, 1e-9),
    )  # fmt: skip


def there(name: str) -> Host:
    """A host whose packages are installed."""
    (host,) = named([name])
    if host.missing:
        pytest.skip(host.missing)
    return host


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], Any]:
    kept: dict[tuple[str, str], Any] = {}
    monkeypatch.setattr(record, "recall", lambda kind, place: kept.get((kind, place)))
    monkeypatch.setattr(record, "remember", lambda kind, place, value: kept.update({(kind, place): value}))
    return kept


@pytest.fixture
def window_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs that are set, the later candidate the cheaper (the window is after what is exact), and end to end too."""
    monkeypatch.setattr(
        measure.SiteBench, "compare", lambda self, built, **_: [9.0 - 2 * n for n in range(len(built) + 1)]
    )
    monkeypatch.setattr(whole, "costs_of", lambda runs, request: [4.0, 2.0, 3.0][: len(runs)])


def ran(outcome: str = "approximate", drop: float = 0.005, faster: float = 2.0, model: str = "a") -> Run:
    return Run(model, 64, 0.01, 0, outcome, drop, 0.004, 7, faster, 20, 240, 1.0)


def test_a_run_is_measured_on_fresh_data_and_kept(
    tiny: Host, cache: dict[tuple[str, str], Any], window_pays: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    among = Hosts(SETTINGS)
    found = list(measured([tiny], 2, among))
    assert [(each.bound, each.seed, each.tokens, each.fresh) for each in found] == [(0.5, 0, 300, 7), (1e-9, 0, 300, 7)]
    loose, strict = found
    assert loose.outcome == "approximate" and loose.faster == 2.0 and 1e-5 < abs(loose.drop) <= 0.5
    assert strict.outcome == "exact" and abs(strict.drop) < 1e-5
    least = 2 + 3 + 3 * 4 + 1  # does it repeat itself, the original, effects, and a trial that is lost at once
    assert loose.all == strict.all > 0 and min(loose.calls, strict.calls) >= least, "also where the cache knew them"
    assert session_of(among.loaded(tiny).model) is None, "the next run starts from the original"

    def never(host: Host) -> Loaded:
        raise AssertionError("loaded a model for runs that are over")

    again = Hosts(SETTINGS)
    monkeypatch.setattr(again, "loaded", never)
    assert list(measured([tiny], 2, again)) == found
    with pytest.raises(AssertionError):
        list(measured([tiny], 3, again))
    other = Hosts(replace(SETTINGS, fresh=6))
    monkeypatch.setattr(other, "loaded", never)
    with pytest.raises(AssertionError):
        list(measured([tiny], 1, other))


def test_fresh_data_are_in_no_calibration(tiny: Host) -> None:
    loaded = Loaded(tiny, SETTINGS)
    divisions = [loaded.divided(seed) for seed in range(20)]
    for calibration, fresh in divisions:
        assert len(calibration) == 9 and len(fresh) == 7
        assert not {id(batch) for batch in calibration} & {id(loaded.batches[n]) for n in fresh}
    assert len({tuple(fresh) for _, fresh in divisions}) > 10, "the seed shuffles"


def test_no_text_is_in_two_pieces() -> None:
    there("encoder")
    found = articles(encoder_folder(), 510)
    assert len(found) > 90 and {len(ids) for ids in found} == {510}
    # Runs of words that are in two pieces would be those of an article that was cut in two.
    runs = [{tuple(ids[at : at + 30]) for at in range(len(ids) - 29)} for ids in found]
    assert sum(map(len, runs)) == len(set().union(*runs))


def test_a_text_that_was_sent_again_is_left_out() -> None:
    words = [str(n) for n in range(60)]
    texts = [" ".join(words[:40]), "short", " ".join(words[30:]), "short", " ".join(words[10:30])]
    assert list(distinct(texts)) == [texts[0], texts[1], texts[2]]


def test_the_drop_is_that_of_the_metric(tiny: Host) -> None:
    loaded = Loaded(tiny, SETTINGS)
    assert loaded.drop_on(range(5)) == 0
    before = loaded._original(0)[0].value
    with torch.no_grad():
        loaded.model.lm_head.weight.zero_()
    uniform = 128.0
    assert loaded.drop_on([0]) == pytest.approx(uniform / before - 1, rel=1e-4)
    assert Loaded(replace(tiny, metric="cosine"), SETTINGS).drop_on([1, 2]) == pytest.approx(0, abs=1e-6)


def test_runs_are_over_models_bounds_and_seeds(tiny: Host) -> None:
    other = replace(tiny, name="other", bounds=(0.1,))
    found = [(host.name, bound, seed) for host, bound, seed in planned([tiny, other], 5)]
    assert found == [("tiny", 0.5, 0), ("other", 0.1, 0), ("tiny", 1e-9, 0), ("tiny", 0.5, 1), ("other", 0.1, 1)]
    assert list(planned([], 5)) == []


def test_what_is_counted() -> None:
    kept = [ran(), ran("original", 0.0, 1.0), ran("exact", 1e-9, 1.2)] + [ran()] * 17
    (total,) = summaries(kept)
    assert (total.runs, total.approximate, total.original, total.exceeded) == (20, 18, 1, 0)
    assert total.worst == 0.5 and total.faster == 2.0 and total.holds
    one_more = summaries([*kept[1:], ran(drop=0.0149)])[0]
    assert one_more.exceeded == 1 and one_more.holds, "one in twenty may"
    assert not summaries([*kept[1:], ran(drop=0.0151)])[0].holds, "none by more than a half"
    assert not summaries([*kept[2:], ran(drop=0.011), ran(drop=0.011)])[0].holds, "two in twenty are too many"
    assert [total.model for total in summaries([ran(), ran(model="b")])] == ["a", "b", "all"]
    assert guard_tables.rows([one_more])[0] == ("a", "20", "18", "1", "1 (5%)", "1.49", "2.00x", "12.0x")


def test_the_command(
    tiny: Host,
    cache: dict[tuple[str, str], Any],
    window_pays: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    absent = Package("a_package_that_nobody_has", "a-package==1")
    lost = replace(tiny, name="lost", packages=(absent,))
    monkeypatch.setattr(hosts, "HOSTS", {"tiny": replace(tiny, bounds=(0.5,)), "lost": lost})
    arguments = ["bench", "guard", "--runs", "1", "--variants", "sdpa"]
    assert cli.run([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (only,) = found["runs"]
    assert only["model"] == "tiny" and only["times"] == only["drop"] / 0.5 and only["seconds"] > 0
    assert found["models"][0]["runs"] == 1 and "pip install --no-deps a-package==1" in found["missing"]["lost"]
    assert cli.run([*arguments, "--simple", "--markdown"]) == 0
    shown = capsys.readouterr().out
    assert "| tiny | 0.5 | rank and revert | " in shown
    assert "| tiny | 1 | 0 |" in shown and "Not run: lost (" in shown
    monkeypatch.setattr("rewriter.bench.guarded.MOST_TIMES", -1.0)
    assert cli.run(arguments) != 0
    assert "does not hold what it promises" in " ".join(capsys.readouterr().err.split())


def test_simple_plans_keep_the_same_bound(tiny: Host, window_pays: None) -> None:
    plans = compared(Loaded(replace(tiny, bounds=(0.9,)), SETTINGS), 0.9, 0, lambda *_: None)
    exact, search, reverted, uniform = plans
    assert [plan.how for plan in plans] == ["exact", "search", "rank and revert", "one setting"]
    assert abs(exact.searched) < 1e-4 and abs(exact.fresh) < 1e-4 and exact.setting == ""
    assert uniform.setting.startswith("sliding_window") and uniform.tried == 1 and reverted.tried == 1
    assert all(plan.searched <= MARGIN * 0.9 and plan.measured > 0 for plan in plans)
    assert search.predicted >= max(reverted.predicted, uniform.predicted) and reverted.predicted > exact.predicted
    assert uniform.fresh != 0, "another window changes the answers"


def test_rank_and_revert_keeps_as_many_as_it_can(tiny: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight sites of rising effect, of which the first five are within the margin."""
    tables = [Table([Column(2.0, [0.0]), Column(1.0, [float(n)])]) for n in (3, 1, 2, 8, 5, 4, 7, 6)]
    simple = object.__new__(Simple)
    simple.exact, simple._tables, simple._margin = (Choice(0),) * 8, tables, 15.0
    simple._whole = [{"window": Choice(1)} for _ in tables]
    asked = []

    def drop_of(solution: Solution) -> float:
        asked.append(solution)
        return sum(effect_of(*pair) for pair in zip(tables, solution, strict=True))

    monkeypatch.setattr(simple, "drop_of", drop_of)
    plan, tried = simple.rank_and_revert()
    assert [choice.whole for choice in plan] == [1, 1, 1, 0, 1, 1, 0, 0]
    assert tried == len(asked) <= 4
    simple._margin = 0.5
    assert simple.rank_and_revert()[0] == simple.exact
    simple._margin = 36.0
    assert simple.rank_and_revert() == ((Choice(1),) * 8, 1)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--models", "none"], "there is no model 'none': choose among lm"),
        (["--models", "lost"], "no model can be measured"),
        (["--time-budget", "soon"], "'soon' is not a time"),
    ],
)
def test_one_sentence_for_what_is_wrong(
    given: list[str], sentence: str, tiny: Host, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = replace(tiny, name="lost", packages=(Package("a_package_that_nobody_has", "a-package==1"),))
    monkeypatch.setitem(hosts.HOSTS, "lost", lost)
    monkeypatch.setitem(hosts.HOSTS, "tiny", tiny)
    if "--time-budget" in given:
        given = [*given, "--models", "tiny"]
    assert cli.run(["bench", "guard", *given]) == 2
    assert sentence in " ".join(capsys.readouterr().err.split())


def test_too_little_data_is_said(tiny: Host) -> None:
    with pytest.raises(OptionError, match="the data of tiny are 60 pieces of 300 tokens, and 61 are needed"):
        Loaded(tiny, replace(SETTINGS, calibration=60))


def test_pictures_are_seen() -> None:
    vision = there("vision")
    pieces = vision.pieces(260)
    assert pieces[0]["pixel_values"].shape == (1, 3, 224, 224) and len(pieces) == 120
    assert len({float(piece["pixel_values"].double().sum()) for piece in pieces}) == 120, "each is another one"
    with torch.no_grad():
        assert vision.load()(**pieces[0]).last_hidden_state.shape == (1, 257, 384)


def test_speech_is_understood() -> None:
    host = there("speech")
    right = spoken([*distinct(news_lines())][:2])
    wrong = [right[0] | {"input_features": right[1]["input_features"]}]
    model = host.load()
    with torch.no_grad():
        heard, other = (float(model(**piece).loss.exp()) for piece in (right[0], *wrong))
    assert heard < 6 and other > 10 * heard, "the weights are trained, and stand where they belong"


def test_every_host_can_be_judged() -> None:
    for host in hosts.HOSTS.values():
        assert host.metric in BUILT_IN and all(0 < bound < 1 for bound in host.bounds)
    assert named(["encoder"])[0].packages == (ENCODER, TEXTS)
