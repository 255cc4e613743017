"""Masks are read for what they mean: `classify` against brute force, `read_mask` on masks as models spell them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rewriter.guard import error, tolerance
from rewriter.site import Causal, Chunked, Dense, Full, Mask, Padding, PrefixCausal, SlidingWindow
from rewriter.structure import classify

BOUND = st.one_of(st.none(), st.integers(-6, 12))


def band(q_len: int, kv_len: int, left: int | None, right: int | None) -> Tensor:
    """bool[q_len, kv_len], one entry at a time: age is the distance from query to key, the last two aligned."""
    seen = torch.zeros(q_len, kv_len, dtype=torch.bool)
    for i in range(q_len):
        for j in range(kv_len):
            age = (i + kv_len - q_len) - j
            seen[i, j] = (left is None or age <= left) and (right is None or age >= -right)
    return seen


# --- classify --------------------------------------------------------------------------------------------------------


@given(st.integers(1, 9), st.integers(1, 9), BOUND, BOUND)
def test_bands_are_classified(q_len: int, kv_len: int, left: int | None, right: int | None) -> None:
    seen = band(q_len, kv_len, left, right)
    mask = classify(seen)
    if not seen.any():
        assert mask is None
    else:
        assert mask is not None
        assert torch.equal(mask.visible(q_len, kv_len), seen), mask


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**36 - 1))
def test_what_is_classified_is_true(q_len: int, kv_len: int, bits: int) -> None:
    seen = torch.tensor([[bits >> (i * kv_len + j) & 1 == 1 for j in range(kv_len)] for i in range(q_len)])
    mask = classify(seen)
    assert mask is None or torch.equal(mask.visible(q_len, kv_len), seen), mask


@pytest.mark.parametrize(
    ("q_len", "kv_len", "left", "right", "mask"),
    [
        (5, 5, None, 0, Causal()),
        (5, 5, None, -1, Causal(-1)),
        (5, 5, None, 2, Causal(2)),
        (3, 8, None, 0, Causal()),
        (8, 3, None, 0, Causal()),
        (8, 8, 2, 0, SlidingWindow(2, 0)),
        (8, 8, 2, 3, SlidingWindow(2, 3)),
        (8, 8, 2, None, SlidingWindow(2, None)),
        (8, 8, 0, 0, SlidingWindow(0, 0)),
        (3, 8, 2, 0, SlidingWindow(2, 0)),
        (8, 8, 7, 7, Full()),
        (8, 8, 8, 0, Causal()),  # the window is wider than the sequence
        (1, 8, None, 0, Full()),  # one query after all keys sees them all
        (1, 8, 2, 0, SlidingWindow(2, 0)),
        (1, 1, 0, 0, Full()),
    ],
)
def test_names(q_len: int, kv_len: int, left: int | None, right: int | None, mask: Mask) -> None:
    assert classify(band(q_len, kv_len, left, right)) == mask


@pytest.mark.parametrize(
    "seen",
    [
        torch.ones(6, 6, dtype=torch.bool).tril() | (torch.arange(6) == 2),  # one key that all see
        torch.tensor([0, 0, 1, 1, 1, 2])[:, None] == torch.tensor([0, 0, 1, 1, 1, 2]),  # blocks of different sizes
        ~torch.eye(6, dtype=torch.bool),
        torch.ones(6, 6, dtype=torch.bool).tril() & (torch.arange(6)[:, None] < 5),  # the last query sees nothing
        torch.zeros(6, 6, dtype=torch.bool),
        torch.stack([band(4, 4, None, 0), band(4, 4, 1, 0)]),  # not the same for each head
    ],
)
def test_other_masks_are_of_no_kind(seen: Tensor) -> None:
    assert classify(seen) is None


# --- masks in graphs -------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Attention with fixed heads under a mask that `build(length, *more)` makes, as an argument of SDPA or added."""

    def __init__(self, build: Callable[..., Tensor], added: bool) -> None:
        super().__init__()
        self.build, self.added = build, added

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        q = x.unflatten(-1, (2, 4)).transpose(1, 2)
        mask = self.build(x.shape[1], *more)
        if not self.added:
            return F.scaled_dot_product_attention(q, q, q, mask)
        scores = q @ q.mT + torch.where(mask, 0.0, torch.finfo(q.dtype).min)
        return scores.softmax(-1) @ q


def places(length: int) -> tuple[Tensor, Tensor]:
    return torch.arange(length)[:, None], torch.arange(length)[None, :]


def window(size: int) -> Callable[[int], Tensor]:
    def build(length: int) -> Tensor:
        i, j = places(length)
        return (j <= i) & (j > i - size)

    return build


def prefix(length: int) -> Tensor:
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    mask[:, :3] = True  # through a view: nobody reads the result
    return mask


