"""The command line: every command, and one line with a status for everything that is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rewriter import cli, doctor, options, terminal
from rewriter.convert.checkpoint import quiet
from rewriter.errors import GuardError, OptionError
from rewriter.plan import FORMAT

ZOO = """
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as attend

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return attend(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

class Branches(nn.Module):
    def forward(self, x):
        return x + 1 if x.sum().item() > 0 else x - 1

def attention():
    print("the model says hello")
    torch.manual_seed(0)
    return Attention(), torch.randn(1, 48, 32)

def plain(): return nn.Linear(32, 32), torch.randn(1, 32)
def branches(): return Branches(), torch.randn(1, 32)
def raises(): raise RuntimeError("out of memory\\nand more")
def batches(): return [torch.randn(1, 48, 32) for _ in range(4)]
def wrong_keys(): return [{"y": torch.randn(1, 48, 32)}] * 2
def nans(): return [torch.full((1, 48, 32), float("nan"))] * 2
def wild(model, batch): return float("nan")
def fails(model, batch): raise ValueError("no")
nan_metric, failing_metric = (wild, "higher"), (fails, "higher")
"""


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a module of models, and texts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "cli_zoo", raising=False)
    (tmp_path / "cli_zoo.py").write_text(ZOO)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    return tmp_path


@pytest.fixture
def bare(zoo: Path, tiny_lm: Callable[..., nn.Module]) -> Path:
    """A checkpoint folder without weights and without tokenizer."""
    with quiet():
        tiny_lm().save_pretrained(zoo / "bare")
    (zoo / "bare" / "model.safetensors").unlink()
    return zoo / "bare"


Ran = tuple[int, Any, str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """`run("explain", ...)`: status, stdout (parsed where it is JSON), stderr."""

    def ran(*arguments: str) -> Ran:
        status = cli.run(arguments)
        out, err = capsys.readouterr()
        return status, json.loads(out) if "--json" in arguments else out, err

    return ran


# --- what works ------------------------------------------------------------------------------------------------------


def test_explain(zoo: Path, run: Callable[..., Ran]) -> None:
    status, out, _ = run("explain", "cli_zoo:attention")
    assert status == 0 and "1 attention in 1 graph" in out and "causal(0)" in out and "could stand there" in out


def test_explain_json_is_alone_on_stdout(zoo: Path, run: Callable[..., Ran]) -> None:
    status, out, err = run("explain", "cli_zoo:attention", "--json")
    assert status == 0 and "hello" in err
    assert out["sites"][0]["mask"] == "causal(0)" and out["sites"][0]["heads"] == 2
    assert {each["variant"] for each in out["candidates"]} >= {"sdpa", "sliding_window"}


def test_explain_of_a_model_without_attention_is_no_error(zoo: Path, run: Callable[..., Ran]) -> None:
    status, out, _ = run("explain", "cli_zoo:plain")
    assert status == 0 and "no attentions" in out


def test_convert(zoo: Path, run: Callable[..., Ran]) -> None:
    arguments = ("convert", "cli_zoo:attention", "--calibration", "cli_zoo:batches", "--max-drop", "1%")
    status, out, _ = run(*arguments, "--out", "faster", "--time-budget", "20s")
    assert status == 0 and "guard" in out and "held" in out and "Written to faster." in out.replace("\n", " ")
    written = {file.name for file in (zoo / "faster").iterdir()}
    assert {"model.safetensors", "rewriter_plan.json", "rewriter_report.json"} <= written
    status, out, err = run(*arguments, "--out", "faster")
    assert status == 2 and "not empty" in err, "never over what is there"


def test_convert_without_calibration_is_exact(zoo: Path, run: Callable[..., Ran]) -> None:
    status, out, _ = run("convert", "cli_zoo:attention", "--out", "faster", "--json")
    assert status == 0 and out["guard"] is None and out["plan"]["format"] == FORMAT
    assert {d["fidelity"] for d in out["plan"]["decisions"]} == {"exact"}
    assert "No gain here" in out["outcome"] or "replaced" in out["outcome"]


TUNE = ("tune", "cli_zoo:attention", "--calibration", "cli_zoo:batches")


def test_tune_writes_a_plan_and_nothing_else(zoo: Path, run: Callable[..., Ran]) -> None:
    before = set(zoo.iterdir())
    status, out, _ = run(*TUNE, "--out", "p.json", "--pareto")
    assert status == 0 and "The plan is in p.json." in out.replace("\n", " ")
    assert {path.name for path in set(zoo.iterdir()) - before} - {"__pycache__"} == {"p.json"}
    found = json.loads((zoo / "p.json").read_text())
    assert found["search"]["metric"] == "cosine" and found["search"]["timeline"]
    status, out, _ = run("convert", "cli_zoo:attention", "--plan", "p.json", "--out", "faster", "--json")
    assert status == 0 and [d["variant"] for d in out["plan"]["decisions"]] in (["original"], ["sdpa"])
    assert (len(out["sites"]), out["graphs"]) == (1, 1) and " of 0 " not in out["outcome"]
    revalidated = ("--calibration", "cli_zoo:batches", "--revalidate", "--out", "again", "--json")
    status, out, _ = run("convert", "cli_zoo:attention", "--plan", "p.json", *revalidated)
    assert status == 0 and out["guard"]["held"]


def test_a_plan_may_be_written_into_a_folder(zoo: Path, run: Callable[..., Ran]) -> None:
    for _ in range(2):
        status, out, _ = run(*TUNE, "--out", "full", "--json")
        assert status == 0 and out["out"] == "full/rewriter_plan.json"
    assert {path.name for path in (zoo / "full").iterdir()} == {"file", "rewriter_plan.json"}


def test_what_is_in_brackets_is_shown(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    status, out, _ = run("tune", "--help")
    assert status == 0 and "rewriter[ray]" in out and "exact only" not in out


def test_a_dry_run_measures_and_writes_nothing(
    zoo: Path, run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rewriter.tune.measure import SiteBench

    monkeypatch.delattr(SiteBench, "compare")
    before = set(zoo.iterdir())
    status, out, _ = run(*TUNE, "--dry-run", "--json")
    assert status == 0 and (out["sites"], out["kinds"], out["searched"] + out["held_out"]) == (1, 1, 4)
    assert out["pairs"] >= 1 and {path.name for path in set(zoo.iterdir()) - before} <= {"__pycache__"}
    status, out, _ = run(*TUNE, "--dry-run")
    assert status == 0 and "1 attentions of 1 kinds" in out and "Nothing was measured" in out.replace("\n", " ")


def test_variants(run: Callable[..., Ran]) -> None:
    status, out, _ = run("variants")
    assert status == 0 and "sliding_window" in out
    _, rows, _ = run("variants", "--json")
    assert all(Path(row["file"]).is_file() and row["paper"] and row["fidelity"] for row in rows["variants"])
    assert all(row["limits"].endswith(".") for row in rows["variants"])


def test_doctor(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_inductor_works", lambda: "compiles, and the result is right")
    status, out, _ = run("doctor")
    assert status == 0 and all(line.startswith(("ok ", "warn ")) for line in out.splitlines())
    assert torch.__version__ in out
    _, document, _ = run("doctor", "--json")
    names = [check["name"] for check in document["checks"]]
    assert {"python", "torch", "triton", "transformers", "device", "capability", "C++ compiler", "inductor"} <= {*names}


def test_doctor_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    found = {check.name: check for check in doctor.examine(compile_probe=False)}
    assert not found["C++ compiler"].ok and "out of reach" in found["C++ compiler"].found


@pytest.mark.parametrize("multiplies", [True, False])
def test_doctor_says_where_bfloat16_is_emulated(monkeypatch: pytest.MonkeyPatch, multiplies: bool) -> None:
    monkeypatch.setattr(doctor, "multiplies_bfloat16", lambda: multiplies)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = {check.name for check in doctor.examine(compile_probe=False)}
    assert ("bfloat16" in found) is not multiplies


def test_doctor_survives_a_broken_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> str:
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(doctor, "_inductor_works", broken)
    found = {check.name: check for check in doctor.examine()}
    assert found["inductor"] == doctor.Check("inductor", False, "not usable: no compiler")


def test_sizes_are_for_people(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(2_500_000))
    assert doctor.size(tmp_path) == "2 MB" and doctor.size(tmp_path / "absent") == "not there yet"


# --- what is wrong ---------------------------------------------------------------------------------------------------

ATTENTION = ("convert", "cli_zoo:attention", "--out", "out")
CALIBRATED = (*ATTENTION, "--calibration", "cli_zoo:batches")
BAD: dict[str, tuple[tuple[str, ...], str]] = {
    "no such folder": (("explain", "nowhere"), "there is no folder nowhere"),
    "hub name": (("explain", "some-org/some-model"), "nothing is downloaded"),
    "folder without config": (("explain", "full"), "no config.json"),
    "module that raises": (("explain", "cli_zoo:raises"), "raised RuntimeError: out of memory"),
    "module that is not there": (("explain", "nowhere_zoo:model"), "cannot be imported"),
    "name that is not there": (("explain", "cli_zoo:nothing"), "has no nothing"),
    "no attention": (("convert", "cli_zoo:plain", "--out", "out"), "no attention"),
    "cannot be captured": (("convert", "cli_zoo:branches", "--out", "out"), ""),
    "empty calibration": (("convert", "cli_zoo:attention", "--out", "out", "--calibration", "empty.txt"), "is empty"),
    "no calibration file": ((*ATTENTION, "--calibration", "no.txt"), "does not exist"),
    "wrong keys": ((*ATTENTION, "--calibration", "cli_zoo:wrong_keys"), "y"),
    "NaN in calibration": ((*ATTENTION, "--calibration", "cli_zoo:nans"), "NaN"),
    "metric gives NaN": ((*CALIBRATED, "--metric", "cli_zoo:nan_metric"), "wild"),
    "metric raises": ((*CALIBRATED, "--metric", "cli_zoo:failing_metric"), "fails"),
    "no such metric": ((*CALIBRATED, "--metric", "beauty"), "beauty"),
    "negative max_drop": ((*CALIBRATED, "--max-drop=-1%"), "must not be negative"),
    "max_drop that is no number": ((*CALIBRATED, "--max-drop", "little"), "little"),
    "max_drop NaN": ((*CALIBRATED, "--max-drop", "nan"), "nan"),
    "time that is none": ((*CALIBRATED, "--time-budget", "soon"), "'soon' is not a time"),
    "no such variant": ((*CALIBRATED, "--variants", "sdpa,magic"), "no variant 'magic'"),
    "no such device": ((*ATTENTION, "--device", "abacus"), "no device 'abacus'"),
    "output not empty": (("convert", "cli_zoo:attention", "--out", "full"), "is not empty"),
    "output is a file": (("convert", "cli_zoo:attention", "--out", "empty.txt"), "is a file"),
    "no data to tune on": (("tune", "cli_zoo:attention"), "needs --calibration"),
    "no folder for the plan": ((*TUNE, "--out", "gone/p.json"), "gone/p.json cannot be written (No such file"),
    "a place that takes no plan": ((*TUNE, "--dry-run", "--out", "x" * 300), "cannot be written (File name too long)"),
    "no such metric in a dry run": ((*TUNE, "--dry-run", "--metric", "beauty"), "no metric 'beauty'"),
    "what is no plan in the way": ((*TUNE, "--out", "cli_zoo.py"), "is not a plan"),
    "to revalidate nothing": ((*ATTENTION, "--revalidate"), "--plan"),
    "no target": (("explain",), "TARGET"),
    "no such command": (("improve", "cli_zoo:attention"), "improve"),
    "no such goal": ((*ATTENTION, "--goal", "beauty"), "beauty"),
    "length 0": (("explain", "cli_zoo:attention", "--length", "0"), "--length"),
    "no such demonstration": (("demo", "--model", "vision"), "no demonstration of 'vision'"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_line_and_status_2(zoo: Path, run: Callable[..., Ran], what: str) -> None:
    arguments, sentence = BAD[what]
    before = sorted(zoo.rglob("*"))
    status, out, err = run(*arguments, "--json")
    assert status == 2
    lines = [line for line in err.splitlines() if line != "the model says hello"]
    assert len(lines) == 1 and lines[0].startswith("error: ") and "Traceback" not in err
    assert sentence.lower() in lines[0].lower() and lines[0] == f"error: {out['error']}"
    assert [path for path in sorted(zoo.rglob("*")) if "__pycache__" not in path.parts] == before


def test_a_folder_without_weights(bare: Path, run: Callable[..., Ran]) -> None:
    for command in (("explain", "bare"), ("convert", "bare", "--out", "out")):
        status, out, err = run(*command)
        assert status == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1
        assert "no weights" in err


def test_a_failed_guard_is_status_1(zoo: Path, run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    import rewriter

    def fails(*_: object, **__: object) -> None:
        raise GuardError("the bound cannot be met: give more data")

    monkeypatch.setattr(rewriter, "optimize", fails)
    status, out, _ = run(*CALIBRATED, "--json")
    assert status == 1 and out == {"error": "the bound cannot be met: give more data"}
    assert not (zoo / "out").exists()


def test_a_defect_is_one_line_too(zoo: Path, run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    import rewriter

    def fails(*_: object, **__: object) -> None:
        raise ZeroDivisionError("one\ntwo")

    monkeypatch.setattr(rewriter, "explain", fails)
    status, _, err = run("explain", "cli_zoo:attention")
    assert status == 3 and "ZeroDivisionError: one" in err and "Traceback" not in err
    monkeypatch.setenv("REWRITER_DEBUG", "1")
    assert "Traceback" in run("explain", "cli_zoo:attention")[2]


def test_stopping_is_no_traceback(zoo: Path, run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    import rewriter

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(rewriter, "explain", stopped)
    status, _, err = run("explain", "cli_zoo:attention")
    assert status == 130 and err.splitlines()[-1].startswith("error: stopped")


def test_the_installed_command(zoo: Path, root: Path) -> None:
    """The console entry in a process of its own, where nothing hides what goes to stdout and stderr."""
    script = Path(sys.executable).parent / "rewriter"
    module = [sys.executable, "-m", "rewriter"]
    environment = os.environ | {"PYTHONPATH": str(root)}
    installed = [str(script)] if script.exists() else module
    for command, extra in ((installed, []), (installed, ["--json"]), (module, ["--json"])):
        done = subprocess.run([*command, "explain", "nowhere", *extra], capture_output=True, text=True, env=environment)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")
        assert json.loads(done.stdout)["error"] in done.stderr if extra else done.stdout == ""


def test_a_reader_that_leaves_early_is_no_traceback(root: Path) -> None:
    """As in `rewriter variants --json | head -c 1`, but with a pipe that is closed before anything is written."""
    code = "import sys, rewriter.cli as c; sys.argv[1:] = ['variants', '--json']; sys.stdin.read(); c.main()"
    environment = os.environ | {"PYTHONPATH": str(root)}
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, stderr=pipe, env=environment) as done:
        assert done.stdin and done.stdout and done.stderr
        done.stdout.close()
        done.stdin.close()
        assert done.stderr.read() == b"" and done.wait() == 1


def test_durations() -> None:
    assert (
        options.seconds("90") == options.seconds("90s") == options.seconds("1.5m") == 90
        and options.seconds("1h") == 3600
    )
    assert options.seconds(None) is None
    for wrong in ("", "5 days", "-5m", "0", "m"):
        with pytest.raises(OptionError):
            options.seconds(wrong)


def test_json_never_holds_what_json_does_not_have() -> None:
    assert json.loads(terminal.as_text({"a": [float("nan"), (float("inf"), 1.0)], "b": {1: None}})) == {
        "a": [None, [None, 1.0]],
        "b": {"1": None},
    }
