"""Attention as people write it by hand, one spelling each, and what looks like attention and is none."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo.entry import LAYERS, Built, Recipes

recipe = Recipes("hand")

WIDTH, HEADS = 32, 4
HEAD = WIDTH // HEADS


class Stack(nn.Module):
    """Layers of projections around one way to attend: x + out(attend(q, k, v)), operands as (B, H, S, D)."""

    def __init__(self, attend: Callable[..., Tensor], layers: int = LAYERS, kv_heads: int = HEADS) -> None:
        super().__init__()
        self.attend, self.kv_heads = attend, kv_heads
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm": nn.LayerNorm(WIDTH),
                    "q": nn.Linear(WIDTH, WIDTH),
                    "k": nn.Linear(WIDTH, kv_heads * HEAD),
                    "v": nn.Linear(WIDTH, kv_heads * HEAD),
                    "out": nn.Linear(WIDTH, WIDTH),
                }
            )
            for _ in range(layers)
        )

    def forward(self, x: Tensor, **facts: Any) -> Tensor:
        for layer in self.layers:
            y = layer["norm"](x)
            q, k, v = (layer[name](y).unflatten(-1, (-1, HEAD)).transpose(1, 2) for name in "qkv")
            x = x + layer["out"](self.attend(q, k, v, **facts).transpose(1, 2).flatten(2))
        return x


def sequence(length: int = 13, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, WIDTH)


def spelled(
    name: str, length: int = 13, kv_heads: int = HEADS, sites: int = LAYERS, **entry: Any
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """An entry whose layers attend with the function below."""

    def add(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        recipe(name, sites, **entry)(lambda: (Stack(attend, kv_heads=kv_heads).eval(), sequence(length)))
        return attend

    return add


def causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


@spelled("softmax_matmul", masks=frozenset({"full"}), fast=True)
def _plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(HEAD), dim=-1) @ v


@spelled("einsum_causal", masks=frozenset({"causal(0)"}), fast=True)
def _einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * HEAD**-0.5
    scores = scores.masked_fill(~causal(q.shape[2]), float("-inf"))
    return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)


@spelled("scaled_on_both_sides")
def _both_sides(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    root = HEAD**-0.25
    return F.softmax((q * root) @ (k * root).mT, dim=-1) @ v


@spelled("bmm")
def _bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    shape = q.shape
    q, k, v = (t.reshape(-1, t.shape[2], HEAD) for t in (q, k, v))
    weights = torch.bmm(q / math.sqrt(HEAD), k.transpose(1, 2)).softmax(-1)
    return torch.bmm(weights, v).view(shape)


@spelled("baddbmm_with_a_bias")
def _baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    shape, length = q.shape, q.shape[2]
    q, k, v = (t.reshape(-1, t.shape[2], HEAD) for t in (q, k, v))
    distance = -(torch.arange(length)[:, None] - torch.arange(length)).abs().to(q.dtype)
    scores = torch.baddbmm(distance, q, k.mT, beta=0.1, alpha=HEAD**-0.5)
    return (scores.softmax(-1) @ v).view(shape)


@spelled("keys_transposed_weights", length=9)
def _transposed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax(k @ q.mT * HEAD**-0.5, dim=-2)
    return weights.mT @ v


@spelled("values_on_the_left")
def _left(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax(q @ k.mT * HEAD**-0.5, dim=-1)
    return (v.mT @ weights.mT).mT


@spelled("exp_and_sum")
def _exponential(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * HEAD**-0.5
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (weights / weights.sum(-1, keepdim=True)) @ v


@spelled("normalised_after_the_values")
def _late(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.exp(q @ k.mT * HEAD**-0.5)
    return (weights @ v) / weights.sum(-1, keepdim=True)


@spelled("logsumexp")
def _logsumexp(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * HEAD**-0.5
    return (scores - scores.logsumexp(-1, keepdim=True)).exp() @ v


@spelled("log_softmax_exp")
def _log_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.log_softmax(q @ k.mT * HEAD**-0.5, dim=-1).exp() @ v


@spelled("sigmoid")
def _sigmoid(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(q @ k.mT * HEAD**-0.5 - math.log(k.shape[2])) @ v


@spelled("multiply_and_sum", length=7)
def _multiply_and_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = ((q[:, :, :, None] * k[:, :, None]).sum(-1) * HEAD**-0.5).softmax(-1)
    return (weights[..., None] * v[:, :, None]).sum(-2)


@spelled("distances", length=9)
def _distances(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(-(torch.cdist(q, k) ** 2) / 2, dim=-1) @ v


@spelled("cosine")
def _cosine(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(10 * F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT, dim=-1) @ v


@spelled("softcap_causal", masks=frozenset({"causal(0)"}))
def _softcap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = 5.0 * torch.tanh(q @ k.mT * HEAD**-0.5 / 5.0)
    return torch.where(causal(q.shape[2]), scores, torch.finfo(scores.dtype).min).softmax(-1) @ v


@spelled("window_from_distances", length=19, masks=frozenset({"sliding_window(4, 0)"}))
def _window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    at = torch.arange(q.shape[2])
    behind = at[:, None] - at
    scores = q @ k.mT * HEAD**-0.5 + torch.zeros(()).masked_fill((behind < 0) | (behind > 4), float("-inf"))
    return scores.softmax(-1) @ v


@spelled("slopes_causal", length=12)
def _slopes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    slopes = torch.tensor([2.0 ** -(8 * (head + 1) / HEADS) for head in range(HEADS)])
    at = torch.arange(q.shape[2])
    bias = -slopes[:, None, None] * (at[:, None] - at)
    return (q @ k.mT * HEAD**-0.5 + bias).masked_fill(~causal(q.shape[2]), -1e9).softmax(-1) @ v


@spelled("groups_repeated", kv_heads=2)
def _repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
    return torch.softmax(q @ k.mT * HEAD**-0.5, dim=-1) @ v


@spelled("groups_by_five_dimensions", kv_heads=2)
def _five_dimensions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    grouped = q.unflatten(1, (2, 2))
    weights = torch.einsum("bgrid,bgjd->bgrij", grouped, k).mul(HEAD**-0.5).softmax(-1)
    return torch.einsum("bgrij,bgjd->bgrid", weights, v).flatten(1, 2)


@spelled("one_key_head", kv_heads=1)
def _one_key_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT * HEAD**-0.5, dim=-1) @ v


def _padded(q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
    return (q @ k.mT * HEAD**-0.5).masked_fill(~real[:, None, None], float("-inf")).softmax(-1) @ v


@recipe("key_padding", LAYERS, masks=frozenset({"padding"}), fast=True)
def _padding() -> Any:
    real = torch.arange(13) < torch.tensor([[13], [8]])
    return Stack(_padded).eval(), sequence(), {"real": real}


@spelled("sink_column")
def _sink(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * HEAD**-0.5
    weights = torch.cat([scores, torch.zeros_like(scores[..., :1])], dim=-1).softmax(-1)
    return weights[..., :-1] @ v


@spelled("top_k", length=12)
def _top_k(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * HEAD**-0.5
    kept = scores.topk(4, dim=-1).values[..., -1:]
    return scores.masked_fill(scores < kept, float("-inf")).softmax(-1) @ v


@spelled("blocks_of_queries", length=16, sites=LAYERS * 2)
def _blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    parts = [torch.softmax(block @ k.mT * HEAD**-0.5, dim=-1) @ v for block in q.split(8, dim=2)]
    return torch.cat(parts, dim=2)


@spelled("windows_by_reshaping", length=16)
def _local(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.unflatten(2, (4, 4)) for t in (q, k, v))
    return (torch.softmax(q @ k.mT * HEAD**-0.5, dim=-1) @ v).flatten(2, 3)


@spelled("across_channels")
def _channels(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = (F.normalize(t, dim=2) for t in (q, k))
    return (torch.softmax(q.mT @ k, dim=-1) @ v.mT).mT


@spelled("difference_of_two", sites=LAYERS * 2)
def _difference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    (q1, q2), (k1, k2) = q.chunk(2, dim=-1), k.chunk(2, dim=-1)
    scale = (HEAD // 2) ** -0.5
    return torch.softmax(q1 @ k1.mT * scale, -1) @ v - 0.3 * torch.softmax(q2 @ k2.mT * scale, -1) @ v


@spelled("half_in_float32")
def _upcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    halves = [t.to(torch.bfloat16) for t in (q, k, v)]
    scores = halves[0] @ halves[1].mT * HEAD**-0.5
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(torch.bfloat16)
    return (weights @ halves[2]).to(q.dtype)


@spelled("fused_call", masks=frozenset({"causal(0)"}), fast=True)
def _fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@spelled("fused_call_with_groups_and_bias", kv_heads=2)
def _fused_bias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    at = torch.arange(q.shape[2], dtype=q.dtype)
    bias = -(at[:, None] - at).abs().sqrt()
    return F.scaled_dot_product_attention(q, k, v, bias[None, None], scale=0.2, enable_gqa=True)


class Cross(nn.Module):
    """Queries from one sequence, keys and values from another, then from learned latents back."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(5, WIDTH))
        self.read, self.write = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        latents = self.latents.expand(x.shape[0], -1, -1)
        latents = latents + self.read(latents, x, x, need_weights=False)[0]
        scores = self.write(x) @ latents.mT / math.sqrt(WIDTH)
        return x + scores.softmax(-1) @ latents


