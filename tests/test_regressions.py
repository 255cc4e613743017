"""Bugs that users of other systems met, each as a test: research on the peers of this library, section 6.

Every model is rewritten exactly, by the original mathematics and by the fused call, and compared with itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

import rewriter
from rewriter.codegen import cpp, native
from rewriter.guard import model_tolerance, relative_rms
from rewriter.site import Causal, Dense, Full, Padding, Refusal, SlidingWindow
from rewriter.variant import variants
from tests.programs import check_equal

Rewrite = Callable[..., Any]

EXACT = pytest.mark.parametrize("variant", ["original", "sdpa"])
HIDDEN = torch.finfo(torch.float32).min


def tensors(
    batch: int = 3, heads: int = 4, length: int = 7, width: int = 8, *, kv_heads: int | None = None,
    kv_length: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Queries, keys and values with heads first, that take gradients."""
    kv = (batch, kv_heads or heads, kv_length or length, width)
    made = torch.randn(batch, heads, length, width), torch.randn(kv), torch.randn(kv)
    query, key, value = (t.requires_grad_() for t in made)
    return query, key, value


def causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def checked(rewrite: Rewrite, function: Callable[..., Any], *inputs: Tensor, variant: str = "original") -> Any:
    """The only site of a function, which computes the same with the variant in its place."""
    result = rewrite(function, *inputs, variant=variant)
    assert len(result.sites) == 1, result.refusals
    assert len(result.matches) == 1, "it is rewritten, not only recognised"
    check_equal(result.out, function(*inputs), inputs)
    return result.sites[0]


def close(actual: Tensor, expected: Tensor) -> bool:
    """Outputs of a whole model."""
    return relative_rms(actual, expected) <= model_tolerance(expected.dtype)


# --- products and scales ---------------------------------------------------------------------------------------------


@EXACT
@pytest.mark.parametrize(("batch", "length"), [(1, 7), (3, 7), (3, 8)])
def test_keys_permuted_to_width_by_length(rewrite: Rewrite, variant: str, batch: int, length: int) -> None:
    """pytorch#195320: with as many tokens as channels, keys permuted at once were bound as if transposed later."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, v = q.permute(0, 2, 1, 3), v.permute(0, 2, 1, 3)
        return (q @ k.permute(0, 2, 3, 1) / math.sqrt(8)).softmax(-1) @ v

    inputs = tuple(t.detach().transpose(1, 2).contiguous().requires_grad_() for t in tensors(batch, length=length))
    site = checked(rewrite, attend, *inputs, variant=variant)
    assert (site.heads, site.q_len, site.kv_len, site.head_dim) == (4, length, length, 8)
    assert site.scale == pytest.approx(8**-0.5)


@EXACT
@pytest.mark.parametrize("called", [False, True], ids=["eager", "called"])
def test_a_scale_that_is_not_the_default(rewrite: Rewrite, variant: str, called: bool) -> None:
    """pytorch#174049, pytorch#151098: another scale than 1 / sqrt(d) was replaced by the default."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if called:
            return F.scaled_dot_product_attention(q, k, v, scale=0.5)
        return (q @ k.mT * 0.5).softmax(-1) @ v

    assert checked(rewrite, attend, *tensors(width=16), variant=variant).scale == 0.5


@EXACT
@pytest.mark.parametrize(
    "scaled", [lambda s: s.mul(1 / 3), lambda s: s.div(3)], ids=["times a third", "divided by three"]
)
def test_times_and_divided_with_a_mask(rewrite: Rewrite, variant: str, scaled: Callable[[Tensor], Tensor]) -> None:
    """pytorch#195412: the multiplication was not matched where the division was."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return (scaled(q @ k.mT) + mask).softmax(-1) @ v

    mask = torch.zeros(3, 1, 7, 7).masked_fill(torch.rand(3, 1, 7, 7) < 0.3, HIDDEN)
    site = checked(rewrite, attend, *tensors(), mask, variant=variant)
    assert site.scale == pytest.approx(1 / 3)
    assert site.mask == Dense()


@EXACT
@pytest.mark.parametrize("commuted", [False, True])
def test_mask_plus_scores(rewrite: Rewrite, variant: str, commuted: bool) -> None:
    """pytorch#195782: `mask + scores` was not matched, `scores + mask` was."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = q @ k.mT / math.sqrt(8)
        return (mask + scores if commuted else scores + mask).softmax(-1) @ v

    mask = torch.zeros(3, 1, 7, 7).masked_fill(torch.rand(3, 1, 7, 7) < 0.3, HIDDEN)
    assert checked(rewrite, attend, *tensors(), mask, variant=variant).mask == Dense()


