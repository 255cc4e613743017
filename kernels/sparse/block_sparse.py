"""The masks of a benchmark of attention over long contexts, and its block-sparse patterns, as formulas of indices.

LongCA-bench (arXiv:2510.17896, and its published code). A config names one, which is intersected with the site's own
mask. i is the query, j the key, s(t) where the document of token t begins; `documents` are the lengths of all documents
but the last, "300,150", which holds the rest.

    full, causal                full_document           s(i) = s(j)
    causal_document             s(i) = s(j) and j <= i
    share_question              j <= i, in the own document or in the first one, the question
    causal_blockwise            j <= i, in the own document; the last document sees all that is before it
    prefix_lm_causal            j <= i or j < prefix    (`prefix` keys; the published flex form shows one more)
    prefix_lm_document          the same in each document
    sliding_window              -right <= i - j <= left
    sliding_window_causal       0 <= i - j <= window    (window + 1 keys)
    global_sliding_window       |i - j| <= window, i < window or j < window (the published generator has causal strips)
    block_causal_document       in the own document, up to the end of the query's block of `block`, from s(i) on
    block_sparse                a share `density` of the blocks of `block` x `block`
    variable_block_sparse       the same, of blocks of `block` to 3 `block` tokens (2 on average)

The published block-sparse patterns are drawn anew for each length. These are a function of the places alone, so that a
growing cache keeps its blocks: with density a / c, of every c blocks of keys in a row (c c' to c c' + c - 1) each block
of queries sees a that follow one another, cyclically, from a place that a hash of (key/value head, block of queries,
c', `seed`) gives. With `own` the query's block is kept too: without it some causal queries may see nothing. Exact where
the mask hides nothing that the site shows. Work and memory are O(kept blocks).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch

from rewriter.codegen.expression import parameters
from rewriter.codegen.formula import ELEMENTS, Formula, IndexFunction, of_site
from rewriter.codegen.implementation import defined, generated
from rewriter.errors import OptionError
from rewriter.site import AttentionSite, Causal, DataChunked, DataPrefix, Dense, Documents, Full, Padding, Refusal
from rewriter.target import Target
from rewriter.variant import Case, Config, Variant

_PRIME = 46337
"""Its square fits into 32 bits, and cubes modulo it are all different: 3 does not divide what is one less."""
_FINEST = 64
"""Densities are fractions of at most so many blocks."""
_FEWEST = 512


def start(t: Any, starts: tuple[int, ...]) -> Any:
    """Where the document of a token begins."""
    found = t * 0
    for each in starts:
        found = torch.where(t >= each, each, found)
    return found


def causal(i: Any, j: Any) -> Any:
    return j <= i


def full_document(i: Any, j: Any, starts: tuple[int, ...]) -> Any:
    return start(i, starts) == start(j, starts)


def causal_document(i: Any, j: Any, starts: tuple[int, ...]) -> Any:
    return full_document(i, j, starts) & (j <= i)


def share_question(i: Any, j: Any, starts: tuple[int, ...]) -> Any:
    return (full_document(i, j, starts) | (j < starts[0])) & (j <= i)


def causal_blockwise(i: Any, j: Any, starts: tuple[int, ...]) -> Any:
    return (full_document(i, j, starts) | (i >= starts[-1])) & (j <= i)


def prefix_lm_causal(i: Any, j: Any, leading: int) -> Any:
    return (j <= i) | (j < leading)


def prefix_lm_document(i: Any, j: Any, starts: tuple[int, ...], leading: int) -> Any:
    return full_document(i, j, starts) & ((j <= i) | (j < start(i, starts) + leading))


def sliding_window(i: Any, j: Any, behind: int, ahead: int) -> Any:
    return (i - j <= behind) & (i - j >= -ahead)


def sliding_window_causal(i: Any, j: Any, span: int) -> Any:
    return (i - j <= span) & (j <= i)


def global_sliding_window(i: Any, j: Any, span: int) -> Any:
    return ((i - j).abs() <= span) | (i < span) | (j < span)


def block_causal_document(i: Any, j: Any, starts: tuple[int, ...], block: int) -> Any:
    end = (i // block + 1) * block
    for each in starts:  # no block goes beyond its document
        end = torch.where(i >= each, (i - each) // block * block + (each + block), end.clamp(max=each))
    return full_document(i, j, starts) & (j < end)


def hashed(*places: Any, seed: int) -> Any:
    """A number below `_PRIME`, in 32 bits: the cube of a sum."""
    total = seed * 2741 % _PRIME
    for place, factor in zip(places, (7919, 6011, 3571), strict=False):
        total = total + place % _PRIME * factor
    total = total % _PRIME
    return total * total % _PRIME * total % _PRIME


def kept(h: Any, m: Any, n: Any, share: tuple[int, int], group: int, seed: int, own: bool) -> Any:
    """Does a block of queries see a block of keys?"""
    some, of = share
    seen = (n + hashed(h // group, m, n // of, seed=seed)) % of < some
    return seen | (m == n) if own else seen


def block_sparse(h: Any, i: Any, j: Any, block: int, share: tuple[int, int], group: int, seed: int, own: bool) -> Any:
    return kept(h, i // block, j // block, share, group, seed, own)


def varied(t: Any, block: int, seed: int) -> Any:
    """The number of a token's block: block q > 0 begins at 2 q `block` and up to `block` later, in quarters."""
    place = t // (2 * block)
    late = hashed(place, seed=seed) % 5 * (block // 4)
    return torch.where(t % (2 * block) < late, place - 1, place).clamp(min=0)


def variable_block_sparse(
    h: Any, i: Any, j: Any, block: int, share: tuple[int, int], group: int, seed: int, own: bool
) -> Any:
    return kept(h, varied(i, block, seed), varied(j, block, seed), share, group, seed, own)


MASKS: dict[str, IndexFunction | None] = {"full": None} | {
    each.__name__: each
    for each in (
        causal, full_document, causal_document, share_question, causal_blockwise, prefix_lm_causal, prefix_lm_document,
        sliding_window, sliding_window_causal, global_sliding_window, block_causal_document, block_sparse,
        variable_block_sparse,
    )
}  # fmt: skip
_SETTINGS = {
    "starts": "documents", "leading": "prefix", "behind": "left", "ahead": "right", "span": "window", "block": "block",
    "share": "density",
}  # fmt: skip
"""The settings from which the numbers of the masks follow."""


def formula(site: AttentionSite, config: Config) -> Formula:
    """The site's own, with fewer keys."""
    own, name = of_site(site), str(config.get("mask"))
    if name not in MASKS:
        raise OptionError(f"no mask {name!r}: choose among {', '.join(MASKS)}")
    function = MASKS[name]
    if function is None:
        return own
    numbers = {each: _number(each, site, config) for each in parameters(function) if each not in ("h", "i", "j")}
    return replace(own, masks=(*own.masks, function), numbers={**own.numbers, **numbers})


def _number(name: str, site: AttentionSite, config: Config) -> Any:
    if name == "group":
        return site.heads // site.kv_heads
    if name in ("seed", "own"):
        return bool(config.get(name, False)) if name == "own" else int(config.get(name, 0))
    setting = _SETTINGS[name]
    if setting not in config:
        raise OptionError(f"the mask {config['mask']!r} needs the setting {setting!r}")
    value = config[setting]
    if name == "starts":
        lengths = [int(each) for each in str(value).split(",")]
        if min(lengths) < 1:
            raise OptionError(f"a document without a token: {value}")
        return tuple(sum(lengths[: n + 1]) for n in range(len(lengths)))
    if name == "share":
        share = Fraction(float(value)).limit_denominator(_FINEST)
        if not 0 < share <= 1:
            raise OptionError(f"a density of {value}; it is above 0, and at most 1")
        return share.numerator, share.denominator
    least = 4 if config["mask"] == "variable_block_sparse" else 1
    if name == "block" and (int(value) < least or int(value) % least):
        raise OptionError(f"a block of {value}; it is a positive multiple of {least}")
    return int(value)


def applies(site: AttentionSite, target: Target) -> bool | Refusal:
    """Self-attention under any mask of which it is known what it means."""
    unknown = [str(part) for part in site.mask.parts() if isinstance(part, Dense) and not isinstance(part, _KNOWN)]
    reason = ""
    if site.dropout_p > 0:
        reason = f"dropout of {site.dropout_p} would have other random numbers, and fewer keys to drop"
    elif unknown:
        reason = f"the mask has a factor of which too little is known to hide more: {', '.join(unknown)}"
    elif site.kv_len is not None and site.kv_len <= _FEWEST:
        reason = f"{site.kv_len} keys are too few for a pattern of blocks: it takes more than {_FEWEST}"
    elif not site.mask.has(Causal) and site.q_len != site.kv_len and not site.single_query_decode:
        reason = f"{site.q_len} queries over {site.kv_len} keys is cross-attention, where no block is a query's own"
    return Refusal(reason, site.path, site.source) if reason else True


_KNOWN = (Documents, DataPrefix, DataChunked)


def configs(site: AttentionSite, target: Target) -> Iterable[Config]:
    """The densest first: the other masks are what a model has been trained with, and options."""
    return [
        {"mask": "block_sparse", "block": 64, "density": 0.5, "own": True},
        {"mask": "block_sparse", "block": 64, "density": 0.2, "own": True},
        {"mask": "variable_block_sparse", "block": 128, "density": 0.2, "own": True},
    ]


_SITE = AttentionSite(
    path="case", heads=6, kv_heads=2, head_dim=16, v_head_dim=16, dtype="float32", scale=0.25, mask=Causal(),
    batch=3, q_len=520, kv_len=520,
)  # fmt: skip
_SMALL: Config = {"mask": "block_sparse", "block": 16, "density": 0.4, "seed": 3}
_DOCUMENTS = "100,37,150"

VARIANT = Variant(
    name="block_sparse",
    paper="arXiv:2510.17896",
    fidelity="approximate",
    reference=defined(formula),
    applies=applies,
    configs=configs,
    build=generated(formula),
    formula=formula,
    elements=ELEMENTS,
    cases=[
        Case(site=_SITE),
        Case(site=replace(_SITE, mask=Full(), dtype="bfloat16", q_len=515, kv_len=515), configs=[_SMALL]),
        Case(
            site=replace(_SITE, mask=Causal() & Padding(), v_head_dim=8),
            configs=[{"mask": "share_question", "documents": _DOCUMENTS}],
        ),
        Case(
            site=replace(_SITE, mask=Full() & Padding()),
            configs=[{"mask": "block_causal_document", "documents": _DOCUMENTS, "block": 24}],
        ),
        Case(
            site=replace(_SITE, mask=Documents() & Full(), kv_heads=6),
            configs=[{"mask": "global_sliding_window", "window": 20}],
        ),
        Case(
            site=replace(_SITE, mask=Causal(20), q_len=3),
            configs=[{**_SMALL, "mask": "variable_block_sparse", "seed": 0}],
        ),
        Case(site=replace(_SITE, bias="dense", softcap=2.0), configs=[_SMALL]),
        Case(site=replace(_SITE, sink="learned"), configs=[_SMALL]),
        Case(site=replace(_SITE, normaliser="sigmoid"), configs=[_SMALL]),
        Case(site=replace(_SITE, normaliser="relu"), configs=[_SMALL]),
    ],
    near_misses=[
        replace(_SITE, dropout_p=0.1),
        replace(_SITE, mask=Causal() & Dense()),
        replace(_SITE, q_len=512, kv_len=512),
        replace(_SITE, mask=Full(), q_len=100),
    ],
)
