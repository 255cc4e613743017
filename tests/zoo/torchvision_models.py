"""torchvision: image and video transformers, and networks without attention."""

from __future__ import annotations

from typing import Any

import torch
from zoo.entry import LAYERS, Recipes, image

recipe = Recipes("torchvision")


@recipe("vit", LAYERS, fast=True)
def _vit() -> Any:
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 8, LAYERS, 4, 32, 48, num_classes=7).eval(), image()


@recipe("vit_train", LAYERS, grad=True)
def _vit_train() -> Any:
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 8, LAYERS, 4, 32, 48, num_classes=7).train(), image()


def _swin(block: str) -> Any:
    from functools import partial

    from torchvision.models import swin_transformer as swin

    v2 = block == "SwinTransformerBlockV2"
    model = swin.SwinTransformer(
        [2, 2], 16, [2, 2], [2, 4], [4, 4], stochastic_depth_prob=0.0, num_classes=7,
        block=partial(getattr(swin, block)), downsample_layer=swin.PatchMergingV2 if v2 else swin.PatchMerging,
    )  # fmt: skip
    return model.eval(), image()


@recipe("swin", 4)
def _swin_v1() -> Any:
    return _swin("SwinTransformerBlock")


@recipe("swinv2", 4)
def _swin_v2() -> Any:
    return _swin("SwinTransformerBlockV2")


@recipe("maxvit", 2 * 2)
def _maxvit() -> Any:
    from torchvision.models import MaxVit

    return MaxVit((64, 64), 8, 4, [16, 32], [1, 1], 8, 0.0, num_classes=7).eval(), image(64)


@recipe("video_mvit", LAYERS)
def _mvit() -> Any:
    from torchvision.models.video.mvit import MSBlockConfig, MViT

    blocks = [MSBlockConfig(2, 16, 16, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 2, 2]) for _ in range(LAYERS)]
    model = MViT(
        (16, 16), 4, blocks, residual_pool=True, residual_with_cls_embed=False, rel_pos_embed=True,
        proj_after_attn=True, num_classes=7, patch_embed_stride=(2, 4, 4),
    )  # fmt: skip
    return model.eval(), torch.randn(1, 3, 4, 16, 16)


@recipe("video_swin", 2)
def _swin3d() -> Any:
    from torchvision.models.video.swin_transformer import SwinTransformer3d

    model = SwinTransformer3d([2, 4, 4], 16, [2], [2], [2, 2, 2], stochastic_depth_prob=0.0, num_classes=7)
    return model.eval(), torch.randn(1, 3, 4, 16, 16)


@recipe("mobilenet_v3", 0)
def _mobilenet() -> Any:
    from torchvision.models import mobilenet_v3_small

    return mobilenet_v3_small(num_classes=7).eval(), image(64)


@recipe("densenet", 0, fast=True)
def _densenet() -> Any:
    from torchvision.models import DenseNet

    return DenseNet(8, (2, 2), 8, num_classes=7).eval(), image(64)


@recipe("segmentation", 0)
def _segmentation() -> Any:
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large

    return lraspp_mobilenet_v3_large(weights_backbone=None, num_classes=4).eval(), image(64)
