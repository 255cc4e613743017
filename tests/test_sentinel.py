"""Masks that are known only from what buffers held: a call for which that has changed gets the original mathematics."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter.backend import GraphRewriter
from rewriter.capture import compiled, exported
from rewriter.detect import detect
from rewriter.guard import error, tolerance
from rewriter.instances import Names
from rewriter.lower import Lowered
from rewriter.passes import Rewrite, rewritten
from rewriter.select import Selector
from rewriter.sentinel import Sentinel
from rewriter.site import Causal, Dense, Full, Mask, Padding, SlidingWindow, Window2d
from rewriter.variant import variants

LENGTH = 12


class Buffered(nn.Module):
    """Two layers under a mask that is a buffer, cut to the length of the input, as bool or added."""

    def __init__(self, seen: Tensor, added: bool = False) -> None:
        super().__init__()
        self.added = added
        self.register_buffer("seen", torch.zeros(seen.shape).masked_fill(~seen, -1e30) if added else seen)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            seen = self.seen[: x.shape[-2], : x.shape[-2]]
            scores = x @ x.mT
            scores = scores + seen if self.added else scores.masked_fill(~seen, float("-inf"))
            x = x + scores.softmax(-1) @ x
        return x


def causal() -> Tensor:
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()


def right(actual: Tensor, wanted: Tensor) -> bool:
    return error(actual, wanted) <= tolerance(torch.float32)


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "symbolic"])
@pytest.mark.parametrize("added", [False, True], ids=["bool", "added"])
@pytest.mark.parametrize(
    ("seen", "mask"),
    [(causal(), Causal()), (causal().triu(-3), SlidingWindow(3, 0)), (causal() | True, Full())],
    ids=["causal", "window", "all"],
)
def test_a_buffer_is_observed(rewrite: Any, seen: Tensor, mask: Mask, added: bool, dynamic: Any) -> None:
    model, x = Buffered(seen.clone(), added), torch.randn(2, 2, 8, 4)
    result = rewrite(model, x, variant="sdpa", dynamic=dynamic)
    assert [(s.mask, s.observed) for s in result.sites] == [(mask, ("mask",))] * 2
    lowered = [module for module in result.graphs[0].modules() if isinstance(module, Lowered)]
    assert all(module.spare for module in lowered) and lowered[0].sentinel is lowered[1].sentinel
    assert right(result.run(x), model(x))


CHANGES: dict[str, Callable[[Buffered], Any]] = {
    "filled": lambda model: model.seen.fill_(True),
    "one entry": lambda model: model.seen.__setitem__((0, 3), True),
    "loaded": lambda model: model.load_state_dict({"seen": torch.rand(LENGTH, LENGTH) > 0.3}),
    "another tensor": lambda model: setattr(model, "seen", causal().mT.contiguous()),
    "other memory": lambda model: setattr(model.seen, "data", causal().triu(-1)),
    "turned over": lambda model: model.seen.logical_not_().fill_diagonal_(True),
}


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_buffer_that_changes_after_the_optimisation(change: Callable[[Buffered], Any], inner: str) -> None:
    model, x = Buffered(causal()), torch.randn(2, 2, 8, 4)
    rewriter = GraphRewriter(Selector(allowed=frozenset({"sdpa"})), inner=inner, names=Names.of(model))
    run = compiled(model, rewriter)
    assert right(run(x), model(x))
    assert [s.mask for s in rewriter.sites.values()] == [Causal() if inner == "eager" else Dense()] * 2
    with torch.no_grad():
        change(model)
        wanted = model(x)
        for _ in range(2):
            assert torch.allclose(run(x), wanted, atol=1e-5, equal_nan=True)
        model.seen.copy_(causal())
        assert right(run(x), model(x))


def test_inductor(rewrite: Any) -> None:
    """Nothing that is only observed is used where a compiler traces what is left."""
    model, x = Buffered(causal()), torch.randn(2, 2, 8, 4)
    run = torch.compile(model, backend="rewriter", options={"inner": "inductor", "variants": ["sdpa"]})
    assert right(run(x), model(x))
    model.seen.logical_or_(causal().mT)
    assert right(run(x), model(x))


def test_integers_are_taken_for_0_and_1(rewrite: Any) -> None:
    def attend(x: Tensor, tokens: Tensor) -> Tensor:
        hidden = (1.0 - tokens[:, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
        return (x @ x.mT + hidden).softmax(-1) @ x

    x, tokens = torch.randn(2, 6, 4), torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]])
    result = rewrite(attend, x, tokens, variant="sdpa")
    assert [(s.mask, s.observed) for s in result.sites] == [(Padding(), ("binary",))]
    for other in (tokens, tokens.flip(0), tokens * 0 + 1, tokens * 2, tokens - 1):
        assert torch.allclose(result.run(x, other), attend(x, other), atol=1e-5)
    assert len(result.graphs) == 1


def test_in_inference_mode(rewrite: Any) -> None:
    """Versions are not counted there, so values are compared."""
    with torch.inference_mode():
        model, x = Buffered(causal()), torch.randn(2, 2, 8, 4)
        result = rewrite(model, x, variant="sdpa")
        assert right(result.run(x), model(x))
        model.seen.fill_(True)
        assert right(result.run(x), model(x))


def test_gradients_pass(rewrite: Any) -> None:
    model, x = Buffered(causal()), torch.randn(2, 2, 8, 4, requires_grad=True)
    result = rewrite(model, x, variant="sdpa")
    (found,) = torch.autograd.grad(result.run(x).square().sum(), x)
    (wanted,) = torch.autograd.grad(model(x).square().sum(), x)
    assert error(found, wanted) <= 10 * tolerance(torch.float32)


def test_a_sentinel() -> None:
    buffer, flags = torch.arange(4), torch.tensor([0, 1])
    sentinel = Sentinel.of([buffer])
    assert sentinel.holds([buffer, flags]) and sentinel.holds([buffer.clone(), flags])
    flags[0] = 2
    assert not sentinel.holds([buffer, flags])
    flags[0] = 1
    assert sentinel.holds([buffer, flags])
    for other in (copy.deepcopy(sentinel), pickle.loads(pickle.dumps(sentinel))):
        assert other.holds([torch.arange(4)])
        assert not other.holds([torch.arange(5)]) and not other.holds([torch.arange(4).float()])
    with torch._subclasses.FakeTensorMode() as mode:
        assert not sentinel.holds([mode.from_tensor(buffer)])
    buffer[0] = 9
    assert not sentinel.holds([buffer])


def test_an_exported_program(rewrite: Any) -> None:
    """Its buffers are attributes of the graph."""
    model, x = Buffered(causal()), torch.randn(2, 2, 8, 4)
    graph = exported(torch.export.export(model, (x,)))
    work = Rewrite(graph, {}, detect(graph))
    assert [(s.mask, s.observed) for s in work.detection.sites] == [(Causal(), ("mask",))] * 2
    run = rewritten(work, lambda match: variants()["sdpa"].build(match.site, {}))
    assert run is not None
    assert right(run(x), model(x))
    state = dict(run.named_buffers()) | {name: t for name, t in run.state_dict().items()}
    for buffer in [t for name, t in state.items() if "seen" in name]:
        buffer.copy_(causal() | (torch.arange(LENGTH) < 4))
    model.seen.copy_(causal() | (torch.arange(LENGTH) < 4))
    assert right(run(x), model(x))


def regions() -> Tensor:
    """bool[4, 16, 16]: which tokens of an 8 x 8 grid, in windows of 4 x 4 and rolled by 2, were neighbours."""
    part = (torch.arange(8) >= 6).long()
    region = (part[:, None] * 2 + part).view(2, 4, 2, 4).transpose(1, 2).reshape(4, 16)
    return region[:, None] == region[:, :, None]


def test_windows_that_are_a_buffer(rewrite: Any) -> None:
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.zeros(4, 16, 16).masked_fill(~regions(), -100.0))

        def forward(self, x: Tensor) -> Tensor:
            scores = (x @ x.mT).view(2, 4, 2, 16, 16) + self.mask[:, None]
            return scores.view(8, 2, 16, 16).softmax(-1) @ x

    model, x = Windows(), torch.randn(8, 2, 16, 4)
    result = rewrite(model, x, variant="sdpa")
    assert [(s.mask, s.observed) for s in result.sites] == [(Window2d(4, 4, 2, 2), ("mask",))]
    assert right(result.run(x), model(x))
    model.mask[1, 0, 1] = -1e9
    assert right(result.run(x), model(x))


def test_a_bias_that_is_a_buffer_is_always_passed(rewrite: Any) -> None:
    class Sloped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("bias", -0.5 * (torch.arange(8)[:, None] - torch.arange(8)).abs().float())

        def forward(self, x: Tensor) -> Tensor:
            return (x @ x.mT + self.bias).softmax(-1) @ x

    model, x = Sloped(), torch.randn(2, 2, 8, 4)
    result = rewrite(model, x, variant="sdpa")
    assert [(s.mask, s.bias, s.observed) for s in result.sites] == [(Full(), "alibi", ("bias",))]
    model.bias.normal_()
    assert right(result.run(x), model(x))


class Filled(nn.Module):
    """Causal attention whose hidden scores become what a buffer holds."""

    def __init__(self, fill: float, spelling: str = "where") -> None:
        super().__init__()
        self.register_buffer("fill", torch.tensor(fill))
        self.fill: Tensor
        self.spelling = spelling

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, S, D) from such a tensor."""
        scores, seen = x @ x.mT, torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool).tril()
        if self.spelling == "where":
            scores = torch.where(seen, scores, self.fill.to(scores.dtype))
        elif self.spelling == "turned":
            scores = torch.where(~seen, self.fill, scores)
        else:
            scores = scores.masked_fill(~seen, self.fill)
        return scores.softmax(-1) @ x


