"""torch's fused inference path is written out, so that the attention inside is seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter.fastpath import WRITTEN_OUT, self_attention
from rewriter.guard import error, tolerance


def encoder(norm_first: bool, activation: str) -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        32, 4, 64, batch_first=True, norm_first=norm_first, activation=activation, dropout=0.0
    )
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_an_encoder(rewrite: Any, norm_first: bool, activation: str) -> None:
    model, x = encoder(norm_first, activation), torch.randn(3, 7, 32)
    with torch.no_grad():
        result = rewrite(model, x, variant="sdpa")
        assert error(result.out, model(x)) <= tolerance(torch.float32)
    assert [site.path for site in result.sites] == ["layers.0", "layers.1"]
    assert {(site.heads, site.head_dim, str(site.mask)) for site in result.sites} == {(4, 8, "full")}


def test_padding(rewrite: Any) -> None:
    model, x = encoder(False, "relu"), torch.randn(2, 7, 32)
    hidden = torch.arange(7) >= torch.tensor([[7], [4]])
    with torch.no_grad():
        result = rewrite(model, x, src_key_padding_mask=hidden, variant="sdpa")
        expected = torch.compile(model, backend="eager")(x, src_key_padding_mask=hidden)
    assert len(result.sites) == 2
    assert error(result.out, expected) <= tolerance(torch.float32)


@pytest.mark.parametrize("mask_type", [None, 0, 1])
@pytest.mark.parametrize("need_weights", [False, True])
def test_the_definition(need_weights: bool, mask_type: int | None) -> None:
    """Written out, the operator of `nn.MultiheadAttention` computes what torch computes."""
    (operator,) = (each for each in WRITTEN_OUT if WRITTEN_OUT[each] is self_attention)
    x = torch.randn(2, 5, 16)
    weights = [torch.randn(48, 16), torch.randn(48), torch.randn(16, 16), torch.randn(16)]
    masks: dict[int | None, Tensor | None] = {
        None: None,
        0: torch.ones(5, 5, dtype=torch.bool).triu(1),
        1: torch.arange(5) >= torch.tensor([[5], [3]]),
    }
    arguments = (x, x, x, 16, 4, *weights, masks[mask_type], need_weights, True, mask_type)
    with torch.no_grad():
        expected, given = operator(*arguments), self_attention(*arguments)
    assert error(given[0], expected[0]) <= tolerance(torch.float32)
    if need_weights:
        assert error(given[1], expected[1]) <= tolerance(torch.float32)


def test_gradients_take_the_usual_path(rewrite: Any) -> None:
    model, x = encoder(False, "relu"), torch.randn(2, 7, 32, requires_grad=True)
    result = rewrite(model, x, variant="sdpa")
    assert len(result.sites) == 2
    (gradient,) = torch.autograd.grad(result.out.square().sum(), x)
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    assert error(gradient, expected) <= tolerance(torch.float32)


def test_a_decoder_is_one_graph(rewrite: Any) -> None:
    """Whether its mask is causal is only a hint, which torch reads from the values of the mask."""
    layer = nn.TransformerDecoderLayer(16, 4, 32, batch_first=True)
    model = nn.TransformerDecoder(layer, 2).eval()
    mask = nn.Transformer.generate_square_subsequent_mask(6)

    class Decoded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, target: Tensor, memory: Tensor) -> Tensor:
            return self.model(target, memory, tgt_mask=mask)

    inputs = torch.randn(2, 6, 16), torch.randn(2, 9, 16)
    result = rewrite(Decoded(), *inputs, variant="sdpa")
    assert [(site.q_len, site.kv_len) for site in result.sites] == [(6, 6), (6, 9)] * 2
    with torch.no_grad():
        assert error(result.out, Decoded()(*inputs)) <= tolerance(torch.float32)
