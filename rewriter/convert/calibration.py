"""Calibration files: texts, JSON lines, saved batches or a function, turned into batches for `optimize`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from rewriter.convert.checkpoint import cause, checked_length, load_tokenizer, parameters_of
from rewriter.convert.target import Loaded, call, is_function, moved
from rewriter.errors import CalibrationError, RewriterError

T = TypeVar("T")

BLOCK_LENGTH = 2048
BATCH_LINES = 8
MAX_BATCHES = 32
SHORTEST_BLOCK = 16


def read_calibration(source: str, loaded: Loaded, length: int | None = None) -> tuple[list[Any], list[str]]:
    """Batches for the model, on its device, from a file or `package.module:function`, and notes.

    A text becomes blocks of `length` tokens for a model that generates, and padded batches of lines for one that
    encodes; `.pt` files and functions give batches (dict, tuple or tensor) as they are. Raises CalibrationError.
    """
    batches, notes = _read(source, loaded, length)
    device = next((parameter.device for parameter in loaded.model.parameters()), torch.device("cpu"))
    return moved(batches, device), notes


def _read(source: str, loaded: Loaded, length: int | None) -> tuple[list[Any], list[str]]:
    if is_function(source):
        return saved_batches(_called(source), source), []
    path = Path(source).expanduser()
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise CalibrationError(f"the calibration file {path} {problem}: give a .txt, .jsonl or .pt file")
    if path.suffix in (".pt", ".pth"):
        try:
            batches = torch.load(path, weights_only=True)
        except Exception as error:
            raise CalibrationError(f"{path} cannot be read as saved batches: {cause(error)}") from error
        return saved_batches(batches, str(path)), []
    texts = read_texts(path)
    model = loaded.model
    main = getattr(model, "main_input_name", "input_ids")
    if loaded.folder is None:
        raise CalibrationError(
            "a text needs the tokenizer of a checkpoint folder, and a function has none: "
            "give calibration batches as .pt or package.module:function"
        )
    if main != "input_ids" or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        needed = "the decoder's input too" if main == "input_ids" else main
        raise CalibrationError(
            f"the model takes {needed}, which a text does not give: "
            "give calibration batches as .pt or package.module:function"
        )
    tokenizer = load_tokenizer(loaded.folder)
    limit = checked_length(model, length, BLOCK_LENGTH)
    if model.can_generate():  # type: ignore[operator]
        return text_blocks("\n\n".join(texts), tokenizer, limit)
    lines = texts if path.suffix == ".jsonl" else [line for line in texts[0].splitlines() if line.strip()]
    return line_batches(lines, tokenizer, limit, parameters_of(model))


def read_texts(path: Path) -> list[str]:
    """One whole text, or the "text" fields of JSON lines; never empty. Raises CalibrationError."""
    data = path.read_bytes()
    if b"\0" in data:
        raise CalibrationError(f"{path} is not a text: give a .txt, .jsonl or .pt file")
    try:
        whole = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        whole = data.decode("latin-1")
    texts = [whole]
    if path.suffix == ".jsonl":
        texts = [_field(line, number, path) for number, line in enumerate(whole.splitlines(), 1) if line.strip()]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise CalibrationError(f"the calibration file {path} is empty: give a text like those the model will see")
    return texts


def text_blocks(text: str, tokenizer: Any, length: int) -> tuple[list[dict[str, Tensor]], list[str]]:
    """One long text as batches of one block, each beginning as the tokenizer begins a text; shortened to give two."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    begin = tokenizer("")["input_ids"][:1]
    start = [tokenizer.bos_token_id] if begin == [tokenizer.bos_token_id] else []
    notes = []
    if len(ids) < 2 * (length - len(start)):
        shorter = len(ids) // 2 + len(start)
        if shorter < SHORTEST_BLOCK:
            raise CalibrationError(
                f"the calibration text has only {len(ids)} tokens: give at least {2 * SHORTEST_BLOCK}, "
                f"and {2 * length} for blocks of {length}"
            )
        notes.append(
            f"the calibration text has only {len(ids)} tokens, so accuracy was measured on blocks of {shorter} "
            f"tokens instead of {length}"
        )
        length = shorter
    step = length - len(start)
    blocks = [start + ids[at : at + step] for at in range(0, len(ids) - step + 1, step)]
    chosen, said = spread(blocks)
    return [{"input_ids": torch.tensor([block])} for block in chosen], notes + said


def line_batches(
    texts: Sequence[str], tokenizer: Any, length: int, accepted: Sequence[str]
) -> tuple[list[dict[str, Tensor]], list[str]]:
    """Lines as padded batches of eight; a few lines are shared out so that there are two batches."""
    if len(texts) < 2:
        raise CalibrationError("the calibration text has one line, and one text a line is expected: give at least two")
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise CalibrationError("the tokenizer has no padding token, so lines cannot be batched: set pad_token")
        tokenizer.pad_token = tokenizer.eos_token
    size = min(BATCH_LINES, len(texts) // 2)
    groups = [list(texts[at : at + size]) for at in range(0, len(texts) - size + 1, size)]
    chosen, notes = spread(groups)
    made = [tokenizer(group, padding=True, truncation=True, max_length=length, return_tensors="pt") for group in chosen]
    return [{name: value for name, value in batch.items() if name in accepted} for batch in made], notes


def spread(items: list[T]) -> tuple[list[T], list[str]]:
    """At most MAX_BATCHES items, taken evenly over the whole text, and a note if some were left out."""
    if len(items) <= MAX_BATCHES:
        return items, []
    kept = [items[i * len(items) // MAX_BATCHES] for i in range(MAX_BATCHES)]
    return kept, [f"{MAX_BATCHES} of the {len(items)} batches of the calibration text were used, evenly spread"]


def saved_batches(batches: Any, origin: str) -> list[Any]:
    """A list of dicts, tuples or tensors, not empty. Raises CalibrationError."""
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise CalibrationError(f"{origin} holds a {type(batches).__name__}, not a list: give a list of batches")
    found = list(batches)
    if not found:
        raise CalibrationError(f"{origin} holds no batches: give at least two")
    for batch in found:
        if not isinstance(batch, (Tensor, Mapping, tuple, list)):
            raise CalibrationError(
                f"{origin} holds a {type(batch).__name__} as a batch: give dicts, tuples or tensors, as the model takes"
            )
    return found


def _called(source: str) -> Any:
    try:
        return call(source)
    except RewriterError as error:
        raise CalibrationError(str(error)) from error


def _field(line: str, number: int, path: Path) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise CalibrationError(f'line {number} of {path} is not a JSON object with a "text" field: mend that line')
    return text
