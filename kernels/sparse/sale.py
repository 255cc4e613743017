"""SALE: block-sparse prefill, its blocks chosen by an estimate of q k^T in 4 bits (arXiv:2505.24179, section 3).

1. k' = k - mean(k) over the tokens (the softmax does not change), q' = q - mean(q); c_j = mean(q) . k'_j
2. q' and k' as integers of [-7, 7] times a step, max|.| / 7: of each token, or of the tokens that a fragment of the
   paper's kernel holds together (rows r and r + 8 of 16 queries; of 32 keys those of equal (j mod 8) // 2)
3. s~_ij = step_i step_j q4_i . k4_j + c_j; `rounded`: c_j to a multiple of step_i step_j, as integers are added up
4. m_i, l_i: maximum and sum of exp(scale (s_ij - m_i)) over the first 32 keys and a local band of at least `local`
5. a block of 64 queries x 32 keys is kept iff any Relative Attention Score exp(scale (s~_ij - m_i)) / l_i exceeds tau,
   or the sink or the band has part in it; softmax attention with the real q, k, v over what is kept

The sums of a block map are frozen, unlike those of a kernel in one pass, whose threshold rises. Exact with tau = 0, and
for calls of at most `floor` queries (of which those of decoding are): they are dense. The selection is a constant to
gradients, in float32; tokens of padding take no part in the means. Work: N^2 / 2 products of 4-bit numbers (in
bfloat16 on a CPU that has its products, else in floats: both hold them and their sums, which are whole), and the kept
blocks. Memory: the map, a byte for 2,048 scores; where there is no compiler, some rows of the estimate as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rewriter.codegen import estimate
from rewriter.codegen.either import Either
from rewriter.codegen.formula import Formula, of_site, reading
from rewriter.codegen.implementation import generated
from rewriter.kernels.exact import sdpa
from rewriter.site import AttentionSite, Causal, Dense, Full, Padding, Refusal
from rewriter.target import Target
from rewriter.variant import Case, Config, Implementation, Variant

_ROWS, _KEYS, _SINK, _SEGMENT = 64, 32, 32, 128
_LEAST, _MOST = 1e-5, 7  # a smaller tau keeps all; the largest 4-bit value
_TOGETHER = 1 << 21  # scores of the estimate that are in memory at once
_FAR = 1e20  # beyond all scores, and finite: it is multiplied
_FLOOR = 1024


def chosen(b: Any, h: Any, row: Any, j: Any, kept: Any) -> Any:
    """The blocks that a call keeps, bool (B, H, blocks of queries, blocks of keys)."""
    return kept[b, h, row // _ROWS, j // _KEYS]


def formula(site: AttentionSite, config: Config) -> Formula:
    """The site's own, of the kept blocks. The numbers say how they are chosen."""
    own = of_site(site)
    numbers = {"tau": float(config["tau"]), "local": int(config["local"]), "rounded": bool(config["rounded"])}
    how = {**numbers, "fragments": config["steps"] == "fragment"}
    masks, numbers = (*own.masks, chosen), {**own.numbers, **how}
    return replace(own, masks=masks, numbers=numbers, types={"kept": torch.bool}, chosen=True)


def dense(query: Tensor, key: Tensor, config: Config) -> bool:
    """Are all blocks kept without a look?"""
    q_len, kv_len = query.shape[2], key.shape[2]
    return bool(q_len <= config["floor"] or q_len > kv_len or config["tau"] < _LEAST)  # type: ignore[operator]


def reference(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, padding: Tensor | None, site: AttentionSite,
    config: Config,
) -> Tensor:  # fmt: skip
    """With the whole matrix of scores: (B, H, Sq, Dv)."""
    whole, seen = of_site(site), {} if padding is None else {"padding": padding}
    if not dense(query, key, config):
        every = selected(query, key, padding, site.scale, config)
        seen["mask"] = every.repeat_interleave(_ROWS, 2).repeat_interleave(_KEYS, 3)
    return reading(whole, seen).reference(query, key, value, site.scale, **seen)


