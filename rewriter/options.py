"""The options that commands share, and what their texts mean."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Any

import typer

from rewriter.errors import OptionError


class Goal(StrEnum):
    """What `convert` makes small."""

    latency = "latency"
    memory = "memory"


class DropType(StrEnum):
    """What a drop is measured by."""

    relative = "relative"
    absolute = "absolute"


class Dtype(StrEnum):
    """The type to load the weights in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


TARGET = Annotated[
    str, typer.Argument(metavar="TARGET", help="A Hugging Face checkpoint folder, or package.module:function.")
]
LENGTH = Annotated[int | None, typer.Option(min=1, help="Tokens in a sequence.")]
DEVICE = Annotated[str | None, typer.Option(help="cpu or cuda; without it, the GPU if there is one.")]
DTYPE = Annotated[Dtype | None, typer.Option(help="Load the weights in this type instead of the checkpoint's.")]
MAX_DROP = Annotated[str, typer.Option(help="How much accuracy may fall: 1% or 0.01; with 0 only exact variants.")]
SEED = Annotated[int, typer.Option(help="Of everything random.")]
CALIBRATION = Annotated[
    str | None,
    typer.Option(help=".txt, .jsonl or .pt file, or package.module:function: data like those the model will see."),
]
METRIC = Annotated[
    str | None, typer.Option(help="A built-in metric, or package.module:name of a (function, direction) pair.")
]
GOAL = Annotated[Goal, typer.Option(help="What to make small.")]
TIME_BUDGET = Annotated[str | None, typer.Option(help="Time for the search: 90s, 5m, 1h.")]
VARIANTS = Annotated[str | None, typer.Option(help="Only these, by name, with commas between.")]
DROP_TYPE = Annotated[
    DropType | None, typer.Option(help="Relative to the original's value, as all metrics but kl are, or absolute.")
]
WORST_DROP = Annotated[
    str | None, typer.Option(help="How much the worst sample may fall; without it, three times as much.")
]
RECALL_DROP = Annotated[
    str | None, typer.Option(help="How much of a language model's recall may go; 10% without it, 100%: not probed.")
]
RESUME = Annotated[bool, typer.Option("--resume/--fresh", help="Believe what earlier runs measured, or measure anew.")]

RAY = Annotated[
    str | None,
    typer.Option(help="Measure ahead on the nodes of the Ray cluster at this address; needs rewriter\\[ray]."),
]


def seconds(text: str | None) -> float | None:
    """A duration: 90, 90s, 5m or 1h. Raises OptionError."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip())
    if found is None or float(found[1]) == 0:
        raise OptionError(f"{text!r} is not a time: write 90s, 5m or 1h")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]


def variant_names(text: str | None) -> list[str] | None:
    """The names between commas, all of which must exist. Raises OptionError."""
    from rewriter.variant import variants as all_variants

    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in all_variants()]
    if unknown or not names:
        missing = f"there is no variant {unknown[0]!r}" if unknown else "no variant is named"
        raise OptionError(f"{missing}: choose among {', '.join(all_variants())}")
    return names


def metric_of(text: str | None) -> Any:
    """A built-in name as it is, or the object that package.module:name stands for."""
    from rewriter.convert.target import is_function, lookup

    return lookup(text) if text is not None and is_function(text) else text


def dtype_of(choice: Dtype | None) -> Any:
    """As torch calls it."""
    import torch

    return None if choice is None else getattr(torch, choice.value)
