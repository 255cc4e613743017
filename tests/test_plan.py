"""Plans: the file format in and out, everything that can be wrong with it, and fingerprints."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rewriter import planfile
from rewriter.errors import OutputError, PlanError
from rewriter.fingerprint import fingerprint
from rewriter.plan import FORMAT, MIXED, Decision, HeadGroup, Plan, Tried, decided
from rewriter.plan_check import check_guard, check_model


class Model(nn.Module):
    def __init__(self, width: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("cache", torch.zeros(5), persistent=False)


def decision(path: str = "layers.0", **facts: Any) -> Decision:
    known: dict[str, Any] = {
        "path": path, "site": "heads=2,mask=causal(0)", "variant": "window", "config": {"window": 256, "sinks": 4},
        "fidelity": "approximate", "reason": "twice as fast", "evidence": {"original_ms": 2.0, "error": 0.01},
        "refused": {"linear": "has no parameters yet"},
    }  # fmt: skip
    return Decision(**(known | facts))


def mixed(path: str) -> Decision:
    return decision(
        path,
        variant=MIXED,
        config={},
        heads=(
            HeadGroup(heads=(0, 2), variant="original"),
            HeadGroup(heads=(1,), variant="window", config={"window": 8}),
        ),
        lengths=(512, 4096),
        otherwise="sdpa",
        tried=(
            Tried(variant="window", config={"window": 8}, cost=1.5, error=0.25, effect=0.001),
            Tried(variant="sdpa", cost=2.0),
        ),
    )


def plan(*decisions: Decision, **facts: Any) -> Plan:
    known: dict[str, Any] = {
        "decisions": decisions or (decision(), decision("layers.1", variant="original", fidelity="exact", config={})),
        "target": {"device": "cpu", "threads": 2, "triton": None},
        "model": fingerprint(Model()),
        "goal": "latency",
        "guard": {"metric": "kl", "drop": 0.001, "held": True},
    }
    return Plan(**(known | facts))


# --- in and out ------------------------------------------------------------------------------------------------------


def test_a_plan_comes_back_equal(tmp_path: Path) -> None:
    made = plan(
        *plan().decisions,
        mixed("layers.2"),
        search={"front": [{"cost": 1.0}], "seconds": 2.5},
        timings=({"what": "1x8", "original": 2.0},),
        state={"layers.0.weight": torch.randn(3, 4).T, "layers.0.bias": torch.ones(2, dtype=torch.bfloat16)},
    )
    assert made.save(tmp_path / "p.json") == tmp_path / "p.json"
    read = Plan.load(tmp_path / "p.json")
    assert read == made
    assert set(read.state) == set(made.state)
    for name, tensor in made.state.items():
        assert torch.equal(read.state[name], tensor) and read.state[name].dtype == tensor.dtype
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.json", "p.safetensors"]


def test_a_folder_means_the_usual_name(tmp_path: Path) -> None:
    made = plan()
    made.save(str(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["rewriter_plan.json"]
    assert Plan.load(tmp_path) == made and Plan.load(tmp_path).state == {}


def test_tied_parameters_are_saved(tmp_path: Path) -> None:
    shared = torch.randn(4)
    plan(state={"a": shared, "b": shared[:2]}).save(tmp_path)
    assert torch.equal(Plan.load(tmp_path).state["b"], shared[:2])


text = st.text(max_size=12)
numbers = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**60), 2**60)
decisions = st.builds(
    Decision,
    path=text,
    site=text,
    variant=text,
    config=st.dictionaries(text, st.booleans() | numbers | text, max_size=3),
    fidelity=st.sampled_from(["exact", "approximate", "learned"]),
    reason=text,
    evidence=st.dictionaries(text, numbers, max_size=3),
    refused=st.dictionaries(text, text, max_size=3),
)
plans = st.builds(
    Plan,
    decisions=st.lists(decisions, max_size=4, unique_by=lambda d: d.path).map(tuple),
    target=st.dictionaries(text, st.none() | numbers | text, max_size=3),
    model=st.just({"structure": "a", "weights": "b", "tensors": 1, "values": 2}),
    goal=text,
    guard=st.none() | st.dictionaries(text, numbers | st.lists(numbers, max_size=2), max_size=3),
    created=text,
    rewriter=text,
)


@given(made=plans)
def test_any_plan_comes_back_equal(made: Plan) -> None:
    with tempfile.TemporaryDirectory() as folder:
        made.save(folder)
        assert Plan.load(folder) == made


def test_the_file_is_diffable(tmp_path: Path) -> None:
    made = plan(decision(config={"b": 1, "a": 2}, evidence={"z": 1.0, "error": float("inf")}))
    turned = plan(decision(config={"a": 2, "b": 1}, evidence={"z": 1.0}), created=made.created, model=made.model)
    one, two = (p.save(tmp_path / f"{i}.json").read_text() for i, p in enumerate((made, turned)))
    assert one == two and one.endswith("}\n") and one.count("\n") > 20
    raw = json.loads(one)
    assert raw["format"] == FORMAT and list(raw)[-1] == "decisions"
    assert list(raw["decisions"][0]) == [f.name for f in dataclasses.fields(Decision)]
    assert raw["decisions"][0]["evidence"] == {"z": 1.0}


def test_fidelity_is_the_worst() -> None:
    kinds = ("exact", "approximate", "learned")
    found = [decision(str(i), fidelity=kind) for i, kind in enumerate(kinds)]
    assert [plan(*found[: i + 1]).fidelity for i in range(3)] == list(kinds)
    assert plan(decisions=()).fidelity == "exact"


def test_heads_that_differ_are_printed_as_runs() -> None:
    groups = (
        HeadGroup(heads=(0, 1, 2, 5), variant="original"),
        HeadGroup(heads=(3, 4), variant="window", config={"w": 8}),
    )
    assert "heads 0-2, 5: original; heads 3-4: window(w=8)" in str(plan(decision(variant=MIXED, heads=groups)))


def test_decisions_are_found_by_path() -> None:
    found = plan().decision_for("layers.1")
    assert found is not None and found.variant == "original"
    assert plan().decision_for("layers.2") is None


def test_a_plan_prints_as_a_table() -> None:
    lines = str(plan()).splitlines()
    assert lines[0].startswith("plan for latency, approximate, 2 sites")
    assert lines[1].split() == ["layers.0", "window(sinks=4,", "window=256)", "approximate", "twice", "as", "fast"]
    assert lines[2].index("exact") == lines[1].index("approximate")
    assert "0 sites" in str(plan(decisions=()))


# --- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_save_leaves_the_old_plan(tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old = plan(state={"a": torch.ones(2)})
    old.save(tmp_path)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((os, "fsync") if step == "fsync" else (Path, "replace")), full)
    with pytest.raises(OutputError, match="No space left on device"):
        plan(goal="memory", state={"a": torch.zeros(2)}).save(tmp_path)
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rewriter_plan.json", "rewriter_plan.safetensors"]
    assert Plan.load(tmp_path) == old and torch.equal(Plan.load(tmp_path).state["a"], torch.ones(2))


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        plan().save(tmp_path / "missing" / "p.json")
    with pytest.raises(OutputError, match="as JSON"):
        plan(target={"device": object()}).save(tmp_path / "p.json")
    assert not list(tmp_path.iterdir())


def test_weights_of_others_are_not_overwritten(tmp_path: Path) -> None:
    checkpoint = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"a": torch.ones(1)}, checkpoint)
    before = checkpoint.read_bytes()
    learned = plan(state={"a": torch.zeros(2)})
    for name in ("model.json", "model.safetensors"):
        with pytest.raises(OutputError, match="would be overwritten"):
            learned.save(tmp_path / name)
    assert checkpoint.read_bytes() == before
    learned.save(tmp_path)
    learned.save(tmp_path)


# --- reading what is wrong -------------------------------------------------------------------------------------------


def test_a_truncated_plan_is_refused(tmp_path: Path) -> None:
    file = plan(state={"a": torch.ones(2)}).save(tmp_path / "p.json")
    data = file.read_bytes().rstrip()
    for size in [*range(0, len(data), 50), len(data) - 1]:
        file.write_bytes(data[:size])
        with pytest.raises(PlanError, match="not JSON, or is cut off"):
            Plan.load(file)


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    file = plan(state={"a": torch.ones(64)}).save(tmp_path / "p.json")
    weights = tmp_path / "p.safetensors"
    data = weights.read_bytes()
    for size in range(0, len(data), 50):
        weights.write_bytes(data[:size])
        with pytest.raises(PlanError, match=r"p\.safetensors are damaged"):
            Plan.load(file)
    weights.write_bytes(data[:-1] + b"x")
    with pytest.raises(PlanError, match="damaged"):
        Plan.load(file)
    weights.unlink()
    with pytest.raises(PlanError, match="copy them beside the plan"):
        Plan.load(file)


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe\x00", b"[1]", b'"plan"', b"null", b"NaN", b"[" * 100_000, b"{}", b"PK\x03\x04"]
)
def test_a_file_that_is_no_plan(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "p.json").write_bytes(content)
    with pytest.raises(PlanError, match=r"the plan .*p\.json"):
        Plan.load(tmp_path / "p.json")


def test_a_plan_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "p.json", tmp_path / "a" / "b"):
        with pytest.raises(PlanError, match="No such file"):
            Plan.load(path)


def edited(raw: dict[str, Any], place: str, value: Any) -> None:
    *steps, last = place.split("/")
    at: Any = raw
    for step in steps:
        at = at[int(step) if step.isdigit() else step]
    if value is KeyError:
        del at[last]
    else:
        at[int(last) if last.isdigit() else last] = value


@pytest.mark.parametrize(
    ("place", "value", "sentence"),
    [
        ("format", 1, f"format is 1 and this version of rewriter reads {FORMAT}"),
        ("format", "1", "format is '1'"),
        ("format", True, "format is True"),
        ("format", KeyError, "format is None"),
        ("decisions", KeyError, "the plan has no 'decisions'"),
        ("decisions", {}, "'decisions' in the plan is a dict, not a list"),
        ("decisions", [3], "decision 0 is not an object"),
        ("goal", KeyError, "has no 'goal'"),
        ("goal", 3, "'goal' in the plan is a int"),
        ("created", None, "'created' in the plan is a NoneType"),
        ("rewriter", [], "'rewriter' in the plan"),
        ("target", [], "'target' in the plan"),
        ("guard", 3, "'guard' in the plan"),
        ("model", {}, "model has no 'structure'"),
        ("model/tensors", "4", "'tensors' in model is a str"),
        ("model/values", True, "'values' in model is a bool"),
        ("judged", None, "'judged' in the plan is a NoneType"),
        ("model/written", "cache", "'written' in model"),
        ("model/parts", 3, "'parts' in model"),
        ("model/parts", {"a": 3}, "'parts' in model"),
        ("weights", "p.safetensors", "'weights' in the plan is a str"),
        ("weights", {"file": "../p.safetensors", "sha256": ""}, "not a file name"),
        ("weights", {"file": "gone.safetensors", "sha256": ""}, "cannot be read"),
        ("decisions/1/path", KeyError, "decision 1 has no 'path'"),
        ("decisions/1/path", "layers.0", "more than once on layers.0 for calls of one length"),
        ("decisions/0/variant", 1, "'variant' in decision 0 is a int"),
        ("decisions/0/fidelity", "good", "'fidelity' in decision 0 is 'good', not one of exact"),
        ("decisions/0/config", None, "'config' in decision 0 is a NoneType"),
        ("decisions/0/config/window", [1], "'window' in 'config' of decision 0 is a list"),
        ("decisions/0/evidence/error", "small", "'error' in 'evidence' of decision 0 is a str"),
        ("decisions/0/evidence/error", True, "'error' in 'evidence' of decision 0 is a bool"),
        ("decisions/0/refused/linear", 1, "'linear' in 'refused' of decision 0 is a int"),
        ("decisions/0/variant", "mixed", "says 'mixed' and lists 0 groups of heads"),
        ("decisions/2/variant", "window", "says 'window' and lists 2 groups of heads"),
        ("decisions/2/heads/0/heads", [0, 1], "do not hold every head once"),
        ("decisions/2/heads/0/heads", [0.5], "'heads' in heads 0 of decision 2 are not numbers of heads"),
        ("decisions/2/heads/1", "all", "heads 1 of decision 2 is not an object"),
        ("decisions/2/heads/1/config/window", None, "'window' in 'config' of heads 1 of decision 2 is a NoneType"),
        ("decisions/2/lengths", [9, 3], "'lengths' in decision 2 is not a pair"),
        ("decisions/2/otherwise", KeyError, "decision 2 has no 'otherwise'"),
        ("decisions/2/tried/0/cost", None, "'cost' in tried 0 of decision 2 is not a number"),
        ("decisions/2/tried/0/error", "small", "'error' in tried 0 of decision 2 is not a number"),
        ("search", [], "'search' in the plan is a list"),
        ("timings", [1], "'timings' in the plan are not objects"),
    ],
)
def test_a_plan_edited_into_nonsense(tmp_path: Path, place: str, value: Any, sentence: str) -> None:
    file = plan(*plan().decisions, mixed("layers.2")).save(tmp_path)
    raw = json.loads(file.read_text())
    edited(raw, place, value)
    file.write_text(json.dumps(raw))
    with pytest.raises(PlanError, match=sentence) as caught:
        Plan.load(file)
    assert "\n" not in str(caught.value)


def test_foreign_weights_with_a_right_hash(tmp_path: Path) -> None:
    file = plan(state={"a": torch.ones(2)}).save(tmp_path / "p.json")
    (tmp_path / "p.safetensors").write_bytes(b"rubbish")
    raw = json.loads(file.read_text())
    raw["weights"]["sha256"] = planfile.hashlib.sha256(b"rubbish").hexdigest()
    file.write_text(json.dumps(raw))
    with pytest.raises(PlanError, match="not a safetensors file"):
        Plan.load(file)


# --- what the guard measured -----------------------------------------------------------------------------------------


def test_a_verdict_belongs_to_its_decisions(tmp_path: Path) -> None:
    made = plan(*plan().decisions, mixed("layers.2"))
    made = dataclasses.replace(made, judged=decided(made.decisions))
    file = made.save(tmp_path)
    check_guard(Plan.load(file))
    said = [("reason", "told so"), ("evidence", {}), ("refused", {}), ("tried", [])]
    does = [
        ("path", "a"), ("site", "heads=1"), ("variant", "s2"), ("config", {"window": 0}), ("fidelity", "learned"),
        ("lengths", [0, 10**9]), ("otherwise", "sdpa"),
    ]  # fmt: skip
    before = json.loads(file.read_text())
    for edits, changes in ((said, False), (does, True)):
        for name, value in edits:
            raw = copy.deepcopy(before)
            edited(raw, f"decisions/0/{name}", value)
            file.write_text(json.dumps(raw))
            if changes:
                with pytest.raises(PlanError, match="edited by hand, and its guard measured other decisions; tune"):
                    check_guard(Plan.load(file))
            else:
                check_guard(Plan.load(file))
    edited(before, "decisions/2/heads/0/heads", [0, 1])
    edited(before, "decisions/2/heads/1/heads", [2])
    file.write_text(json.dumps(before))
    with pytest.raises(PlanError, match="edited by hand"):
        check_guard(Plan.load(file))
    check_guard(dataclasses.replace(Plan.load(file), guard=None))  # says nothing about its accuracy


def test_what_the_guard_refused_is_not_taken() -> None:
    made = plan(guard={"metric": "kl", "held": False}, judged=decided(plan().decisions))
    with pytest.raises(PlanError, match="within its bound; tune again"):
        check_guard(made)


# --- fingerprints ----------------------------------------------------------------------------------------------------


def test_the_fingerprint_is_of_structure_and_weights() -> None:
    torch.manual_seed(0)
    model = Model()
    found = fingerprint(model)
    assert found["tensors"] == 5 and found["values"] == 2 * 20 + 3
    assert fingerprint(model) == found
    other = Model()
    assert fingerprint(other)["structure"] == found["structure"]
    assert fingerprint(other)["weights"] != found["weights"]
    assert fingerprint(Model(width=5))["structure"] != found["structure"]
    assert fingerprint(Model(layers=3))["structure"] != found["structure"]


def test_the_fingerprint_does_not_see_what_comes_and_goes() -> None:
    model = Model()
    found = fingerprint(model)
    model.cache = torch.zeros(99)
    model.rewriter = nn.Linear(2, 2)
    model.requires_grad_(False)
    assert fingerprint(model) == found
    wrapper = nn.Module()
    wrapper._orig_mod = model  # As torch.compile does; its own class would start the compiler here.
    assert fingerprint(wrapper) == found


def test_the_fingerprint_does_not_depend_on_the_type_of_loading() -> None:
    model = Model().to(torch.bfloat16)
    assert fingerprint(Model().to("meta"))["structure"] == fingerprint(model)["structure"]
    assert fingerprint(model) == fingerprint(model.to(torch.float32))


def test_every_value_of_a_small_parameter_counts() -> None:
    model = Model()
    found = fingerprint(model)
    model.layers[1].bias.data[3] += 1
    assert fingerprint(model)["weights"] != found["weights"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(5000,), (300, 700), (3, 60, 70), (64, 4, 3, 3), ()])
def test_every_value_counts(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    model = nn.Module()
    model.register_buffer("kept", (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 9).to(dtype))
    seen = {fingerprint(model)["weights"]}
    flat = model.kept.view(-1)
    changed = range(0, flat.numel(), max(1, flat.numel() // 50))
    for place in changed:
        before = flat[place].clone()
        flat[place] = before.logical_not() if dtype == torch.bool else before + 1
        seen.add(fingerprint(model)["weights"])
        flat[place] = before
    assert len(seen) == 1 + len(changed)
    if len(shape) > 1 and dtype != torch.bool:
        flat[:] = flat.flip(0).clone()
        assert fingerprint(model)["weights"] not in seen, "the same values in another order"


def test_the_layout_in_memory_does_not_count() -> None:
    model = nn.Conv2d(40, 30, 3)
    found = fingerprint(model)
    assert fingerprint(model.to(memory_format=torch.channels_last)) == found
    model.weight.data = model.weight.data.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3)
    assert fingerprint(model) == found


def test_weights_in_buffers_count_and_what_calls_write_does_not() -> None:
    one, two = Model(), Model()
    two.load_state_dict(one.state_dict())
    two.scale[1] = 2.0
    assert fingerprint(one)["structure"] == fingerprint(two)["structure"]
    assert fingerprint(one)["weights"] != fingerprint(two)["weights"]
    written = fingerprint(one, ["scale", "gone"])
    assert written == fingerprint(two, ["scale"]) and written["written"] == ["scale"] and written["tensors"] == 4
    one.other = nn.Module()
    one.other.register_buffer("scale", one.scale)
    assert fingerprint(one, ["scale"])["written"] == ["other.scale", "scale"], "it has two names"


def test_tied_parameters_count_under_each_name() -> None:
    tied, untied = Model(), Model()
    tied.layers[1].weight = tied.layers[0].weight
    assert fingerprint(tied)["structure"] == fingerprint(untied)["structure"]


def test_a_plan_for_another_model_is_refused() -> None:
    torch.manual_seed(0)
    model = Model()
    made = plan(model=fingerprint(model))
    check_model(made, model)
    with pytest.raises(
        PlanError,
        match=r"of 5 tensors with 43 values.*has 3 with 23: layers\.#\.bias is 1 of 4, and was 2 of 4; .*; tune",
    ):
        check_model(made, Model(layers=1))
    with pytest.raises(PlanError, match="another model"):
        check_model(made, Model(width=5), check_weights=False)
    with pytest.raises(PlanError, match=r"other weights.*check_weights=False"):
        check_model(made, Model())
    check_model(made, Model(), check_weights=False)
    check_model(plan(decision(fidelity="exact"), model=fingerprint(model)), Model())
