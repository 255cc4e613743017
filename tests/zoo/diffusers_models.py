"""diffusers: U-Nets, diffusion transformers and autoencoders, as they come and with their attention spelled out."""

from __future__ import annotations

from typing import Any

import torch
from zoo.entry import LAYERS, Recipes

recipe = Recipes("diffusers")

WHEN = 3
"""The step of the diffusion."""


def eager(model: Any) -> Any:
    """The model with every attention spelled out instead of a fused call."""
    from diffusers.models.attention_processor import AttnProcessor

    for module in model.modules():
        if hasattr(module, "set_processor"):
            module.set_processor(AttnProcessor())
    return model


def unet2d(**settings: Any) -> Any:
    from diffusers import UNet2DModel

    model = UNet2DModel(
        sample_size=16, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8, attention_head_dim=8, **settings,
    )  # fmt: skip
    return model.eval(), torch.randn(1, 3, 16, 16), WHEN


UNET2D = 1 + 1 + 2
"""Down, in the middle, and up, where each block has a layer more."""


@recipe("unet2d", UNET2D)
def _unet2d() -> Any:
    return unet2d()


@recipe("unet2d@eager", UNET2D)
def _unet2d_eager() -> Any:
    model, *call = unet2d()
    return eager(model), *call


def conditioned() -> Any:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=16, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8, cross_attention_dim=24,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=2,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    return model.eval(), torch.randn(1, 4, 16, 16), WHEN, torch.randn(1, 5, 24)


UNET = 2 * (1 + 1 + 2)
"""To itself and to the text: down, in the middle, up."""


@recipe("unet2d_condition", UNET)
def _conditioned() -> Any:
    return conditioned()


@recipe("unet2d_condition@eager", UNET)
def _conditioned_eager() -> Any:
    model, *call = conditioned()
    return eager(model), *call


@recipe("unet3d_condition", UNET * 2 + 2)
def _unet3d() -> Any:
    from diffusers import UNet3DConditionModel

    model = UNet3DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8, cross_attention_dim=24,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), attention_head_dim=8,
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    )  # fmt: skip
    return model.eval(), torch.randn(1, 4, 3, 8, 8), WHEN, torch.randn(1, 5, 24)


def autoencoder() -> Any:
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        block_out_channels=(16, 32), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=8,
        up_block_types=("UpDecoderBlock2D",) * 2, sample_size=16,
    )  # fmt: skip
    return model.eval(), torch.randn(1, 3, 16, 16)


@recipe("autoencoder", 2)
def _autoencoder() -> Any:
    return autoencoder()


@recipe("autoencoder@eager", 2, fast=True)
def _autoencoder_eager() -> Any:
    model, *call = autoencoder()
    return eager(model), *call


@recipe("vq_model", 2)
def _vq() -> Any:
    from diffusers import VQModel

    model = VQModel(
        block_out_channels=(16, 32), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=8,
        up_block_types=("UpDecoderBlock2D",) * 2, num_vq_embeddings=16,
    )  # fmt: skip
    return model.eval(), torch.randn(1, 3, 16, 16)


@recipe("autoencoder_tiny", 0)
def _tiny() -> Any:
    from diffusers import AutoencoderTiny

    model = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )  # fmt: skip
    return model.eval(), torch.randn(1, 3, 16, 16)


SQUARE = {"sample_size": 8, "num_layers": LAYERS, "attention_head_dim": 8, "num_attention_heads": 4}


@recipe("dit", LAYERS)
def _dit() -> Any:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(**SQUARE, num_embeds_ada_norm=10, norm_num_groups=4)
    return model.eval(), torch.randn(1, 4, 8, 8), torch.tensor([WHEN]), torch.tensor([1])


@recipe("pixart@eager", 2 * LAYERS)
def _pixart() -> Any:
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(**SQUARE, cross_attention_dim=32, caption_channels=24, norm_num_groups=4)
    call = {
        "encoder_hidden_states": torch.randn(1, 5, 24),
        "timestep": torch.tensor([WHEN]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return eager(model.eval()), torch.randn(1, 4, 8, 8), call


@recipe("sd3", LAYERS, fast=True)
def _sd3() -> Any:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        **SQUARE, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=16, pos_embed_max_size=8,
        in_channels=4, out_channels=4,
    )  # fmt: skip
    text = {"encoder_hidden_states": torch.randn(1, 5, 32), "pooled_projections": torch.randn(1, 16)}
    return model.eval(), torch.randn(1, 4, 8, 8), text | {"timestep": torch.tensor([WHEN])}


@recipe("flux", 2 * LAYERS)
def _flux() -> Any:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        in_channels=4, num_layers=LAYERS, num_single_layers=LAYERS, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=24, pooled_projection_dim=16, axes_dims_rope=(4, 2, 2),
    )  # fmt: skip
    call = {
        "encoder_hidden_states": torch.randn(1, 5, 24),
        "pooled_projections": torch.randn(1, 16),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.randn(16, 3),
        "txt_ids": torch.randn(5, 3),
    }
    return model.eval(), torch.randn(1, 16, 4), call


