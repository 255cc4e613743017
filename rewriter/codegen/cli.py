"""`rewriter kernels show | compile | defaults`: generated source, and what it becomes on machines that are not here.
`rewriter simulate`: how much a window of a grid can gain.
"""

from __future__ import annotations

import math
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rewriter.errors import OptionError
from rewriter.terminal import JSON, Document, progress, stdout

if TYPE_CHECKING:
    from rewriter.codegen.families import Kernels

kernels = typer.Typer(help="Look at the kernels that are generated.", no_args_is_help=True)

VARIANT = Annotated[str, typer.Option(help="A variant with a formula; see `rewriter variants`.")]
HEAD_DIM = Annotated[int, typer.Option(min=1, max=256, help="Head size of queries and keys.")]
V_HEAD_DIM = Annotated[int | None, typer.Option(min=1, max=256, help="Head size of values; without it the same.")]
DTYPE = Annotated[str, typer.Option(help="float32, float16 or bfloat16.")]
MASK = Annotated[str, typer.Option(help="The mask of the site, as `rewriter explain` prints it.")]
TOKENS = Annotated[str | None, typer.Option(help="How the tokens of the site lie, as 14x14+1: with one in front.")]
SAMPLES = Annotated[str | None, typer.Option(help="Of attention to places in maps: how many in each, as 4+4+4.")]
CONFIG = Annotated[list[str] | None, typer.Option(help="A setting of the variant, as window=256; may be repeated.")]
BLOCKS = Annotated[str | None, typer.Option(help="The config's numbers, as 128,64,8,2; without it the shipped one.")]


@kernels.command("show")
def show(
    variant: VARIANT,
    target: Annotated[str, typer.Option(help="cpu for the C++ source, or a GPU such as sm_90.")] = "sm_90",
    head_dim: HEAD_DIM = 64,
    v_head_dim: V_HEAD_DIM = None,
    dtype: DTYPE = "bfloat16",
    mask: MASK = "causal(0)",
    tokens: TOKENS = None,
    samples: SAMPLES = None,
    config: CONFIG = None,
    blocks: BLOCKS = None,
) -> Document:
    """Print the source that is generated for a variant at a site."""
    made = _kernels(variant, head_dim, v_head_dim, dtype, mask, tokens, samples, config)
    if target != "cpu":
        _known(target)
    text = made.cpp() if target == "cpu" else made.triton(_blocks(blocks, made, made.names[0], target))
    print(text)
    return {"source": text}


@kernels.command("compile")
def compile_(
    variant: VARIANT,
    target: Annotated[str, typer.Option(help="GPUs, separated by commas.")] = "sm_80,sm_90,sm_100,gfx942",
    head_dim: HEAD_DIM = 64,
    v_head_dim: V_HEAD_DIM = None,
    dtype: DTYPE = "bfloat16",
    mask: MASK = "causal(0)",
    tokens: TOKENS = None,
    samples: SAMPLES = None,
    config: CONFIG = None,
    blocks: BLOCKS = None,
    as_json: JSON = False,
) -> Document:
    """Compile a variant's kernels ahead of time, without the hardware, and say what is in the binaries."""
    made = _kernels(variant, head_dim, v_head_dim, dtype, mask, tokens, samples, config)
    found: list[Any] = []
    names = [_known(name.strip()) for name in target.split(",")]
    with progress() as advance:
        for name in names:
            for kernel in made.names:
                advance("compiling", len(found), len(names) * len(made.names))
                found.append(made.binary(kernel, _blocks(blocks, made, kernel, name), name))
    if not as_json:
        _print([{"kernel": each.kernel, **each.row()} for each in found])
    return {"kernels": [each.to_json() for each in found]}


@kernels.command("defaults")
def defaults(
    target: Annotated[str, typer.Option(help="GPUs, separated by commas.")] = "sm_80,sm_90,sm_100,gfx942",
    sizes: Annotated[str, typer.Option(help="Head sizes, separated by commas.")] = "32,64,128,256",
    as_json: JSON = False,
) -> Document:
    """Compile every candidate config and rank them by spills and instructions: the tables of shipped defaults.

    For attention with a softmax, without a bias and with one (pairs); linear attention has one config for all kernels
    and targets.
    """
    from rewriter.codegen.configs import ranked

    names = [_known(each.strip()) for each in target.split(",")]
    tables: dict[str, Any] = {"defaults": {}, "pairs": {}}
    with progress() as advance:
        for table, pairs in zip(tables.values(), (False, True), strict=True):
            for name, kernel, size, best in ranked(names, _heads(sizes), pairs=pairs):
                advance(f"{name} {kernel} {size}", 0, None)
                config = asdict(best)
                config.pop("splits")
                table.setdefault(name, {}).setdefault(kernel, {})[size] = tuple(config.values())
    if not as_json:
        stdout().print(tables)
    return tables