@EXACT
@pytest.mark.parametrize("module", [False, True], ids=["clone", "module"])
def test_the_copy_that_dropout_leaves_in_eval(rewrite: Rewrite, variant: str, module: bool) -> None:
    """pytorch PR #108141: a decomposition of dropout left `clone()` behind, and many models failed to match."""
    dropout = nn.Dropout(0.1).eval()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.mT / math.sqrt(8)).softmax(-1)
        return (dropout(weights) if module else weights.clone()) @ v

    assert checked(rewrite, attend, *tensors(), variant=variant).dropout_p == 0


@EXACT
@pytest.mark.parametrize("batch", [1, 2])
def test_batch_one_is_found_like_batch_two(rewrite: Rewrite, variant: str, batch: int) -> None:
    """pytorch, fuse_attention: `reshape` copies from batch 2 on only, so each pattern was needed twice."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.expand(batch, 4, 7, 8).reshape(batch * 4, 7, 8) for t in (q, k, v))
        weights = torch.bmm(q, k.transpose(1, 2)).reshape(batch, 4, 7, 7).mul(0.5).softmax(-1)
        return torch.bmm(weights.reshape(batch * 4, 7, 7), v).reshape(batch, 4, 7, 8).transpose(1, 2).reshape(-1, 32)

    site = checked(rewrite, attend, *tensors(batch), variant=variant)
    assert (site.scale, site.mask, site.head_dim) == (0.5, Full(), 8)


# --- masks -----------------------------------------------------------------------------------------------------------


class GPT2Attention(nn.Module):
    """As GPT-2 was written: a causal buffer for all lengths, of which a part is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", causal(32)[None, None], persistent=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) / torch.full([], v.size(-1) ** 0.5, dtype=q.dtype)
        length, kv_length = q.size(-2), k.size(-2)
        seen = self.bias[:, :, kv_length - length : kv_length, :kv_length]
        lowest = torch.full([], torch.finfo(scores.dtype).min, dtype=scores.dtype)
        return torch.where(seen, scores.to(scores.dtype), lowest).softmax(-1).type(v.dtype) @ v


@EXACT
@pytest.mark.parametrize("kv_length", [7, 12])
def test_a_slice_of_a_causal_buffer(rewrite: Rewrite, variant: str, kv_length: int) -> None:
    """pytorch#119760: the slice of GPT-2's causal buffer was not matched."""
    site = checked(rewrite, GPT2Attention(), *tensors(kv_length=kv_length), variant=variant)
    assert site.mask == Causal()
    assert site.scale == pytest.approx(8**-0.5)


class OtherNames(GPT2Attention):
    """With a way of its own to look up attributes, as modules have that rename their settings."""

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name.removeprefix("old_"))


@EXACT
def test_the_buffer_of_a_module_with_a_getattr_of_its_own(rewrite: Rewrite, variant: str) -> None:
    """diffusers' prior: dynamo names its buffers in another way, and the mask was taken for data."""
    assert checked(rewrite, OtherNames(), *tensors(), variant=variant).mask == Causal()


@EXACT
def test_gpt2(rewrite: Rewrite, variant: str) -> None:
    """pytorch#119760, in the model of today: causal, and with padding."""
    config = hf.GPT2Config(
        vocab_size=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2, attn_implementation="eager"
    )
    model, ids = hf.GPT2LMHeadModel(config).eval(), torch.randint(0, 64, (3, 9))
    padded = torch.ones_like(ids)
    padded[0, :4] = 0
    for given, masks in (({}, {Causal()}), ({"attention_mask": padded}, {Causal() & Padding()})):
        result = rewrite(model, input_ids=ids, use_cache=False, variant=variant, **given)
        assert len(result.sites) == 2
        assert {site.mask for site in result.sites} == masks
        assert close(result.out.logits, model(input_ids=ids, use_cache=False, **given).logits)


