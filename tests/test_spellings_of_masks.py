"""Masks and biases in many spellings, taken for what they are. Captured without dynamo, each in some milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewriter.detect import Detection
from rewriter.site import (
    Causal,
    DataChunked,
    DataPrefix,
    Dense,
    Documents,
    Full,
    Mask,
    Padding,
    SlidingWindow,
    Window2d,
)
from tests.programs import check_equal, rewritten

N = 9
LOWEST = torch.finfo(torch.float32).min


def added(term: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Attention of x (B, S, 8) in two heads whose scores get this term of the other inputs added."""

    def attend(x: Tensor, *more: Tensor) -> Tensor:
        q = x.unflatten(-1, (2, 4)).transpose(1, 2)
        return (q @ q.mT + term(*more)).softmax(-1) @ q

    return attend


def kept(visible: Callable[..., Tensor], fill: float = float("-inf")) -> Callable[..., Tensor]:
    """The same under a bool mask."""

    def attend(x: Tensor, *more: Tensor) -> Tensor:
        q = x.unflatten(-1, (2, 4)).transpose(1, 2)
        return (q @ q.mT).masked_fill(~visible(*more), fill).softmax(-1) @ q

    return attend


def found(model: Callable[..., Tensor], *inputs: Tensor, others: list[tuple[Tensor, ...]] | None = None) -> Detection:
    """What is detected in `model(x, *inputs)`, after a check of its values on these inputs and others."""
    x = torch.randn(2, N, 8)
    detection, run = rewritten(model, x, *inputs, variant="sdpa")
    for given in [inputs, *(others or [])]:
        check_equal(run(x, *given), model(x, *given))
    assert len(detection.sites) == 1, detection.refusals
    return detection


def mask_of(model: Callable[..., Tensor], *inputs: Tensor, others: list[tuple[Tensor, ...]] | None = None) -> Mask:
    return found(model, *inputs, others=others).sites[0].mask


def tril() -> Tensor:
    return torch.ones(N, N).tril()


POSITIONAL: dict[str, tuple[Callable[[], Tensor], Mask]] = {
    "full of -inf, triu": (lambda: torch.full((N, N), float("-inf")).triu(1), Causal()),
    "(1 - tril) * lowest": (lambda: (1 - tril()) * LOWEST, Causal()),
    "(1 - tril) * -1e4": (lambda: (1 - tril()) * -1e4, Causal()),
    "-1e9 * (tril == 0)": (lambda: -1e9 * (tril() == 0), Causal()),
    "log of tril": (lambda: tril().log(), Causal()),
    "int tril": (lambda: (1 - tril().long()) * -1e9, Causal()),
    "masked_fill of ones": (lambda: torch.zeros(N, N).masked_fill(tril() < 0.5, -1e30), Causal()),
    "a sum of two": (lambda: (1 - tril()) * -1e9 + (1 - torch.ones(N, N).triu(-2)) * -1e9, SlidingWindow(2, 0)),
    "cat of columns": (lambda: torch.cat([torch.zeros(N, 1), (1 - tril())[:, 1:] * -1e9], 1), Causal()),
    "written in place": (lambda: torch.zeros(N, N).index_put_((torch.arange(N), torch.arange(N)), torch.tensor(0.0))
                         .masked_fill_(tril() == 0, -1e9), Causal()),
    "tanh of it": (lambda: ((tril() - 1) * 50).tanh() * 1e9, Causal()),
    "not enough to hide": (lambda: (1 - tril()) * -100.0, Dense()),
    "half of it": (lambda: (1 - tril()) * 0.5, Full()),
}  # fmt: skip


@pytest.mark.parametrize(("term", "mask"), POSITIONAL.values(), ids=POSITIONAL)
def test_of_positions(term: Callable[[], Tensor], mask: Mask) -> None:
    assert mask_of(added(term)) in (mask, Full() if mask == Dense() else mask)


def keys(tokens: Tensor) -> Tensor:
    return tokens[:, None, None, :]


