"""timm: image models, each family that attends in its own way, and some that do not attend."""

from __future__ import annotations

import importlib
from typing import Any

from zoo.entry import LAYERS, Recipes, image

recipe = Recipes("timm")


def model(name: str, size: int, **settings: Any) -> Any:
    """A timm model with settings in place of its own, and a call. `module:Class` is built without the registry, whose
    functions do not let every setting be replaced.
    """
    import timm

    if ":" in name:
        module, cls = name.split(":")
        build = getattr(importlib.import_module(f"timm.models.{module}"), cls)
        return build(num_classes=7, **settings).eval(), image(size)
    return timm.create_model(name, pretrained=False, num_classes=7, **settings).eval(), image(size)


VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": LAYERS, "num_heads": 4}


def add(entry: str, name: str, sites: int, size: int = 32, fast: bool = False, **settings: Any) -> None:
    """An entry that is one model with settings."""
    recipe(entry, sites, fast=fast)(lambda: model(name, size, **settings))


def add_eager(entry: str, name: str, sites: int, size: int = 32, fast: bool = False, **settings: Any) -> None:
    """The same with every attention spelled out instead of a fused call."""

    def build() -> Any:
        from timm.layers import set_fused_attn

        set_fused_attn(False)
        try:
            return model(name, size, **settings)
        finally:
            set_fused_attn(True)

    recipe(f"{entry}@eager", sites, fast=fast)(build)


# Plain transformers on patches
add("vit", "vit_tiny_patch16_224", LAYERS, **VIT)
add_eager("vit", "vit_tiny_patch16_224", LAYERS, fast=True, **VIT)
add_eager("vit_qk_norm_map_pool", "vit_tiny_patch16_224", LAYERS + 1, **VIT, qk_norm=True, global_pool="map",
          class_token=False)  # fmt: skip
add("vit_relative_positions", "vit_relpos_small_patch16_224", LAYERS, **VIT)
add_eager("vit_relative_positions_mlp", "vit_relpos_small_patch16_224", LAYERS, **VIT, rel_pos_type="mlp")
add_eager("eva_rotary", "eva02_tiny_patch14_224", LAYERS, **VIT)
add_eager("naflexvit", "naflexvit_base_patch16_gap", LAYERS, patch_size=8, embed_dim=32, depth=LAYERS, num_heads=4)

# Their attention changed
add("cait", "cait_xxs24_224", LAYERS + 1, img_size=32, patch_size=8, embed_dim=32, depth=LAYERS, num_heads=4,
    depth_token_only=1, fast=True)  # fmt: skip
add_eager("convit", "convit_tiny", LAYERS, img_size=32, patch_size=8, embed_dim=8, depth=LAYERS, num_heads=4,
          local_up_to_layer=1)  # fmt: skip
add_eager("xcit", "xcit_nano_12_p8_224", LAYERS + 1, img_size=32, embed_dim=32, depth=LAYERS, num_heads=4,
          cls_attn_layers=1)  # fmt: skip
# The first stage weights its neighbourhoods by a linear map of the pixel.
add_eager("volo", "volo:VOLO", 1 + 1, 64, img_size=64, layers=[1, 1], embed_dims=[32, 32], num_heads=[4, 4],
          downsamples=(True, False), outlook_attention=(True, False), post_layers=("ca",), use_aux_head=False,
          stem_hidden_dim=8)  # fmt: skip
add_eager("tnt", "tnt_s_patch16_224", 2 * LAYERS, img_size=32, patch_size=8, embed_dim=32, inner_dim=8, depth=LAYERS,
          num_heads_inner=2, num_heads_outer=4)  # fmt: skip
# Two stages, each with a block on both branches and one attention from either branch to the other.
add_eager("crossvit", "crossvit_9_240", 2 * (2 + 2), 64, img_size=64, img_scale=(1.0, 1.0), patch_size=(8, 16),
          embed_dim=(16, 32), depth=((1, 1, 0), (1, 1, 0)), num_heads=(2, 2))  # fmt: skip
