"""What a kernel of the linear family computes: the formula, and its definition token by token in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from rewriter.codegen.expression import Expression, asking, parameters, traced
from rewriter.errors import OptionError

Decay = Literal["none", "head", "token", "channel"]

LEAST = -60.0
"""Logarithms of decays below this are taken for it: what is left of a state is lost in float32 anyway."""

_RANKS = {"head": 1, "token": 3, "channel": 4}


class LinearState(NamedTuple):
    """What is remembered of the keys so far, in float32: `sums`, the decayed sum of phi(k) v^T, (B, Hs, F, Dv), and
    `totals`, that of phi(k), (B, Hs, F), None where nothing is normalised. Hs is what `state_heads` says.
    """

    sums: Tensor
    totals: Tensor | None = None


@dataclass(frozen=True)
class LinearFormula:
    """S_t = decay_t S_(t-1) + phi(k_t) v_t^T and out_t = scale phi(q_t) S_t, where normalised divided by
    phi(q_t) z_t + eps with z_t = decay_t z_(t-1) + phi(k_t).

    query_map   phi of the queries, a function of one element at first place (None: phi(q) is passed as query)
    key_map     phi of the keys
    numbers     the values of what else the maps ask for by name
    decay       in logarithms <= 0, a tensor of each call: "head" (H,), "token" (B, H, N), "channel" (B, H, N, F)
    normalised  divide by the sum of the weights?
    causal      else every query sees every key, without decay
    features    the size of a phi(q) that is passed, where it is not that of q: a map that mixes channels is not traced

    Retention (arXiv:2307.08621) and lightning attention (arXiv:2405.17381): "head". Mamba-2 (arXiv:2405.21060):
    "token". Gated linear attention (arXiv:2312.06635): "channel".
    """

    query_map: Callable[..., Any] | None = None
    key_map: Callable[..., Any] | None = None
    numbers: Mapping[str, float] = field(default_factory=dict, hash=False)
    decay: Decay = "none"
    normalised: bool = False
    eps: float = 1e-6
    causal: bool = True
    features: int | None = None

    def __post_init__(self) -> None:
        if not self.causal and self.decay != "none":
            raise OptionError(f"a decay by {self.decay} is that of a causal sum; here every query sees every key")

    @property
    def maps(self) -> tuple[Callable[..., Any], ...]:
        """Those that there are."""
        return tuple(each for each in (self.query_map, self.key_map) if each)

    def expression(self, which: Literal["query", "key"]) -> Expression | None:
        """A map as an expression of `s`."""
        function = self.query_map if which == "query" else self.key_map
        return _of_element(function, self.numbers) if function else None

    def mapped(self, which: Literal["query", "key"], x: Tensor) -> Tensor:
        """phi of queries or keys."""
        function = self.query_map if which == "query" else self.key_map
        if function is None:
            return x
        given = {name: value for name, value in self.numbers.items() if name in _names(function)}
        return torch.as_tensor(function(x, **given), dtype=x.dtype).expand(x.shape)

    def reference(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        *,
        log_decay: Tensor | None = None,
        padding: Tensor | None = None,
        state: LinearState | None = None,
    ) -> tuple[Tensor, LinearState]:
        """The definition: query (B, H, Sq, F), key (B, Hk, Skv, F), value (B, Hv, Skv, Dv) -> (B, H, Sq, Dv) and the
        state after the last key. `padding`, bool (B, Skv), is False at keys that are left out, and do not decay.
        The last query stands at the last key.
        """
        count = state_heads(self, query, key, value, log_decay)
        batch, q_len, kv_len = len(query), query.shape[2], key.shape[2]
        seen = key.new_ones(batch, kv_len, dtype=torch.bool) if padding is None else padding
        q = self.mapped("query", query)
        k = self.mapped("key", key).repeat_interleave(count // key.shape[1], 1)
        k = torch.where(seen[:, None, :, None], k, 0.0)
        v = torch.where(seen[:, None, :, None], value, 0.0).repeat_interleave(count // value.shape[1], 1)
        kept = k.new_ones(batch, count, kv_len, 1)
        if log_decay is not None:
            log_decay = log_decay[None, :, None, None] if log_decay.dim() == 1 else log_decay
            log_decay = log_decay[..., None] if log_decay.dim() == 3 else log_decay
            log_decay = log_decay.repeat_interleave(count // log_decay.shape[1], 1)
            log_decay = log_decay.expand(batch, count, kv_len, -1)
            kept = torch.where(seen[:, None, :, None], log_decay, 0.0).exp()
        sums = k.new_zeros(*k.shape[:2], k.shape[3], v.shape[3]) if state is None else state.sums.to(k.dtype)
        totals = k.new_zeros(*k.shape[:2], k.shape[3])
        if state is not None and state.totals is not None:
            totals = state.totals.to(k.dtype)

        def answer(at: int) -> Tensor:
            own = q[:, :, at]
            groups = q.shape[1] // count
            out = scale * torch.einsum("bhf,bhfe->bhe", own, sums.repeat_interleave(groups, 1))
            if not self.normalised:
                return out
            return out / ((own * totals.repeat_interleave(groups, 1)).sum(-1, keepdim=True) + self.eps)

        out = []
        for t in range(kv_len):
            sums = kept[:, :, t, :, None] * sums + k[:, :, t, :, None] * v[:, :, t, None, :]
            totals = kept[:, :, t] * totals + k[:, :, t]
            if self.causal and t >= kv_len - q_len:
                out.append(answer(t - kv_len + q_len))
        if not self.causal:
            out = [answer(i) for i in range(q_len)]
        return torch.stack(out, 2), LinearState(sums, totals if self.normalised else None)


def state_heads(formula: LinearFormula, query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None) -> int:
    """How many states there are: as many as heads of keys, of values or of decays, whichever are most.

    Raises OptionError where the operands do not fit together.
    """
    heads, k_heads, v_heads = query.shape[1], key.shape[1], value.shape[1]
    if (log_decay is None) != (formula.decay == "none"):
        raise OptionError(
            f"the formula's decay is {formula.decay!r}; given is {'none' if log_decay is None else 'one'}"
        )
    if query.shape[3] != key.shape[3]:
        raise OptionError(f"queries have {query.shape[3]} features and keys {key.shape[3]}")
    if formula.causal and query.shape[2] > key.shape[2]:
        raise OptionError(f"{query.shape[2]} queries cannot end with {key.shape[2]} keys in a causal sum")
    counts = [k_heads, v_heads]
    if log_decay is not None:
        if log_decay.dim() != _RANKS[formula.decay]:
            raise OptionError(f"a decay by {formula.decay} has {_RANKS[formula.decay]} axes, not {log_decay.dim()}")
        counts.append(log_decay.shape[min(1, log_decay.dim() - 1)])
    count = max(counts)
    if heads % count or any(count % each for each in counts):
        raise OptionError(
            f"{heads} query heads, {k_heads} of keys, {v_heads} of values: {counts} do not divide {heads}"
        )
    return count


def _names(function: Callable[..., Any]) -> list[str]:
    """What a map asks for: its element comes first."""
    try:
        return parameters(function)
    except ValueError:  # torch.exp has no signature
        return ["x"]


def _of_element(function: Callable[..., Any], numbers: Mapping[str, float]) -> Expression:
    """What is traced names its element `s`, as scores do; a map names it `x`."""

    def renamed(s: Any, **given: Any) -> Any:
        return function(s, **given)

    names = ["s", *_names(function)[1:]]
    return traced(asking(renamed, names, getattr(function, "__name__", "function")), numbers, {})