@EXACT
@pytest.mark.parametrize("causally", [False, True])
def test_the_fallback_of_sdpa_written_out(rewrite: Rewrite, variant: str, causally: bool) -> None:
    """pytorch PR #185574: scales of the square root on both sides and a safe softmax matched nothing."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q * math.sqrt(8**-0.5)) @ (k.transpose(-2, -1) * math.sqrt(8**-0.5))
        if causally:
            scores = scores + torch.zeros(7, 7).masked_fill(~causal(7), float("-inf"))
        shifted = (scores - scores.amax(-1, keepdim=True)).exp()
        weights = shifted / shifted.sum(-1, keepdim=True)
        empty = ~(scores != float("-inf")).any(-1, keepdim=True)
        return torch.where(empty, torch.zeros_like(weights), weights) @ v

    site = checked(rewrite, attend, *tensors(), variant=variant)
    assert site.scale == pytest.approx(8**-0.5)
    assert site.mask in ((Causal(), Dense()) if causally else (Full(),))


@EXACT
def test_the_safe_softmax_of_aten(rewrite: Rewrite, variant: str) -> None:
    """pytorch PR #185574: `aten._safe_softmax` itself, with a query that sees nothing."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = (q * 8**-0.25) @ (k * 8**-0.25).mT
        return torch.ops.aten._safe_softmax(scores + mask, -1) @ v

    mask = torch.zeros(3, 1, 7, 7).masked_fill(~causal(7), float("-inf"))
    mask[0, 0, 3] = float("-inf")
    q, k, v = (t.detach() for t in tensors())
    site = checked(rewrite, attend, q, k, v, mask, variant=variant)
    assert site.scale == pytest.approx(8**-0.5)


@EXACT
def test_a_mask_that_multiplies(rewrite: Rewrite, variant: str) -> None:
    """openxla/xla PR #11717: scores times 0 or 1 are not hidden: they take part in the softmax as zeros."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return (q @ k.mT * mask).softmax(-1) @ v

    inputs = (*tensors(), causal(7).float())
    result = rewrite(attend, *inputs, variant=variant)
    check_equal(result.out, attend(*inputs), inputs)
    assert [(site.mask, site.factor, site.edits) for site in result.sites] == [(Full(), "key", ("scaled_by_position",))]
    assert not result.matches, "recognised, and left as it is"


@EXACT
def test_weights_with_another_user(rewrite: Rewrite, variant: str) -> None:
    """openxla/xla PR #7331: weights that are also returned must be kept."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        weights = (q @ k.mT / math.sqrt(8)).softmax(-1)
        return weights @ v, weights

    inputs = tensors()
    result = rewrite(attend, *inputs, variant=variant)
    check_equal(result.out, attend(*inputs), inputs)
    assert [site.edits for site in result.sites] == [("weights_used",)], result.refusals
    assert not result.matches, "recognised, and left as it is"


@EXACT
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_after_what_looked_causal(rewrite: Rewrite, variant: str, side: str) -> None:
    """torchao's probe, DeepSpeed#3960: a batch without padding looked causal, and later masks were dropped."""

    def attend(q: Tensor, k: Tensor, v: Tensor, tokens: Tensor) -> Tensor:
        mask = causal(7) & tokens[:, None, None, :]
        return (q @ k.mT + torch.where(mask, 0.0, HIDDEN)).softmax(-1) @ v

    inputs, everything = tensors(), torch.ones(3, 7, dtype=torch.bool)
    padded = everything.clone()
    padded[0, slice(0, 3) if side == "left" else slice(4, 7)] = False
    result = rewrite(attend, *inputs, everything, variant=variant)
    assert [site.mask for site in result.sites] == [Causal() & Padding()]
    for tokens in (everything, padded):
        expected = attend(*inputs, tokens)
        blind = side == "left" and tokens is padded and variant == "sdpa"
        check_equal(result.run(*inputs, tokens), expected, () if blind else inputs)
    assert len(result.graphs) == 1


