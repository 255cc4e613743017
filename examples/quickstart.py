"""A model, one line, and what the line did. Takes any module; here a small language model with random weights."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import rewriter

config = LlamaConfig(
    hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2,
    vocab_size=512, attn_implementation="eager",
)  # fmt: skip
model = LlamaForCausalLM(config).eval()
tokens = torch.randint(0, 512, (1, 512))

with torch.no_grad():
    before = model(tokens).logits
    rewriter.optimize(model, example={"input_ids": tokens})
    after = model(tokens).logits

print(rewriter.report_of(model).to_json()["plan"]["decisions"][0], rewriter.report_of(model).notes)
print(rewriter.report_of(model))
torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
assert all(decision.fidelity == "exact" for decision in rewriter.plan_of(model).decisions)
