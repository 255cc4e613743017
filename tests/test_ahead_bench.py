"""`rewriter bench ahead`: the generated kernel beside another library's, compiled for a GPU that is not here."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from dataclasses import replace

import pytest

from rewriter import cli

pytest.importorskip("triton")

from rewriter.bench import tables
from rewriter.bench.ahead import OURS, PEER, SIZES, Row, compiled, products
from rewriter.codegen.ahead import Binary
from rewriter.codegen.disassembly import Counts
from rewriter.codegen.fragments import Blocks

compiles = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter cannot compile")
ROW = Row(64, Blocks(128, 64, 8, 3), OURS, 176, 0, 65536, 8, 275)


@compiles
@pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="fla-core is not installed: rewriter[bench]")
def test_no_more_instructions_than_the_peer(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", "ahead", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["missing"] is None
    rows = document["rows"]
    assert [row["implementation"] for row in rows] == [OURS, PEER] * (len(rows) // 2)
    for ours, theirs in zip(rows[::2], rows[1::2], strict=True):
        assert (ours["head_dim"], ours["blocks"]) == (theirs["head_dim"], theirs["blocks"])
        assert ours["wgmma"] == theirs["wgmma"], "the same work"
        assert ours["ratio"] == ours["instructions"] / theirs["instructions"] <= 1.0
        assert ours["spills"] == 0 and theirs["ratio"] is None


@compiles
def test_without_the_peer(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fla.ops.attn.parallel", None)
    assert cli.run(["bench", "ahead"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "cannot be imported" in text and "comes with rewriter[bench]" in text
    assert PEER not in text.split("sm_90")[0]


@compiles
def test_both_products_are_wgmma_and_nothing_spills() -> None:
    rows = list(compiled())
    assert {row.head_dim for row in rows} == {*SIZES}
    for row in rows:
        assert row.implementation == OURS and row.ratio is None and row.spills == 0
        # Each of a warp's rows of 64 takes 16 channels or keys at once, over a whole block of the others.
        per_group = row.blocks.block_m / 64 / (row.blocks.num_warps / 4)
        assert row.wgmma == per_group * (row.head_dim + row.blocks.block_n) / 16


def test_products_of_a_loop() -> None:
    loop = Counts(100, {"HGMMA.64x128x16.F32.BF16": 4, "HGMMA.64x64x16.F32.BF16": 8}, 0, {}, {}, 0, 0)
    binary = Binary("forward", "sm_90", 8, 2, 0, 0, 0, loop, (loop,))
    assert products(binary) == 2 * 128 * 128 * 64  # one tile of both products
    assert products(replace(binary, warps=4)) == 2 * 64 * 128 * 64


def test_the_table() -> None:
    ours, theirs = tables.ahead_rows([replace(ROW, ratio=0.736), replace(ROW, implementation=PEER, instructions=374.5)])
    assert ours == ("generated", "64", "128 x 64", "8", "3", "176", "0", "64", "8", "275", "0.74")
    assert theirs[-2:] == ("374.5", "")
    text = tables.ahead_markdown([ROW], "not here")
    assert text.startswith("| kernel | head |") and text.endswith("not here")