@recipe("latents_read_and_write", 2)
def _latents() -> Any:
    return Cross().eval(), sequence()


class HeadMixing(nn.Module):
    """Linear maps across the heads before and after the softmax (Shazeer et al. 2020, arXiv:2003.02436)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.before, self.after = nn.Linear(HEADS, HEADS), nn.Linear(HEADS, HEADS)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, HEAD)).permute(2, 0, 3, 1, 4)
        scores = self.before((q @ k.mT * HEAD**-0.5).movedim(1, -1)).movedim(-1, 1)
        weights = self.after(scores.softmax(-1).movedim(1, -1)).movedim(-1, 1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


@recipe("heads_mixed", 1)
def _heads_mixed() -> Any:
    return HeadMixing().eval(), sequence()


class Additive(nn.Module):
    """Relative positions by the shift of a padded product (Dai et al. 2019, arXiv:1901.02860)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.positions = nn.Linear(WIDTH, 3 * WIDTH), nn.Parameter(torch.randn(HEADS, 25, HEAD))
        self.u, self.w = nn.Parameter(torch.randn(HEADS, 1, HEAD)), nn.Parameter(torch.randn(HEADS, 1, HEAD))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, HEAD)).permute(2, 0, 3, 1, 4)
        length = x.shape[1]
        by_position = F.pad((q + self.w) @ self.positions.mT, (1, 0))
        by_position = by_position.view(*q.shape[:2], -1, length)[:, :, 1:].view(*q.shape[:3], -1)[..., :length]
        scores = ((q + self.u) @ k.mT + by_position) / math.sqrt(HEAD)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


