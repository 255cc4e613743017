"""What is known about one attention: `AttentionSite`, its mask as a value of a small algebra, and `Refusal`.

This is all that `patterns/` (which produce sites) and `kernels/` (which consume them) share.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

#
# Positions are compared by *age*: age(i, j) = (i + Skv - Sq) - j, how many tokens before query i its key j stands when
# the last query is aligned with the last key. With a KV cache this is the distance that the model means; without one
# (Sq == Skv) it is i - j.


@dataclass(frozen=True)
class Mask:
    """Which keys a query may see. Masks combine with `&`; `str(mask)` is read back by `Mask.parse`."""

    def __and__(self, other: Mask) -> Mask:
        parts = [p for m in (self, other) for p in m.parts() if not isinstance(p, Full)]
        unique = tuple(sorted(dict.fromkeys(parts), key=str))  # one order, so that equal masks are equal values
        return unique[0] if len(unique) == 1 else And(unique) if unique else Full()

    def parts(self) -> Iterator[Mask]:
        """The factors of the intersection."""
        yield self

    @property
    def positional(self) -> Mask:
        """The factors that depend on positions only, intersected."""
        kept = Full() & Full()
        for part in self.parts():
            if isinstance(part, POSITIONAL):
                kept = kept & part
        return kept

    def has(self, kind: type[Mask]) -> bool:
        """Is a factor of this kind present?"""
        return any(isinstance(p, kind) for p in self.parts())

    def visible(self, q_len: int, kv_len: int, device: Any = None) -> Tensor:
        """bool[q_len, kv_len], True where the positional factors let query i see key j."""
        age = ages(q_len, kv_len, device)
        key = torch.arange(kv_len, device=device)
        seen = torch.ones_like(age, dtype=torch.bool)
        for part in self.parts():
            if isinstance(part, Causal):
                seen &= age >= -part.offset
            elif isinstance(part, SlidingWindow):
                if part.left is not None:
                    seen &= age <= part.left
                if part.right is not None:
                    seen &= age >= -part.right
            elif isinstance(part, Chunked):
                query = torch.arange(kv_len - q_len, kv_len, device=device)
                blocks = (torch.div(place, part.size, rounding_mode="floor") for place in (query[:, None], key))
                seen &= torch.eq(*blocks)
            elif isinstance(part, PrefixCausal):
                seen &= (age >= 0) | (key < part.length)
        return seen

    def __str__(self) -> str:
        name = re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()
        values = [getattr(self, f.name) for f in fields(self)]
        return f"{name}({', '.join('inf' if v is None else str(v) for v in values)})" if values else name

    @staticmethod
    def parse(text: str) -> Mask:
        """The mask that `str` printed. Raises ValueError on anything else."""
        mask: Mask = Full()
        for word in text.split(" & "):
            found = re.fullmatch(r"(\w+)(?:\(([^()]*)\))?", word.strip())
            kind = _KINDS.get(found[1]) if found else None
            if found is None or kind is None:
                raise ValueError(f"not a mask: {text!r}")
            try:  # a wrong count or kind of values is a wrong mask
                bounds = found[2].split(",") if found[2] else []
                values = [None if v.strip() == "inf" and kind is SlidingWindow else int(v) for v in bounds]
                mask = mask & kind(*values)
            except (TypeError, ValueError) as cause:
                raise ValueError(f"not a mask: {text!r}") from cause
        return mask


@dataclass(frozen=True)
class Full(Mask):
    """Every key is visible."""


@dataclass(frozen=True)
class Causal(Mask):
    """Key j is visible to query i iff age(i, j) >= -offset; offset 0 is the usual causal mask, aligned at the end."""

    offset: int = 0


@dataclass(frozen=True)
class SlidingWindow(Mask):
    """Visible iff -right <= age <= left. `None` is unbounded. A window of w tokens with itself is (w - 1, 0)."""

    left: int | None
    right: int | None


@dataclass(frozen=True)
class Chunked(Mask):
    """Visible iff both stand in the same block of `size` positions, counted from the first key."""

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"a block of {self.size} positions")


@dataclass(frozen=True)
class PrefixCausal(Mask):
    """The first `length` keys are visible to all, and the others as in `Causal(0)`: the union of the two."""

    length: int


@dataclass(frozen=True)
class Padding(Mask):
    """Depends on data: bool[B, Skv], the same for every query and head."""


@dataclass(frozen=True)
class Dense(Mask):
    """A mask of which a tensor says all: anything that broadcasts to (B, H, Sq, Skv). Its subclasses know more about
    it, which serves variants that are made for it; for all others they are a tensor.
    """


@dataclass(frozen=True)
class Documents(Dense):
    """Depends on data: visible iff query and key belong to the same segment. The tensor says which."""


@dataclass(frozen=True)
class DataPrefix(Dense):
    """Depends on data: `PrefixCausal` with a length that is the batch row's own. The tensor says which."""


