"""Variants are found: the files of kernels/, and what a program registers."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import rewriter.kernels
from rewriter import variant as module
from rewriter.errors import OptionError
from rewriter.kernels.exact.sdpa import VARIANT as SDPA
from rewriter.site import AttentionSite, Full, Refusal
from rewriter.target import Target
from rewriter.variant import ORIGINAL, Variant, modules_of, register, unregister, variants


@pytest.fixture
def mine() -> Iterator[Variant]:
    yield replace(variants()["sdpa"], name="mine")
    unregister("mine")


def test_every_file_is_a_variant_of_its_name(root: Path) -> None:
    files = sorted(file.stem for file in (root / "kernels").rglob("*.py"))
    assert list(variants()) == files
    assert {ORIGINAL, "sdpa", "sliding_window", "linear"} <= set(files)
    for found in modules_of(rewriter.kernels):
        assert found.VARIANT.name == found.__name__.rpartition(".")[2]
        assert found.VARIANT is variants()[found.VARIANT.name]
        assert found.__doc__ and "arXiv:" in found.VARIANT.paper


def test_a_new_file_is_found_without_another_edit(tmp_path: Path, root: Path) -> None:
    file = tmp_path / "exact" / "added.py"
    file.parent.mkdir()
    file.write_text((root / "kernels/exact/sdpa.py").read_text().replace('name="sdpa"', 'name="added"'))
    program = f"import rewriter.kernels as k; k.__path__ = [*k.__path__, {str(tmp_path)!r}]\n"
    program += "import rewriter.kernels.exact as e; e.__path__ = [*e.__path__, k.__path__[-1] + '/exact']\n"
    program += "from rewriter.variant import variants; print(*variants())"
    run = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert "added" in run.stdout.split(), run.stderr


def test_register_and_unregister(mine: Variant) -> None:
    assert register(mine) is mine
    assert variants()["mine"] is mine
    unregister("mine")
    assert "mine" not in variants()
    unregister("mine")  # nothing to take back


def test_a_name_is_taken_once(mine: Variant) -> None:
    register(mine)
    for taken in (mine, variants()["sdpa"]):
        with pytest.raises(OptionError, match=f"'{taken.name}' exists already"):
            register(taken)


def test_unregister_leaves_the_files_alone() -> None:
    unregister("sdpa")
    assert "sdpa" in variants()


def test_other_packages_join_by_an_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = importlib.metadata.EntryPoint("other", "rewriter.kernels.exact.sdpa:VARIANT", "rewriter.variants")
    monkeypatch.setattr(module.importlib.metadata, "entry_points", lambda group: [entry])
    module._discovered.cache_clear()
    try:
        assert variants()["other"] is variants()["sdpa"]
    finally:
        module._discovered.cache_clear()


# --- which sites a variant takes -------------------------------------------------------------------------------------

SITE = AttentionSite(
    path="a", heads=1, kv_heads=1, head_dim=8, v_head_dim=8, dtype="float32", scale=1.0, mask=Full(), source="m.py:1"
)


def test_a_variant_takes_what_it_applies_to() -> None:
    assert SDPA.takes(SITE, Target.current()) is True
    refusal = SDPA.takes(replace(SITE, dropout_p=0.1), Target.current())
    assert isinstance(refusal, Refusal) and refusal == SDPA.applies(replace(SITE, dropout_p=0.1), Target.current())


@pytest.mark.parametrize(
    ("facts", "missing"),
    [
        ({"softcap": 5.0}, "softcap"), ({"sink": "zero"}, "sink"), ({"normaliser": "sigmoid"}, "sigmoid"),
        ({"softcap": 5.0, "sink": "learned", "bias": "dense"}, "sink, softcap"),
    ],
)  # fmt: skip
def test_what_a_variant_does_not_compute_it_does_not_take(facts: dict[str, Any], missing: str) -> None:
    site = replace(SITE, **facts)
    refusal = replace(SDPA, elements=frozenset({"bias"})).takes(site, Target.current())
    assert isinstance(refusal, Refusal)
    assert (refusal.reason, refusal.path, refusal.source) == (f"it does not compute {missing}", "a", "m.py:1")
    assert replace(SDPA, elements=site.elements).takes(site, Target.current()) is True
    assert variants()[ORIGINAL].takes(site, Target.current()) is True


def test_a_kept_site_is_taken_by_nothing_but_the_original() -> None:
    site = replace(SITE, edits=("weights_used", "squared"))
    refusal = replace(SDPA, elements=frozenset({"bias"})).takes(site, Target.current())
    assert isinstance(refusal, Refusal)
    assert "weights_used, squared" in refusal.reason and refusal.path == "a"
    assert variants()[ORIGINAL].takes(site, Target.current()) is True


def test_the_processor_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"cuda:0": "a large one", "cuda:1": "a small one"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[str(device)])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert [Target.current(device).processor for device in names] == list(names.values())
