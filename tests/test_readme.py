"""What the README shows runs, in the order in which it stands there."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch


def blocks(root: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (root / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def test_python_blocks(
    root: Path, tiny_lm: Callable[..., torch.nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the README saves files by plain names
    tokens = torch.randint(3, 128, (8, 2, 64))
    names = {
        "__name__": "readme",
        "model": tiny_lm("eager"),
        "fresh_model": lambda: tiny_lm("eager"),
        "batches": [{"input_ids": batch, "labels": batch} for batch in tokens],
    }
    found = blocks(root, "python")
    assert found
    for block in found:
        exec(compile(block, "README.md", "exec"), names)


def test_commands_exist(root: Path) -> None:
    from typer.main import get_command

    from rewriter.cli import app

    shown = set(re.findall(r"^rewriter (\w+)", "\n".join(blocks(root, "sh")), re.MULTILINE))
    assert shown and shown <= set(get_command(app).commands)


def test_make_targets_exist(root: Path) -> None:
    shown = set(re.findall(r"\bmake (\w+)", (root / "README.md").read_text()))
    assert shown and shown <= set(re.findall(r"^(\w+):", (root / "Makefile").read_text(), re.MULTILINE))
