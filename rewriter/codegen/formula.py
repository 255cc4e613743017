"""What a kernel of the softmax family computes: the formula, its definition in plain PyTorch, and masks as formulas."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from rewriter.codegen.expression import INDICES, Expression, Kind, asking, kind_of, kind_of_type, parameters, traced
from rewriter.errors import OptionError
from rewriter.ops import normalised
from rewriter.site import AttentionSite, Causal, Chunked, Mask, PrefixCausal, SlidingWindow

IndexFunction = Callable[..., Any]
ELEMENTS = frozenset({"bias", "softcap", "sink", "sigmoid", "relu"})
"""What a formula of a site computes beyond softmax(scale * q k^T + mask) v."""


@dataclass(frozen=True)
class Formula:
    """out_i = sum over j of normalise_j(score(scale * q_i k_j)) v_j, over the keys j for which every mask is True.

    masks    functions of indices that give a bool, for example `lambda i, j, window: i - j < window`
    scores   functions of the score `s` and indices, each on the result of the one before
    numbers  the values of those of their parameters that are plain numbers, or tuples of them
    sink     does one more logit for each head, (H,), take part in the softmax, without a value?
    types    of the elements of tensors that a call passes beside those of its site, for what is compiled before a call
    chosen   what a query sees is chosen from all operands of a call: some of the queries alone would see other keys
    ordered  tokens stand in an order of each call's own, and what its mask and padding hide is said by these tensors

    A function names what it wants: `b`, `h` (the query head), `i`, `j` (the positions of query and key among the keys;
    the last query stands at the last key), `row` (the query's place in this call), `s`. Every other parameter is one of
    `numbers` or a tensor that is passed with each call and read at indices, as in `slopes[h]`; an index outside of it
    is moved to its edge.
    """

    masks: tuple[IndexFunction, ...] = ()
    scores: tuple[IndexFunction, ...] = ()
    numbers: Mapping[str, Any] = field(default_factory=dict, hash=False)
    normaliser: Literal["softmax", "sigmoid", "relu"] = "softmax"
    sink: bool = False
    types: Mapping[str, torch.dtype] = field(default_factory=dict, hash=False)
    chosen: bool = False
    ordered: bool = False

    def __post_init__(self) -> None:
        for function in self.masks:
            if "s" in parameters(function):
                raise OptionError(f"{getattr(function, '__name__', 'a mask')} asks for the score, which no mask sees")

    @cached_property
    def tensors(self) -> tuple[str, ...]:
        """The names of the tensors that a call passes."""
        named = [name for function in self.masks + self.scores for name in parameters(function)]
        return tuple(name for name in dict.fromkeys(named) if name not in INDICES and name not in self.numbers)

    def expressions(self, kinds: Mapping[str, Kind]) -> tuple[Expression | None, Expression | None]:
        """All masks as one expression, and all score functions; None where there are none."""
        return _expressions(self, tuple(kinds.items()))

    def reads_pairs(self, kinds: Mapping[str, Kind]) -> bool:
        """Does it read a number for each pair of a query and a key, as of a bias? Kernels then hold blocks of them."""
        return any(each.reads_pairs for each in self.expressions(kinds) if each)

    def visible(self, tensors: Mapping[str, Tensor], **at: Tensor) -> Tensor:
        """What the masks say of pairs at `b`, `h`, `i`, `j` and `row`, which broadcast; True where there are none."""
        return torch.as_tensor(self._visible(**self._given(tensors, at)) if self.masks else True)

    def _given(self, tensors: Mapping[str, Tensor], at: Mapping[str, Tensor]) -> dict[str, Any]:
        return {**self.numbers, **{name: _Edged(tensor) for name, tensor in tensors.items()}, **at}

    def _visible(self, **given: Any) -> Any:
        seen = None
        for function in self.masks:
            one = _called(function, given)
            seen = one if seen is None else seen & one
        return seen

    def _scored(self, s: Any, **given: Any) -> Any:
        for function in self.scores:
            s = _called(function, {**given, "s": s})
        return s

    def reference(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, *, sink: Tensor | None = None, **tensors: Tensor
    ) -> Tensor:
        """The definition, with the whole matrix of scores: (B, H, Sq, Dv). A query that sees no key gives zeros."""
        return self.attended(query, key, value, scale, indices(query, key), sink=sink, **tensors)

    def attended(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        at: Mapping[str, Tensor],
        *,
        sink: Tensor | None = None,
        real: Tensor | None = None,
        **tensors: Tensor,
    ) -> Tensor:
        """The same of queries and keys that stand `at` these indices; `real`, bool, hides more where it is given."""
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        given = self._given(tensors, at)
        scores = query @ key.mT * scale
        if self.scores:
            scored = torch.as_tensor(self._scored(scores, **given), device=query.device)
            scores = scored.to(torch.promote_types(scored.dtype, scores.dtype)).expand(scores.shape)
        seen = torch.as_tensor(self._visible(**given), device=query.device) if self.masks else None
        if real is not None:
            seen = real if seen is None else seen & real
        if seen is None:
            return normalised(scores, sink, self.normaliser).to(value.dtype) @ value
        seen = seen.expand(scores.shape)
        weights = normalised(scores.masked_fill(~seen, float("-inf")), sink, self.normaliser)
        return weights.masked_fill(~seen, 0.0).to(value.dtype) @ value


@cache
def _expressions(formula: Formula, kinds: Any) -> tuple[Expression | None, Expression | None]:
    mask = traced(_joined(formula._visible, formula.masks), formula.numbers, dict(kinds)) if formula.masks else None
    score = None
    if formula.scores:
        score = traced(_joined(formula._scored, formula.scores, ("s",)), formula.numbers, dict(kinds))
    if mask and kind_of(mask.result) != "bool":
        raise OptionError(f"{mask.name} gives a number; a mask says True where a key is seen, as in x != 0")
    return mask, score


def indices(query: Tensor, key: Tensor) -> dict[str, Tensor]:
    """b, h, i, j and row as int64 tensors that broadcast to (B, H, Sq, Skv)."""
    batch, heads, q_len, kv_len = *query.shape[:3], key.shape[2]
    lengths = {"b": (batch, 0), "h": (heads, 1), "row": (q_len, 2), "j": (kv_len, 3)}
    made = {
        name: torch.arange(n, device=query.device).view([-1 if axis == own else 1 for axis in range(4)])
        for name, (n, own) in lengths.items()
    }
    return {**made, "i": made["row"] + kv_len - q_len}


class _Edged:
    """A captured tensor: indices outside of it are moved to its edge, and whole numbers do not wrap around."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __getitem__(self, index: Any) -> Tensor:
        places = index if isinstance(index, tuple) else (index,)
        moved = [torch.as_tensor(p).clamp(0, n - 1) for p, n in zip(places, self.tensor.shape, strict=True)]
        found = self.tensor[tuple(moved)]
        return found.long() if kind_of_type(found.dtype) == "int" else found


def _called(function: IndexFunction, given: Mapping[str, Any]) -> Any:
    return function(**{name: given[name] for name in parameters(function)})


def _joined(
    function: Callable[..., Any], parts: tuple[IndexFunction, ...], also: tuple[str, ...] = ()
) -> Callable[..., Any]:
    """A function that asks for what its parts ask for, and for these."""
    names = dict.fromkeys([*also, *(name for part in parts for name in parameters(part))])
    return asking(function, names, " & ".join(getattr(part, "__name__", "?") for part in parts))


# --- masks -----------------------------------------------------------------------------------------------------------


def of_mask(mask: Mask) -> tuple[tuple[IndexFunction, ...], dict[str, float]]:
    """The positional factors of a site's mask as functions of indices, and their numbers."""
    functions: list[IndexFunction] = []
    numbers: dict[str, float] = {}
    for part in mask.positional.parts():
        if isinstance(part, Causal):
            functions.append(causal)
            numbers["offset"] = part.offset
        elif isinstance(part, SlidingWindow):
            if part.left is not None:
                functions.append(not_before)
                numbers["left"] = part.left
            if part.right is not None:
                functions.append(not_after)
                numbers["right"] = part.right
        elif isinstance(part, Chunked):
            functions.append(chunked)
            numbers["chunk"] = part.size
        elif isinstance(part, PrefixCausal):
            functions.append(prefix_causal)
            numbers["prefix"] = part.length
    if len(set(functions)) < len(functions):
        raise OptionError(f"two factors of one kind in {mask}")
    return tuple(functions), numbers


def causal(i: Any, j: Any, offset: int) -> Any:
    """Keys up to `offset` after the query."""
    return i - j >= -offset


def not_before(i: Any, j: Any, left: int) -> Any:
    """Keys at most `left` before the query."""
    return i - j <= left


def not_after(i: Any, j: Any, right: int) -> Any:
    """Keys at most `right` after the query."""
    return i - j >= -right


def chunked(i: Any, j: Any, chunk: int) -> Any:
    """Keys of the query's own chunk."""
    return i // chunk == j // chunk


def prefix_causal(i: Any, j: Any, prefix: int) -> Any:
    """The first keys, and those up to the query."""
    return (j <= i) | (j < prefix)


def tokens(b: Any, j: Any, padding: Any) -> Any:
    """Keys that are real tokens; `padding` is bool (B, Skv)."""
    return padding[b, j]


def shown(b: Any, h: Any, row: Any, j: Any, mask: Any) -> Any:
    """A bool tensor (B, H, Sq, Skv), True on what is seen; axes of size 1 serve all."""
    return mask[b, h, row, j]


def of_site(site: AttentionSite) -> Formula:
    """What a site computes, but for the tensors that a call passes: `passed` and `reading`."""
    masks, numbers = of_mask(site.mask)
    scores: tuple[IndexFunction, ...] = ()
    if site.softcap is not None:
        scores, numbers = (capped,), {**numbers, "softcap": site.softcap}
    normaliser: Any = site.normaliser
    return Formula(masks, scores, numbers, normaliser, site.sink is not None)


def capped(s: Any, softcap: float) -> Any:
    """arXiv:2408.00118, section 2: softcap * tanh(s / softcap)."""
    return softcap * torch.tanh(s / softcap)


def biased(s: Any, b: Any, h: Any, row: Any, j: Any, bias: Any) -> Any:
    """A tensor (B, H, Sq, Skv) that is added; axes of size 1 serve all."""
    return s + bias[b, h, row, j]


def passed(mask: Tensor | None, padding: Tensor | None) -> dict[str, Tensor]:
    """The tensors of one call by the names at which they are read: `padding`, and a mask of up to four axes that is
    bool (`mask`) or added (`bias`).
    """
    tensors = {} if padding is None else {"padding": padding}
    if mask is not None:
        tensors["mask" if mask.dtype == torch.bool else "bias"] = mask[(None,) * (4 - mask.dim())]
    return tensors


def reading(formula: Formula, names: Collection[str]) -> Formula:
    """The formula with what reads the tensors of these names, as `passed` gives them."""
    masks = tuple(function for name, function in (("padding", tokens), ("mask", shown)) if name in names)
    scores = (biased,) if "bias" in names else ()
    return replace(formula, masks=formula.masks + masks, scores=formula.scores + scores)


def merged(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """One softmax over the keys of two, from (out (B, H, Sq, Dv), log-sum-exp (B, H, Sq)) of each: of a sequence and of
    further keys that all its queries see, say.
    """
    (one, own), (other, more) = first, second
    whole = torch.logaddexp(own, more)
    safe = whole.masked_fill(whole == float("-inf"), 0.0)
    left, right = ((each - safe).exp().unsqueeze(-1) for each in (own, more))
    return (left * one.float() + right * other.float()).to(one.dtype), whole
