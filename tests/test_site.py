"""The algebra of masks, and what identifies a site."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rewriter.site import (
    And,
    AttentionSite,
    Causal,
    Chunked,
    DataChunked,
    DataPrefix,
    Dense,
    Documents,
    Full,
    Mask,
    Padding,
    PrefixCausal,
    Refusal,
    SlidingWindow,
    Window2d,
    Window3d,
    ages,
)

BOUND = st.none() | st.integers(0, 9)
FACTORS = st.one_of(
    st.just(Full()),
    st.builds(Causal, st.integers(-9, 9)),
    st.builds(SlidingWindow, BOUND, BOUND),
    st.builds(Chunked, st.integers(1, 9)),
    st.builds(PrefixCausal, st.integers(0, 9)),
    st.sampled_from([Padding(), Dense(), Documents(), DataPrefix()]),
    st.builds(DataChunked, st.integers(1, 9)),
    st.builds(Window2d, *[st.integers(0, 9)] * 4),
    st.builds(Window3d, *[st.integers(0, 9)] * 6),
)
LENGTH = st.integers(1, 12)

SITE = AttentionSite(
    path="layers.0.attention", heads=4, kv_heads=2, head_dim=64, v_head_dim=64, dtype="bfloat16", scale=0.125,
    mask=Causal() & Padding(), batch=2, q_len=7, kv_len=9, softmax_dtype="float32", source="model.py:12",
)  # fmt: skip


@st.composite
def masks(draw: st.DrawFn) -> Mask:
    """The intersection of up to four factors."""
    mask: Mask = Full()
    for factor in draw(st.lists(FACTORS, max_size=4)):
        mask = mask & factor
    return mask


# --- masks -----------------------------------------------------------------------------------------------------------


@given(masks())
def test_a_mask_is_read_back_from_its_text(mask: Mask) -> None:
    assert Mask.parse(str(mask)) == mask


@given(masks(), masks(), masks())
def test_intersection_has_the_laws_of_a_set(a: Mask, b: Mask, c: Mask) -> None:
    assert a & a == a
    assert a & Full() == a
    assert a & b == b & a
    assert (a & b) & c == a & (b & c)


@given(masks(), masks(), LENGTH, LENGTH)
def test_what_is_visible_is_the_intersection(a: Mask, b: Mask, q_len: int, kv_len: int) -> None:
    both = (a & b).visible(q_len, kv_len)
    assert both.dtype == torch.bool and both.shape == (q_len, kv_len)
    assert torch.equal(both, a.visible(q_len, kv_len) & b.visible(q_len, kv_len))
    assert torch.equal(a.visible(q_len, kv_len), a.positional.visible(q_len, kv_len))


@given(masks())
def test_positional_leaves_out_what_depends_on_data(mask: Mask) -> None:
    positional = mask.positional
    assert not positional.has(Padding) and not positional.has(Dense)
    assert positional.positional == positional
    assert [p for p in mask.parts() if isinstance(p, (Causal, SlidingWindow, Chunked, PrefixCausal))] == [
        p for p in positional.parts() if not isinstance(p, Full)
    ]
    hidden = [p for p in mask.parts() if p != Full() and p not in positional.parts()]
    assert all(isinstance(p, (Padding, Dense)) for p in hidden), "what `visible` does not say is a tensor"
    assert all(p.visible(5, 7).all() for p in hidden)


@given(LENGTH, LENGTH)
def test_ages_align_the_last_query_with_the_last_key(q_len: int, kv_len: int) -> None:
    age = ages(q_len, kv_len)
    assert age[-1, -1] == 0
    assert all(age[i, j] == i + kv_len - q_len - j for i in range(q_len) for j in range(kv_len))


@given(LENGTH, st.integers(1, 12))
def test_masks_that_are_other_words_for_one_another(length: int, window: int) -> None:
    causal = Causal().visible(length, length)
    assert torch.equal(causal, torch.ones(length, length).tril().bool())
    assert torch.equal(causal, SlidingWindow(None, 0).visible(length, length))
    assert torch.equal(Causal(length).visible(length, length), Full().visible(length, length))
    one, two = SlidingWindow(window - 1, 0), Causal() & SlidingWindow(window - 1, None)
    assert torch.equal(one.visible(length, length), two.visible(length, length))
    assert one.visible(length, length).sum(-1).tolist() == [min(window, i + 1) for i in range(length)]


@given(LENGTH, LENGTH, st.integers(1, 9))
def test_blocks_and_prefixes_are_counted_from_the_first_key(q_len: int, kv_len: int, size: int) -> None:
    blocks, prefix = (mask.visible(q_len, kv_len) for mask in (Chunked(size), PrefixCausal(size)))
    for i in range(q_len):
        for j in range(kv_len):
            place = i + kv_len - q_len
            assert blocks[i, j] == (place // size == j // size)
            assert prefix[i, j] == (j <= place or j < size)


def test_masks_by_hand() -> None:
    assert str(Causal()) == "causal(0)"
    assert str(Full()) == "full"
    assert str(Padding() & SlidingWindow(None, 3)) == "padding & sliding_window(inf, 3)"
    assert str(Chunked(4) & Causal() & Documents()) == "causal(0) & chunked(4) & documents"
    assert str(Window2d(7, 7, 3, 3)) == "window2d(7, 7, 3, 3)"
    assert Mask.parse("causal") == Causal()
    assert isinstance(Padding() & Causal(), And)
    assert Causal().visible(1, 5).all(), "a step of decoding sees the whole cache"
    assert Causal().visible(3, 1).tolist() == [[False], [False], [True]]


@pytest.mark.parametrize(
    "text",
    [
        "", "banded", "causal(x)", "causal(1, 2)", "causal(inf)", "full(1)", "sliding_window", "padding, dense",
        "and(1)", "chunked(0)", "chunked(inf)", "window2d(7, 7)", "documents(1)",
    ],
)  # fmt: skip
def test_what_is_no_mask_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match="not a mask"):
        Mask.parse(text)


# --- sites -----------------------------------------------------------------------------------------------------------


def test_the_key_knows_the_computation_and_not_its_place_or_size() -> None:
    same = replace(
        SITE, path="layers.1.attention", source="", spelling="sdpa", batch=None, q_len=None, kv_len=1,
        edits=("squared",), observed=("bias table",),
    )  # fmt: skip
    assert same.key() == SITE.key()
    others = [
        {"heads": 2}, {"kv_heads": 4}, {"head_dim": 32}, {"v_head_dim": 32}, {"dtype": "float32"}, {"scale": 1.0},
        {"mask": Causal()}, {"device": "cuda"}, {"softmax_dtype": None}, {"dropout_p": 0.1}, {"bias": "dense"},
        {"softcap": 5.0}, {"softcap": 6.0}, {"normaliser": "sigmoid"}, {"sink": "zero"}, {"sink": "learned"},
        {"factor": "head"}, {"tokens": "3x3"}, {"tokens": "3x3+1"},
    ]  # fmt: skip
    keys = {replace(SITE, **other).key() for other in others}
    assert len(keys | {SITE.key()}) == len(others) + 1
    assert "=".join(("mask", "causal(0) & padding")) in SITE.key()
    assert not any(name in SITE.key() for name in ("bias", "softcap", "normaliser", "sink", "factor", "tokens")), (
        "the keys of plans that were written before these were known"
    )


BEYOND = {
    "bias": st.sampled_from(["none", "alibi", "relative", "table", "decomposed", "dense"]),
    "softcap": st.none() | st.floats(0.1, 100),
    "normaliser": st.sampled_from(["softmax", "sigmoid", "relu"]),
    "sink": st.sampled_from([None, "zero", "learned"]),
    "factor": st.sampled_from([None, "scalar", "head", "query", "key"]),
}


@given(masks(), st.floats(0.001, 2), st.sampled_from([None, "float32"]), st.fixed_dictionaries(BEYOND))
def test_a_site_is_read_back_from_its_key(
    mask: Mask, scale: float, softmax_dtype: str | None, beyond: dict[str, Any]
) -> None:
    site = replace(SITE, mask=mask, scale=scale, softmax_dtype=softmax_dtype, **beyond)
    found = AttentionSite.parse(site.key(), path="here")
    assert found.key() == site.key()
    assert {name: getattr(found, name) for name in beyond} == beyond
    assert found.elements == site.elements
    grid = replace(site, tokens="14x14+1")
    assert AttentionSite.parse(grid.key()).tokens == "14x14+1"
    assert (found.path, found.batch, found.q_len, found.kv_len) == ("here", None, None, None)


@pytest.mark.parametrize("key", ["", "heads", "heads=four", "heads=4", "mask=banded"])
def test_what_is_no_key_is_a_value_error(key: str) -> None:
    with pytest.raises(ValueError):
        AttentionSite.parse(key)


def test_a_site_prints_as_one_line() -> None:
    assert str(SITE) == (
        "layers.0.attention: 4/2 heads of 64, 7x9 tokens, causal(0) & padding, scale 0.125, bfloat16 [eager]"
    )
    other = replace(SITE, path="", kv_heads=4, v_head_dim=32, q_len=None, dropout_p=0.1)
    assert str(other) == (
        "<root>: 4 heads of 64>32, ?x9 tokens, causal(0) & padding, scale 0.125, bfloat16 dropout=0.1 [eager]"
    )
    other = replace(SITE, bias="dense", softcap=5.0, sink="zero", edits=("weights_used", "squared"))
    assert str(other) == (
        "layers.0.attention: 4/2 heads of 64, 7x9 tokens, causal(0) & padding, scale 0.125, bfloat16, bias dense, "
        "softcap 5.0, sink zero, weights_used, squared [eager]"
    )


def test_facts_of_a_site() -> None:
    assert SITE.torch_dtype == torch.bfloat16
    assert SITE.sized(batch=1, q_len=2, kv_len=3) == replace(SITE, batch=1, q_len=2, kv_len=3)
    assert SITE.to_json()["mask"] == "causal(0) & padding"
    assert not SITE.single_query_decode
    assert replace(SITE, q_len=1).single_query_decode
    assert not replace(SITE, q_len=1, mask=SlidingWindow(3, 0)).single_query_decode


def test_elements_are_what_a_variant_has_to_compute() -> None:
    assert SITE.elements == frozenset()
    every = replace(SITE, bias="alibi", softcap=5.0, sink="learned", normaliser="relu", factor="head", tokens="3x3")
    assert every.elements == {"bias", "softcap", "sink", "relu"}, "a factor is put into the queries or the keys"


def test_a_refusal_is_false_and_says_why() -> None:
    refusal = Refusal("the mask is unknown", "layers.0", "model.py:12")
    assert not refusal
    assert str(refusal) == "layers.0, model.py:12: the mask is unknown"
    assert str(Refusal("the mask is unknown")) == "the mask is unknown"
