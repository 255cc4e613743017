"""Exact rewrites of real pretrained models: outputs, gradients, generation and the task metric."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import rewriter
from rewriter.demo import assets
from rewriter.guard import error, tolerance
from rewriter.variant import ORIGINAL


@pytest.fixture(scope="module")
def lm() -> nn.Module:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(assets.lm_folder(), dtype=torch.float32, attn_implementation="eager")
    return model.eval()


@pytest.fixture
def restored(lm: nn.Module) -> Iterator[nn.Module]:
    yield lm
    rewriter.restore(lm)
    lm.zero_grad(set_to_none=True)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets.lm_folder())
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    return tokenizer


def rewritten_everywhere(model: nn.Module) -> bool:
    plan = rewriter.plan_of(model)
    assert plan is not None
    return bool(plan.decisions) and all(decision.variant != ORIGINAL for decision in plan.decisions)


def test_outputs_and_gradients_of_the_language_model(restored: nn.Module) -> None:
    tokens = torch.randint(0, 40_000, (2, 137), generator=torch.Generator().manual_seed(1))
    call = {"input_ids": tokens, "labels": tokens}
    before = restored(**call)
    before.loss.backward()
    gradients = {name: p.grad.clone() for name, p in restored.named_parameters() if p.grad is not None}
    restored.zero_grad(set_to_none=True)

    rewriter.optimize(restored)
    after = restored(**call)
    after.loss.backward()

    assert rewritten_everywhere(restored) and len(rewriter.plan_of(restored).decisions) == 30
    assert error(after.logits, before.logits) <= tolerance(torch.float32)
    assert gradients
    # Thirty layers backwards: each adds its own rounding.
    worst = max(error(dict(restored.named_parameters())[name].grad, g) for name, g in gradients.items())
    assert worst <= 30 * tolerance(torch.float32)


def test_greedy_generation_with_left_padding_is_identical(restored: nn.Module, tokenizer: Any) -> None:
    prompts = ["The capital of France is", "Once upon a time, there was a little girl who"]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    settings = {"max_new_tokens": 64, "do_sample": False}
    before = restored.generate(**batch, **settings)
    rewriter.optimize(restored)
    assert torch.equal(restored.generate(**batch, **settings), before)
    assert rewritten_everywhere(restored)
    assert not any("original code" in note for note in rewriter.report_of(restored).notes)


def test_the_encoder_in_seconds_and_with_the_same_task_metric() -> None:
    from transformers import AutoModel, AutoTokenizer

    folder = assets.encoder_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    documents, ratings = assets.rated_documents()
    batch = tokenizer(documents, padding=True, truncation=True, return_tensors="pt")

    def correlation() -> float:
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        pooled = nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
        upper = torch.triu_indices(len(documents), len(documents), 1)
        pairs = torch.stack([(pooled @ pooled.T)[*upper].double(), ratings[*upper]])
        return float(torch.corrcoef(pairs)[0, 1])

    before = correlation()
    start = time.perf_counter()
    rewriter.optimize(model)
    seconds = time.perf_counter() - start
    assert correlation() == pytest.approx(before, abs=1e-5)
    assert before > 0.6, "the weights are trained"
    assert rewritten_everywhere(model)
    assert seconds < 20
