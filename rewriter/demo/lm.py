"""The language model: exact rewrites of its eager attention, and a long context under a bound on perplexity."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import rewriter
from rewriter.calibration import batches_from
from rewriter.convert.checkpoint import load_tokenizer, quiet
from rewriter.demo.assets import LM_TITLE, lm_folder, long_text
from rewriter.demo.part import Accuracy, Part, Working, compared, report_on
from rewriter.guard import evaluate
from rewriter.metrics import BUILT_IN
from rewriter.target import multiplies_bfloat16
from rewriter.terminal import Advance

DTYPE = torch.bfloat16 if multiplies_bfloat16() else torch.float32
"""Of the weights."""
NAME = {torch.bfloat16: "bf16", torch.float32: "float32"}[DTYPE]


@dataclass(frozen=True)
class Sizes:
    """Tokens of the short prompt and, at most, of the long one, blocks of calibration, seconds of search and of one
    timing.
    """

    short: int = 2048
    long: int = 8192
    blocks: int = 9
    search: float = 300.0
    timing: float = 30.0

    def affordable(self, seconds: float) -> Sizes:
        """With a long prompt that the search has time for, where a short one takes so many seconds."""
        long = self.short
        while 2 * long <= self.long and _PREFILLS * seconds * (2 * long / self.short) <= self.search:
            long *= 2
        return dataclasses.replace(self, long=long)


_PREFILLS = 200
"""So many times that of a prefill, the time of a whole search: it also computes losses and gradients."""
QUICK = Sizes(512, 1024, 9, 15.0, 3.0)


def parts(sizes: Sizes, max_drop: float, working: Working) -> Iterator[Part]:
    """Both parts, one after the other."""
    with working() as advance:
        advance(f"preparing {LM_TITLE}", 0, None)
        ids = tokens()
    with working() as advance:
        part = exact_prefill(sizes, ids[:, -sizes.short :], advance)
    yield part
    sizes = sizes.affordable(part.timings[0].result / 1000)
    # Blocks of one text: what calibrates comes first, and the last block is seen by nothing but the final measurement.
    blocks = [ids[:, at : at + sizes.long] for at in range(0, ids.shape[1] - sizes.long + 1, sizes.long)]
    fresh = blocks[-1]
    with working() as advance:
        part = long_context(sizes, blocks[: sizes.blocks], fresh, max_drop, advance)
    yield part


def exact_prefill(sizes: Sizes, ids: Tensor, advance: Advance) -> Part:
    """Eager attention in, `optimize` without data, the same answers out."""
    original, model = load("eager"), load("eager")
    start = time.perf_counter()
    result = rewriter.optimize(model, progress=advance)
    took = time.perf_counter() - start
    accuracy = perplexities(original, result, ids, "", advance)
    advance("timing", 0, None)
    return Part(
        f"{LM_TITLE}, {NAME}, loaded with eager attention; exact rewrites only",
        report_on(result), took,
        timings=compared(original, result, {f"prefill of {sizes.short:,} tokens": prompt(ids)}, sizes.timing),
        accuracy=[accuracy],
    )  # fmt: skip


def long_context(sizes: Sizes, blocks: list[Tensor], fresh: Tensor, max_drop: float, advance: Advance) -> Part:
    """Fused attention in, approximations under a bound on perplexity, faster on long prompts."""
    original, model = load("sdpa"), load("sdpa")
    start = time.perf_counter()
    result = rewriter.optimize(
        model,
        [{"input_ids": block} for block in blocks],
        max_drop=max_drop,
        time_budget=sizes.search,
        progress=advance,
    )
    took = time.perf_counter() - start
    accuracy = perplexities(original, result, fresh, " that neither the search nor the guard has seen", advance)
    advance("timing", 0, None)
    calls = {f"prefill of {n:,} tokens": prompt(fresh[:, :n]) for n in (sizes.short, sizes.long)}
    return Part(
        f"{LM_TITLE}, {NAME}, loaded with fused (SDPA) attention; perplexity may rise by {100 * max_drop:g}%",
        report_on(result), took, timings=compared(original, result, calls, sizes.timing), accuracy=[accuracy],
    )  # fmt: skip


def tokens() -> Tensor:
    """int64[1, N]: the long text."""
    ids = load_tokenizer(lm_folder())(long_text(), verbose=False)["input_ids"]
    return torch.tensor([ids])


def load(attention: str) -> nn.Module:
    """The model in DTYPE with one of the attentions that transformers offers."""
    from transformers import AutoModelForCausalLM

    with quiet():
        model: nn.Module = AutoModelForCausalLM.from_pretrained(lm_folder(), dtype=DTYPE, attn_implementation=attention)
    return model.eval()


def prompt(ids: Tensor) -> dict[str, object]:
    """A prefill as `generate` does it: logits of the last token only."""
    return {"input_ids": ids, "logits_to_keep": 1}


def perplexities(original: nn.Module, result: nn.Module, ids: Tensor, which: str, advance: Advance) -> Accuracy:
    """Of both models on one block of text."""
    advance("perplexity", 0, None)
    batches = batches_from([{"input_ids": ids}])
    before, after = (evaluate(BUILT_IN["perplexity"], model, batches).value for model in (original, result))
    return Accuracy(f"perplexity on {ids.shape[1]:,} tokens{which}", before, after)
