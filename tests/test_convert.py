"""Checkpoints in and out: every way to name a model, every form of calibration data, and a round trip."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

import rewriter
from rewriter.convert import check_output, load, load_target, output, read_calibration, write
from rewriter.convert.checkpoint import example_inputs, load_model, quiet, random_ids
from rewriter.convert.target import Loaded, as_example, is_function
from rewriter.errors import CalibrationError, CheckpointError, OptionError, OutputError
from rewriter.plan import FORMAT
from rewriter.target import Target

WORDS = [f"w{i}" for i in range(120)]


def save_tokenizer(folder: Path) -> None:
    """A word-level tokenizer for texts of WORDS."""
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def lm(tiny_lm: Callable[..., nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny causal language model with its tokenizer."""
    folder = tmp_path_factory.mktemp("lm")
    with quiet():
        tiny_lm("eager").save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bidirectional encoder with its tokenizer."""
    from transformers import AutoConfig, AutoModel

    folder = tmp_path_factory.mktemp("encoder")
    config = AutoConfig.for_model(
        "bert", vocab_size=128, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    with quiet():
        AutoModel.from_config(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def words(count: int) -> str:
    return " ".join(WORDS[(i * i) % len(WORDS)] for i in range(count))


# --- targets ---------------------------------------------------------------------------------------------------------


def test_a_folder_gives_the_class_it_names_and_inputs_it_accepts(lm: Path) -> None:
    loaded = load_target(str(lm), length=12)
    assert not loaded.model.training and loaded.folder == lm and loaded.notes == ()
    args, kwargs = loaded.example
    assert args == () and kwargs["input_ids"].shape == (1, 12)
    assert loaded.model(**kwargs).logits.shape == (1, 12, 128)
    assert next(load_target(str(lm), dtype=torch.bfloat16).model.parameters()).dtype == torch.bfloat16


def test_example_lengths_stay_within_the_positions(lm: Path) -> None:
    model, _ = load_model(lm)
    assert example_inputs(model)["input_ids"].shape == (1, 128)
    with pytest.raises(OptionError, match="513 is more than the 512 positions"):
        example_inputs(model, 513)
    assert not (random_ids(model, 500, torch.Generator().manual_seed(0)) == 0).any(), "no padding token"


def test_a_vision_model_gets_a_picture(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(
        "vit", image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    with quiet():
        AutoModel.from_config(config).save_pretrained(tmp_path)
    loaded = load_target(str(tmp_path))
    assert loaded.example[1]["pixel_values"].shape == (1, 3, 16, 16)
    assert loaded.model(**loaded.example[1]).last_hidden_state.shape == (1, 5, 16)


def test_inputs_that_cannot_be_made_up_are_named() -> None:
    class Listens(nn.Module):
        main_input_name = "input_features"

        def forward(self, input_features: torch.Tensor) -> torch.Tensor:
            return input_features

    with pytest.raises(CheckpointError, match=r"takes input_features.*module:function"):
        example_inputs(Listens())


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda folder: None, "no config.json"),
    "not JSON": (lambda folder: (folder / "config.json").write_text("{"), "cannot be read"),
    "no type": (lambda folder: (folder / "config.json").write_text("{}"), "no model_type"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
    "cut off": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:999]),
        "cannot be loaded",
    ),
    "other shapes": (lambda folder: _edit(folder, hidden_size=128), "other shapes"),
    "unknown type": (lambda folder: _edit(folder, model_type="nonesuch", architectures=[]), "cannot be loaded"),
}


def _edit(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_folder_is_refused_in_one_sentence(lm: Path, tmp_path: Path, how: str) -> None:
    damage, sentence = BROKEN[how]
    if how not in ("empty", "not JSON", "no type"):
        for file in lm.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=sentence) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_names_that_are_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="nothing is downloaded"):
        load_target("some-org/some-model")
    with pytest.raises(CheckpointError, match="there is no folder"):
        load_target("nothing")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        load_target("file")


def test_missing_weights_are_noted(lm: Path, tmp_path: Path) -> None:
    for file in lm.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    _edit(tmp_path, num_hidden_layers=3)
    _, notes = load_model(tmp_path)
    assert len(notes) == 1 and "set at random" in notes[0] and "model.layers.2." in notes[0]


def test_a_class_that_transformers_lacks_is_noted(lm: Path, tmp_path: Path) -> None:
    for file in lm.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    _edit(tmp_path, architectures=["NoSuchModel"])
    _, notes = load_model(tmp_path)
    assert "no class NoSuchModel" in notes[0]


def test_examples_come_in_four_forms() -> None:
    x = torch.zeros(1)
    assert as_example(x, "f") == ((x,), {})
    assert as_example((x, 1), "f") == ((x, 1), {})
    assert as_example({"a": x}, "f") == ((), {"a": x})
    assert as_example(((x,), {"a": 1}), "f") == ((x,), {"a": 1})
    for wrong in (None, 3, "text", ()):
        with pytest.raises(CheckpointError, match="example inputs of f"):
            as_example(wrong, "f")


def test_functions_are_found_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "shapes_zoo.py").write_text(
        "import torch\n"
        "def good(): return torch.nn.Linear(2, 2), torch.zeros(1, 2)\n"
        "def single(): return torch.nn.Linear(2, 2)\n"
        "def raises(): raise ValueError('first\\nsecond')\n"
        "number = 3\n"
    )
    (tmp_path / "broken_zoo.py").write_text("def (:\n")
    assert is_function("shapes_zoo:good") and not is_function("./shapes_zoo") and not is_function("C:\\folder")
    model, ((x,), kwargs) = (loaded := load_target("shapes_zoo:good")).model, loaded.example
    assert model(x).shape == (1, 2) and kwargs == {} and not model.training
    for target, sentence in {
        "shapes_zoo:single": "must return a pair",
        "shapes_zoo:raises": "raised ValueError: first$",
        "shapes_zoo:number": "not a function",
        "shapes_zoo:missing": "has no missing",
        "absent_zoo:good": "cannot be imported",
        "broken_zoo:good": "cannot be imported",
    }.items():
        with pytest.raises(CheckpointError, match=sentence):
            load_target(target)


# --- calibration -----------------------------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path: Path) -> Callable[..., str]:
    def write_text(content: str | bytes, name: str = "text.txt") -> str:
        file = tmp_path / name
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(file)

    return write_text


def test_a_text_becomes_blocks(lm: Path, text: Callable[..., str]) -> None:
    batches, notes = read_calibration(text(words(700)), load_target(str(lm)), length=64)
    assert [batch["input_ids"].shape for batch in batches] == [(1, 64)] * 10 and notes == []
    assert len({tuple(batch["input_ids"][0].tolist()) for batch in batches}) == 10
    batches, notes = read_calibration(text(words(64 * 50)), load_target(str(lm)), length=64)
    assert len(batches) == 32 and "32 of the 50" in notes[0]


def test_a_short_text_gives_shorter_blocks_and_says_so(lm: Path, text: Callable[..., str]) -> None:
    batches, notes = read_calibration(text(words(100)), load_target(str(lm)))
    assert [batch["input_ids"].shape for batch in batches] == [(1, 50)] * 2
    assert "blocks of 50 tokens instead of 512" in notes[0]
    with pytest.raises(CalibrationError, match="only 20 tokens: give at least 32"):
        read_calibration(text(words(20)), load_target(str(lm)))


def test_lines_for_an_encoder_are_padded_in_batches(encoder: Path, text: Callable[..., str]) -> None:
    lines = "\n".join(words(n) for n in range(1, 101))
    batches, _ = read_calibration(text(lines), loaded := load_target(str(encoder)))
    assert len(batches) == 12 and set(batches[0]) == {"input_ids", "attention_mask"}
    assert batches[0]["attention_mask"].sum(1).tolist() == list(range(1, 9))
    assert batches[-1]["input_ids"].shape == (8, 64), "cut to the positions"
    assert loaded.model(**batches[0]).last_hidden_state.shape[:2] == (8, 8)
    few, _ = read_calibration(text("w1 w2\nw3\n"), loaded)
    assert len(few) == 2
    with pytest.raises(CalibrationError, match="one line"):
        read_calibration(text("w1 w2"), loaded)


def test_json_lines(lm: Path, encoder: Path, text: Callable[..., str]) -> None:
    lines = "\n".join(json.dumps({"text": words(40)}) for _ in range(8)) + "\n\n"
    batches, _ = read_calibration(text(lines, "a.jsonl"), load_target(str(lm)), length=64)
    assert len(batches) == 5
    batches, _ = read_calibration(text(lines, "a.jsonl"), load_target(str(encoder)))
    assert len(batches) == 2
    for broken in (
        '{"text": "a"}\n{"words": "b"}',
        '{"text": "a"}\n{',
        '{"text": "a"}\n{"text": 3}',
        '{"text": ""}\n[]',
    ):
        with pytest.raises(CalibrationError, match="line 2 of"):
            read_calibration(text(broken, "b.jsonl"), load_target(str(lm)))


def test_saved_batches(lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, ids = load_target(str(lm)), torch.ones(1, 4, dtype=torch.int64)
    for batches in ([{"input_ids": ids}] * 2, [ids, ids], [(ids,), (ids,)]):
        torch.save(batches, tmp_path / "batches.pt")
        found, _ = read_calibration(str(tmp_path / "batches.pt"), loaded)
        assert len(found) == 2 and type(found[0]) is type(batches[0])
    for wrong, sentence in ((ids, "holds a Tensor"), ([], "holds no batches"), ([3], "holds a int"), ({}, "a dict")):
        torch.save(wrong, tmp_path / "wrong.pt")
        with pytest.raises(CalibrationError, match=sentence):
            read_calibration(str(tmp_path / "wrong.pt"), loaded)
    (tmp_path / "junk.pt").write_bytes(b"junk")
    with pytest.raises(CalibrationError, match="cannot be read as saved batches"):
        read_calibration(str(tmp_path / "junk.pt"), loaded)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "batches_zoo.py").write_text("import torch\ndef batches(): return iter([torch.ones(1), torch.ones(1)])")
    assert len(read_calibration("batches_zoo:batches", loaded)[0]) == 2
    with pytest.raises(CalibrationError, match="has no other"):
        read_calibration("batches_zoo:other", loaded)


def test_texts_that_cannot_be_used(lm: Path, text: Callable[..., str], tmp_path: Path) -> None:
    loaded = load_target(str(lm))
    for source, sentence in {
        text("", "a.txt"): "is empty",
        text(" \n ", "b.txt"): "is empty",
        text(b"PK\0\3", "c.txt"): "not a text",
        str(tmp_path / "missing.txt"): "does not exist",
        str(tmp_path): "is a folder",
    }.items():
        with pytest.raises(CalibrationError, match=sentence):
            read_calibration(source, loaded)
    latin = words(200).encode() + " Müller".encode("latin-1")
    assert read_calibration(text(latin), loaded, length=64)[0]
    with pytest.raises(CalibrationError, match="needs the tokenizer of a checkpoint folder"):
        read_calibration(text(words(200)), Loaded(loaded.model, loaded.example))


def test_a_folder_without_tokenizer(
    tiny_lm: Callable[..., nn.Module], tmp_path: Path, text: Callable[..., str]
) -> None:
    folder = tmp_path / "bare"
    with quiet():
        tiny_lm().save_pretrained(folder)
    with pytest.raises(CalibrationError, match=r"no usable tokenizer.*tokenizer\.json"):
        read_calibration(text(words(200)), load_target(str(folder)))


# --- output ----------------------------------------------------------------------------------------------------------


def test_outputs_that_cannot_be_used(tmp_path: Path) -> None:
    check_output(tmp_path / "new" / "deeper")
    check_output(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is not empty"):
        check_output(tmp_path)
    with pytest.raises(OutputError, match="is a file"):
        check_output(tmp_path / "file")
    with pytest.raises(OutputError, match="cannot be written to"):
        check_output(tmp_path / "file" / "below")


def test_small_files_come_along(lm: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(lm, source)
    (source / "pooling").mkdir()
    for name in ("pooling/config.json", "LICENSE", "model.safetensors.index.json", "model.onnx", "config.json.bak"):
        (source / name).write_text("{}")
    write(load_model(lm)[0], out, source=source)
    assert (out / "pooling" / "config.json").exists() and (out / "LICENSE").exists()
    assert not {"model.safetensors.index.json", "model.onnx", "config.json.bak"} & {file.name for file in out.iterdir()}
    assert json.loads((out / "config.json").read_text())["hidden_size"] == 64, "written, not copied"


def test_a_round_trip(lm: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded, out = load_target(str(lm), length=64), tmp_path / "faster"
    ids = loaded.example[1]
    with torch.no_grad():
        before = loaded.model(**ids).logits
    model = rewriter.optimize(loaded.model, example=loaded.example)
    write(model, out, source=lm)
    names = {file.name for file in out.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "rewriter_plan.json", "rewriter_report.json"} <= names
    assert list(tmp_path.iterdir()) == [out], "nothing temporary is left"
    assert json.loads((out / "rewriter_report.json").read_text())["plan"]["format"] == FORMAT
    with quiet():
        plain, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), "the original names, nothing missing and nothing over"
    assert AutoTokenizer.from_pretrained(out)("w1 w2")["input_ids"] == [5, 6]
    fast = load(out)
    with torch.no_grad():
        assert torch.equal(plain.eval()(**ids).logits, before)
        assert torch.allclose(fast(**ids).logits, before, atol=1e-5)
    plan = rewriter.plan_of(fast)
    assert plan is not None and plan.decisions == rewriter.plan_of(model).decisions  # type: ignore[union-attr]


def test_a_learned_variant_comes_back_with_its_parameters(lm: Path, tmp_path: Path) -> None:
    loaded, out = load_target(str(lm), length=64), tmp_path / "faster"
    exact = rewriter.plan_of(rewriter.optimize(loaded.model, example=loaded.example))
    assert exact is not None
    learned = [
        dataclasses.replace(d, variant="linear", fidelity="learned", config=_first_config(report.sites[i]))
        for report in [rewriter.report_of(loaded.model)]
        if report is not None
        for i, d in enumerate(exact.decisions)
    ]
    model = rewriter.apply(loaded.model, dataclasses.replace(exact, decisions=tuple(learned)))
    parameters = list(model.rewriter.parameters())  # type: ignore[union-attr, operator]
    assert parameters
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter))
        before = model(**loaded.example[1]).logits
    write(model, out, source=lm)
    assert (out / "rewriter_plan.safetensors").exists()
    _, notes = load_model(out)
    assert notes == [], "the checkpoint has none of them"
    with torch.no_grad():
        torch.testing.assert_close(load(out)(**loaded.example[1]).logits, before)


def _first_config(site: rewriter.AttentionSite) -> dict[str, Any]:
    return dict(next(iter(rewriter.variants()["linear"].configs(site, Target.current()))))


class Plain(nn.Module):
    """One attention that is no Hugging Face model, with a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.again = nn.Linear(32, 32)
        self.again.weight = self.out.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        mixed: torch.Tensor = self.again(self.out(out.transpose(1, 2).flatten(2)))
        return mixed


def test_a_module_without_save_pretrained(tmp_path: Path) -> None:
    model, x = Plain().eval(), torch.randn(1, 40, 32)
    before = model(x)
    rewriter.optimize(model, example=((x,), {}))
    write(model, tmp_path / "out")
    assert {"model.safetensors", "rewriter_plan.json"} <= {f.name for f in (tmp_path / "out").iterdir()}
    torch.testing.assert_close(load(tmp_path / "out", Plain().eval())(x), before)
    with pytest.raises(CheckpointError, match="do not fit this model"):
        load(tmp_path / "out", nn.Linear(2, 2))


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError("the disk is full")

    model = rewriter.optimize(Plain().eval(), example=((torch.randn(1, 40, 32),), {}))
    monkeypatch.setattr(output.safetensors.torch, "save_file", fails)
    with pytest.raises(OutputError, match=r"cannot be written.*the disk is full"):
        write(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
