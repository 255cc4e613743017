"""Every variant on this CPU beside PyTorch's fused attention: time in alternation, peak memory, and the ideal.

Nothing is listed here: a variant is measured at the sizes whose sites it takes. A sequence is causal where it takes
that, and sees all of itself otherwise; a grid is for those that take the same length only as a grid, or, with smaller
ones below it, for those that read places of maps.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from rewriter.bench.kernels import agrees, peak_memory, site_of
from rewriter.codegen.blocks import pairs_of
from rewriter.codegen.either import pairs
from rewriter.codegen.formula import Formula, of_site
from rewriter.errors import OptionError, RewriterError
from rewriter.sampling import samples_for
from rewriter.site import AttentionSite, Causal, Full
from rewriter.target import Target
from rewriter.testing import inputs
from rewriter.tune.measure import alternate
from rewriter.variant import Config, Implementation, Variant, variants

BASELINE = "SDPA"
SIZES = ("1024", "4096", "16384", "32x32", "64x64", "16x16x16")
DTYPES = ("float32", "bfloat16")
_LAST = 64  # queries that are compared with the definition where it takes few
_SCORES = 1 << 27  # that a definition may hold at once
_SECONDS, _ROUNDS = 6.0, 12.0  # of a call, beyond which it is not measured, and of all rounds of a site


@dataclass(frozen=True)
class Row:
    """One variant with one config at one site, or SDPA there.

    case       the mask of a sequence, or the grid
    faster     the median of the ratios to SDPA, round by round
    work       the share of the site's products that it computes: of the pairs that its mask shows, or, of a variant
               without one, as its operators count them. None where neither is known
    ideal      the ratio to SDPA that the shown pairs allow; None for variants without a mask
    memory     peak beyond operands and result in MiB; None where the system does not say
    reason     why it was not measured
    """

    case: str
    tokens: int
    dtype: str
    variant: str
    config: str = ""
    milliseconds: float | None = None
    faster: float | None = None
    work: float | None = None
    ideal: float | None = None
    memory: float | None = None
    reason: str = ""

    @property
    def reached(self) -> float | None:
        """The share of the ideal speed-up."""
        return self.faster / self.ideal if self.faster and self.ideal else None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"reached": self.reached}


@dataclass(frozen=True)
class Choice:
    """A variant with a config."""

    variant: Variant
    config: Config

    @property
    def settings(self) -> str:
        """The config in words."""
        return ", ".join(f"{name}={value}" for name, value in self.config.items())


def sites(size: str, dtype: str) -> list[AttentionSite]:
    """Those of "4096", tokens in a row, or of "64x64", a grid. Raises OptionError on anything else."""
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){0,2}", size):
        raise OptionError(f"a size is written 4096, 64x64 or 16x16x16, and not {size!r}")
    tokens = prod(map(int, size.split("x")))
    if "x" in size:
        grid = replace(site_of(tokens, dtype, Full()), tokens=size)
        return [grid, replace(grid, samples="4+4+4")] if size.count("x") == 1 else [grid]
    return [site_of(tokens, dtype, mask) for mask in (Causal(), Full())]


def offered(
    found: Collection[Variant], size: str, dtype: str, every: bool
) -> Iterator[tuple[AttentionSite, list[Choice]]]:
    """The sites of a size, each with the variants to measure there and their first config, or every one."""
    target, left = Target.current(), list(found)
    for site in sites(size, dtype):
        plain = replace(site, tokens=None)
        only_so = site.tokens and not site.samples
        here = [each for each in left if each.takes(site, target) and not (only_so and each.takes(plain, target))]
        left = [each for each in left if each not in here]
        most = None if every else 1
        chosen = [Choice(each, config) for each in here for config in islice(each.configs(site, target), most)]
        if chosen:
            yield site, chosen


def measured(
    names: Sequence[str] = (),
    sizes: Sequence[str] = SIZES,
    dtypes: Sequence[str] = DTYPES,
    *,
    repeats: int = 5,
    every: bool = False,
) -> Iterator[Row]:
    """SDPA first at each site. Nothing is timed before it agrees with its definition."""
    known = variants()
    if missing := [name for name in names if name not in known]:
        raise OptionError(f"no variant {missing[0]!r}: choose among {', '.join(known)}")
    chosen = [known[name] for name in names or known]
    ordered = sorted(sizes, key=lambda size: sites(size, "float32")[0].q_len or 0)
    for dtype in dtypes:
        last: dict[str, Row] = {}  # of each variant: the next size is some square of that
        for size in ordered:
            for site, choices in offered(chosen, size, dtype, every):
                yield from _at(site, choices, last, repeats)


def _at(site: AttentionSite, choices: Sequence[Choice], last: dict[str, Row], repeats: int) -> Iterator[Row]:
    case, tokens = site.tokens or str(site.mask), site.q_len or 0
    case += f", {site.samples} places" if site.samples else ""
    fused_given: Any = inputs(site, seed=0)
    given: Any = samples_for(site, _pyramid(site)) if site.samples else fused_given
    left_out, builds = [], []
    for each in choices:
        row = Row(case, tokens, site.dtype, each.variant.name, each.settings)
        if reason := _too_large(last.get(each.variant.name), tokens):
            left_out.append(replace(row, reason=reason))
            continue
        with torch.no_grad():
            built = each.variant.build(site, each.config)
            _defined(each, site, built, given)
            builds.append((row, built, *_ideal(site, built, given)))
    with torch.no_grad():
        runs = [_fused(site, fused_given), *(_call(built, given) for _, built, *_ in builds)]
        times = alternate(runs, repeats=repeats, budget=_ROUNDS)
        memory = [peak_memory(run) for run in runs]
    rows = [Row(case, tokens, site.dtype, BASELINE), *(replace(row, work=w, ideal=i) for row, _, w, i in builds)]
    for row, taken, peak in zip(rows, times, memory, strict=True):
        ratio = statistics.median(first / own for first, own in zip(times[0], taken, strict=True))
        row = replace(row, milliseconds=statistics.median(taken) * 1e3, faster=ratio, memory=peak)
        last[row.variant] = row
        yield row
    yield from left_out


def _pyramid(site: AttentionSite) -> list[tuple[int, int]]:
    """The grid, and each further map half as high and as wide."""
    height, width = map(int, (site.tokens or "").split("x"))
    return [(max(height >> each, 1), max(width >> each, 1)) for each in range((site.samples or "").count("+") + 1)]


def _fused(site: AttentionSite, given: Any) -> Callable[[], Tensor]:
    query, key, value, *_ = given
    causal = site.mask == Causal()
    return lambda: F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=site.scale)


def _call(built: Implementation, given: Any) -> Callable[[], Tensor]:
    return lambda: built(*given)


def _ideal(site: AttentionSite, built: Implementation, given: Any) -> tuple[float | None, float | None]:
    """The work beside the whole attention's, and the ratio of times that it allows."""
    if site.samples:
        return None, None
    query, key, value, mask, padding, *sink = given
    whole = pairs_of(of_site(site), query, key, {})
    shown = pairs(built, query, key, value, mask, padding, *sink)
    if shown is not None:
        return shown / whole, whole / shown
    # The counter knows the fused attention of GPUs only.
    fused = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _products}
    with FlopCounterMode(display=False, custom_mapping=fused) as counter:
        built(*given)
    flops = counter.get_total_flops() / (2 * whole * (query.shape[3] + value.shape[3]))
    return flops or None, None