@torch.no_grad()
def selected(query: Tensor, key: Tensor, padding: Tensor | None, scale: float, config: Config) -> Tensor:
    """Steps 1 to 5 with the whole matrix: bool (B, H, blocks of queries, blocks of keys)."""
    (q_len, kv_len), groups = (query.shape[2], key.shape[2]), query.shape[1] // key.shape[1]
    place, past = torch.arange(kv_len, device=query.device), kv_len - q_len
    real = torch.ones_like(place, dtype=torch.bool).expand(len(query), -1) if padding is None else padding
    q, k = query.float(), key.float().repeat_interleave(groups, 1)
    tokens, own = real[:, None, :, None], real[:, None, past:, None]
    k = torch.where(tokens, k - (k * tokens).sum(2, True) / tokens.sum(2, True).clamp(min=1), 0)
    mean = (q * own).sum(2, True) / own.sum(2, True).clamp(min=1)

    def rounded(x: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
        peaks = x.new_zeros(*x.shape[:2], int(group.max()) + 1)
        peaks.scatter_reduce_(2, group.expand(x.shape[:3]), x.abs().amax(-1), "amax")
        step = peaks[:, :, group, None] / _MOST
        step = torch.where(step == 0, 1, step)  # of zeros
        return (x / step).round(), step

    rows, keys = place[:q_len], place
    if config["steps"] == "fragment":
        rows, keys = rows // 16 * 8 + rows % 8, keys // 32 * 4 + keys % 8 // 2
    (q4, q_step), (k4, k_step) = rounded(q - mean, rows), rounded(k, keys)
    c, step = mean @ k.mT, q_step @ k_step.mT
    c = (c / step).round() * step if config["rounded"] else c
    seen = (place <= place[past:, None]) & real[:, None, None]
    estimate = (step * (q4 @ k4.mT) + c).masked_fill(~seen, float("-inf"))

    first = past + place[:q_len, None] // _ROWS * _ROWS
    start = (first + 1 - int(config["local"])) // _SEGMENT * _SEGMENT
    always = (place < _SINK) | (place >= start)
    exact = (q @ k.mT).masked_fill(~(seen & always), float("-inf"))
    threshold = exact.amax(-1, True) + _log(exact, scale, float(config["tau"]))
    high = (seen & always) | (estimate > threshold)
    whole = F.pad(high, (0, -kv_len % _KEYS, 0, -q_len % _ROWS))
    blocks: Tensor = whole.unflatten(3, (-1, _KEYS)).unflatten(2, (-1, _ROWS)).any(5).any(3)
    return blocks


def _log(exact: Tensor, scale: float, tau: float) -> Tensor:
    """ln(tau l) / scale; -inf where nothing is seen, so that all is above it."""
    top = exact.amax(-1, True).clamp(min=-_FAR)
    log: Tensor = (tau * (scale * (exact - top)).exp().sum(-1, True)).log() / scale
    return log


@torch.no_grad()
def kept(query: Tensor, key: Tensor, padding: Tensor | None, scale: float, numbers: Mapping[str, float]) -> Tensor:
    """`selected` with the numbers of a formula, in blocks of rows, and only before the band."""
    tau, local, fragments = numbers["tau"], int(numbers["local"]), numbers["fragments"]
    (batch, heads, q_len, _), (kv_heads, kv_len) = query.shape, key.shape[1:3]
    groups, past = heads // kv_heads, kv_len - q_len
    q, k, mean = smoothed(query.float(), key.float(), padding)
    q4, q_step = quantised(q - mean, (2, 8) if fragments else (1,), (-2,) if fragments else (-1,))
    k4, k_step = quantised(k, (4, 4, 2) if fragments else (1,), (-3, -1) if fragments else (-1,))
    grouped = q.unflatten(1, (kv_heads, groups))
    c = (mean.unflatten(1, (kv_heads, groups)).squeeze(3) @ k.mT).flatten(1, 2)  # (B, H, Skv)
    if padding is not None:
        c = c.masked_fill(~padding[:, None], -3 * _FAR)

    place = torch.arange(kv_len, device=q.device)
    firsts = past + torch.arange(0, q_len, _ROWS, device=q.device)
    starts = ((firsts + 1 - local) // _SEGMENT * _SEGMENT).clamp(min=0)
    blocks = torch.arange(-(-kv_len // _KEYS), device=q.device) * _KEYS
    last = (firsts + _ROWS).clamp(max=kv_len)
    out = ((blocks + _KEYS > starts[:, None]) | (blocks < _SINK)) & (blocks < last[:, None])
    out = out.repeat(batch, heads, 1, 1)
    if padding is not None:
        out &= F.pad(padding, (0, -kv_len % _KEYS)).unflatten(1, (-1, _KEYS)).any(-1)[:, None, None]

    threshold = q.new_empty(batch, kv_heads, groups, q_len)
    for i in range(0, q_len, _ROWS):
        here, n = slice(i, min(i + _ROWS, q_len)), min(_ROWS, q_len - i)
        begin, end = max((past + i + 1 - local) // _SEGMENT * _SEGMENT, 0), past + i + n
        sink = min(_SINK, begin)
        near = torch.cat([place[:sink], place[begin:end]])
        seen = near <= past + torch.arange(i, i + n, device=q.device)[:, None]
        if padding is not None:
            seen = seen & padding[:, None, None, None, near]
        band = torch.cat([k[:, :, :sink], k[:, :, begin:end]], 2).mT
        exact = (grouped[:, :, :, here].flatten(2, 3) @ band).unflatten(2, (groups, n))
        exact = exact.masked_fill(~seen, float("-inf"))
        threshold[..., here] = (exact.amax(-1) + _log(exact, scale, tau)[..., 0]).clamp(min=-_FAR)
    estimated = q4, k4, q_step[..., 0], k_step[..., 0], c, threshold.flatten(1, 2), starts
    high: Tensor = _above(*estimated, rounded=bool(numbers["rounded"]))
    return out | (high & (blocks < starts[:, None]))


def _above(
    q4: Tensor, k4: Tensor, q_step: Tensor, k_step: Tensor, c: Tensor, threshold: Tensor, starts: Tensor, *,
    rounded: bool,
) -> Tensor:  # fmt: skip
    """Which blocks before the band hold an estimate above its query's threshold: step 5."""
    kernel = estimate.load(_ROWS, _KEYS) if q4.device.type == "cpu" else Refusal("")
    if isinstance(kernel, estimate.EstimateKernel):
        return kernel(q4, k4, q_step, k_step, c, threshold, starts, rounded=rounded)
    (batch, heads, q_len, _), (kv_heads, kv_len) = q4.shape, k4.shape[1:3]
    groups, q_blocks = heads // kv_heads, -(-q_len // _ROWS)
    out = q4.new_zeros(batch, heads, q_blocks, -(-kv_len // _KEYS), dtype=torch.bool)
    rows = max(_TOGETHER // (batch * heads * kv_len) // _ROWS, 1) * _ROWS
    k = k4.float().mT
    for i in range(0, q_len, rows):
        here, n, far = slice(i, i + rows), min(rows, q_len - i), int(starts[(min(i + rows, q_len) - 1) // _ROWS])
        # The queries of a group are rows of one product.
        product = q4[:, :, here].float().unflatten(1, (kv_heads, groups)).flatten(2, 3) @ k[..., :far]
        product = product.unflatten(2, (groups, n)).flatten(1, 2)
        steps = q_step[:, :, here, None] * k_step[:, :, :far].repeat_interleave(groups, 1)[:, :, None]
        constant = c[:, :, None, :far]
        constant = (constant / steps).round() * steps if rounded else constant
        over = steps * product + constant - threshold[:, :, here, None]
        over = F.pad(over, (0, 0, 0, -n % _ROWS), value=-_FAR)
        high = over.unflatten(2, (-1, _ROWS)).amax(3).unflatten(3, (-1, _KEYS)).amax(4) > 0
        out[:, :, i // _ROWS : i // _ROWS + high.shape[2], : far // _KEYS] = high
    return out


def smoothed(q: Tensor, k: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k' and the mean of q, (B, H, 1, D)."""
    if padding is None:
        return q, k - k.mean(2, True), q.mean(2, True)
    real = padding[:, None, :, None].float()
    own = real[:, :, k.shape[2] - q.shape[2] :]
    k_mean, q_mean = ((x * r).sum(2, True) / r.sum(2, True).clamp(min=1) for x, r in ((k, real), (q, own)))
    return q, (k - k_mean) * real, q_mean


def quantised(x: Tensor, tile: tuple[int, ...], shared: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """int8 values of [-7, 7] and steps (..., S, 1): tokens in tiles, with a step for all along the shared axes."""
    n, size = x.shape[-2], len(torch.empty(tile, device="meta").flatten())
    peaks = F.pad(x.abs().amax(-1), (0, -n % size)).unflatten(-1, (-1, *tile))
    together = peaks.amax(shared, True).expand_as(peaks).flatten(-len(tile) - 1)[..., :n, None]
    step = torch.where(together == 0, 1, together / _MOST)
    return (x / step).round().to(torch.int8), step


def masked(site: AttentionSite, config: Config) -> Implementation:
    """PyTorch's fused attention in blocks of rows, with the map as their mask: the work of a dense one."""
    numbers = formula(site, config).numbers

    def attend(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, padding: Tensor | None, /, *sink: Tensor
    ) -> Tensor:
        blocks, out = kept(query, key, padding, site.scale, numbers), []
        past, rows = key.shape[2] - query.shape[2], 4 * _ROWS
        place = torch.arange(key.shape[2], device=query.device)
        for i in range(0, query.shape[2], rows):
            part = query[:, :, i : i + rows]
            end = past + i + part.shape[2]
            chosen = blocks[:, :, i // _ROWS : (i + rows) // _ROWS, : -(-end // _KEYS)]
            seen = chosen.repeat_interleave(_ROWS, 2)[:, :, : part.shape[2]].repeat_interleave(_KEYS, 3)[..., :end]
            seen = seen & (place[:end] <= place[past + i : end, None])
            seen = seen if padding is None else seen & padding[:, None, None, :end]
            own = (part, key[:, :, :end], value[:, :, :end], seen, None)
            out.append(sdpa.attend(*own, scale=site.scale, positional=Full()))
        return torch.cat(out, 2)

    return attend


def build(site: AttentionSite, config: Config) -> Implementation:
    """Sparse for long prompts, dense for what is short."""
    numbers = formula(site, config).numbers

    def read(query: Tensor, key: Tensor, padding: Tensor | None) -> dict[str, Tensor]:
        return {"kept": kept(query, key, padding, site.scale, numbers)}

    whole, sparse = sdpa.VARIANT.build(site, {}), generated(formula, masked, read)(site, config)
    return Either(sparse, whole, lambda query, key: not dense(query, key, config))


def applies(site: AttentionSite, target: Target) -> bool | Refusal:
    """Causal prefill, with or without padding, of more queries than are dense in any case."""
    reason = ""
    if site.dropout_p > 0:
        reason = f"dropout of {site.dropout_p} would have other random numbers, and fewer keys to drop"
    elif site.mask.has(Dense):
        reason = "the mask is a tensor of which nothing is known, so what the local band of a query sees is not known"
    elif site.mask.positional != Causal():
        reason = f"blocks are chosen before a causal query, and the mask is {site.mask}"
    elif site.scale <= 0:
        reason = f"a threshold on scores needs a positive scale, and this one is {site.scale}"
    elif site.q_len is not None and site.q_len <= _FLOOR:
        reason = f"{site.q_len} queries are attended densely: an estimate pays off only with more than {_FLOOR}"
    elif site.q_len is not None and site.kv_len is not None and site.q_len > site.kv_len:
        reason = f"{site.q_len} queries over {site.kv_len} keys is no prefill, whose last query stands at the last key"
    return Refusal(reason, site.path, site.source) if reason else True


def configs(site: AttentionSite, target: Target) -> Iterable[Config]:
    """The lowest threshold first."""
    return [_config(tau) for tau in (0.001, 0.004)]


def _config(tau: float, *, steps: str = "token", rounded: bool = False, floor: int = _FLOOR) -> Config:
    return {"tau": tau, "local": 128, "steps": steps, "rounded": rounded, "floor": floor}


_SITE = AttentionSite(
    path="case", heads=4, kv_heads=2, head_dim=16, v_head_dim=16, dtype="float32", scale=0.25, mask=Causal(),
    batch=2, q_len=1060, kv_len=1060,
)  # fmt: skip
_PADDED = replace(_SITE, mask=Causal() & Padding())

VARIANT = Variant(
    name="sale",
    paper="arXiv:2505.24179, section 3",
    fidelity="approximate",
    reference=reference,
    applies=applies,
    configs=configs,
    build=build,
    formula=formula,
    cases=[
        Case(site=_SITE),
        Case(site=_PADDED, configs=[_config(0.1, floor=200)]),
        Case(site=replace(_PADDED, dtype="bfloat16"), configs=[_config(0.1, steps="fragment", rounded=True, floor=0)]),
        Case(site=replace(_PADDED, q_len=1030, v_head_dim=8), configs=[_config(0.1, rounded=True, floor=130)]),
        Case(site=replace(_SITE, kv_heads=4), configs=[_config(0.0, floor=0)]),
    ],
    near_misses=[
        replace(_SITE, dropout_p=0.1),
        replace(_SITE, mask=Causal() & Dense()),
        replace(_SITE, mask=Full()),
        replace(_SITE, mask=Causal(1)),
        replace(_SITE, scale=-0.25),
        replace(_SITE, q_len=1024),
        replace(_SITE, q_len=1),
        replace(_SITE, kv_len=1050),
    ],
)