TOKENS = torch.tensor([[1] * 6 + [0] * 3, [0] * 2 + [1] * 7])
PADDED: dict[str, Callable[[Tensor], Tensor]] = {
    "(1 - m) * lowest": lambda m: (1 - keys(m)) * LOWEST,
    "(1.0 - m.float()) * -1e4": lambda m: (1.0 - keys(m).float()) * -1e4,
    "m.float().masked_fill": lambda m: (1.0 - keys(m).float()).masked_fill((1.0 - keys(m).float()).bool(), LOWEST),
    "-1e9 * (m == 0)": lambda m: -1e9 * (keys(m) == 0),
    "log": lambda m: keys(m).float().log(),
    "(m - 1) * 1e9": lambda m: (keys(m).float() - 1) * 1e9,
    "for each head": lambda m: ((1 - keys(m)) * LOWEST).repeat(1, 2, N, 1),
    "for each query": lambda m: ((1 - keys(m)) * LOWEST).expand(-1, -1, N, -1),
    "where": lambda m: torch.where(keys(m) > 0, 0.0, LOWEST),
    "bool": lambda m: torch.zeros(2, 1, 1, N).masked_fill(~keys(m).bool(), float("-inf")),
    "in place": lambda m: torch.zeros(2, 1, 1, N).masked_fill_(keys(m) < 1, LOWEST),
    "outer product of ones": lambda m: (1 - torch.ones(2, N, 1) * m[:, None])[:, None] * LOWEST,
}


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("term", PADDED.values(), ids=PADDED)
def test_padding_that_is_added(term: Callable[[Tensor], Tensor], causal: bool) -> None:
    structure = torch.full((N, N), LOWEST).triu(1)
    model = added(lambda m: torch.maximum(term(m) + structure, torch.tensor(LOWEST)) if causal else term(m))
    tokens = TOKENS.clone()
    tokens[:, 0] = 1  # A row that sees nothing is another thing in each spelling.
    wanted = Causal() & Padding() if causal else Padding()
    assert mask_of(model, tokens, others=[(tokens.flip(0),), (tokens * 0 + 1,)]) == wanted


HIDDEN: dict[str, tuple[Callable[[Tensor], Tensor], Mask]] = {
    "or of what is hidden": (lambda m: ~((tril() == 0) | (keys(m) == 0)), Causal() & Padding()),
    "and": (lambda m: tril().bool() & keys(m).bool(), Causal() & Padding()),
    "product": (lambda m: tril() * keys(m) > 0, Causal() & Padding()),
    "sum of hidden": (lambda m: (1 - tril()) + (1 - keys(m)) == 0, Causal() & Padding()),
    "minimum": (lambda m: torch.minimum(tril(), keys(m).float()).bool(), Causal() & Padding()),
    "window": (lambda m: tril().triu(-3).bool() & keys(m).bool(), SlidingWindow(3, 0) & Padding()),
    "tokens that are not 0": (lambda m: keys(m) != 0, Padding()),
    "either": (lambda m: tril().bool() | keys(m).bool(), Dense()),
    "queries and keys": (lambda m: keys(m).bool() & m[:, None, :, None].bool(), Dense()),
    "queries": (lambda m: m[:, None, :, None].bool().expand(-1, -1, -1, N), Dense()),
    "unless all is padding": (lambda m: keys(m).bool() | (keys(m).sum(-1, keepdim=True) == 0), Padding()),
    "longer than a number": (lambda m: keys(m).bool() | (keys(m).sum(-1, keepdim=True) > 6), Padding()),
}  # fmt: skip


@pytest.mark.parametrize(("visible", "mask"), HIDDEN.values(), ids=HIDDEN)
def test_padding_that_is_kept(visible: Callable[[Tensor], Tensor], mask: Mask) -> None:
    tokens = TOKENS.clone()
    tokens[:, 0] = 1
    assert mask_of(kept(visible, -1e30), tokens, others=[(tokens.flip(0),)]) == mask


def test_lengths_are_padding() -> None:
    lengths = torch.tensor([4, 9])
    assert mask_of(kept(lambda n: torch.arange(N)[None, None, None] < n[:, None, None, None]), lengths) == Padding()


def test_batch_and_heads_on_one_axis() -> None:
    def attend(x: Tensor, tokens: Tensor) -> Tensor:
        q = x.unflatten(-1, (2, 4)).transpose(1, 2).flatten(0, 1)
        hidden = tokens.bool().logical_not()[:, None].expand(-1, 2, -1).reshape(4, 1, N)
        return torch.baddbmm(torch.zeros(4, N, N).masked_fill_(hidden, -1e30), q, q.mT).softmax(-1) @ q

    assert mask_of(attend, TOKENS, others=[(TOKENS.flip(0),)]) == Padding()


SEGMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [3, 3, 3, 3, 3, 1, 1, 1, 1]])
DOCUMENTS: dict[str, tuple[Callable[[Tensor], Tensor], Mask]] = {
    "equal ids": (lambda s: s[:, None, :, None] == s[:, None, None, :], Documents()),
    "difference of ids": (lambda s: (s[:, None, :, None] - s[:, None, None, :]).abs() < 1, Documents()),
    "causal": (lambda s: (s[:, None, :, None] == s[:, None, None, :]) & tril().bool(), Causal() & Documents()),
    "cumulated boundaries": (lambda s: (c := s.ne(0).cumsum(-1))[:, None, :, None] == c[:, None, None, :], Documents()),
    "position ids that begin again": (
        lambda s: (
            (c := (s.diff(dim=-1, prepend=s[:, :1] - 1) != 1).cumsum(-1))[:, None, :, None] == c[:, None, None, :]
        ),
        Documents(),
    ),
    "boundaries": (
        lambda s: (c := torch.searchsorted(s.sort(-1).values, torch.arange(N).expand(2, N).contiguous(), right=True))[
            :, None, :, None
        ]
        == c[:, None, None, :],
        Documents(),
    ),
    "and tokens": (
        lambda s: (s[:, None, :, None] == s[:, None, None, :]) & (s > 0)[:, None, None, :] & (s > 0)[:, None, :, None],
        Documents() & Padding(),
    ),
    "one of the batch": (lambda s: (s[:1, None, :, None] == s[:1, None, None, :]), Documents()),
    "one more than": (lambda s: s[:, None, :, None] == s[:, None, None, :] + 1, Dense()),
    "not greater": (lambda s: s[:, None, :, None] >= s[:, None, None, :], Dense()),
    "near": (lambda s: (s[:, None, :, None] - s[:, None, None, :]).abs() < 2, Dense()),
    "neighbours of equal ids": (
        lambda s: (s[:, None, :, None] == s[:, None, None, :]) | (tril().triu(-1) > 0), Dense(),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("visible", "mask"), DOCUMENTS.values(), ids=DOCUMENTS)
def test_documents(visible: Callable[[Tensor], Tensor], mask: Mask) -> None:
    assert mask_of(kept(visible, -1e30), SEGMENTS, others=[(SEGMENTS.flip(0),)]) == mask


def test_prefixes_of_the_data() -> None:
    def visible(n: Tensor) -> Tensor:
        return tril().bool() | (torch.arange(N) < n[:, None, None, None])

    assert mask_of(kept(visible), torch.tensor([3, 5])) == DataPrefix()
    assert mask_of(kept(lambda m: tril().bool() | keys(m).bool()), TOKENS) == Dense()


def test_blocks_from_the_first_token_of_a_row() -> None:
    def visible(m: Tensor) -> Tensor:
        start = (m.cumsum(-1) == 0).sum(-1)[:, None]
        block = (torch.arange(N) - start) // 4
        return (block[:, None, :, None] == block[:, None, None, :]) & tril().bool() & keys(m).bool()

    assert mask_of(kept(visible, -1e30), TOKENS) == Causal() & DataChunked(4) & Padding()


@pytest.mark.parametrize("fill", [-100.0, -1e9])
def test_shifted_windows(fill: float) -> None:
    """A grid of 8 x 12 in windows of 4 x 4, rolled by 2: the regions are written into an image, as it is done."""

    def attend(x: Tensor) -> Tensor:
        image, count = torch.zeros(1, 8, 12, 1), 0
        for rows in (slice(0, -4), slice(-4, -2), slice(-2, None)):
            for columns in (slice(0, -4), slice(-4, -2), slice(-2, None)):
                image[:, rows, columns, :] = count
                count += 1
        region = image.view(1, 2, 4, 3, 4, 1).permute(0, 1, 3, 2, 4, 5).reshape(6, 16)
        apart = region[:, None] - region[:, :, None]
        mask = apart.masked_fill(apart != 0, fill).masked_fill(apart == 0, 0.0)
        scores = x @ x.mT  # (B * 6, H, 16, 16)
        scores = scores.view(2, 6, 2, 16, 16) + mask[:, None]
        return scores.view(12, 2, 16, 16).softmax(-1) @ x

    x = torch.randn(12, 2, 16, 4)
    detection, run = rewritten(attend, x, variant="sdpa")
    assert [site.mask for site in detection.sites] == [Window2d(4, 4, 2, 2)]
    check_equal(run(x), attend(x))


def test_a_mask_that_is_given_is_a_tensor() -> None:
    """Whatever it holds now."""
    for mask in (tril().bool(), torch.ones(2, 1, N, N).bool()):
        assert mask_of(kept(lambda m: m), mask) == Dense()
    assert mask_of(added(lambda m: m), torch.zeros(N, N)) == Dense()
    assert mask_of(added(lambda m: m[:, None, None]), torch.zeros(2, N)) == Dense()


# --- biases ----------------------------------------------------------------------------------------------------------


def distances() -> Tensor:
    return torch.arange(N)[:, None] - torch.arange(N)


SLOPES = 2.0 ** -torch.arange(1, 3)


class Biased(nn.Module):
    def __init__(self, term: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.term = term
        self.slopes, self.table = nn.Parameter(SLOPES.clone()), nn.Parameter(torch.randn(2 * N, 2))
        self.whole, self.places = nn.Parameter(torch.randn(2, N, N)), nn.Parameter(torch.randn(N, 4))
        self.grid = nn.Parameter(torch.randn(25, 2))

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (2, 4)).transpose(1, 2)
        return (q @ q.mT + self.term(self, q)).softmax(-1) @ q


def grid_index() -> Tensor:
    place = torch.arange(N)
    rows, columns = place // 3, place % 3
    return (rows[:, None] - rows + 2) * 5 + (columns[:, None] - columns + 2)


BIASES: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "slopes": (lambda m, q: -SLOPES[:, None, None] * distances(), "alibi"),
    "slopes both ways": (lambda m, q: -SLOPES[:, None, None] * distances().abs(), "alibi"),
    "slopes of the key": (lambda m, q: SLOPES[:, None, None] * torch.arange(1 - N, 1), "alibi"),
    "learned slopes": (lambda m, q: -m.slopes[:, None, None] * distances().abs(), "alibi"),
    "slopes in bfloat16": (lambda m, q: (-SLOPES[:, None, None] * distances()).bfloat16().float(), "alibi"),
    "slopes and a mask": (
        lambda m, q: -SLOPES[:, None, None] * distances() + torch.full((N, N), float("-inf")).triu(1), "alibi",
    ),
    "slopes in a mask": (
        lambda m, q: torch.where(tril().bool(), -SLOPES[:, None, None] * distances(), LOWEST).contiguous(), "alibi",
    ),
    "table in a mask": (
        lambda m, q: m.table[distances() + N].permute(2, 0, 1)[None].masked_fill(tril() == 0, LOWEST), "relative",
    ),
    "squares": (lambda m, q: -SLOPES[:, None, None] * distances() ** 2, "relative"),
    "table of distances": (lambda m, q: m.table[distances() + N].permute(2, 0, 1), "relative"),
    "table of buckets": (
        lambda m, q: F.embedding(distances().abs().clamp(max=4), m.table).permute(2, 0, 1), "relative"
    ),
    "table of a grid": (lambda m, q: m.grid[grid_index().flatten()].view(N, N, 2).permute(2, 0, 1), "table"),
    "parameters": (lambda m, q: m.whole, "table"),
    "products with places": (lambda m, q: q @ m.places.mT, "decomposed"),
    "data": (lambda m, q: torch.tanh(F.linear(q, m.places)), "dense"),
    "relative and data": (
        lambda m, q: m.table[distances() + N].permute(2, 0, 1) + torch.tanh(F.linear(q, m.places)), "dense",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("term", "kind"), BIASES.values(), ids=BIASES)
def test_biases(term: Callable[[Any, Tensor], Tensor], kind: str) -> None:
    site = found(Biased(term)).sites[0]
    assert site.bias == kind
    assert site.mask == (Causal() if {"tril", "triu"} & {*term.__code__.co_names} else Full())
