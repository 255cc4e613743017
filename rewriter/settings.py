"""Are the settings of a plan those of its variant? Told for all alike, by what `configs` offers and `cases` show.

A name must be one of those; a number, or text made of numbers such as 8x5, may be another with the same sign.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rewriter.site import AttentionSite
from rewriter.target import Target
from rewriter.variant import Config, Variant

_MOST = 2**31 - 1
"""Kernels count in 32 bits."""


def known_settings(variant: Variant, site: AttentionSite, target: Target) -> list[Config]:
    """All that it is offered with, here and in its cases."""
    shown = [case.configs if case.configs is not None else variant.configs(case.site, target) for case in variant.cases]
    return [config for configs in (variant.configs(site, target), *shown) for config in configs]


def wrong_setting(config: Config, known: Sequence[Config]) -> str:
    """What is wrong with a config beside these, in words that end a sentence; nothing where it is like them."""
    names = dict.fromkeys(name for each in known for name in each)
    for name, value in config.items():
        if name not in names:
            return f"has no setting {name!r:.40}; it has {', '.join(names) or 'none'}"
        if not _alike(value, [each[name] for each in known if name in each]):
            return f"has no {name} of {value!r:.40}"
    missing = [name for name in names if name not in config and all(name in each for each in known)]
    return f"needs a setting {missing[0]!r}" if missing else ""


def _alike(value: object, known: Sequence[int | float | str | bool]) -> bool:
    if isinstance(value, (bool, str)):
        return any(type(each) is type(value) and _form(each) == _form(value) for each in known)
    numbers = [each for each in known if not isinstance(each, (bool, str))]
    if not isinstance(value, (int, float)) or not numbers:
        return False
    fits = isinstance(value, int) or any(isinstance(each, float) for each in numbers)
    least = min(numbers)
    return fits and abs(value) <= _MOST and (value > 0 or least < 0 or value == least == 0)


def _form(value: object) -> object:
    """The mark between numbers, by which 8x5 and 16x16x4 are alike; all else is alike only to itself, and true to
    false.
    """
    found = re.fullmatch(r"\d{1,9}(?:([x,])\d{1,9}(?:\1\d{1,9})*)?", str(value))
    return type(value) if isinstance(value, bool) else (found[1] or "") if found else value
