"""Models that compute parts of themselves again for the backward: found, rewritten, and still computed again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import rewriter
from rewriter import checkpointed


class Block(nn.Module):
    """Attention under a mask that is made outside, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT * 8**-0.5).masked_fill(~mask, float("-inf")).softmax(-1)
        return x + F.dropout(self.out((weights @ v).transpose(1, 2).flatten(2)), 0.5, self.training)


def contexts() -> Any:
    """Products with weights are kept, all else is computed again."""

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept = operator in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


class Model(nn.Module):
    def __init__(self, nested: bool = False, **settings: Any) -> None:
        super().__init__()
        self.blocks, self.nested, self.settings = nn.ModuleList(Block() for _ in range(3)), nested, settings

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        if self.nested:
            return self.again(lambda x: self.again(self.blocks[1], self.again(self.blocks[0], x, mask), mask), x)
        for block in self.blocks:
            x = self.again(block, x, mask)
        return x

    def again(self, part: Any, *args: Tensor) -> Tensor:
        result: Tensor = checkpoint(part, *args, use_reentrant=False, **self.settings)
        return result


def results(run: Any, model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output and all gradients, with the same random numbers each time."""
    torch.manual_seed(3)
    model.zero_grad()
    out = run(x)
    out.square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("model", [Model(), Model(nested=True), Model(context_fn=contexts)], ids=["", "nested", "kept"])
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_what_is_computed_again(model: Model, inner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, calls = torch.randn(2, 7, 16), []
    expected = results(model, model, x)
    monkeypatch.setattr(
        checkpointed, "checkpoint", lambda *args, **settings: calls.append(args) or checkpoint(*args, **settings)
    )
    run = torch.compile(model, backend="rewriter", options={"inner": inner})
    for got, wanted in zip(results(run, model, x), expected, strict=True):
        torch.testing.assert_close(got, wanted)
    if inner == "eager":
        assert any("attention" in str(args[0].code) for args in calls)


def test_the_sites_and_their_masks() -> None:
    model = Model()
    report = rewriter.explain(model, torch.randn(2, 7, 16))
    assert [site.path for site in report.sites] == [f"blocks.{i}" for i in range(3)]
    assert {str(site.mask) for site in report.sites} == {"causal(0)"}


def test_dropout_of_a_part_without_attention() -> None:
    """torch's own eager backend draws other numbers for the backward than it drew for the forward."""
    layer = nn.Linear(8, 8)
    run = torch.compile(
        lambda x: checkpoint(lambda x: F.dropout(layer(x), 0.5), x, use_reentrant=False),
        backend="rewriter", options={"inner": "eager"},
    )  # fmt: skip
    out = run(torch.randn(16, 8, requires_grad=True))
    out.sum().backward()
    assert torch.equal(layer.bias.grad, 2.0 * (out != 0).sum(0))
