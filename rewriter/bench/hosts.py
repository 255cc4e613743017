"""Pretrained models with real data of their own, whose pieces share nothing: each is another article or picture."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rewriter.bench.speech import SPEECH, SPEECH_TITLE, SPOKEN, VOICE, speech_folder, spoken
from rewriter.bench.vision import PICTURES, READER, VISION, VISION_TITLE, pictures, vision_folder
from rewriter.convert.checkpoint import load_model, load_tokenizer
from rewriter.demo import lm
from rewriter.demo.assets import (
    ENCODER,
    ENCODER_TITLE,
    LM,
    LM_TITLE,
    TEXTS,
    Package,
    encoder_folder,
    lm_folder,
    news_lines,
)
from rewriter.errors import CheckpointError, OptionError

_SHARED = 15
_HEARD = 100
"""Texts that are read aloud."""

Pieces = Sequence[dict[str, Any]]
"""Keyword arguments of calls, of one row each."""


@dataclass(frozen=True)
class Host:
    """One model.

    packages  what is read, which must be installed
    load      the model, in eval mode
    pieces    the data, in pieces of so many tokens
    tokens    in a piece where nobody says how many
    bounds    on `metric`, each for as many runs as the others
    fixed     does it take no other number of tokens?
    """

    name: str
    title: str
    packages: tuple[Package, ...]
    load: Callable[[], nn.Module]
    pieces: Callable[[int], Pieces]
    tokens: int
    metric: str
    bounds: tuple[float, ...]
    fixed: bool = False

    @property
    def missing(self) -> str:
        """Why it cannot be loaded, or ""."""
        try:
            for package in self.packages:
                package.root()
        except CheckpointError as error:
            return str(error)
        return ""


def title_of(name: str) -> str:
    """What a table calls it."""
    return HOSTS[name].title if name in HOSTS else name


def named(names: Sequence[str]) -> list[Host]:
    """The hosts of these names, or all. Raises OptionError."""
    if unknown := [name for name in names if name not in HOSTS]:
        raise OptionError(f"there is no model {unknown[0]!r}: choose among {', '.join(HOSTS)}")
    return [HOSTS[name] for name in dict.fromkeys(names or HOSTS)]


def distinct(texts: Iterable[str]) -> Iterator[str]:
    """Those that share no _SHARED words in a row with an earlier one: news are corrected and sent again."""
    seen: set[tuple[str, ...]] = set()
    for text in texts:
        words = text.split()
        runs = {tuple(words[at : at + _SHARED]) for at in range(max(1, len(words) - _SHARED + 1))}
        if not runs & seen:
            yield text
        seen |= runs


def articles(folder: Path, tokens: int) -> list[list[int]]:
    """News as token ids: each piece begins with a new article, and what is left of its last one is in no other."""
    tokenizer = load_tokenizer(folder)

    def pieces() -> Iterator[list[int]]:
        ids: list[int] = []
        for line in distinct(news_lines()):
            ids += tokenizer(line, add_special_tokens=False, verbose=False)["input_ids"]
            if len(ids) >= tokens:
                yield ids[:tokens]
                ids = []

    return list(pieces())


def _continued(tokens: int) -> Pieces:
    return [{"input_ids": torch.tensor([ids])} for ids in articles(lm_folder(), tokens)]


def _embedded(tokens: int) -> Pieces:
    tokenizer = load_tokenizer(encoder_folder())
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
    return [{"input_ids": torch.tensor([[first, *ids, last]])} for ids in articles(encoder_folder(), tokens - 2)]


HOSTS = {
    host.name: host
    for host in (
        Host(
            name="lm",
            title=f"{LM_TITLE}, {lm.NAME}",
            packages=(LM, TEXTS),
            load=lambda: lm.load("sdpa"),
            pieces=_continued,
            tokens=384,
            metric="perplexity",
            bounds=(0.01, 0.02, 0.05, 0.1),
        ),
        Host(
            name="encoder",
            title=f"{ENCODER_TITLE}, float32",
            packages=(ENCODER, TEXTS),
            load=lambda: load_model(encoder_folder())[0],
            pieces=_embedded,
            tokens=384,
            metric="cosine",
            bounds=(0.005, 0.01, 0.02, 0.05),
        ),
        Host(
            name="vision",
            title=f"{VISION_TITLE}, float32",
            packages=(VISION, PICTURES, READER),
            load=lambda: load_model(vision_folder())[0],
            pieces=pictures,
            tokens=325,
            metric="cosine",
            bounds=(0.005, 0.01, 0.02, 0.05),
        ),
        Host(
            name="speech",
            title=f"{SPEECH_TITLE}, float32",
            packages=(SPEECH, VOICE, TEXTS),
            load=lambda: load_model(speech_folder())[0],
            pieces=lambda tokens: spoken(islice(distinct(news_lines()), _HEARD)),
            tokens=SPOKEN,
            metric="perplexity",
            bounds=(0.01, 0.02, 0.05, 0.1),
            fixed=True,
        ),
    )
}