def _products(
    query: Any, key: Any, value: Any, dropout_p: float = 0.0, is_causal: bool = False, *_: Any, **__: Any
) -> int:
    """Of one call, from shapes."""
    batch, heads, q_len, width = query
    shown = q_len * (q_len + 1) // 2 if is_causal else q_len * key[2]
    return int(2 * batch * heads * shown * (width + value[3]))


def _defined(choice: Choice, site: AttentionSite, built: Implementation, given: Any) -> None:
    """Raise RewriterError where the implementation differs from the definition of its variant: at the last queries
    where a sequence has a formula by which no query depends on others, otherwise at all, where the definition's scores
    can be held.
    """
    if site.samples:
        agrees(built(*given), choice.variant.reference(*given, site, choice.config), site.torch_dtype)
        return
    query, key, value, mask, padding, *sink = given
    variant, module = choice.variant, {"module": built} if isinstance(built, nn.Module) else {}
    rows = query.shape[2]
    formula = None if variant.formula is None else variant.formula(site, choice.config)
    whole = site.tokens is not None or (isinstance(formula, Formula) and formula.chosen)
    if formula is not None and not whole:
        rows = min(rows, _LAST)
    elif prod(query.shape[:3]) * key.shape[2] > _SCORES:
        return
    got = built(*given)[:, :, -rows:]
    last = query[:, :, -rows:].float(), key.float(), value.float()
    expected = variant.reference(*last, mask, padding, *sink, site, choice.config, **module)
    try:
        agrees(got.float(), expected, query.dtype)
    except RewriterError as error:
        raise RewriterError(f"{variant.name} with {choice.settings or 'no settings'} at {site}: {error}") from None


def _too_large(last: Row | None, tokens: int) -> str:
    """Would a call take too long or too much memory, if either grows as the square of what was seen?"""
    if last is None or last.milliseconds is None:
        return ""
    growth = (tokens / last.tokens) ** 2
    seconds, mib, free = growth * last.milliseconds / 1e3, growth * (last.memory or 0.0), _free()
    if seconds > _SECONDS:
        return f"a call would take some {seconds:.0f} s"
    return f"a call would need some {mib / 1024:.0f} GiB" if mib > free / 2 else ""


def _free() -> float:
    """MiB that the system can give; all that is wanted where it does not say."""
    listed = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+)", listed.read_text()) if listed.exists() else None
    return int(found[1]) / 1024 if found else float("inf")