@dataclass(frozen=True)
class DataChunked(Dense):
    """Depends on data: `Chunked` with blocks that are counted from the batch row's own first token."""

    size: int


@dataclass(frozen=True)
class Window2d(Dense):
    """Windows of `height` x `width` tokens of a grid that was rolled by (`shift_h`, `shift_w`): in a window, only
    tokens that were neighbours before see each other. The batch axis holds the windows, each with a mask of its own.
    """

    height: int
    width: int
    shift_h: int
    shift_w: int


@dataclass(frozen=True)
class Window3d(Dense):
    """As `Window2d`, over frames as well."""

    depth: int
    height: int
    width: int
    shift_d: int
    shift_h: int
    shift_w: int


@dataclass(frozen=True)
class And(Mask):
    """The intersection of several factors."""

    factors: tuple[Mask, ...] = ()

    def parts(self) -> Iterator[Mask]:
        return iter(self.factors)

    def __str__(self) -> str:
        return " & ".join(map(str, self.factors))


POSITIONAL = (Causal, SlidingWindow, Chunked, PrefixCausal)
"""What `Mask.visible` says everything about. The others are a tensor, of which they say something (`Dense`)."""

_KINDS: dict[str, type[Mask]] = {
    "full": Full, "causal": Causal, "sliding_window": SlidingWindow, "chunked": Chunked, "prefix_causal": PrefixCausal,
    "padding": Padding, "dense": Dense, "documents": Documents, "data_prefix": DataPrefix, "data_chunked": DataChunked,
    "window2d": Window2d, "window3d": Window3d,
}  # fmt: skip


def ages(q_len: int, kv_len: int, device: Any = None) -> Tensor:
    """int64[q_len, kv_len]: how many tokens before query i its key j stands, aligned at the end."""
    q = torch.arange(kv_len - q_len, kv_len, device=device)
    return q[:, None] - torch.arange(kv_len, device=device)[None, :]


