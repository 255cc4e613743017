"""The whole job on two real pretrained models; every number that is printed was measured in that run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import chain
from typing import Any

from rich.console import Console

from rewriter.demo import encoder, lm
from rewriter.demo.assets import ENCODER, LM, TEXTS
from rewriter.demo.part import Part, Working
from rewriter.errors import OptionError
from rewriter.target import Target

MODELS = ("lm", "encoder", "all")


def run(*, max_drop: float, model: str, quick: bool, working: Working, console: Console) -> dict[str, Any]:
    """Do it, print each part as it is ready, and return the JSON document.

    `working` gives a context with a progress callback, which is left before anything is printed.
    """
    if model not in MODELS:
        raise OptionError(f"there is no demonstration of {model!r}: choose one of {', '.join(MODELS)}")
    # Look for everything first: what is missing should not be found out after minutes.
    for package in ((LM,) if model != "encoder" else ()) + ((ENCODER, TEXTS) if model != "lm" else ()):
        package.root()
    begin, target, done = time.perf_counter(), Target.current(), []
    console.print(f"{target.capability}, {target.threads} threads, torch {target.torch}", highlight=False)
    for part in parts(max_drop, model, quick, working):
        part.show(console)
        done.append(part)
    seconds = time.perf_counter() - begin
    console.print(f"\nall of this took {seconds / 60:.1f} minutes", highlight=False)
    return {"target": target.to_json(), "parts": [part.to_json() for part in done], "seconds": seconds}


def parts(max_drop: float, model: str, quick: bool, working: Working) -> Iterator[Part]:
    """The parts that were asked for, each done when it is drawn."""
    sizes = lm.QUICK if quick else lm.Sizes()
    lengths, search = ((128, 256), 5.0) if quick else ((128, 512), 30.0)
    return chain(
        lm.parts(sizes, max_drop, working) if model != "encoder" else (),
        encoder.parts(lengths, max_drop, search, working) if model != "lm" else (),
    )
