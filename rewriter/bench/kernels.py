"""Generated kernels on this CPU beside what torch has: time in alternation, peak memory, and the ideal."""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rewriter.codegen import cpp
from rewriter.codegen.formula import Formula, of_mask
from rewriter.errors import RewriterError
from rewriter.guard import error, tolerance
from rewriter.site import AttentionSite, Causal, Mask, Refusal, SlidingWindow
from rewriter.tune.measure import alternate
from rewriter.variant import variants

HEADS, WIDTH, WINDOW = 8, 64, 256
_BLOCK = 64
"""Of the random block-sparse mask: what one element of its table stands for."""

Runs = dict[str, Callable[[], Tensor] | Refusal]


@dataclass(frozen=True)
class Row:
    """One implementation in one case: the median of its milliseconds, of the ratios to the first one in the same round
    (None where it runs alone), the largest ratio that the kept share of the scores allows, and its peak memory beyond
    inputs and output in MiB. Without milliseconds, `reason` says why this CPU has none.
    """

    case: str
    tokens: int
    dtype: str
    implementation: str
    milliseconds: float | None = None
    faster: float | None = None
    ideal: float | None = None
    memory: float | None = None
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def measured(*, tokens: int = 4096, repeats: int = 7, flex: bool = True) -> Iterator[Row]:
    """Every case, the reference of each first. Nothing is timed before its result agrees with the reference's."""
    for dtype in (torch.float32, torch.bfloat16):
        yield from _timed("window of 256, causal", tokens, dtype, repeats, _window(tokens, dtype, flex), None)
        for sparse in (2 * tokens, 4 * tokens):
            runs, kept = _block_sparse(sparse, dtype)
            yield from _timed("10% of blocks", sparse, dtype, max(3, repeats // 2), runs, 1 / kept)
        for dense in (tokens // 8, tokens // 2, tokens):
            yield from _timed("dense, causal", dense, dtype, repeats, _dense(dense, dtype), None)
        for linear in (tokens // 4, tokens // 2, tokens, 16 * tokens):
            yield from _timed("linear, causal", linear, dtype, repeats, _linear(linear, dtype, linear <= tokens), None)


def _operands(tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, HEADS, tokens, WIDTH, generator=generator).to(dtype) for _ in range(3))
    return query, key, value


def _fused(operands: tuple[Tensor, Tensor, Tensor], *, causal: bool) -> Callable[[], Tensor]:
    return lambda: F.scaled_dot_product_attention(*operands, is_causal=causal)


def site_of(tokens: int, dtype: str, mask: Mask) -> AttentionSite:
    """The site of all measurements: one sequence, 8 heads of 64."""
    return AttentionSite(
        path="bench", heads=HEADS, kv_heads=HEADS, head_dim=WIDTH, v_head_dim=WIDTH, dtype=dtype,
        scale=WIDTH**-0.5, mask=mask, batch=1, q_len=tokens, kv_len=tokens,
    )  # fmt: skip


def native(
    formula: Formula, query: Tensor, key: Tensor, value: Tensor, **tensors: Tensor
) -> Callable[[], Tensor] | Refusal:
    """A call of the generated C++, whose last queries agree with the definition (RewriterError otherwise), or why this
    machine has none.
    """
    made = cpp.attention(formula, query, value, tensors)
    if isinstance(made, Refusal):
        return made
    scale = query.shape[3] ** -0.5
    with torch.no_grad():
        expected = formula.reference(query[:, :, -_BLOCK:].double(), key.double(), value.double(), scale, **tensors)
        agrees(made(query, key, value, scale, **tensors)[:, :, -_BLOCK:].double(), expected, query.dtype)
    return lambda: made(query, key, value, scale, **tensors)


def agrees(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Raise RewriterError if they differ by more than two results of this type may."""
    if not error(got, expected) <= 2 * tolerance(dtype):
        raise RewriterError(f"an implementation differs from its definition by {error(got, expected):.2g}")


def _window(tokens: int, dtype: torch.dtype, flex: bool) -> Runs:
    query, key, value = operands = _operands(tokens, dtype)
    variant = variants()["sliding_window"]
    config = {"window": WINDOW, "sinks": 0}
    gather: Any = variant.build(site_of(tokens, str(dtype)[6:], Causal()), config)
    masks, numbers = of_mask(Causal() & SlidingWindow(WINDOW - 1, None))
    runs: Runs = {
        "SDPA, causal": _fused(operands, causal=True),
        "SDPA, full": _fused(operands, causal=False),
        "block gather": lambda: gather.plain(query, key, value, None, None),
        "generated C++": native(Formula(masks, numbers=numbers), query, key, value),
    }
    if flex:
        runs["flex_attention"] = _flex(query, key, value)
    return runs


def _flex(query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def near(b: Any, h: Any, i: Any, j: Any) -> Any:
        return (i >= j) & (i - j < WINDOW)

    mask = create_block_mask(near, None, None, query.shape[2], key.shape[2], device="cpu")
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(query, key, value, block_mask=mask)


def _block_sparse(tokens: int, dtype: torch.dtype) -> tuple[Runs, float]:
    """And the share of the scores that is kept."""
    operands = _operands(tokens, dtype)
    blocks = tokens // _BLOCK
    table = torch.rand(blocks, blocks, generator=torch.Generator().manual_seed(1)) < 0.1
    table.fill_diagonal_(True)

    def listed(i: Any, j: Any, table: Any) -> Any:
        return table[i // _BLOCK, j // _BLOCK]

    runs: Runs = {
        "SDPA, full": _fused(operands, causal=False),
        "generated C++": native(Formula((listed,)), *operands, table=table),
    }
    return runs, float(table.float().mean())


def _dense(tokens: int, dtype: torch.dtype) -> Runs:
    operands = _operands(tokens, dtype)
    chosen = variants()["sdpa"].build(site_of(tokens, str(dtype)[6:], Causal()), {})
    return {
        "SDPA, causal": _fused(operands, causal=True),
        "sdpa, as chosen": lambda: chosen(*operands, None, None),
    }


def _linear(tokens: int, dtype: torch.dtype, beside: bool) -> Runs:
    """Of another function than the softmax's, whose time is what counts here; alone where SDPA would take minutes. Its
    last queries agree with its definition.
    """
    query, key, value = operands = _operands(tokens, dtype)
    variant, site = variants()["linear"], site_of(tokens, str(dtype)[6:], Causal())
    mapped = variant.build(site, {})
    with torch.no_grad():
        last = query[:, :, -_BLOCK:].float(), key.float(), value.float()
        expected = variant.reference(*last, None, None, site, {}, module=mapped)
        agrees(mapped(query, key, value, None, None)[:, :, -_BLOCK:].float(), expected, dtype)
    alone: Runs = {"linear, chunked": lambda: mapped(*operands, None, None)}
    return {"SDPA, causal": _fused(operands, causal=True), **alone} if beside else alone


def _timed(case: str, tokens: int, dtype: torch.dtype, repeats: int, runs: Runs, ideal: float | None) -> Iterator[Row]:
    there = {name: run for name, run in runs.items() if not isinstance(run, Refusal)}
    with torch.no_grad():
        _check(case, there, dtype)
        times = alternate(list(there.values()), repeats=repeats)
        memory = [peak_memory(run) for run in there.values()]
    measured = dict(zip(there, zip(times, memory, strict=True), strict=True))
    for name, run in runs.items():
        row = Row(case, tokens, str(dtype)[6:], name, ideal=ideal if name == "generated C++" else None)
        if isinstance(run, Refusal):
            yield replace(row, reason=str(run))
            continue
        taken, peak = measured[name]
        ratio = statistics.median(first / own for first, own in zip(times[0], taken, strict=True))
        faster = ratio if len(there) > 1 else None
        yield replace(row, milliseconds=statistics.median(taken) * 1e3, faster=faster, memory=peak)


def _check(case: str, runs: Mapping[str, Callable[[], Tensor]], dtype: torch.dtype) -> None:
    """Those that compute the same must agree before any is timed: all local ones, and all dense ones. Of block-sparse
    and linear ones there is one, which agrees with its definition.
    """
    local = [run for name, run in runs.items() if not name.startswith("SDPA") or case.startswith("dense")]
    first = local[0]()
    for other in local[1:]:
        agrees(other(), first, dtype)


def peak_memory(function: Callable[[], Tensor]) -> float | None:
    """MiB of the process at the worst moment of a call, beyond what it held before and the result.

    Of the whole process, since the allocations of generated code are not torch's. None where the system does not say.
    """
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists() or not hasattr(ctypes.CDLL(None), "malloc_trim"):
        return None
    function()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed is given back first
    reset.write_text("5")
    before = _kib(status, "VmRSS")
    result = function()
    return max(_kib(status, "VmHWM") - before - result.nbytes / 1024, 0) / 1024


def _kib(status: Path, name: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name))