@recipe("relative_shift", 1)
def _relative_shift() -> Any:
    return Additive().eval(), sequence(13)


class Pooling(nn.Module):
    """One query for the sequence, made from its mean."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.keys = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        query = self.query(x.mean(1, keepdim=True))
        return (torch.softmax(query @ self.keys(x).mT / math.sqrt(WIDTH), -1) @ x).squeeze(1)


@recipe("attention_pooling", 1)
def _pooling() -> Any:
    return Pooling().eval(), sequence()


class Cached(nn.Module):
    """One step of decoding: the keys and values of the past come in, and go out longer by one."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, HEAD)).permute(2, 0, 3, 1, 4)
        keys, values = torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)
        return torch.softmax(q @ keys.mT * HEAD**-0.5, -1) @ values, keys, values


@recipe("decoding_step", 1, masks=frozenset({"full"}))
def _cached() -> Any:
    return Cached().eval(), sequence(1), torch.randn(2, HEADS, 9, HEAD), torch.randn(2, HEADS, 9, HEAD)


class NonLocal(nn.Module):
    """The pixels of a map attend to each other (Wang et al. 2018, arXiv:1711.07971), in convolutions' layout."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Conv2d(8, 8, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (convolution(x).flatten(2) for convolution in (self.q, self.k, self.v))
        weights = torch.bmm(q.transpose(1, 2), k).softmax(-1)
        return x + torch.bmm(v, weights.transpose(1, 2)).view_as(x)


@recipe("non_local_block", 1)
def _non_local() -> Any:
    return NonLocal().eval(), torch.randn(2, 8, 5, 6)


def mha(**call: Any) -> Built:
    return nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).eval(), (*[sequence()] * 3,), call


@recipe("multihead_attention", 1, fast=True)
def _mha() -> Any:
    model, args, kwargs = mha(need_weights=False)
    return model, *args, kwargs


@recipe("multihead_attention_with_weights", 1)
def _mha_weights() -> Any:
    model, args, kwargs = mha(need_weights=True)
    return model, *args, kwargs


@recipe("multihead_attention_padded", 1, grad=True)
def _mha_padded() -> Any:
    hidden = torch.arange(13) >= torch.tensor([[13], [9]])
    model, args, kwargs = mha(key_padding_mask=hidden, need_weights=False)
    return model, *args, kwargs


@recipe("multihead_attention_extra_key", 1)
def _mha_extra() -> Any:
    model = nn.MultiheadAttention(WIDTH, HEADS, add_bias_kv=True, kdim=24, vdim=20).eval()
    return model, torch.randn(7, 2, WIDTH), torch.randn(9, 2, 24), torch.randn(9, 2, 20), {"need_weights": False}


def encoder() -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 48, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)


@recipe("encoder_eval", LAYERS)
def _encoder_eval() -> Any:
    return encoder().eval(), sequence()


@recipe("encoder_train", LAYERS, grad=True)
def _encoder_train() -> Any:
    return encoder().train(), sequence()


@recipe("encoder_decoder", LAYERS * 3, grad=True)
def _encoder_decoder() -> Any:
    model = nn.Transformer(WIDTH, HEADS, LAYERS, LAYERS, 48, dropout=0.0, batch_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(7)
    return model.train(), sequence(), sequence(7), {"tgt_mask": mask, "tgt_is_causal": True}


# --- without attention ----------------------------------------------------------------------------------------------


class Router(nn.Module):
    """A mixture of experts: a softmax over experts, whose outputs are added by weight."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(WIDTH, 4), nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        return (torch.stack([expert(x) for expert in self.experts], dim=-1) @ weights[..., None]).squeeze(-1)


