"""A new variant in one file, outside the repository.

In a package of its own it would be found through the entry-point group `rewriter.variants`; a script registers it.
Keys and values are averaged over blocks of two: half of the work of a full attention, for encoders.
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BertConfig, BertModel

import rewriter
from rewriter.site import AttentionSite, Full, Refusal
from rewriter.target import Target
from rewriter.variant import Case, Config, Implementation, Variant


def pooled(x: Tensor, size: int) -> Tensor:
    """(B, H, S, D) -> (B, H, ceil(S / size), D), averaged over blocks; the last block may be shorter."""
    batch, heads, tokens, width = x.shape
    return F.avg_pool1d(x.reshape(batch * heads, tokens, width).mT, size, ceil_mode=True).mT.reshape(
        batch, heads, -1, width
    )


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, padding: Tensor | None, *, scale: float, size: int
) -> Tensor:
    """Attention to the means of blocks of `size` keys."""
    return F.scaled_dot_product_attention(query, pooled(key, size), pooled(value, size), scale=scale)


def reference(
    query: Tensor, key: Tensor, value: Tensor, mask: None, padding: None, site: AttentionSite, config: Config
) -> Tensor:
    """The definition."""
    size = int(config["size"])
    scores = query @ pooled(key, size).mT * site.scale
    return scores.softmax(-1) @ pooled(value, size)


def applies(site: AttentionSite, target: Target) -> bool | Refusal:
    """Full attention only: a block has no place in a mask."""
    if site.mask != Full():
        return Refusal(f"blocks of keys have no place in the mask {site.mask}")
    return Refusal("keys and queries share heads") if site.heads != site.kv_heads else True


def configs(site: AttentionSite, target: Target) -> list[Config]:
    """Small blocks first."""
    return [{"size": 2}, {"size": 4}]


def build(site: AttentionSite, config: Config) -> Implementation:
    """The implementation for a site."""
    return partial(attend, scale=site.scale, size=int(config["size"]))


SITE = AttentionSite(
    path="", heads=4, kv_heads=4, head_dim=16, v_head_dim=16, dtype="float32", scale=0.25, mask=Full(), batch=1,
    q_len=64, kv_len=64,
)  # fmt: skip
VARIANT = Variant(
    name="pooled_keys",
    paper="an example, after arXiv:2005.00581",
    fidelity="approximate",
    reference=reference,
    applies=applies,
    configs=configs,
    build=build,
    cases=[Case(site=SITE)],
)

if __name__ == "__main__":
    torch.manual_seed(0)
    rewriter.register(VARIANT)
    config = BertConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=100,
        max_position_embeddings=1024, attn_implementation="eager",
    )  # fmt: skip
    model = BertModel(config).eval()
    batches = [{"input_ids": torch.randint(0, 100, (1, 1024))} for _ in range(4)]
    rewriter.optimize(model, batches, max_drop=0.05, metric="cosine", variants=["pooled_keys", "sdpa"])
    report = rewriter.report_of(model)
    print(report)
    assert report.verdict.held