@dataclass(frozen=True, kw_only=True)
class AttentionSite:
    """Every fact about one attention: out = softmax(scale * q k^T + mask) v, per head.

    Lengths and batch are None where the graph is symbolic in them. `dtype` is the type of q, k and v as torch prints it
    without the prefix ("bfloat16"); `softmax_dtype` is the type in which the original normalises.

    bias        what is added to the scores beside the mask: "none", "alibi" (a slope for each head times the distance),
                "relative" (a function of the distance), "table" (of both positions), "decomposed" (products of the
                queries or keys with tables of positions), "dense" (of the data)
    softcap     c where the scores are c * tanh(scale * q k^T / c)
    normaliser  "softmax", "sigmoid", "relu"
    sink        one more logit in the sum: "zero" (softmax1) or "learned"
    factor      a tensor that multiplies the scores: "scalar", "head", "query" or "key" (which part it differs over)
    edits       what is outside of the canonical operator; such a site is recognised, and left as it is
    tokens      how tokens lie, where it is known: "14x14", or "14x14+1" with one more in front, "14x14+0+1" behind
    samples     the weights are not those of keys but of places between the pixels of maps (`rewriter/sampling.py`), so
                many in each: "4+4+4+4"; `kv_len` counts the pixels
    observed    facts that were seen in values that may change, and are not proved for the next call: "mask", "bias"
                and "fill" (of what buffers hold), "binary" (numbers that are taken for 0 and 1)
    """

    path: str
    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    dtype: str
    scale: float
    mask: Mask
    batch: int | None = None
    q_len: int | None = None
    kv_len: int | None = None
    device: str = "cpu"
    softmax_dtype: str | None = None
    dropout_p: float = 0.0
    bias: str = "none"
    softcap: float | None = None
    normaliser: str = "softmax"
    sink: str | None = None
    factor: str | None = None
    edits: tuple[str, ...] = ()
    tokens: str | None = None
    samples: str | None = None
    observed: tuple[str, ...] = ()
    spelling: str = "eager"
    source: str = ""

    def key(self) -> str:
        """The identity of the computation, for plans and measurements: all facts but place, sizes and spelling. How
        tokens lie is one of them where it is known: what a variant computes depends on it.
        """
        skip = {"path", "source", "batch", "q_len", "kv_len", "spelling", "edits", "observed"}
        facts = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in skip}
        facts = {name: value for name, value in facts.items() if value != _USUAL.get(name, _MISSING)}
        return ",".join(f"{name}={value}" for name, value in facts.items())

    @staticmethod
    def parse(key: str, path: str = "") -> AttentionSite:
        """The site that `key` describes, with sizes unknown. Raises ValueError on anything else."""
        words = dict(word.split("=", 1) for word in re.split(r",(?=\w+=)", key))
        read: dict[str, Any] = {"path": path}
        for each in fields(AttentionSite):
            if each.name in words:
                read[each.name] = _READERS.get(str(each.type).removesuffix(" | None"), str)(words[each.name])
        known: dict[str, Any] = {name: None if value == "None" else value for name, value in read.items()}
        try:
            return AttentionSite(**known)
        except TypeError as cause:
            raise ValueError(f"not the key of a site: {key!r}") from cause

    def sized(self, *, batch: int, q_len: int, kv_len: int) -> AttentionSite:
        """The same site with concrete sizes."""
        return replace(self, batch=batch, q_len=q_len, kv_len=kv_len)

    @property
    def elements(self) -> frozenset[str]:
        """What scores go through beyond softmax(scale * q k^T + mask); a variant says which of these it computes."""
        named = {"bias": self.bias != "none", **{each: getattr(self, each) is not None for each in _GIVEN}}
        other = {self.normaliser} - {"softmax"}
        return frozenset(name for name, present in named.items() if present) | other

    @property
    def beyond(self) -> tuple[str, ...]:
        """The same in words, with what else is not plain, and the edits."""
        unlike = [name for name in _PLAIN if getattr(self, name) != _PLAIN[name]]
        return (*(f"{name} {getattr(self, name)}" for name in unlike), *self.edits)

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as a torch object."""
        found = getattr(torch, self.dtype)
        assert isinstance(found, torch.dtype)
        return found

    @property
    def single_query_decode(self) -> bool:
        """One query that sees everything before it: the step of a KV cache, causal by itself."""
        return self.q_len == 1 and self.mask.positional in (Full(), Causal(0))

    def __str__(self) -> str:
        shared = f"/{self.kv_heads}" if self.kv_heads != self.heads else ""
        dims = f"{self.head_dim}" if self.v_head_dim == self.head_dim else f"{self.head_dim}>{self.v_head_dim}"
        lengths = "x".join("?" if n is None else str(n) for n in (self.q_len, self.kv_len))
        drop = f" dropout={self.dropout_p}" if self.dropout_p else ""
        drop += "".join(f", {words}" for words in self.beyond)
        return (
            f"{self.path or '<root>'}: {self.heads}{shared} heads of {dims}, {lengths} tokens, {self.mask}, "
            f"scale {self.scale:.4g}, {self.dtype}{drop} [{self.spelling}]"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values only; the mask as its string."""
        return {f.name: str(v) if isinstance(v := getattr(self, f.name), Mask) else v for f in fields(self)}


_MISSING = object()
_PLAIN: dict[str, Any] = {
    "bias": "none", "softcap": None, "normaliser": "softmax", "sink": None, "factor": None, "samples": None
}  # fmt: skip
_GIVEN = ("softcap", "sink", "samples")
_USUAL: dict[str, Any] = {**_PLAIN, "tokens": None}
"""What most sites have, and their keys leave out."""

_READERS: dict[str, Any] = {"int": int, "float": float, "Mask": Mask.parse}


@dataclass(frozen=True)
class Refusal:
    """A falsy value with a sentence: which fact stood in the way, and where."""

    reason: str
    path: str = ""
    source: str = ""

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        place = ", ".join(p for p in (self.path, self.source) if p)
        return f"{place}: {self.reason}" if place else self.reason