def _kernels(
    variant: str,
    head_dim: int,
    v_head_dim: int | None,
    dtype: str,
    mask: str,
    tokens: str | None,
    samples: str | None,
    config: list[str] | None,
) -> Kernels:
    """Those of a variant at a site with these facts."""
    from rewriter.codegen.families import kernels_of
    from rewriter.site import AttentionSite, Mask
    from rewriter.target import Target
    from rewriter.variant import variants

    known = {name: each for name, each in variants().items() if each.formula is not None}
    if variant not in known:
        raise OptionError(f"there is no variant {variant!r} with a formula: choose among {', '.join(known)}")
    if dtype not in ("float32", "float16", "bfloat16"):
        raise OptionError(f"{dtype!r} is none of float32, float16, bfloat16")
    try:
        parsed = Mask.parse(mask)
    except ValueError as cause:
        raise OptionError(str(cause)) from cause
    site = AttentionSite(
        path="",
        heads=8,
        kv_heads=8,
        head_dim=head_dim,
        v_head_dim=v_head_dim or head_dim,
        dtype=dtype,
        scale=head_dim**-0.5,
        mask=parsed,
        tokens=tokens,
        samples=samples,
    )
    chosen = known[variant]
    refusal = chosen.takes(site, Target.current())
    if not refusal:
        raise OptionError(f"{variant} does not apply: {refusal}")
    settings = dict(next(iter(chosen.configs(site, Target.current()))))
    for word in config or []:
        name, _, value = word.partition("=")
        if name not in settings:
            raise OptionError(f"{variant} has no setting {name!r}: {', '.join(settings) or 'it has none'}")
        try:
            settings[name] = type(settings[name])(value)
        except ValueError:  # where other words have other settings
            settings[name] = value
        if isinstance(number := settings[name], int) and number < 0:
            raise OptionError(f"{name} is {value}; it must be at least 0")
    assert chosen.formula is not None
    try:
        formula = chosen.formula(site, settings)
    except ValueError as cause:
        raise OptionError(f"{variant} is not defined for {', '.join(config or [])}: {cause}") from cause
    if formula is None:
        raise OptionError(f"{variant} with these settings is several kernels: choose one of them")
    return kernels_of(formula, site)


def _known(target: str) -> str:
    """A target that has limits here."""
    from rewriter.codegen.ahead import SHARED_KIB, parse_target

    parse_target(target)
    if target not in SHARED_KIB:
        raise OptionError(f"the limits of {target} are not known, only those of {', '.join(SHARED_KIB)}")
    return target


def _heads(text: str) -> list[int]:
    sizes = [int(each) if each.strip().isdecimal() else 0 for each in text.split(",")]
    if not all(1 <= size <= 256 for size in sizes):
        raise OptionError(f"{text!r} is not head sizes from 1 to 256, as 64,128")
    return sizes


def _blocks(text: str | None, made: Kernels, kernel: str, target: str) -> Any:
    if text is None:
        return made.default(kernel, target)
    try:
        return made.config(*map(int, text.split(",")))
    except (TypeError, ValueError) as cause:
        raise OptionError(f"{text!r} is not {','.join(each.name for each in fields(made.config))}") from cause


def _print(rows: list[dict[str, str]]) -> None:
    """One table a kernel and target would be wide: facts stand below each other."""
    from rich.table import Table

    for row in rows:
        table = Table(show_header=False, box=None, padding=(0, 2))
        for name, value in row.items():
            table.add_row(name, value)
        stdout().print(table, "")


SIZES = "numbers by axis, as 16x8x8, or one for all"


def simulate(
    grid: Annotated[str, typer.Option(help="Tokens along each of one to three axes, as 30x48x80.")],
    window: Annotated[str, typer.Option(help=f"Keys that a query sees: {SIZES}.")],
    stride: Annotated[str, typer.Option(help=f"Queries that share a window: {SIZES}.")] = "1",
    dilation: Annotated[str, typer.Option(help=f"Distance of the keys in a window: {SIZES}.")] = "1",
    causal: Annotated[str, typer.Option(help="1 for a causal axis, 0 for others, as 1x0x0.")] = "0",
    tile: Annotated[
        str | None, typer.Option(help="Tokens of a kernel's tile, as 2x8x8, or of queries/of keys.")
    ] = None,
    best: Annotated[bool, typer.Option("--search", help="Find the best stride and tile for the window.")] = False,
    tokens: Annotated[
        str, typer.Option(help="With --search: tokens in a tile, as 128, or of queries/of keys.")
    ] = "128",
    as_json: JSON = False,
) -> Document:
    """The most that attention in windows of a grid can gain, counted in tiles of a kernel."""
    from rewriter.codegen import simulate as counted

    if best == (tile is not None):
        raise OptionError("give either a --tile, or --search to find one")
    if best and stride != "1":
        raise OptionError("--search finds the stride: leave out --stride")
    axes = counted.axes_of(_sizes(grid), _sizes(window), _sizes(stride), _sizes(dilation), _sizes(causal))
    shapes = [_sizes(half) for half in (tokens if tile is None else tile).split("/")]
    if len(shapes) > 2 or (best and any(len(shape) != 1 for shape in shapes)):
        raise OptionError("a tile is one size, or that of queries and that of keys with a / between them")
    ends = shapes[0], shapes[-1]
    found = counted.search(axes, ends[0][0], ends[1][0]) if best else counted.bound(axes, *ends)
    rows = counted.bound_in_rows(axes, math.prod(found.query_tile), math.prod(found.key_tile))
    if not as_json:
        one = {
            "stride": _words(found.stride),
            "tile": "/".join(dict.fromkeys(map(_words, (found.query_tile, found.key_tile)))),
            "at most": f"{found.speedup:.2f}x",
            "by tokens": f"{found.ideal:.2f}x",
            "tiles in rows": f"{rows:.2f}x",
            "masks": "none needed" if found.dense else "in some tiles",
        }
        _print([one])
    return {**found.to_json(), "speedup_in_rows": rows}


def _sizes(text: str) -> tuple[int, ...]:
    words = text.split("x")
    if not all(word.isdecimal() for word in words):
        raise OptionError(f"{text!r} is not a size: numbers with an x between them, as 30x48x80")
    return tuple(map(int, words))


def _words(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))