# Windows
SWIN = {"img_size": 32, "patch_size": 2, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
add("swin", "swin_tiny_patch4_window7_224", 4, **SWIN)
add_eager("swin", "swin_tiny_patch4_window7_224", 4, fast=True, **SWIN)
add_eager("swinv2", "swinv2_tiny_window8_256", 4, **SWIN)
add_eager("swinv2_cr", "swinv2_cr_tiny_224", 4, **SWIN)
add_eager("maxvit", "maxvit_rmlp_pico_rw_256", 4, 64, img_size=64, depths=(1, 1), embed_dim=(32, 64), stem_width=8,
          block_type=("M", "M"))  # fmt: skip
add_eager("nest", "nest:Nest", 4, img_size=32, patch_size=2, num_levels=2, embed_dims=(16, 32), num_heads=(2, 4),
          depths=(2, 2))  # fmt: skip
add_eager("gcvit", "gcvit:GlobalContextVit", 4, 64, img_size=64, window_ratio=(8, 16), embed_dim=16, depths=(2, 2),
          num_heads=(2, 4))  # fmt: skip
add_eager("davit", "davit_tiny", 4, 64, depths=(1, 1), embed_dims=(16, 32), num_heads=(2, 4), window_size=4)
add_eager("hiera", "hiera_tiny_224", 4, 64, img_size=(64, 64), embed_dim=16, num_heads=1, stages=(1, 1, 1, 1))
add_eager("mvitv2", "mvitv2_tiny", 1 + 2 + 5 + 2, 64, img_size=64)
# The third stage ends with one such block, the fourth has two.
add_eager("halonet", "halonet26t", 1 + 2, 256)
add_eager("botnet", "botnet26t_256", 1 + 2, 64, img_size=64)
# Pyramids, and mixtures with convolutions
add_eager("pvt_v2", "pvt_v2_b0", 4, 64, depths=(1, 1, 1, 1), embed_dims=(8, 16, 32, 32), num_heads=(1, 2, 4, 4))
add_eager("twins_svt", "twins_svt_small", 4, 64, img_size=64, embed_dims=(16, 32), num_heads=(2, 4), depths=(2, 2),
          sr_ratios=(4, 2), wss=(4, 4), mlp_ratios=(2, 2))  # fmt: skip
add_eager("levit", "levit_128s", 5, 64, img_size=64, embed_dim=(16, 24, 32), key_dim=8, num_heads=(2, 3, 4),
          depth=(1, 1, 1))  # fmt: skip
add_eager("mobilevit", "mobilevit_xxs", 2 + 4 + 3, 64)
add_eager("edgenext", "edgenext_xx_small", 3, 64, depths=(1, 1, 1, 1), dims=(16, 24, 32, 40), heads=(4, 4, 4, 4),
          global_block_counts=(0, 1, 1, 1))  # fmt: skip
add_eager("efficientformer", "efficientformer_l1", 1, 224)
add_eager("fastvit_attention", "fastvit_sa12", 1, 64, layers=(1, 1, 1, 1), embed_dims=(16, 32, 32, 64))
add_eager("tiny_vit", "tiny_vit_5m_224", 3, 64, embed_dims=(16, 16, 32, 32), depths=(1, 1, 1, 1),
          num_heads=(2, 2, 4, 4), window_sizes=(4, 4, 4, 2))  # fmt: skip
add_eager("resnet_attention_pool", "resnet50_clip", 1, 64)

# Without attention: convolutions, mixers, gates, linear attention
add("resnet18", "resnet18", 0, 64, fast=True)
add("senet", "seresnet18", 0, 64)
add("sknet", "skresnet18", 0, 64)
add("convnext", "convnext_atto", 0, 64, depths=(1, 1, 1, 1), dims=(8, 16, 16, 32))
add("mixer", "mlp_mixer:MlpMixer", 0, img_size=32, patch_size=8, num_blocks=2, embed_dim=32)
add("efficientvit_linear", "efficientvit_b0", 0, 64)
add("mobilevitv2", "mobilevitv2_050", 0, 64)
add("coat_factorised", "coat_lite_tiny", 0, 64, img_size=64, embed_dims=(16, 32, 32, 32), serial_depths=(1, 1, 1, 1))
