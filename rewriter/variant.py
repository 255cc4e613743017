"""What a file in `kernels/` declares, and how it is found.

A variant is one way to compute an attention, from one paper, in one file. Adding the file adds the variant to the
tuner, the CLI and the tests. Other packages join through the entry-point group `rewriter.variants` (each entry loads to
a `Variant`), and a running program through `register`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal, Protocol

from torch import Tensor

from rewriter.errors import OptionError
from rewriter.site import AttentionSite, Refusal
from rewriter.target import Target

if TYPE_CHECKING:
    from rewriter.codegen.formula import Formula
    from rewriter.codegen.linear_formula import LinearFormula
    from rewriter.codegen.sampling_formula import SamplingFormula

Config = Mapping[str, int | float | str | bool]
"""The settings of a variant at one site: plain values, as they stand in the plan."""


class Implementation(Protocol):
    """What `build` returns: the attention itself. An `nn.Module` where the variant has parameters.

    query (B, H, Sq, D), key (B, Hkv, Skv, D), value (B, Hkv, Skv, Dv) -> (B, H, Sq, Dv).
    `mask` is the whole mask of the site as the model built it, bool (True: visible) or additive, broadcastable to
    (B, H, Sq, Skv), or None where the site's positional mask says everything. `padding` is bool (B, Skv), True on real
    tokens, given where the site's mask has a `Padding` factor. A site with a sink passes one more tensor, (H,). A site
    with `samples` passes the three arguments of `rewriter.sampling` instead. An implementation reads sizes from its
    arguments: they differ from call to call.
    """

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, padding: Tensor | None, /, *sink: Tensor
    ) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Case:
    """A site with concrete sizes, and the configs to test there (None: all that `configs` offers)."""

    site: AttentionSite
    configs: Sequence[Config] | None = None


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One paper.

    name        equals the file's name
    paper       where the definition stands (arXiv id, equation)
    fidelity    "exact": the same mathematics; "approximate": training-free; "learned": has parameters or buffers to fit
    reference   the definition in plain PyTorch, slow and obvious: (implementation's arguments, site, config) -> out;
                for a learned variant the built module is passed as `module=`
    applies     True, or a `Refusal` that names the fact of the site in the way; its docstring says where it applies
    configs     the settings to try, cheapest-error first
    build       the implementation for a site and a config
    cases       sites that the tests and benchmarks run
    near_misses sites that `takes` must refuse
    elements    which of `AttentionSite.elements` it computes, beyond softmax(scale * q k^T + mask) v
    formula     what it computes, in the terms of one of the families of kernels, which are generated from it; or None,
                as of a config that is several of them
    """

    name: str
    paper: str
    fidelity: Literal["exact", "approximate", "learned"]
    reference: Callable[..., Tensor]
    applies: Callable[[AttentionSite, Target], bool | Refusal]
    configs: Callable[[AttentionSite, Target], Iterable[Config]]
    build: Callable[[AttentionSite, Config], Implementation]
    cases: Sequence[Case] = field(default=(), repr=False)
    near_misses: Sequence[AttentionSite] = field(default=(), repr=False)
    elements: frozenset[str] = frozenset()
    formula: Callable[[AttentionSite, Config], Formula | LinearFormula | SamplingFormula | None] | None = None

    def concerns(self, site: AttentionSite) -> bool:
        """Is it for attention of this kind: with scores, or to places in maps?"""
        return ("samples" in self.elements) == (site.samples is not None)

    @property
    def limits(self) -> str:
        """Where it applies, in a sentence: that of `applies` about itself."""
        return (inspect.getdoc(self.applies) or "").partition("\n\n")[0].replace("\n", " ")

    def takes(self, site: AttentionSite, target: Target) -> bool | Refusal:
        """Does it apply here, and does it compute all that the scores go through?"""
        if site.edits and self.name != ORIGINAL:
            named = ", ".join(site.edits)
            return Refusal(f"the site is recognised and stays as it is ({named})", site.path, site.source)
        missing = sorted(site.elements - self.elements)
        if missing:
            return Refusal(f"it does not compute {', '.join(missing)}", site.path, site.source)
        return self.applies(site, target)


ORIGINAL = "original"
"""The name of the variant that leaves a site as it is: always a candidate."""

_REGISTERED: dict[str, Variant] = {}


def register(variant: Variant) -> Variant:
    """Add a variant to this process. The name must be free."""
    if variant.name in variants():
        raise OptionError(f"a variant named {variant.name!r} exists already; choose another name")
    _REGISTERED[variant.name] = variant
    return variant


def unregister(name: str) -> None:
    """Take back what `register` added."""
    _REGISTERED.pop(name, None)


def variants() -> dict[str, Variant]:
    """All variants by name: the files of `rewriter.kernels`, installed entry points, and what was registered."""
    return _discovered() | _REGISTERED


@cache
def _discovered() -> dict[str, Variant]:
    import rewriter.kernels as package

    found: dict[str, Variant] = {}
    for module in modules_of(package):
        variant = module.VARIANT
        assert variant.name == module.__name__.rpartition(".")[2], f"{module.__name__} declares {variant.name!r}"
        found[variant.name] = variant
    for entry in importlib.metadata.entry_points(group="rewriter.variants"):
        found[entry.name] = entry.load()
    return dict(sorted(found.items()))


def modules_of(package: ModuleType) -> list[ModuleType]:
    """Every module below a package, sorted by name. The folders have no `__init__.py`, so pkgutil does not see them."""
    names = {
        ".".join((package.__name__, *file.relative_to(root).with_suffix("").parts))
        for root in map(Path, package.__path__)
        for file in root.rglob("*.py")
    }
    return [importlib.import_module(name) for name in sorted(names)]