@pytest.mark.xfail(strict=True, reason="the fused backward of PyTorch on CPUs is not that of an even mixture")
def test_gradients_of_queries_that_see_nothing(rewrite: Rewrite) -> None:
    """Found by the test above: where every key gets the lowest number, the gradients of the call are too large."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return (q @ k.mT + mask).softmax(-1) @ v

    mask = torch.zeros(3, 1, 7, 7)
    mask[0, :, 0] = HIDDEN
    checked(rewrite, attend, *tensors(), mask, variant="sdpa")


@EXACT
def test_shared_heads_that_see_everything(rewrite: Rewrite, variant: str) -> None:
    """onnxsim PR #698: grouped heads became an operator that is always causal."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).reshape(3, 4, 7, 8) for t in (k, v))
        return (q @ k.mT / math.sqrt(8)).softmax(-1) @ v

    site = checked(rewrite, attend, *tensors(kv_heads=2), variant=variant)
    assert (site.heads, site.kv_heads, site.mask) == (4, 2, Full())


def test_a_softcap(rewrite: Rewrite) -> None:
    """TensorRT-LLM#4789 (AutoDeploy): tanh between the products was "no attention"."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.tanh(q @ k.mT * 0.25 / 30.0) * 30.0
        return scores.masked_fill(~causal(7), HIDDEN).softmax(-1) @ v

    inputs = tensors(width=16)
    result = rewrite(attend, *inputs)
    check_equal(result.out, attend(*inputs), inputs)
    assert [(site.softcap, site.scale, site.mask) for site in result.sites] == [(30.0, 0.25, Causal())]


@EXACT
@pytest.mark.parametrize("called", [False, True], ids=["eager", "called"])
def test_a_query_that_sees_nothing(rewrite: Rewrite, variant: str, called: bool) -> None:
    """Rows that are hidden altogether: NaN only where the original has it, zeros from the call."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        if called:
            return F.scaled_dot_product_attention(q, k, v, mask)
        return (q @ k.mT).masked_fill(~mask, HIDDEN).softmax(-1) @ v

    mask = torch.rand(3, 1, 7, 7) > 0.4
    mask[0, :, 0] = mask[1] = False
    q, k, v = (t.detach() for t in tensors())
    checked(rewrite, attend, q, k, v, mask, variant=variant)


