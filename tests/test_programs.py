"""Attention put together at random from the elements of its grammar is found once, with its facts, and computed right.

`REWRITER_EXAMPLES=10000` tries so many programs, other ones each time (`make fuzz`).
"""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, example, given, note, settings

from rewriter.guard import error, tolerance
from tests.programs import LookAlike, Program, check_equal, look_alikes, programs, rewritten

EXAMPLES = int(os.environ.get("REWRITER_EXAMPLES", "0"))
TRIED = settings(
    max_examples=EXAMPLES or 200,
    derandomize=not EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@TRIED
@given(programs())
@example(Program(masks=(("padding", "masked_fill -1e9"), ("tril", "add"))))
@example(Program(masks=(("chunks", "commuted add"), ("padding", "masked_fill -1e9")), width=8, v_width=8))
@example(Program(masks=(("tril", "masked_fill -1e9"), ("padding", "add"))))
@example(Program(masks=(("tril", "masked_fill lowest"), ("tril", "add"))))
@example(
    Program(  # sums of exponentials that are too small for all of their digits
        layout="heads first",
        sharing="grouped",
        batch=3,
        kv_heads=1,
        groups=3,
        q_len=5,
        kv_len=5,
        width=16,
        v_width=10,
        scales=(("queries", "times", 0.125), ("queries", "times", 2.0)),
        biases=("dense",),
        masks=(("documents", "masked_fill -inf"), ("documents", "masked_fill -inf")),
        normaliser="exp and sum",
    )
)
@example(  # two heads that a layer mixes, and one query: not two queries
    Program(
        layout="heads first",
        product="multiply and sum",
        sharing="broadcast",
        kv_heads=1,
        groups=2,
        q_len=1,
        edit="talking heads before",
    )
)
@example(  # of a query whose keys are all hidden by one of two masks
    Program(
        layout="folded",
        product="bmm",
        value_product="bmm",
        width=8,
        v_width=8,
        masks=(("chunks", "masked_fill -inf"), ("padding", "masked_fill -1e9")),
        normaliser="logsumexp",
    )
)
def test_programs(program: Program) -> None:
    model, inputs = program.module(), program.inputs()
    detection, run = rewritten(model, *inputs)
    note("refused: " + "; ".join(map(str, detection.refusals)))
    assert len(detection.sites) == 1
    (site,) = detection.sites
    note(f"found: {site}")
    facts = program.site_facts()
    if program.normaliser == "logsumexp" and "by_logarithm" in site.edits and "edits" in facts:
        # Of a row that a finite number hides, exp(s - logsumexp(s)) is 1 everywhere: another function than a softmax.
        facts["edits"] = (*facts["edits"], "by_logarithm")
    for name, fact in facts.items():
        assert getattr(site, name) == (pytest.approx(fact) if isinstance(fact, float) else fact), name
    assert program.mask_is_right(site.mask), site.mask
    assert site.bias != "none" or not program.biases, "a bias is not forgotten"
    assert site.edits or not program.edit, "an element outside of the operator is named"
    actual, expected = run(*inputs), model(*inputs)
    if program.dtype == "float32":
        check_equal(actual, expected)
        return
    # Many roundings stand between the two; neither may be far from the program in full precision.
    exact = model.double()(*(t.double() if t.is_floating_point() else t for t in inputs))
    pairs = zip(*(t if isinstance(t, tuple) else (t,) for t in (actual, expected, exact)), strict=True)
    for got, wanted, truth in pairs:
        assert error(got, truth) <= tolerance(torch.bfloat16) + 2 * error(wanted, truth)


@TRIED
@given(look_alikes)
def test_look_alikes(alike: LookAlike) -> None:
    model, inputs = alike.module(), alike.inputs()
    detection, run = rewritten(model, *inputs)
    assert not detection.sites
    assert torch.equal(run(*inputs), model(*inputs))
