"""The search where sites do not add up, and what the last resort reverts."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewriter
from rewriter.guard import Measurement
from rewriter.kernels.exact.sdpa import VARIANT as SDPA
from rewriter.kernels.local.sliding_window import VARIANT as WINDOW
from rewriter.metrics import Metric
from rewriter.report.facts import Facts
from rewriter.report.tables import searched as searched_in_words
from rewriter.site import AttentionSite, Causal
from rewriter.tune import predict, scores, whole
from rewriter.tune.choices import Candidate, SiteChoices, Workbench
from rewriter.tune.deadline import Deadline
from rewriter.tune.measure import SiteBench
from rewriter.tune.record import Record
from rewriter.tune.rehearsal import rehearsed
from rewriter.tune.search import MARGIN, MOST_TRIALS, search, tries
from rewriter.tune.slots import SlotRewriter
from rewriter.tune.tuning import Tuning

METRIC = Metric(name="made", higher_is_better=False, absolute=True, score=lambda *_: [])
ORIGINAL = Measurement(METRIC, ((0.0, 1.0),))
EXACT = 8.0
"""What `sdpa` costs at each site."""

Windowed = dict[int, int]
"""Which window each of the windowed sites has, by their numbers."""
Windows = Sequence[tuple[float, float]]
"""The cost and the predicted effect of each window at a site."""


class Scores:
    """What plans do to a metric, in closed form."""

    metric, batches, seconds_a_batch = METRIC, (0,), 0.0

    def __init__(self, drop: Callable[[Windowed], float]) -> None:
        self._drop = drop
        self.asked: list[Windowed] = []

    def of(self, named: Any, lost: Any) -> Measurement:
        self.asked.append(windowed(named))
        return Measurement(METRIC, ((self._drop(self.asked[-1]), 1.0),))


def windowed(named: Any) -> Windowed:
    found = {int(path): groups[0] for path, groups in named.items()}
    return {number: group[2]["window"] for number, group in found.items() if group[1] == WINDOW.name}


def searched(sites: Sequence[Windows], drop: Callable[[Windowed], float], bound: float) -> tuple[Windowed, float, Any]:
    """What is windowed in the plan that a search finds, what it costs, and all that was measured."""

    def choices(path: str, windows: Windows) -> SiteChoices:
        site = AttentionSite(
            path=path, heads=2, kv_heads=2, head_dim=8, v_head_dim=8, dtype="float32", scale=1.0, mask=Causal(),
            batch=1, q_len=64, kv_len=64,
        )  # fmt: skip
        exact = Candidate(SDPA, {}, lambda *_: torch.empty(0), EXACT)
        others = [
            Candidate(WINDOW, {"window": n, "sinks": 0}, lambda *_: torch.empty(0), cost, 0.1, [effect / 2, effect / 2])
            for n, (cost, effect) in enumerate(windows)
        ]
        region: Any = SimpleNamespace(lengths=(64, 64))
        return SiteChoices(region, site, EXACT + 2, exact, others, [exact, *others], {}, None)

    tuning = Tuning(
        nn.Identity(), SlotRewriter(None), "latency", Workbench("latency", None), Deadline(None), lambda *_: None,
        Record(),
    )  # fmt: skip
    tuning.choices = {str(n): choices(str(n), windows) for n, windows in enumerate(sites)}
    asked: Any = Scores(drop)
    search(tuning, asked, ORIGINAL, bound)
    best = tries(tuning)[0]
    return windowed(tuning.named(best.solution)), best.cost, asked.asked


@pytest.mark.parametrize("harm", [0.5, 1e3], ids=["some", "all"])
@pytest.mark.parametrize(
    "effects",
    [
        [0.0] * 6,
        [1e-4] * 6,
        [0.05] * 6,  # as much as the bound allows one of
        [1e-6, 1e-6, 1e-3, 1e-3, 1e-3, 1e-3],
        [6e-4, 5e-4, 4e-4, 3e-4, 2e-4, 1e-4],
    ],
    ids=["none", "small", "large", "culprits least", "culprits most"],
)
def test_of_two_that_are_harmful_only_together_one_is_reverted(effects: list[float], harm: float) -> None:
    def drop(on: Windowed) -> float:
        return harm if {0, 1} <= on.keys() else 0.0

    found, _, asked = searched([[(5.0, effect)] for effect in effects], drop, 0.1)
    assert len(found) == 5 and {2, 3, 4, 5} <= found.keys()
    assert len(asked) <= MOST_TRIALS and found in asked, "what is taken was measured as a whole"


def test_sites_that_add_up_need_no_last_resort() -> None:
    """Each is as predicted: the best of all plans is found with the first trial."""
    sites = [[(3.0 + n / 4, 0.04 / (1 + n)), (6.0, 0.002)] for n in range(6)]

    def drop(on: Windowed) -> float:
        return sum(sites[site][window][1] for site, window in on.items())

    found, cost, asked = searched(sites, drop, 0.1)
    assert len(asked) == 1 and asked == [found] and drop(found) <= MARGIN * 0.1
    assert cost == pytest.approx(cheapest(sites, drop, MARGIN * 0.1), rel=2e-3)


def cheapest(sites: Sequence[Windows], drop: Callable[[Windowed], float], margin: float) -> float:
    """Of all plans, tried one by one."""
    costs = []
    for picks in itertools.product(*(range(-1, len(windows)) for windows in sites)):
        on = {site: window for site, window in enumerate(picks) if window >= 0}
        if drop(on) <= margin:
            costs.append(sum(EXACT if w < 0 else sites[n][w][0] for n, w in enumerate(picks)))
    return min(costs)


def test_whatever_interacts_what_is_found_is_within_the_margin_and_near_the_best() -> None:
    """Narrow and wide windows at each site, predicted within a factor of three; some pairs of narrow ones are harmful
    together. Of what could be gained nine tenths are, on average over many such models.
    """
    generator, parts = random.Random(0), []
    for _ in range(40):
        count = generator.randint(3, 6)
        sites = [
            [
                (generator.uniform(3, 6), 10 ** generator.uniform(-4, -1.5)),
                (generator.uniform(6, 7.5), 10 ** generator.uniform(-5, -2.5)),
            ]
            for _ in range(count)
        ]
        wrong = [10 ** generator.uniform(-0.5, 0.5) for _ in sites]
        pairs = [p for p in itertools.combinations(range(count), 2) if generator.random() < 0.15]
        harms = {pair: 10 ** generator.uniform(-2, 0) for pair in pairs}

        def drop(on: Windowed, sites: Any = sites, wrong: Any = wrong, harms: Any = harms) -> float:
            alone = sum(sites[site][window][1] * wrong[site] for site, window in on.items())
            return alone + sum(harm for (a, b), harm in harms.items() if on.get(a) == on.get(b) == 0)

        found, cost, asked = searched(sites, drop, 0.1)
        assert drop(found) <= MARGIN * 0.1 and len(asked) <= MOST_TRIALS
        best = cheapest(sites, drop, MARGIN * 0.1)
        parts.append((EXACT * count - cost) / (EXACT * count - best) if best < EXACT * count else 1.0)
    assert sum(parts) / len(parts) > 0.9 and min(parts) > 0.4


# --- a model ---------------------------------------------------------------------------------------------------------

LENGTH, MARKED = 300, slice(10, 30)
"""Tokens, and which of them are marked: after the sinks of a window of 128, which forgets them."""


class Redundant(nn.Module):
    """Attentions that all tell whether marked tokens stood before. Within a group any one of them is enough, and the
    gradient of each is nothing.
    """

    def __init__(self, groups: Sequence[int]) -> None:
        super().__init__()
        self.sites = nn.ModuleList(nn.ModuleList(One() for _ in range(count)) for count in groups)

    def forward(self, x: Tensor) -> Tensor:
        told = [sum(site(x) for site in group).clamp(max=0.04) for group in self.sites]  # type: ignore[union-attr]
        return torch.stack([*told, torch.full_like(told[0], 0.02)], -1)


class One(nn.Module):
    """The mean of the marks over all tokens so far, (B, S): causal attention whose scores are all the same."""

    def forward(self, x: Tensor) -> Tensor:
        value = x[:, None]
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        scores = (0 * value @ value.mT).masked_fill(hidden, float("-inf"))
        return (scores.softmax(-1) @ value)[:, 0, :, 0]


@pytest.fixture
def priced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Windows cost a fifth of what is exact, which costs half of the original; and as a whole too."""

    def compare(self: SiteBench, implementations: Sequence[Any], **_: Any) -> list[float]:
        return [100.0, *(50.0 - 10 * n for n in range(len(implementations)))]

    monkeypatch.setattr(SiteBench, "compare", compare)
    monkeypatch.setattr(whole, "alternate", lambda functions, **_: [[0.1], [0.05], [0.08]][: len(functions)])
    yield


