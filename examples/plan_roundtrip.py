"""Tune once, keep the plan as a readable file, replay it on another copy of the model without any search."""

import copy
import tempfile
from pathlib import Path

import torch
from transformers import BertConfig, BertModel

import rewriter

torch.manual_seed(0)
config = BertConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=100,
    max_position_embeddings=600, attn_implementation="eager",
)  # fmt: skip
model = BertModel(config).eval()
fresh = copy.deepcopy(model)
batches = [{"input_ids": torch.randint(0, 100, (1, 512))} for _ in range(4)]

rewriter.optimize(model, batches, max_drop=0.02, metric="cosine")
with tempfile.TemporaryDirectory() as folder:
    file = rewriter.plan_of(model).save(Path(folder) / "plan.json")
    print(file.read_text())
    rewriter.apply(fresh, rewriter.Plan.load(file))

with torch.no_grad():
    torch.testing.assert_close(
        fresh(**batches[0]).last_hidden_state, model(**batches[0]).last_hidden_state, rtol=1e-5, atol=1e-5
    )
rewriter.restore(model)
assert rewriter.plan_of(model) is None
