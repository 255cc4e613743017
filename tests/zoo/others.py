"""x-transformers and vit-pytorch: many small changes to one attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from zoo.entry import LAYERS, Recipes, image, tokens

lucid, vision = Recipes("x-transformers"), Recipes("vit-pytorch")


def decoder(**settings: Any) -> Any:
    """A causal language model."""
    import x_transformers as x

    layers = x.Decoder(dim=32, depth=LAYERS, heads=4, attn_dim_head=8, **settings)
    return x.TransformerWrapper(num_tokens=64, max_seq_len=32, attn_layers=layers).eval(), tokens()


def encoder(**settings: Any) -> Any:
    """An encoder of vectors, whose second sequence is padded."""
    import x_transformers as x

    model = x.Encoder(dim=32, depth=LAYERS, heads=4, attn_dim_head=8, **settings).eval()
    return model, torch.randn(2, 11, 32), {"mask": torch.arange(11) < torch.tensor([[11], [7]])}


def add(name: str, build: Callable[..., Any], sites: int = LAYERS, fast: bool = False, **settings: Any) -> None:
    """An entry that is one model with settings."""
    lucid(name, sites, fast=fast)(lambda: build(**settings))


add("decoder", decoder, fast=True)
add("decoder_fused", decoder, attn_flash=True)
add("encoder", encoder)
add("alibi", decoder, alibi_pos_bias=True, alibi_num_heads=2)
add("t5_bias", encoder, rel_pos_bias=True)
add("dynamic_bias", encoder, dynamic_pos_bias=True, dynamic_pos_bias_log_distance=False)
add("rotary", decoder, rotary_pos_emb=True)
add("grouped", decoder, attn_kv_heads=2)
add("one_key_head", decoder, attn_one_kv_head=True)
add("qk_norm", decoder, attn_qk_norm=True, attn_qk_norm_groups=2)
add("softclamp", decoder, attn_softclamp_logits=True, attn_logit_softclamp_value=5.0)
add("talking_heads", encoder, attn_pre_talking_heads=True, attn_post_talking_heads=True)
add("sparse_topk", encoder, attn_sparse_topk=4)
add("memory_key_values", encoder, attn_num_mem_kv=3)
add("null_key_value", encoder, attn_add_zero_kv=True)
add("sigmoid", encoder, attn_sigmoid=True)
add("gated_values", encoder, attn_gate_values=True, attn_head_scale=True)
add("selective", decoder, attn_selective=True)


@lucid("cross_attention", 2 * LAYERS)
def _cross() -> Any:
    import x_transformers as x

    model = x.Encoder(dim=32, depth=LAYERS, heads=4, attn_dim_head=8, cross_attend=True).eval()
    return model, torch.randn(2, 11, 32), {"context": torch.randn(2, 7, 32)}


@lucid("cross_attender", LAYERS)
def _attender() -> Any:
    import x_transformers as x

    model = x.CrossAttender(dim=32, depth=LAYERS, heads=4, attn_dim_head=8).eval()
    return model, torch.randn(2, 11, 32), {"context": torch.randn(2, 7, 32)}


@lucid("encoder_decoder", 3 * LAYERS)
def _pair() -> Any:
    import x_transformers as x

    sides = {
        f"{side}_{key}": value
        for side in ("enc", "dec")
        for key, value in {"num_tokens": 64, "depth": LAYERS, "heads": 4, "max_seq_len": 32}.items()
    }
    model = x.XTransformer(dim=32, **sides).eval()
    return model, tokens(), tokens(length=7)


# vit-pytorch

SIZES = {
    "image_size": 32,
    "patch_size": 8,
    "num_classes": 7,
    "dim": 32,
    "depth": LAYERS,
    "heads": 4,
    "mlp_dim": 48,
    "dim_head": 8,
}


def see(name: str, module: str, cls: str, sites: int = LAYERS, fast: bool = False, size: int = 32, **settings: Any):  # type: ignore[no-untyped-def]
    """An entry that is one class of one module; settings of None are left out."""

    def build() -> Any:
        import importlib

        given = {key: value for key, value in (SIZES | settings).items() if value is not None}
        return getattr(importlib.import_module(f"vit_pytorch.{module}"), cls)(**given).eval(), image(size)

    vision(name, sites, fast=fast)(build)


see("vit", "vit", "ViT", fast=True)
see("simple_vit_fused", "simple_flash_attn_vit", "SimpleViT")
see("qk_norm", "simple_vit_with_qk_norm", "SimpleViT")
see("deepvit_reattention", "deepvit", "DeepViT", fast=True)
see("small_dataset", "vit_for_small_dataset", "ViT")
see("parallel", "parallel_vit", "ViT", 2 * LAYERS)
see("cait", "cait", "CaiT", LAYERS + 1, cls_depth=1)
see("rotary", "rvt", "RvT", LAYERS)
see(
    "look", "look_vit", "LookViT", 3 * LAYERS, mlp_dim=None, highres_patch_size=4, cross_attn_heads=4,
    cross_attn_dim_head=8,
)  # fmt: skip
see("xcit", "xcit", "XCiT", LAYERS + 1, cls_depth=1)
# There is no transformer after the last of the steps in which tokens are joined.
see("t2t", "t2t", "T2TViT", 1 + LAYERS, t2t_layers=((7, 4), (3, 2)), patch_size=None)
see(
    "cct", "cct", "CCT", LAYERS, img_size=32, embedding_dim=32, num_layers=LAYERS, num_heads=4, mlp_ratio=2.0,
    n_conv_layers=1, kernel_size=3, stride=2, padding=1, image_size=None, patch_size=None, dim=None, depth=None,
    heads=None, mlp_dim=None, dim_head=None,
)  # fmt: skip
see(
    "cvt", "cvt", "CvT", 3, size=64, s1_emb_dim=16, s1_heads=1, s1_depth=1, s2_emb_dim=24, s2_heads=2, s2_depth=1,
    s3_emb_dim=32, s3_heads=2, s3_depth=1, image_size=None, patch_size=None, dim=None, depth=None, heads=None,
    mlp_dim=None, dim_head=None,
)  # fmt: skip
# A block before the position encoding of each stage and one after it; the last stage has no local half.
see(
    "twins_svt", "twins_svt", "TwinsSVT", 2 * (2 * 3 + 1), s1_emb_dim=16, s1_depth=1, s1_local_patch_size=2,
    s1_global_k=2, s2_emb_dim=16, s2_depth=1, s2_local_patch_size=2, s2_global_k=2, s3_emb_dim=16, s3_depth=1,
    s3_local_patch_size=2, s3_global_k=1, s4_emb_dim=16, s4_depth=1, s4_local_patch_size=1, s4_global_k=1,
    size=64, image_size=None, patch_size=None, dim=None, depth=None, heads=None, mlp_dim=None, dim_head=None,
)  # fmt: skip
see(
    "cross_vit", "cross_vit", "CrossViT", 1 + 1 + 2, sm_dim=16, lg_dim=32, sm_patch_size=8, sm_enc_depth=1,
    sm_enc_heads=2, sm_enc_mlp_dim=32, sm_enc_dim_head=8, lg_patch_size=16, lg_enc_depth=1, lg_enc_heads=2,
    lg_enc_mlp_dim=32, lg_enc_dim_head=8, cross_attn_depth=1, cross_attn_heads=2, cross_attn_dim_head=8, depth=1,
    patch_size=None, dim=None, heads=None, mlp_dim=None, dim_head=None,
)  # fmt: skip
# Windows attend to each other where there are several, as in the first of the stages.
see(
    "sep_vit", "sep_vit", "SepViT", 2 + 1, size=56, dim=16, depth=(1, 1), window_size=7, heads=(1, 2),
    dim_head=8, image_size=None, patch_size=None, mlp_dim=None,
)  # fmt: skip
see(
    "max_vit", "max_vit", "MaxViT", 2 * 2, size=64, dim_conv_stem=8, dim=16, depth=(1, 1), window_size=4,
    image_size=None, patch_size=None, heads=None, mlp_dim=None,
)  # fmt: skip
see(
    "levit", "levit", "LeViT", 3, size=64, image_size=64, stages=2, depth=(1, 1), heads=(2, 4), mlp_mult=2,
    dim=(16, 32), dim_key=8, dim_value=16, patch_size=None, mlp_dim=None, dim_head=None,
)  # fmt: skip
see(
    "mobile_vit", "mobile_vit", "MobileViT", 3, size=64, image_size=(64, 64), dims=[16, 16, 16],
    channels=[8, 8, 8, 8, 16, 16, 16, 16, 16, 16, 16], depths=(1, 1, 1), patch_size=(2, 2), dim=None, depth=None,
    heads=None, mlp_dim=None, dim_head=None,
)  # fmt: skip


@vision("vivit", 2 * LAYERS)
def _vivit() -> Any:
    from vit_pytorch.vivit import ViViT

    video = {"frames": 4, "frame_patch_size": 2, "spatial_depth": LAYERS, "temporal_depth": LAYERS}
    sizes = {key: value for key, value in SIZES.items() if key not in ("patch_size", "depth", "image_size")}
    model = ViViT(image_size=16, image_patch_size=8, **video, **sizes)
    return model.eval(), torch.randn(1, 3, 4, 16, 16)