def marked(seed: int) -> Tensor:
    x = 0.01 * torch.randn(1, LENGTH, 4, generator=torch.Generator().manual_seed(seed))
    x[:, MARKED, 0] = 1.0
    return x


@pytest.mark.parametrize("groups", [[2, 2], [3, 1, 1]])
def test_a_model_that_needs_one_of_each_group(groups: list[int], priced: None) -> None:
    model = Redundant(groups).eval()
    batches = [marked(seed) for seed in range(24)]
    options: dict[str, Any] = {"metric": "cosine", "max_drop": 0.01, "variants": ["sdpa", "sliding_window"]}
    report = rewriter.report_of(rewriter.optimize(model, batches, **options))
    assert report is not None and report.verdict is not None and report.plan is not None
    assert report.verdict.held and not any("refused on held-out data" in note for note in report.notes)
    exact = [d.path for d in report.plan.decisions if d.variant != "sliding_window"]
    assert sorted(path.split(".")[1] for path in exact) == [str(n) for n in range(len(groups))], "the least"
    fresh = [marked(100 + seed) for seed in range(8)]
    similar = [nn.functional.cosine_similarity(model(x), Redundant(groups)(x), dim=-1).mean() for x in fresh]
    assert 1 - torch.stack(similar).mean().item() <= 0.01


