"""What a model recalls of pairs that were planted far before, and what is said of it."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter import probes
from rewriter.guard import evaluate
from rewriter.metrics import Batch
from rewriter.verdict import Check

WORDS = 600


class Copying(nn.Module):
    """A language model that only copies: each token looks for itself among those before, and expects what followed. It
    sees the last `window` tokens.
    """

    def __init__(self, window: int = 10**6) -> None:
        super().__init__()
        self.window = window
        made = torch.randn(WORDS, 64, generator=torch.Generator().manual_seed(0))
        self.words = nn.Parameter(made / made.norm(dim=1, keepdim=True))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        known = self.words[input_ids]
        before = nn.functional.pad(known[:, :-1], (0, 0, 1, 0))
        i, j = torch.arange(input_ids.shape[1])[:, None], torch.arange(input_ids.shape[1])
        seen = (j <= i) & (i - j < self.window)
        scores = (20 * known @ before.mT).masked_fill(~seen, float("-inf"))
        return SimpleNamespace(logits=12 * (scores.softmax(-1) @ known @ self.words.mT))


def texts(count: int = 8, rows: int = 1, length: int = 200, words: int = WORDS) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [Batch((torch.randint(0, words, (rows, length), generator=generator),)) for _ in range(count)]


def asked(batch: Batch) -> probes.Planted:
    assert isinstance(batch.source, probes.Planted)
    return batch.source


def check(window: int, batches: list[Batch], bound: float = 0.1) -> Check:
    planted = probes.planted(batches, 0)
    original, candidate = (evaluate(probes.RECALL, Copying(each), planted) for each in (10**6, window))
    return probes.judged(original, candidate, bound)


@pytest.mark.parametrize("rows", [1, 3])
def test_pairs_stand_at_their_distances_and_are_asked_for_at_the_end(rows: int) -> None:
    planted = probes.planted(texts(rows=rows), 3)
    assert len(planted) == {1: 8, 3: 4}[rows], "twelve pairs at each distance, three in a row of a text"
    for pairs, without in zip(planted[::2], planted[1::2], strict=True):
        ids, plain = pairs.args[0], without.args[0]
        before = ids.shape[1] - 12
        assert asked(pairs).places.tolist() == list(range(before, before + 12))
        assert torch.equal(ids[:, before:], plain[:, before:]), "the same questions"
        for row in range(rows):
            planted_at = (ids[row] != plain[row]).nonzero().flatten().tolist()
            assert planted_at == [start + n for start in (0, 94, 141, 165) for n in range(6)]
            found = {int(ids[row, n]): int(ids[row, n + 1]) for n in planted_at[::2]}
            questions, wanted = ids[row, before:].tolist(), asked(pairs).wanted[row].tolist()
            assert [found[q] for q in questions] == wanted
            assert not set(plain[row, :before].tolist()) & {*questions, *wanted}


@pytest.mark.parametrize(
    ("window", "lost", "part"), [(10**6, 0.0, None), (150, 1.0, "at 1 "), (60, 1.0, "at 0.5"), (8, 1.0, "at 0.125")]
)
def test_what_a_window_forgets(window: int, lost: float, part: str | None) -> None:
    found = check(window, texts(rows=2))
    assert found.drop == pytest.approx(lost, abs=0.2)
    assert found.held == (lost < 0.1)
    if part == "at 1 ":
        assert part in found.note, "shorter distances are in the window"
    assert check(window, texts(rows=2), bound=2.0).held


def test_a_model_that_recalls_nothing_is_not_probed() -> None:
    planted = probes.planted(texts(), 0)
    found = evaluate(probes.RECALL, Copying(1), planted)
    said = probes.judged(found, found, 0.1)
    assert said.held and said.drop is None and "does not recall" in said.note


def test_a_candidate_that_fails_has_lost_all() -> None:
    found = probes.judged(evaluate(probes.RECALL, Copying(), probes.planted(texts(), 0)), None, 0.1)
    assert not found.held and found.drop == math.inf


def test_long_texts_hold_more_pairs_so_that_fewer_are_run() -> None:
    (pairs, _) = planted = probes.planted(texts(rows=2, length=1000, words=3000), 0)
    assert len(planted) == 2 and asked(pairs).wanted.shape == (2, 32)


def test_what_nothing_can_be_planted_in() -> None:
    assert probes.planted(texts(length=50), 0) == []
    assert probes.planted(texts(words=9), 0) == [], "too few different tokens"
    (batch,) = texts(1)
    ids = batch.args[0]
    mask = torch.ones_like(ids)
    assert len(probes.planted([Batch(kwargs={"input_ids": ids, "attention_mask": mask})], 0)) == 2
    mask[:, :3] = 0
    assert probes.planted([Batch(kwargs={"input_ids": ids, "attention_mask": mask})], 0) == []


def test_the_seed_decides_what_is_planted() -> None:
    first, again, other = (probes.planted(texts(), seed)[0].args[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
