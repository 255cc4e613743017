"""The sentence encoder: exact rewrites at once, then approximations under a bound, judged by people's ratings."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rewriter
from rewriter.convert.checkpoint import load_model, load_tokenizer, random_ids
from rewriter.demo.assets import ENCODER_TITLE, encoder_folder, news_lines, rated_documents
from rewriter.demo.part import Accuracy, Part, Working, compared, report_on
from rewriter.guard import evaluating
from rewriter.terminal import Advance

LINES = 32
BATCH = 8


def parts(lengths: tuple[int, ...], max_drop: float, search: float, working: Working) -> Iterator[Part]:
    """Without data, then with calibration data unless the bound is 0."""
    folder = encoder_folder()
    with working() as advance:
        part = encoder(folder, lengths, None, 0.0, search, advance)
    yield part
    if max_drop > 0:
        with working() as advance:
            part = encoder(folder, lengths, batches(folder), max_drop, search, advance)
        yield part


def encoder(
    folder: Path, lengths: tuple[int, ...], calibration: Any, max_drop: float, search: float, advance: Advance
) -> Part:
    """Original and result on the task and on single texts of some lengths."""
    (original, _), (model, _) = load_model(folder), load_model(folder)
    start = time.perf_counter()
    if calibration is None:
        title = f"{ENCODER_TITLE}, float32; exact rewrites only"
        result = rewriter.optimize(model, example=((), text(model, lengths[0])), progress=advance)
    else:
        title = f"{ENCODER_TITLE}, float32; cosine of the outputs may fall by {100 * max_drop:g}%"
        result = rewriter.optimize(model, calibration, max_drop=max_drop, time_budget=search, progress=advance)
    took = time.perf_counter() - start
    advance("task", 0, None)
    before, after = similarity(original, folder), similarity(result, folder)
    advance("timing", 0, None)
    timings = compared(original, result, {f"{n} tokens": text(model, n) for n in lengths}, budget=5.0)
    quality = Accuracy("document similarity, correlation with human ratings", before, after)
    return Part(title, report_on(result), took, timings, [quality])


def text(model: nn.Module, length: int) -> dict[str, Tensor]:
    """One text of random words."""
    return {"input_ids": random_ids(model, length, torch.Generator().manual_seed(0))}


def batches(folder: Path) -> list[dict[str, Tensor]]:
    """Padded batches of news items."""
    tokenizer, lines = load_tokenizer(folder), news_lines()[:LINES]
    groups = [lines[at : at + BATCH] for at in range(0, len(lines), BATCH)]
    return [dict(tokenizer(group, padding=True, truncation=True, return_tensors="pt")) for group in groups]


def similarity(model: nn.Module, folder: Path) -> float:
    """Pearson correlation between the similarities of 50 documents and what people said."""
    tokenizer = load_tokenizer(folder)
    documents, ratings = rated_documents()
    vectors = []
    with evaluating(model):
        for at in range(0, len(documents), 10):
            batch = tokenizer(documents[at : at + 10], padding=True, truncation=True, return_tensors="pt")
            hidden = model(**batch).last_hidden_state
            real = batch["attention_mask"][..., None]
            vectors.append((hidden * real).sum(1) / real.sum(1))
    unit = torch.nn.functional.normalize(torch.cat(vectors).double(), dim=-1)
    upper = torch.triu(torch.ones_like(ratings, dtype=torch.bool), diagonal=1)
    return float(torch.corrcoef(torch.stack([(unit @ unit.T)[upper], ratings[upper]]))[0, 1])