def test_calls_are_counted(priced: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as there are: of both halves of the data, there and back, and of plans only until they are lost."""
    counts: dict[str, int] = {}

    def counting(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapped)

    for owner, name in ((scores, "evaluate"), (scores, "measure_original"), (predict, "gradients")):
        counting(owner, name)
    options: dict[str, Any] = {"metric": "cosine", "max_drop": 0.01, "variants": ["sdpa", "sliding_window"]}
    batches = [marked(seed) for seed in range(24)]
    planned = rehearsed(Redundant([2]).eval(), batches, metric="cosine", variants=options["variants"])
    model = rewriter.optimize(Redundant([2]).eval(), batches, **options)
    plan = rewriter.plan_of(model)
    assert plan is not None and plan.search is not None
    search = plan.search
    # All windowed is lost with the first of eight batches; then each alone, and on the rest what was found.
    assert [trial["within"] for trial in search["trials"]] == [False, True]
    assert counts == {"measure_original": 24, "gradients": 4, "evaluate": 1 + 8 + 16}
    assert search["evaluations"] == search["needed"] == 2 + 24 + 4 * 4 + 25
    assert search["guarding"] == 16 + 16 and search["pairs"] == 4
    assert search["exhaustive"] == search["exhaustive_by_heads"] == planned.changing * planned.searched == 2 * 8
    assert search["evaluations"] <= planned.calls and search["pairs"] == planned.pairs
    assert "To search takes 35 calls" in searched_in_words(Facts.of(plan)) and "would take 16" in searched_in_words(
        Facts.of(plan)
    )
