"""Hugging Face checkpoint folders: reading the model, its tokenizer, and inputs that it accepts."""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.errors import CalibrationError, CheckpointError, OptionError

WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
EXAMPLE_LENGTH = 128


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a folder that holds weights too. Raises CheckpointError on everything else."""
    if not folder.exists():
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)):
            raise CheckpointError(
                f"there is no folder {folder}, and nothing is downloaded from a hub: "
                "download the checkpoint first and give the path of its folder"
            )
        raise CheckpointError(f"there is no folder {folder}: give a checkpoint folder or package.module:function")
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file: give the checkpoint folder that holds config.json and the weights")
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"there is no config.json in {folder}, so it is not a Hugging Face checkpoint: "
            "give a folder that save_pretrained wrote, or package.module:function"
        ) from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be read ({cause(error)}): restore the file") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise CheckpointError(
            f"{folder / 'config.json'} names no model_type, so it is not the configuration of a Hugging Face model: "
            "restore the file, or use package.module:function"
        )
    if not any(any(folder.glob(pattern)) for pattern in WEIGHTS):
        raise CheckpointError(
            f"{folder} has a config.json but no weights: put model.safetensors or pytorch_model.bin beside it"
        )
    return config


def load_model(folder: Path, dtype: torch.dtype | None = None) -> tuple[nn.Module, list[str]]:
    """The model of a checkpoint folder in eval mode, and notes about what was odd. Raises CheckpointError."""
    config = read_config(folder)
    notes: list[str] = []
    with quiet():
        import transformers

        names = [name for name in config.get("architectures") or [] if isinstance(name, str)]
        known = [found for name in names if (found := getattr(transformers, name, None)) is not None]
        if names and not known:
            notes.append(f"transformers has no class {names[0]}; the model was loaded by its model_type instead")
        options: dict[str, Any] = {"local_files_only": True, "output_loading_info": True, "dtype": dtype or "auto"}
        if not known:
            options["trust_remote_code"] = False  # else it asks on the terminal
        try:
            # Mismatches are asked for, not raised, because the error of from_pretrained only points at its log.
            model, info = (known[0] if known else transformers.AutoModel).from_pretrained(
                folder, ignore_mismatched_sizes=True, **options
            )
        except Exception as error:
            raise CheckpointError(f"{folder} cannot be loaded: {cause(error)}") from error
    assert isinstance(model, nn.Module)
    if mismatched := sorted(entry if isinstance(entry, str) else entry[0] for entry in info["mismatched_keys"]):
        raise CheckpointError(
            f"the weights in {folder} have other shapes than its config.json says "
            f"({len(mismatched)} of them, {mismatched[0]} first): put the config.json back that belongs to them"
        )
    if missing := sorted(info["missing_keys"]):
        if len(missing) >= len(model.state_dict()):
            raise CheckpointError(f"the weights in {folder} belong to another model: none of their names fits")
        notes.append(
            f"{len(missing)} weights are not in the checkpoint and were set at random, {missing[0]} first: "
            "accuracy can only be judged where they do not matter"
        )
    return model.eval(), notes


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint folder. Raises CalibrationError, because only texts need one."""
    with quiet():
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:
            raise CalibrationError(
                f"there is no usable tokenizer in {folder}, and a text needs one: "
                "put tokenizer.json there, or give calibration batches as .pt or package.module:function"
            ) from error


def parameters_of(model: nn.Module) -> list[str]:
    """The names of the inputs of `forward`."""
    return [name for name in inspect.signature(model.forward).parameters if name != "kwargs"]


def max_positions(model: nn.Module) -> int | None:
    """How many positions the configuration allows, where it says so."""
    found = getattr(text_config(model), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def text_config(model: nn.Module) -> Any:
    """The part of the configuration that is about text."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def checked_length(model: nn.Module, length: int | None, default: int) -> int:
    """`length` if the model has that many positions, or the default cut to them. Raises OptionError."""
    limit = max_positions(model)
    if length is None:
        return min(default, limit or default)
    if limit is not None and length > limit:
        raise OptionError(f"a length of {length} is more than the {limit} positions of the model: ask for less")
    return length


def example_inputs(model: nn.Module, length: int | None = None, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs that the model accepts: one sequence of token ids, or one picture. Raises CheckpointError."""
    names, main = parameters_of(model), getattr(model, "main_input_name", "input_ids")
    random = torch.Generator().manual_seed(seed)
    config = getattr(model, "config", None)
    if main == "pixel_values" and (size := getattr(config, "image_size", None)):
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        shape = (1, getattr(config, "num_channels", 3), height, width)
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        return {"pixel_values": torch.rand(shape, generator=random).to(dtype)}
    if main == "input_ids" and main in names:
        ids = random_ids(model, checked_length(model, length, EXAMPLE_LENGTH), random)
        both = getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in names
        return {"input_ids": ids, "decoder_input_ids": ids.clone()} if both else {"input_ids": ids}
    raise CheckpointError(
        f"the model takes {main}, and no example of that can be made up: "
        "give package.module:function that returns the model and example inputs"
    )


def random_ids(model: nn.Module, length: int, random: torch.Generator) -> Tensor:
    """int64[1, length] token ids; never the padding token, which models treat in a special way."""
    config = text_config(model)
    words, padding = int(getattr(config, "vocab_size", 0) or 2), getattr(config, "pad_token_id", None)
    ids = torch.randint(words, (1, length), generator=random)
    return torch.where(ids == padding, (ids + 1) % words, ids) if isinstance(padding, int) else ids


def cause(error: BaseException) -> str:
    """The first line of what an exception says, to quote inside a sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".:") if lines else type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing from transformers on the terminal inside: no bars and no warnings; what matters becomes a note."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    reports: Any = logging  # it is typed in part only
    level, bars = reports.get_verbosity(), reports.is_progress_bar_enabled()
    reports.set_verbosity(reports.CRITICAL)
    reports.disable_progress_bar()
    try:
        yield
    finally:
        reports.set_verbosity(level)
        if bars:
            reports.enable_progress_bar()