@recipe("auraflow", 2 * LAYERS)
def _auraflow() -> Any:
    from diffusers import AuraFlowTransformer2DModel

    model = AuraFlowTransformer2DModel(
        sample_size=8, num_mmdit_layers=LAYERS, num_single_dit_layers=LAYERS, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=24, caption_projection_dim=32, pos_embed_max_size=64,
    )  # fmt: skip
    return model.eval(), torch.randn(1, 4, 8, 8), torch.randn(1, 5, 24), torch.tensor([0.5])


@recipe("cogvideox", LAYERS)
def _cogvideox() -> Any:
    from diffusers import CogVideoXTransformer3DModel

    model = CogVideoXTransformer3DModel(
        num_attention_heads=4, attention_head_dim=8, num_layers=LAYERS, in_channels=4, out_channels=4,
        time_embed_dim=8, text_embed_dim=24, sample_width=8, sample_height=8, sample_frames=5,
        max_text_seq_length=5,
    )  # fmt: skip
    return model.eval(), torch.randn(1, 2, 4, 8, 8), torch.randn(1, 5, 24), torch.tensor([WHEN])


@recipe("wan", 2 * LAYERS)
def _wan() -> Any:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=24, freq_dim=16,
        ffn_dim=32, num_layers=LAYERS, rope_max_seq_len=32,
    )  # fmt: skip
    return model.eval(), torch.randn(1, 4, 2, 8, 8), torch.tensor([WHEN]), torch.randn(1, 5, 24)


@recipe("ltx_video", 2 * LAYERS)
def _ltx() -> Any:
    from diffusers import LTXVideoTransformer3DModel

    model = LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=8, cross_attention_dim=32,
        num_layers=LAYERS, caption_channels=24,
    )  # fmt: skip
    call = {
        "encoder_hidden_states": torch.randn(1, 5, 24),
        "timestep": torch.tensor([WHEN]),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0]]),
        "num_frames": 2,
        "height": 4,
        "width": 4,
    }
    return model.eval(), torch.randn(1, 32, 4), call


@recipe("sana", LAYERS)
def _sana() -> Any:
    from diffusers import SanaTransformer2DModel

    # Linear attention to itself, attention to the text.
    model = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=8, num_layers=LAYERS,
        num_cross_attention_heads=4, cross_attention_head_dim=8, cross_attention_dim=32, caption_channels=24,
        sample_size=8,
    )  # fmt: skip
    return model.eval(), torch.randn(1, 4, 8, 8), torch.randn(1, 5, 24), torch.tensor([WHEN])


@recipe("hunyuan_dit", 2 * LAYERS + 1)  # and one to pool the text
def _hunyuan() -> Any:
    from diffusers import HunyuanDiT2DModel

    model = HunyuanDiT2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, patch_size=2, sample_size=8, hidden_size=32,
        num_layers=LAYERS, mlp_ratio=2.0, learn_sigma=False, cross_attention_dim=24, cross_attention_dim_t5=24,
        pooled_projection_dim=16, text_len=3, text_len_t5=4,
    )  # fmt: skip
    call = {
        "encoder_hidden_states": torch.randn(1, 3, 24),
        "text_embedding_mask": torch.ones(1, 3, dtype=torch.bool),
        "encoder_hidden_states_t5": torch.randn(1, 4, 24),
        "text_embedding_mask_t5": torch.ones(1, 4, dtype=torch.bool),
        "image_meta_size": torch.ones(1, 6),
        "style": torch.tensor([0]),
        "image_rotary_emb": [torch.randn(16, 8), torch.randn(16, 8)],
    }
    return model.eval(), torch.randn(1, 4, 8, 8), torch.tensor([float(WHEN)]), call


@recipe("prior@eager", LAYERS)
def _prior() -> Any:
    from diffusers import PriorTransformer

    model = PriorTransformer(
        num_attention_heads=4, attention_head_dim=8, num_layers=LAYERS, embedding_dim=16, num_embeddings=5,
        additional_embeddings=4,
    )  # fmt: skip
    return eager(model.eval()), torch.randn(2, 16), WHEN, torch.randn(2, 16), torch.randn(2, 5, 16)
