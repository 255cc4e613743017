"""All models of the zoo."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from zoo import diffusers_models, hand, others, timm_models, torchvision_models, transformers_models
from zoo.entry import Entry

SOURCES = (
    hand.recipe,
    transformers_models.entries(),
    timm_models.recipe,
    diffusers_models.recipe,
    torchvision_models.recipe,
    others.lucid,
    others.vision,
)


def entries(library: str | None = None, names: Collection[str] | None = None) -> Iterator[Entry]:
    """Those of one library, those with these names, or all."""
    for source in SOURCES:
        for entry in source:
            if library in (None, entry.library) and (names is None or entry.name in names):
                yield entry
