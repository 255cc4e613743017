"""A training step through a rewritten model, with a learned variant whose parameters are trained along."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import rewriter

torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=128, attn_implementation="eager",
)  # fmt: skip
model = LlamaForCausalLM(config)
tokens = torch.randint(0, 128, (2, 96))

# A plan can be written by hand, too: here, linear attention in the first layer.
sites = rewriter.explain(model, input_ids=tokens).sites
plan = rewriter.Plan.for_model(model, {sites[0]: "linear"})
rewriter.apply(model, plan)

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
learned = {name: value.detach().clone() for name, value in model.named_parameters() if name.startswith("rewriter.")}
assert learned, "the parameters of the learned variant are parameters of the model"
model.train()
losses = []
for _ in range(5):
    optimizer.zero_grad()
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    losses.append(float(loss.detach()))
print("losses:", " ".join(f"{value:.3f}" for value in losses))
assert losses[-1] < losses[0]
now = dict(model.named_parameters())
assert all(not torch.equal(value, now[name]) for name, value in learned.items())
