"""What a formula at a site becomes, of each family of kernels: sources, configs, and binaries for other machines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rewriter.codegen import cpp, fragments, linear_fragments, native
from rewriter.codegen.expression import kind_of_type
from rewriter.codegen.formula import Formula, reading
from rewriter.codegen.fragments import KERNELS, Blocks
from rewriter.codegen.linear_formula import LinearFormula
from rewriter.codegen.linear_fragments import BACKWARD, FORWARD, LinearBlocks, aligned
from rewriter.codegen.sampling_formula import SamplingFormula
from rewriter.errors import OptionError
from rewriter.site import AttentionSite, Dense, Padding

if TYPE_CHECKING:
    from rewriter.codegen.ahead import Binary


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """The kernels of one formula at one site.

    names    in the order in which they run
    config   what a config is made of: a dataclass of whole numbers
    default  (kernel, target) -> the config that is shipped
    triton   config -> the source of all kernels
    cpp      the source for a CPU; OptionError where none is generated
    binary   (kernel, config, target) -> what the kernel is there; CompileError where it does not fit
    """

    names: tuple[str, ...]
    config: type[Any]
    default: Callable[[str, str], Any]
    triton: Callable[[Any], str]
    cpp: Callable[[], str]
    binary: Callable[[str, Any, str], Binary]


def kernels_of(formula: Formula | LinearFormula | SamplingFormula, site: AttentionSite) -> Kernels:
    """Those of the formula's family."""
    if isinstance(formula, SamplingFormula):
        return _sampled(formula, site)
    return _linear(formula, site) if isinstance(formula, LinearFormula) else _softmax(formula, site)


def _softmax(formula: Formula, site: AttentionSite) -> Kernels:
    sizes: dict[str, Any] = {"head_dim": site.head_dim, "v_head_dim": site.v_head_dim, "dtype": _dtype(site)}
    types = {} if formula.ordered else _passed(site)
    formula = reading(formula, types)
    types = {**formula.types, **types}
    kinds = {name: kind_of_type(dtype) for name, dtype in types.items()}

    def default(kernel: str, target: str) -> Blocks:
        from rewriter.codegen.configs import default

        return default(target, kernel, site.head_dim, sizes["dtype"], pairs=formula.reads_pairs(kinds))

    def binary(kernel: str, blocks: Blocks, target: str) -> Binary:
        from rewriter.codegen.compiled import binaries

        return binaries(formula, blocks, target, **sizes, kinds=kinds, kernels=(kernel,))[0]

    def written() -> str:
        spec = cpp.spec_of(formula, **sizes, tensors=types)
        if (refusal := spec.refusal()) is not None:
            raise OptionError(str(refusal))
        return native.source(spec)

    return Kernels(
        names=KERNELS,
        config=Blocks,
        default=default,
        triton=lambda blocks: fragments.source(formula, blocks, **sizes, kinds=kinds),
        cpp=written,
        binary=binary,
    )


def _passed(site: AttentionSite) -> dict[str, torch.dtype]:
    """The types of what each call of a site passes beside its operands."""
    types = {"padding": torch.bool} if site.mask.has(Padding) else {}
    if site.bias != "none":
        types["bias"] = _dtype(site)
    elif site.mask.has(Dense):
        types["mask"] = torch.bool
    return types


def _linear(formula: LinearFormula, site: AttentionSite) -> Kernels:
    sizes: dict[str, Any] = {
        "features": aligned(formula.features) if formula.features else site.head_dim,
        "values": site.v_head_dim,
        "dtype": _dtype(site),
        "padded": site.mask.has(Padding),
    }

    def unwritten() -> str:
        raise OptionError("on a CPU this one runs in chunks of PyTorch's own products: no C++ is generated for it")

    def binary(kernel: str, blocks: LinearBlocks, target: str) -> Binary:
        from rewriter.codegen.linear_compiled import binaries

        return binaries(formula, blocks, target, **sizes, kernels=(kernel,))[0]

    return Kernels(
        names=FORWARD + BACKWARD,
        config=LinearBlocks,
        # Kernels of one call share their chunks.
        default=lambda kernel, target: LinearBlocks.of(sizes["dtype"], target),
        triton=lambda blocks: linear_fragments.source(formula, blocks, **sizes),
        cpp=unwritten,
        binary=binary,
    )


def _sampled(formula: SamplingFormula, site: AttentionSite) -> Kernels:
    from rewriter.codegen import sampling, sampling_triton

    def binary(kernel: str, blocks: sampling_triton.SamplingBlocks, target: str) -> Binary:
        sizes: dict[str, Any] = {"head_dim": site.head_dim, "dtype": _dtype(site)}
        return sampling_triton.binary(formula, blocks, target, kernel, **sizes)

    return Kernels(
        names=sampling_triton.KERNELS,
        config=sampling_triton.SamplingBlocks,
        default=lambda kernel, target: sampling_triton.SamplingBlocks.of(site.head_dim),
        triton=lambda blocks: sampling_triton.source(formula, blocks, site.head_dim),
        cpp=lambda: sampling.source(site.head_dim, _dtype(site)),
        binary=binary,
    )


def _dtype(site: AttentionSite) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, site.dtype)
    return dtype