@EXACT
@pytest.mark.parametrize("length", [137, 521, 1025])
@pytest.mark.parametrize("mask", [Causal(), SlidingWindow(63, 0)], ids=str)
def test_lengths_between_the_blocks(rewrite: Rewrite, variant: str, length: int, mask: Any) -> None:
    """attention-gym#50, pytorch#173933, pytorch#153799: lengths that are no multiple of a block gave wrong rows."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = torch.arange(length)[:, None], torch.arange(length)
        seen = j <= i if mask == Causal() else (j <= i) & (j > i - 64)
        return (q @ k.mT * 0.25).masked_fill(~seen, HIDDEN).softmax(-1) @ v

    assert checked(rewrite, attend, *tensors(1, 2, length, 16), variant=variant).mask == mask


WINDOW = variants()["sliding_window"]


def windowed(length: int, window: int, sinks: int) -> tuple[Any, Any, tuple[Tensor, ...], Tensor]:
    """A causal site of this length with a window of tokens, what is built for it, its inputs, and the definition."""
    site = replace(WINDOW.cases[0].site, heads=2, kv_heads=1).sized(batch=1, q_len=length, kv_len=length)
    built = WINDOW.build(site, {"window": window, "sinks": sinks})
    q, k, v = tensors(1, 2, length, 16, kv_heads=1)
    (i, j), shared = (torch.arange(length)[:, None], torch.arange(length)), (t.repeat_interleave(2, 1) for t in (k, v))
    seen = (j <= i) & ((j > i - window) | (j < sinks))
    return site, built, (q, k, v), F.scaled_dot_product_attention(q, *shared, attn_mask=seen, scale=site.scale)


@pytest.mark.parametrize("length", [137, 521, 1025])
@pytest.mark.parametrize(("window", "sinks"), [(64, 0), (100, 5)])
def test_lengths_between_the_blocks_of_a_window(length: int, window: int, sinks: int) -> None:
    """The same issues: blocks of queries, each with the slice of keys around it, and what is differentiated there."""
    _, built, inputs, expected = windowed(length, window, sinks)
    check_equal(built(*inputs, None, None), expected, inputs)


@pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("length", [137, 521, 1025])
@pytest.mark.parametrize(("window", "sinks"), [(64, 0), (100, 5)])
def test_lengths_between_the_blocks_of_generated_kernels(length: int, window: int, sinks: int) -> None:
    """The same issues: tiles of C++, in all sizes that compete. There is no backward of them."""
    site, built, (q, k, v), expected = windowed(length, window, sinks)
    kernels = [cpp.attention(built.formula, q, v, {}, size) for size in cpp.sizes(built.formula, q, k, {})]
    assert kernels
    with torch.no_grad():
        for kernel in kernels:
            assert not isinstance(kernel, Refusal), kernel
            check_equal(kernel(q, k, v, site.scale), expected)


# --- sizes -----------------------------------------------------------------------------------------------------------


class MidBlock(nn.Module):
    """One head over a feature map, by 1x1 convolutions: the attention of an image autoencoder."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q = self.q(x).reshape(b, c, h * w).permute(0, 2, 1)
        weights = (torch.bmm(q, self.k(x).reshape(b, c, h * w)) * c**-0.5).softmax(2)
        mixed = torch.bmm(self.v(x).reshape(b, c, h * w), weights.permute(0, 2, 1))
        return x + self.out(mixed.reshape(b, c, h, w))


@EXACT
def test_one_head_of_512(rewrite: Rewrite, variant: str) -> None:
    """SageAttention#134, LatentSync#332: a patched call failed in the VAE, whose only head is 512 wide."""
    model, x = MidBlock(512), torch.randn(1, 512, 5, 3)
    result = rewrite(model, x, variant=variant)
    assert [(s.heads, s.head_dim, s.q_len) for s in result.sites] == [(1, 512, 15)], result.refusals
    check_equal(result.out, model(x))


class Mixed(nn.Module):
    """A wide head, and a block whose weights are dropped: the fused call would draw other random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.dropped = MidBlock(512), nn.Linear(512, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.dropped(self.wide(x).flatten(2).mT).chunk(3, -1)
        return F.dropout((q @ k.mT / 4).softmax(-1), 0.2) @ v


def test_a_site_that_is_refused_beside_one_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """SageAttention#134: one site that a kernel has not, and the whole model failed. Each has its own fallback."""
    monkeypatch.setattr("rewriter.exact.WORTH_IT", math.inf)  # on a busy machine a measurement may say anything
    model, x = Mixed().requires_grad_(False), torch.randn(1, 512, 5, 3)
    module = rewriter.optimize(torch.export.export(model, (x,)))
    plan = rewriter.plan_of(module)
    assert plan is not None
    assert {decision.path: decision.variant for decision in plan.decisions} == {"wide": "sdpa", "": "original"}
    assert any("random numbers" in decision.refused.get("sdpa", "") for decision in plan.decisions)
    torch.manual_seed(1)
    expected = model(x)
    torch.manual_seed(1)
    assert close(module(x), expected)