@pytest.mark.parametrize("spelling", ["where", "turned", "masked_fill"])
@pytest.mark.parametrize("fill", [-1e9, -1e4, float("-inf")])
def test_a_fill_that_is_a_buffer(rewrite: Any, fill: float, spelling: str) -> None:
    model, x = Filled(fill, spelling), torch.randn(2, 2, 8, 4)
    result = rewrite(model, x, variant="sdpa")
    assert [(s.mask, s.observed) for s in result.sites] == [(Causal(), ("fill",))]
    assert right(result.run(x), model(x))


def test_a_fill_of_an_exported_program() -> None:
    model, x = Filled(-1e9), torch.randn(2, 2, 8, 4)
    graph = exported(torch.export.export(model, (x,)))
    work = Rewrite(graph, {}, detect(graph))
    assert [(s.mask, s.observed) for s in work.detection.sites] == [(Causal(), ("fill",))]
    run = rewritten(work, lambda match: variants()["sdpa"].build(match.site, {}))
    assert run is not None
    assert right(run(x), model(x))


def test_a_fill_that_hides_nothing_is_refused(rewrite: Any) -> None:
    result = rewrite(Filled(-5.0), torch.randn(2, 2, 8, 4), variant="sdpa")
    assert not result.sites
    assert "does not hide them" in result.refusals[0]


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("later", [-1e4, -1e30, float("-inf")])
def test_a_fill_that_changes_after_the_optimisation(later: float, inner: str) -> None:
    """Another fill that hides does the same. One that does not is another function: NaN, and not the wrong numbers."""
    model, x = Filled(-1e9), torch.randn(2, 2, 8, 4)
    rewriter = GraphRewriter(Selector(allowed=frozenset({"sdpa"})), inner=inner, names=Names.of(model))
    run = compiled(model, rewriter)
    assert right(run(x), model(x))
    assert [s.mask for s in rewriter.sites.values()] == [Causal() if inner == "eager" else Dense()]
    model.fill.fill_(later)
    assert right(run(x), model(x))
    model.fill.fill_(-5.0)
    assert run(x)[..., :-1, :].isnan().all()


def test_two_fills_of_which_one_is_stronger(rewrite: Any) -> None:
    """A query that sees no other key sees itself: the weaker fill is what is left to choose."""

    class Both(Filled):
        def forward(self, x: Tensor) -> Tensor:
            place = torch.arange(x.shape[-2])
            scores = torch.where(place <= place[:, None], x @ x.mT, self.fill)
            return torch.where(place != place[:, None], scores, self.weaker).softmax(-1) @ x

    model, x = Both(-1e9), torch.randn(2, 2, 8, 4)
    model.register_buffer("weaker", torch.tensor(-1e5))
    result = rewrite(model, x, variant="sdpa")
    assert len(result.sites) == 1
    assert right(result.run(x), model(x))