def chunks(length: int) -> Tensor:
    i, j = places(length)
    return (j <= i) & (i // 4 == j // 4)


BUILT: dict[str, tuple[Callable[..., Tensor], Mask]] = {
    "tril": (lambda n: torch.ones(n, n, dtype=torch.bool).tril(), Causal()),
    "not triu": (lambda n: ~torch.ones(n, n, dtype=torch.bool).triu(1), Causal()),
    "arange": (lambda n: places(n)[1] <= places(n)[0], Causal()),
    "four axes": (lambda n: (places(n)[1] <= places(n)[0])[None, None], Causal()),
    "a copy for each batch": (lambda n: (places(n)[1] <= places(n)[0]).repeat(2, 1, 1, 1), Causal()),
    "strict": (lambda n: torch.ones(n, n, dtype=torch.bool).tril(-1), Causal(-1)),
    "all": (lambda n: torch.ones(n, n, dtype=torch.bool), Full()),
    "window": (window(4), SlidingWindow(3, 0)),
    "two windows": (lambda n: window(4)(n) & window(6)(n), SlidingWindow(3, 0)),
    "both sides": (lambda n: (places(n)[0] - places(n)[1]).abs() <= 2, SlidingWindow(2, 2)),
    "prefix": (prefix, PrefixCausal(3)),
    "chunks": (chunks, Causal() & Chunked(4)),
    "chunks both ways": (lambda n: places(n)[0] // 4 == places(n)[1] // 4, Chunked(4)),
    "not itself": (lambda n: ~torch.eye(n, dtype=torch.bool), Dense()),
    "chance": (lambda n: torch.rand(n, n) > 1e-9, Dense()),
}


@pytest.mark.parametrize("added", [False, True], ids=["bool", "added"])
@pytest.mark.parametrize(("build", "mask"), BUILT.values(), ids=BUILT)
def test_masks_of_positions(rewrite: Any, build: Callable[..., Tensor], mask: Mask, added: bool) -> None:
    if added and mask == Causal(-1):
        mask = Dense()  # Its first query sees nothing, and mixes all values where the fill is finite.
    model, x = Attention(build, added), torch.randn(2, 11, 8)
    torch.manual_seed(1)
    result = rewrite(model, x)
    assert [s.mask for s in result.sites] == [mask]
    torch.manual_seed(1)
    assert error(result.out, model(x)) <= tolerance(torch.float32)


@pytest.mark.parametrize(
    ("size", "mask"),
    [(4, SlidingWindow(3, 0)), (64, SlidingWindow(63, 0)), (2048, SlidingWindow(2047, 0))],
)
def test_windows_wider_than_what_was_captured(rewrite: Any, size: int, mask: Mask) -> None:
    """With symbolic sizes the same graph runs on longer inputs, where the window shows."""
    model = Attention(window(size), added=False)
    result = rewrite(model, torch.randn(2, 11, 8), dynamic=True)
    assert [s.mask for s in result.sites] == [mask]
    x = torch.randn(2, 100, 8)
    assert error(result.run(x), model(x)) <= tolerance(torch.float32)
    assert len(result.graphs) == 1


@pytest.mark.parametrize(
    ("build", "mask"),
    [
        (chunks, Causal() & Chunked(4)),
        (lambda n: (places(n)[1] <= places(n)[0]) | (places(n)[1] < 5), PrefixCausal(5)),
        (lambda n: (places(n)[1] <= places(n)[0]) | (places(n)[1] < n // 2), Dense()),
        (lambda n: (places(n)[0] - places(n)[1]) ** 2 <= n, Dense()),
    ],
    ids=["chunks", "prefix", "half a prefix", "a growing window"],
)
def test_masks_that_show_at_other_sizes(rewrite: Any, build: Callable[..., Tensor], mask: Mask) -> None:
    """Three tokens are less than a chunk, and no more than the prefix: at that size both look like plain masks."""
    model = Attention(build, added=False)
    result = rewrite(model, torch.randn(2, 3, 8), dynamic=True)
    assert [s.mask for s in result.sites] == [mask]
    x = torch.randn(2, 37, 8)
    assert error(result.run(x), model(x)) <= tolerance(torch.float32)


DATA: dict[str, tuple[Callable[..., Tensor], Mask]] = {
    "padding": (lambda n, pad: pad[:, None, None, :], Padding()),
    "padding for each query": (lambda n, pad: pad[:, None, None, :].expand(-1, -1, n, -1), Padding()),
    "causal padding": (lambda n, pad: window(n)(n) & pad[:, None, None, :], Causal() & Padding()),
    "padded window": (lambda n, pad: window(4)(n) & pad[:, None, None, :], SlidingWindow(3, 0) & Padding()),
    "padding twice": (lambda n, pad: pad[:, None, None, :] & pad.flip(0)[:, None, None, :], Padding()),
    "padding turned around": (lambda n, pad: ~pad[:, None, None, :], Padding()),
    "causal or padding": (lambda n, pad: window(n)(n) | pad[:, None, None, :], Dense()),
    "padding of queries": (lambda n, pad: pad[:, None, :, None] | pad[:, None, None, :], Dense()),
}


@pytest.mark.parametrize("added", [False, True], ids=["bool", "added"])
@pytest.mark.parametrize(("build", "mask"), DATA.values(), ids=DATA)
def test_masks_of_data(rewrite: Any, build: Callable[..., Tensor], mask: Mask, added: bool) -> None:
    model, x = Attention(build, added), torch.randn(2, 9, 8)
    pad = torch.ones(2, 9, dtype=torch.bool)
    pad[0, :3] = False
    result = rewrite(model, x, pad, variant="sdpa")
    assert [s.mask for s in result.sites] == [mask]
    for other in (pad, pad.flip(0), pad | True):
        assert error(result.run(x, other), model(x, other)) <= tolerance(torch.float32)
    assert len(result.graphs) == 1


def test_a_mask_that_changes_between_two_layers(rewrite: Any) -> None:
    def layers(x: Tensor, mask: Tensor) -> Tensor:
        mask = mask.clone()
        for place in (3, 4):
            scores = (x @ x.mT).masked_fill(~mask, -1e9)
            x = x + scores.softmax(-1) @ x
            mask[..., place] = True
        return x

    x, mask = torch.randn(2, 2, 7, 4), torch.rand(2, 1, 7, 7) > 0.5
    result = rewrite(layers, x, mask)
    assert [s.mask for s in result.sites] == [Dense()] * 2
    assert error(result.out, layers(x, mask)) <= tolerance(torch.float32)


# --- masks of real models --------------------------------------------------------------------------------------------

SMALL = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def ids(batch: int, length: int) -> Tensor:
    return torch.randint(3, 64, (batch, length))


def padded(length: int, left: int = 0, right: int = 0) -> Tensor:
    """int64[2, length] as a tokenizer gives it: the first sequence is padded."""
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, :left] = 0
    mask[0, length - right :] = 0
    return mask


def masks(result: Any) -> list[Mask]:
    return [site.mask for site in result.sites]


def check(result: Any, model: nn.Module, *, at: Tensor | None = None, **kwargs: Any) -> None:
    """Outputs as the original's, on real tokens."""
    with torch.no_grad():
        actual, wanted = result.run(**kwargs)[0], model(**kwargs)[0]
    kept = slice(None) if at is None else at.bool()
    assert error(actual[kept], wanted[kept]) <= 10 * tolerance(torch.float32)


@pytest.mark.parametrize(
    ("impl", "mask", "expected"),
    [
        ("sdpa", None, Causal()),
        ("eager", padded(9, left=3), Causal() & Padding()),
        ("sdpa", padded(9, left=3), Causal() & Padding()),
        ("eager", padded(9, right=2), Causal() & Padding()),
    ],
)
def test_causal_lm(rewrite: Any, tiny_lm: Any, impl: str, mask: Tensor | None, expected: Mask) -> None:
    model, tokens = tiny_lm(impl, num_hidden_layers=1), ids(2, 9)
    with torch.no_grad():
        result = rewrite(model, input_ids=tokens, attention_mask=mask)
    assert masks(result) == [expected]
    check(result, model, at=mask, input_ids=tokens, attention_mask=mask)


@pytest.mark.parametrize(
    ("impl", "size", "expected"),
    [("eager", 4, SlidingWindow(3, 0)), ("sdpa", 4, SlidingWindow(3, 0)), ("eager", 32, Causal())],
)
def test_sliding_window_lm(rewrite: Any, impl: str, size: int, expected: Mask) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(**SMALL, num_key_value_heads=1, sliding_window=size, attn_implementation=impl)
    model, tokens, mask = MistralForCausalLM(config).eval(), ids(2, 9), padded(9, left=2)
    with torch.no_grad():
        result = rewrite(model, input_ids=tokens, attention_mask=mask)
    assert masks(result) == [expected & Padding()]
    check(result, model, at=mask, input_ids=tokens, attention_mask=mask)


def test_a_window_wider_than_the_captured_length_is_not_causal(rewrite: Any) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(**SMALL, num_key_value_heads=1, sliding_window=20, attn_implementation="eager")
    model, mask = MistralForCausalLM(config).eval(), padded(9, left=2)
    with torch.no_grad():
        result = rewrite(model, input_ids=ids(2, 9), attention_mask=mask, dynamic=True)
    assert masks(result) == [SlidingWindow(19, 0) & Padding()]
    mask = padded(50, left=2)
    check(result, model, at=mask, input_ids=ids(2, 50), attention_mask=mask)


def test_local_and_global_layers(rewrite: Any) -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        **(SMALL | {"num_hidden_layers": 2}), num_key_value_heads=1, head_dim=8, sliding_window=4,
        layer_types=["sliding_attention", "full_attention"], attn_implementation="eager",
    )  # fmt: skip
    model, tokens, mask = Gemma3ForCausalLM(config).eval(), ids(2, 9), padded(9, left=3)
    with torch.no_grad():
        result = rewrite(model, input_ids=tokens, attention_mask=mask)
    assert masks(result) == [SlidingWindow(3, 0) & Padding(), Causal() & Padding()]
    check(result, model, at=mask, input_ids=tokens, attention_mask=mask)


@pytest.mark.parametrize(("impl", "dynamic"), [("eager", None), ("sdpa", True)], ids=["static", "symbolic"])
def test_encoder(rewrite: Any, impl: str, dynamic: bool | None) -> None:
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(**SMALL, attn_implementation=impl)).eval()
    tokens, mask = ids(2, 9), padded(9, right=4)
    with torch.no_grad():
        result = rewrite(model, input_ids=tokens, attention_mask=mask, dynamic=dynamic)
    assert masks(result) == [Padding()]
    check(result, model, at=mask, input_ids=tokens, attention_mask=mask)
    check(result, model, input_ids=tokens, attention_mask=padded(9))


def test_encoder_decoder(rewrite: Any) -> None:
    from transformers import BartConfig, BartModel

    config = BartConfig(
        vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, attn_implementation="sdpa",
    )  # fmt: skip
    model = BartModel(config).eval()
    call = {"input_ids": ids(2, 9), "decoder_input_ids": ids(2, 5), "attention_mask": padded(9, right=3)}
    with torch.no_grad():
        result = rewrite(model, **call)
    assert masks(result) == [Padding(), Causal(), Padding()]
    assert [(s.q_len, s.kv_len) for s in result.sites] == [(9, 9), (5, 5), (5, 9)]
    check(result, model, **call)


def test_a_position_bias_is_beside_the_mask(rewrite: Any) -> None:
    from transformers import T5Config, T5Model

    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    config._attn_implementation = "eager"
    model = T5Model(config).eval()
    call = {"input_ids": ids(2, 9), "decoder_input_ids": ids(2, 5), "attention_mask": padded(9, right=3)}
    with torch.no_grad():
        result = rewrite(model, **call)
    assert masks(result) == [Padding(), Causal(), Padding()]
    assert [s.bias for s in result.sites] == ["relative", "relative", "none"]
    assert {s.scale for s in result.sites} == {1.0}
    check(result, model, **call)


def test_generate_with_a_static_cache(rewrite: Any, tiny_lm: Any) -> None:
    """Keys beyond the present token are hidden by a mask that depends on the position, which is data there."""
    model, tokens, mask = tiny_lm("sdpa", num_hidden_layers=1), ids(2, 6), padded(6, left=2)
    call = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
    expected = model.generate(tokens, **call)
    result = rewrite(model)
    model._compiled_call_impl = result.run
    assert torch.equal(model.generate(tokens, **call), expected)
    assert {(s.q_len, s.kv_len) for s in result.sites} == {(6, 9), (1, 9)}
    assert not any(s.mask.has(Causal) for s in result.sites)


def test_masks_that_are_made_entry_by_entry(rewrite: Any) -> None:
    """`vmap` over a function of (batch, query, key), with and without data."""

    def build(length: int, pad: Tensor, causal: bool) -> Tensor:
        def entry(b: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (j <= i) & (j > i - 4) & pad[b, j] if causal else pad[b, j] & (i >= 0)

        over_keys = torch.vmap(entry, in_dims=(None, None, 0))
        over_queries = torch.vmap(over_keys, in_dims=(None, 0, None))
        seen = torch.vmap(over_queries, in_dims=(0, None, None))
        place = torch.arange(length)
        return seen(torch.arange(pad.shape[0]), place, place)[:, None]

    x, pad = torch.randn(2, 9, 8), torch.ones(2, 9, dtype=torch.bool)
    pad[0, 6:] = False
    for causal, mask in ((True, SlidingWindow(3, 0) & Padding()), (False, Padding())):
        model = Attention(lambda n, p, causal=causal: build(n, p, causal), added=False)
        result = rewrite(model, x, pad)
        assert masks(result) == [mask]
        assert error(result.run(x, pad), model(x, pad)) <= tolerance(torch.float32)