@EXACT
@pytest.mark.parametrize("width", [40, 80, 160])
def test_heads_of_a_diffusion_model(rewrite: Rewrite, variant: str, width: int) -> None:
    """ComfyUI#7352: head sizes that a kernel has not, each site with its own fallback."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        empty = torch.empty(q.shape[0], q.shape[1], k.shape[1])
        scores = torch.baddbmm(empty, q, k.transpose(-1, -2), beta=0, alpha=width**-0.5)
        return torch.bmm(scores.softmax(-1), v).unflatten(0, (3, 2)).transpose(1, 2).flatten(2)

    site = checked(rewrite, attend, *tensors(3, 2, 15, width, kv_length=11), variant=variant)
    assert (site.head_dim, site.scale) == (width, pytest.approx(width**-0.5))


@EXACT
@pytest.mark.parametrize("called", [False, True], ids=["eager", "called"])
def test_groups_of_three(rewrite: Rewrite, variant: str, called: bool) -> None:
    """pytorch#143117: a number of queries per key head that is no power of 2."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if called:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        k, v = (t.repeat_interleave(3, 1) for t in (k, v))
        return (q @ k.mT * 8**-0.5).masked_fill(~causal(7), HIDDEN).softmax(-1) @ v

    site = checked(rewrite, attend, *tensors(heads=9, kv_heads=3), variant=variant)
    assert (site.heads, site.kv_heads, site.mask) == (9, 3, Causal())


class SpaceAndTime(nn.Module):
    """Attention within each frame, then between the frames, over a grid of tokens that is not square."""

    def __init__(self, frames: int, rows: int, columns: int) -> None:
        super().__init__()
        self.grid = (frames, rows, columns)
        self.space, self.time = nn.Linear(16, 48), nn.Linear(16, 48)

    def attend(self, qkv: Tensor) -> Tensor:
        q, k, v = qkv.unflatten(-1, (3, 2, 8)).transpose(-2, -4).unbind(-3)  # (..., H, S, D)
        return ((q * 8**-0.5 @ k.mT).softmax(-1) @ v).transpose(-2, -3).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        frames, rows, columns = self.grid
        x = x.unflatten(1, (frames, rows * columns))
        x = x + self.attend(self.space(x))
        x = x.transpose(1, 2)
        return (x + self.attend(self.time(x))).transpose(1, 2).flatten(1, 2)


@EXACT
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("frames", [16, 17])
def test_frames_and_a_grid_that_is_not_square(rewrite: Rewrite, variant: str, frames: int, batch: int) -> None:
    """Sliding-tile attention: the layout of the tokens was guessed from their number."""
    model, x = SpaceAndTime(frames, 3, 5), torch.randn(batch, frames * 15, 16)
    result = rewrite(model, x, variant=variant)
    found = [(s.batch, s.q_len, s.kv_len, s.head_dim) for s in result.sites]
    assert found == [(batch * frames, 15, 15, 8), (batch * 15, frames, frames, 8)]
    # 15 tokens may be 3x5 or 5x3, 16 may be 4x4, and 17 may have one in front: their number is not told how they lie.
    assert [s.tokens for s in result.sites] == [None, None]
    check_equal(result.out, model(x))


# --- libraries -------------------------------------------------------------------------------------------------------


@EXACT
@pytest.mark.parametrize("impl", ["eager", "sdpa"])
def test_bart(rewrite: Rewrite, variant: str, impl: str) -> None:
    """onnxruntime#23864: after a release of transformers not one attention of BART was fused any more."""
    config = hf.BartConfig(
        vocab_size=64, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=2, attn_implementation=impl,
    )  # fmt: skip
    model = hf.BartModel(config).eval()
    given = {"input_ids": torch.randint(3, 64, (3, 9)), "decoder_input_ids": torch.randint(3, 64, (3, 7))}
    result = rewrite(model, **given, use_cache=False, variant=variant)
    kinds = [(site.path.rpartition(".")[2], site.q_len, site.kv_len, site.mask.has(Causal)) for site in result.sites]
    encoder, decoder = [("self_attn", 9, 9, False)], [("self_attn", 7, 7, True), ("encoder_attn", 7, 9, False)]
    assert kinds == encoder * 2 + decoder * 2
    assert [site.scale for site in result.sites] == [pytest.approx(8**-0.5)] * 6
    assert close(result.out.last_hidden_state, model(**given, use_cache=False).last_hidden_state)