@recipe("expert_router", 0, fast=True)
def _router() -> Any:
    return Router().eval(), sequence()


class Recogniser(nn.Module):
    """A recurrent network with a head of per-frame label probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(WIDTH, WIDTH, batch_first=True), nn.Linear(WIDTH, 20)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0]).log_softmax(-1)


@recipe("label_head", 0)
def _recogniser() -> Any:
    return Recogniser().eval(), sequence()


class Gate(nn.Module):
    """Channels weighted by what their means say (Hu et al. 2018, arXiv:1709.01507)."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.down, self.up = nn.Conv2d(3, 16, 3), nn.Linear(16, 4), nn.Linear(4, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.convolution(x)
        return x * self.up(self.down(x.mean((2, 3))).relu()).sigmoid()[..., None, None]


@recipe("channel_gate", 0)
def _gate() -> Any:
    return Gate().eval(), torch.randn(2, 3, 9, 9)


class Codes(nn.Module):
    """A soft look-up in a table of parameters: softmax over its rows, then their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(10, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x @ self.table.T, dim=-1) @ self.table


@recipe("soft_table", 0)
def _codes() -> Any:
    return Codes().eval(), sequence()


@spelled("linear_attention", sites=0)
def _linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return q @ (k.mT @ v) / (q @ k.sum(2)[..., None])


@spelled("products_without_normaliser", sites=0)
def _bare(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / k.shape[2]) @ v


class Contrast(nn.Module):
    """Similarities of two batches of vectors, and the probabilities of the pairs, which meet no values."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        left, right = (F.normalize(side(x.mean(1)), dim=-1) for side in (self.left, self.right))
        return (left @ right.T * 10).softmax(-1)


@recipe("contrastive_head", 0)
def _contrast() -> Any:
    return Contrast().eval(), sequence(batch=5)
