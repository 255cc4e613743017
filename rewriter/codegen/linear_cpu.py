"""The linear family on the CPU: chunks in plain PyTorch, in time O(N) and in memory of one chunk beyond the answer."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from rewriter.codegen.linear_formula import LEAST, LinearState
from rewriter.errors import OptionError
from rewriter.target import multiplies_bfloat16

Map = Callable[[Tensor], Tensor]

_KEPT = {torch.bfloat16} if multiplies_bfloat16() else set()
"""The narrow types that products are computed in: elsewhere a CPU is several times faster in float32."""
_CHUNKS = {torch.bfloat16: 256}
_FEW = 32  # queries that read all keys directly: cheaper than a state, which costs a product for each key
_CHUNK = 128  # positions in a chunk, of the other types: measured from 64 to 512 with 64 and 128 features


def scan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    *,
    query_map: Map | None = None,
    key_map: Map | None = None,
    log_decay: Tensor | None = None,
    padding: Tensor | None = None,
    state: LinearState | None = None,
    normalised: bool = False,
    eps: float = 1e-6,
    causal: bool = True,
    ended: bool = True,
    chunk: int | None = None,
) -> tuple[Tensor, LinearState | None]:
    """`LinearFormula.reference` in chunks: the answer (B, H, Sq, Dv) and the state of each query head.

    Only a further call needs the state after the last key: None unless `ended`. The maps may mix channels: from
    (B, heads, n, D) to (B, heads, n, F). `log_decay` is (H,) or (B, H, N), for a token one number and not one for each
    channel. The last query stands at the last key.
    """
    (batch, heads, q_len, _), kv_len = query.shape, key.shape[2]
    if causal and q_len > kv_len:
        raise OptionError(f"{q_len} queries cannot end with {kv_len} keys in a causal sum")
    past = kv_len - q_len if causal else 0
    # Products may lose digits as the original's do, but not range, which float16 lacks; the state is in float32.
    dtype = query.dtype if query.dtype in _KEPT else torch.promote_types(query.dtype, torch.float32)
    wide, chunk = torch.promote_types(dtype, torch.float32), chunk or _CHUNKS.get(dtype, _CHUNK)
    gates = None if log_decay is None else log_decay.to(wide).clamp(min=LEAST)
    if gates is not None and gates.dim() == 1:
        gates = gates[None, :, None].expand(batch, -1, kv_len)
    if gates is not None and padding is not None:
        gates = gates.masked_fill(~padding[:, None], 0.0)

    def keys(at: slice) -> tuple[Tensor, Tensor]:
        """phi(k) and v, (B H, n, .)."""
        k, v = key[:, :, at].to(dtype), value[:, :, at].to(dtype)
        k = key_map(k) if key_map else k
        if padding is not None:
            gone = ~padding[:, None, at, None]
            k, v = k.masked_fill(gone, 0.0), v.masked_fill(gone, 0.0)
        return _flat(k, heads), _flat(v, heads)

    sums: Tensor | None = None
    totals: Tensor | None = None
    if state is not None:
        groups = heads // state.sums.shape[1]
        sums = state.sums.to(wide).repeat_interleave(groups, 1).flatten(0, 1)
        totals = None if state.totals is None else state.totals.to(wide).repeat_interleave(groups, 1).flatten(0, 1)

    def added(k: Tensor, v: Tensor, left: Tensor | None, last: Tensor | None) -> None:
        """The state after these keys; `left` is what of each key is left then, `last` of what was before."""
        nonlocal sums, totals
        k = k if left is None else k * left.to(dtype)[..., None]
        more, count = torch.bmm(k.mT, v).to(wide), k.sum(1).to(wide)
        if last is not None and sums is not None:
            sums, totals = sums * last[:, None, None], None if totals is None else totals * last[:, None]
        sums = more if sums is None else sums + more
        totals = (count if totals is None else totals + count) if normalised else None

    if not causal:
        for start in range(0, kv_len, chunk):
            added(*keys(slice(start, start + chunk)), None, None)
    out: Tensor | None = None
    parts: list[Tensor] = []
    end = kv_len if causal else q_len
    bounds = [0, end] if causal and q_len <= _FEW else [*range(0, end, chunk), end]
    for start, stop in itertools.pairwise(bounds):
        at, first = slice(start, stop), max(start, past)
        since: Tensor | None = None
        if causal:
            k, v = keys(at)
            if gates is not None:
                since = gates[:, :, at].cumsum(-1).repeat_interleave(heads // gates.shape[1], 1).flatten(0, 1)
        if first < stop:
            q = query[:, :, first - past : stop - past].to(dtype)
            q = _flat(query_map(q) if query_map else q, heads)
            answer: Tensor | None = None
            norm: Tensor | None = None
            if sums is not None:
                own = q if since is None else q * since[:, first - start :, None].exp().to(dtype)
                answer = torch.bmm(own, sums.to(dtype))
                norm = torch.bmm(own, totals.to(dtype)[..., None]).to(wide) if totals is not None else None
            if causal:
                w = torch.bmm(q, k.mT)
                if since is not None:
                    w = w * (since[:, first - start :, None] - since[:, None]).clamp(max=0.0).exp().to(dtype)
                w = w.tril(first - start) if w.requires_grad else w.tril_(first - start)
                answer = torch.bmm(w, v) if answer is None else torch.baddbmm(answer, w, v)
                if normalised:
                    count = w.sum(-1, keepdim=True).to(wide)
                    norm = count if norm is None else norm + count
            assert answer is not None
            if norm is not None:
                answer = answer * (scale / (norm + eps))
            elif scale != 1.0:
                answer = answer * scale
            answer = answer.view(batch, heads, *answer.shape[1:])
            if answer.requires_grad:
                parts.append(answer.to(query.dtype))
            else:
                out = query.new_empty((batch, heads, q_len, answer.shape[3])) if out is None else out
                out[:, :, first - past : stop - past] = answer
        if causal and (ended or stop < end):
            left = None if since is None else (since[:, -1:] - since).exp()
            added(k, v, left, None if since is None else since[:, -1].exp())
    last: LinearState | None = None
    if ended:
        assert sums is not None
        heads_of = (batch, heads)
        last = LinearState(sums.unflatten(0, heads_of), None if totals is None else totals.unflatten(0, heads_of))
    return torch.cat(parts, 2) if out is None else out, last


def _flat(x: Tensor, heads: int) -> Tensor:
    """(B, heads or fewer, n, D) as (B heads, n, D)."""
    return x.repeat_interleave(heads // x.shape[1], 1).flatten(0, 1) if x.shape[1] < heads else x.flatten(0, 1)