class BartOfBefore(nn.Module):
    """As BART was written until transformers 4.48: batch and heads in one axis, the mask added in four."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

    def split(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], -1, 2, 8).transpose(1, 2).contiguous().view(x.shape[0] * 2, -1, 8)

    def forward(self, x: Tensor, mask: Tensor | None = None, others: Tensor | None = None) -> Tensor:
        (b, n, _), source = x.shape, x if others is None else others
        q, k, v = self.split(self.q(x) * 8**-0.5), self.split(self.k(source)), self.split(self.v(source))
        scores = torch.bmm(q, k.transpose(1, 2))
        if mask is not None:
            scores = (scores.view(b, 2, n, k.shape[1]) + mask).view(b * 2, n, k.shape[1])
        weights = F.dropout(scores.softmax(-1), 0.1, self.training)
        return self.out(torch.bmm(weights, v).view(b, 2, n, 8).transpose(1, 2).reshape(b, n, 16))


class TranslatorOfBefore(nn.Module):
    """Two layers of an encoder and two of a decoder of them."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder, self.cross = (nn.ModuleList(BartOfBefore() for _ in range(2)) for _ in range(3))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for layer in self.encoder:
            x = x + layer(x)
        mask = torch.full((y.shape[1], y.shape[1]), HIDDEN).triu(1)[None, None].expand(y.shape[0], 1, -1, -1)
        for own, cross in zip(self.decoder, self.cross, strict=True):
            y = y + own(y, mask)
            y = y + cross(y, None, x)
        return y


@EXACT
def test_bart_of_before(rewrite: Rewrite, variant: str) -> None:
    """onnxruntime#23864, pytorch PR #155792: the spelling of BART and MBart before, with views around the mask."""
    model, x = BartOfBefore().eval(), torch.randn(3, 7, 16, requires_grad=True)
    mask = torch.zeros(3, 1, 7, 7).masked_fill(~causal(7), HIDDEN)
    site = checked(rewrite, model, x, mask, variant=variant)
    assert site.head_dim == 8
    assert site.scale == pytest.approx(8**-0.5)


@EXACT
def test_as_many_attentions_in_the_bart_of_before(rewrite: Rewrite, variant: str) -> None:
    """onnxruntime#23864: one spelling was fused, and the other was not. The same sites, of the same facts."""
    before, x, y = TranslatorOfBefore().eval(), torch.randn(3, 9, 16), torch.randn(3, 7, 16)
    config = hf.BartConfig(
        vocab_size=64, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=2, attn_implementation="eager",
    )  # fmt: skip
    given = {"input_ids": torch.randint(3, 64, (3, 9)), "decoder_input_ids": torch.randint(3, 64, (3, 7))}
    now = rewrite(hf.BartModel(config).eval(), **given, use_cache=False, variant=variant)
    result = rewrite(before, x, y, variant=variant)
    facts = [
        [(s.heads, s.kv_heads, s.head_dim, s.q_len, s.kv_len, s.mask, round(s.scale, 6)) for s in each.sites]
        for each in (result, now)
    ]
    assert len(result.matches) == len(now.matches) == 6
    assert facts[0] == facts[1]
    check_equal(result.out, before(x, y))


@EXACT
def test_an_attention_function_never_loses_the_mask(rewrite: Rewrite, variant: str, tiny_lm: Any) -> None:
    """transformers#45811: a function registered without one for masks was given None instead of the mask."""
    before = dict(hf.AttentionInterface()), dict(hf.AttentionMaskInterface())
    ids = torch.randint(3, 128, (3, 9))
    tokens = torch.ones_like(ids)
    tokens[0, :4] = 0
    for impl in ("eager", "sdpa"):
        model = tiny_lm(impl)
        result = rewrite(model, input_ids=ids, attention_mask=tokens, use_cache=False, variant=variant)
        assert {site.mask for site in result.sites} == {Causal() & Padding()}
        assert close(result.out.logits, model(input_ids=ids, attention_mask=tokens, use_cache=False).logits)
    after = dict(hf.AttentionInterface()), dict(hf.AttentionMaskInterface())
    assert after == before, "nothing is registered, and nothing that was there is another function now"
