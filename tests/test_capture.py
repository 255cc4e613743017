"""One form of graph from every front end, with the names that belong to it; and a way in that models do not share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rewriter import debug
from rewriter.capture import (
    capture_errors,
    compiled,
    exported,
    frame_path,
    module_names,
    site_path,
    source_line,
    to_aten,
)
from rewriter.detect import detect
from rewriter.errors import CaptureError, OptionError
from rewriter.guard import error, tolerance

ATEN = torch.ops.aten


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return x.softmax(-1)


class Model(nn.Module):
    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.softmax(-1)


def graphs_of(model: nn.Module, *args: Any, dynamic: bool | None = None) -> list[fx.GraphModule]:
    """Every graph of one call, captured."""
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        graphs.append(to_aten(gm, example_inputs))
        return graphs[-1].forward

    actual = compiled(model, backend, dynamic=dynamic)(*args)
    assert error(actual, model(*args)) <= tolerance(torch.float32)
    return graphs


def calls(graph: fx.GraphModule, target: Any) -> list[fx.Node]:
    return graph.graph.find_nodes(op="call_function", target=target)


class Function(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


# --- the form of the graph -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spelling",
    [
        lambda x: F.softmax(x @ x.mT, dim=-1),
        lambda x: torch.softmax(torch.matmul(x, x.mT), -1),
        lambda x: x.matmul(x.mT).softmax(dim=-1),
        lambda x: nn.Softmax(-1)(torch.matmul(x, x.mT)),
    ],
)
def test_functions_methods_and_operators_have_one_spelling(spelling: Any) -> None:
    (graph,) = graphs_of(Function(spelling), torch.randn(2, 3, 4))
    assert [n.target for n in graph.graph.nodes if n.op == "call_function"] == [
        ATEN.mT.default, ATEN.matmul.default, ATEN.softmax.int,
    ]  # fmt: skip


def test_an_export_has_the_same_spelling() -> None:
    model, x = Model(), torch.randn(2, 4)
    (graph,) = graphs_of(model, x)
    other = exported(torch.export.export(model, (x,)))
    assert [n.target for n in graph.graph.nodes if n.op == "call_function"] == [
        n.target for n in other.graph.nodes if n.op == "call_function"
    ]
    assert torch.equal(other(x), model(x))


def test_parameters_are_known() -> None:
    model, x = Model(1), torch.randn(2, 4)
    (graph,) = graphs_of(model, x)
    assert sorted(n.meta["is_parameter"] for n in graph.graph.find_nodes(op="placeholder")) == [False, True, True]
    attributes = exported(torch.export.export(model, (x,))).graph.find_nodes(op="get_attr")
    assert [n.meta["is_parameter"] for n in attributes] == [True, True]


def test_every_value_is_known() -> None:
    (graph,) = graphs_of(Model(), torch.randn(2, 4))
    for node in graph.graph.nodes:
        assert node.op == "output" or isinstance(node.meta["val"], Tensor), node


def test_an_export_keeps_no_assertions_about_types() -> None:
    def cast(x: Tensor) -> Tensor:
        return x.to(torch.float64).to(torch.float32)

    program = torch.export.export(Function(cast), (torch.randn(2),))
    assertion = ATEN._assert_tensor_metadata.default
    assert any(node.target is assertion for node in program.graph.nodes), "there are some to be removed"
    assert not calls(exported(program), assertion)


def test_what_nobody_reads_is_gone() -> None:
    def function(x: Tensor) -> Tensor:
        weights = x.softmax(-1)
        weights.mean()
        return weights + 1

    (graph,) = graphs_of(Function(function), torch.randn(2, 4))
    assert not calls(graph, ATEN.mean.default)
    assert [len(node.users) for node in calls(graph, ATEN.softmax.int)] == [1]


def test_autograd_works_on_the_result() -> None:
    model, x = Model(), torch.randn(2, 4)

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        return to_aten(gm, example_inputs).forward

    parameters = list(model.parameters())
    actual = torch.autograd.grad(compiled(model, backend)(x)[:, 0].sum(), parameters)
    for one, other in zip(actual, torch.autograd.grad(model(x)[:, 0].sum(), parameters), strict=True):
        assert error(one, other) <= tolerance(torch.float32)


def test_symbolic_sizes_survive() -> None:
    (graph,) = graphs_of(Model(), torch.randn(3, 4), dynamic=True)
    (node, *_) = calls(graph, ATEN.softmax.int)
    assert isinstance(node.meta["val"].shape[0], torch.SymInt)


def changed_argument(x: Tensor) -> Tensor:
    x = x * 2
    x.add_(1)
    return x * 3


def changed_view(x: Tensor) -> Tensor:
    x = x * 2
    x[:, 0] = 7
    return x.softmax(-1)


def changed_result(x: Tensor) -> Tensor:
    made = torch.zeros_like(x).masked_fill_(x > 0, 1.0)
    return made + x


def changed_twice(x: Tensor) -> Tensor:
    for column in range(2):
        x = x.clone()
        x[:, column].mul_(2)
    return x


def changed_base(x: Tensor) -> Tensor:
    x = x.clone()
    row = x[0]
    x.mul_(2)
    return row + 1


@pytest.mark.parametrize("function", [changed_argument, changed_view, changed_result, changed_twice, changed_base])
@pytest.mark.parametrize("dynamic", [None, True])
def test_changes_in_place_are_kept(function: Any, dynamic: bool | None) -> None:
    (graph,) = graphs_of(Function(function), torch.randn(3, 4), dynamic=dynamic)
    mutable = [n for n in graph.graph.nodes if n.op == "call_function" and n.target._schema.is_mutable]
    assert len(mutable) == (2 if function is changed_twice else 1)


def test_readers_after_a_change_read_its_result() -> None:
    (graph,) = graphs_of(Function(changed_argument), torch.randn(3, 4))
    (change,) = calls(graph, ATEN.add_.Tensor)
    assert [user.target for user in change.users] == [ATEN.mul.Tensor]


def test_modes_inside_the_graph() -> None:
    class Modes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                a = self.linear(x)
            with torch.autocast("cpu", torch.bfloat16):
                b = self.linear(x)
            return a + b.float() + self.linear(x)

    model, x = Modes(), torch.randn(3, 4)

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        return to_aten(gm, example_inputs).forward

    out, expected = compiled(model, backend)(x), model(x)
    assert error(out, expected) <= tolerance(torch.float32)
    parameters = list(model.parameters())
    actual = torch.autograd.grad(out.sum(), parameters)
    assert max(map(error, actual, torch.autograd.grad(expected.sum(), parameters))) <= tolerance(torch.bfloat16)


class Cast(nn.Module):
    """Attention with automatic casts in a part of it, or without them in a part."""

    def __init__(self, called: bool, enabled: bool) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.called, self.enabled = called, enabled

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).float().unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.enabled):
            mixed = F.scaled_dot_product_attention(q, k, v) if self.called else (q @ k.mT * 0.5).softmax(-1) @ v
        return self.out(mixed.to(x.dtype).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("called", [False, True], ids=["spelled out", "called"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["", "symbolic"])
def test_automatic_casts_are_the_type_of_the_site(called: bool, dynamic: bool) -> None:
    model, x = Cast(called, enabled=True), torch.randn(2, 5, 8)
    (graph,) = graphs_of(model, x, dynamic=dynamic)
    (match,) = detect(graph).matches
    assert match.site.dtype == "bfloat16"
    run = torch.compile(model, backend="rewriter", options={"inner": "eager"})
    assert error(run(x), model(x)) <= tolerance(torch.bfloat16)


@pytest.mark.parametrize("called", [False, True], ids=["spelled out", "called"])
def test_a_part_without_automatic_casts(called: bool) -> None:
    model, x = Cast(called, enabled=False), torch.randn(2, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        (graph,) = graphs_of(model, x)
        (match,) = detect(graph).matches
    assert match.site.dtype == "float32"


# --- names -----------------------------------------------------------------------------------------------------------


def test_paths() -> None:
    model = Model()
    names = module_names(model)
    assert sorted(names.values()) == ["", "layers", "layers.0", "layers.0.inner", "layers.1", "layers.1.inner"]
    (graph,) = graphs_of(model, torch.randn(2, 4))
    assert frame_path(graph, names) == ""
    assert [site_path(n, names) for n in calls(graph, ATEN.softmax.int)] == ["layers.0", "layers.1", ""]
    assert [site_path(n, names) for n in calls(graph, ATEN.linear.default)] == ["layers.0.inner", "layers.1.inner"]


def test_paths_of_an_export() -> None:
    graph = exported(torch.export.export(Model(), (torch.randn(2, 4),)))
    assert [site_path(n, {}) for n in calls(graph, ATEN.softmax.int)] == ["layers.0", "layers.1", ""]


def test_paths_of_one_module_in_two_places() -> None:
    model = Model()
    model.layers[1] = model.layers[0]
    names = module_names(model)
    (graph,) = graphs_of(model, torch.randn(2, 4))
    assert [site_path(n, names) for n in calls(graph, ATEN.softmax.int)] == ["layers.0", "layers.0", ""]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own
def test_what_an_earlier_graph_computed_is_written_into(rewrite: Any) -> None:
    """In training, as of tokens that are masked: it is no leaf, and it is none where the graph is traced again."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project, self.masked = nn.Linear(16, 16), nn.Parameter(torch.zeros(16))

        def forward(self, x: Tensor) -> Tensor:
            x = self.project(x)
            torch._dynamo.graph_break()
            x[:, 2:4] = self.masked
            q = self.project(x)
            return torch.softmax(q @ q.mT, -1) @ q

    model, x = Masked(), torch.randn(2, 6, 16)
    result = rewrite(model, x)
    assert len(result.matches) == 1
    found, wanted = (
        [out, *torch.autograd.grad(out.square().sum(), [*model.parameters()])] for out in (result.out, model(x))
    )
    assert all(error(got, want) <= tolerance(torch.float32) for got, want in zip(found, wanted, strict=True))


def test_paths_after_a_graph_break() -> None:
    class Broken(Layer):
        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return super().forward(x)

    model = Model()
    model.layers.append(Broken())
    model.requires_grad_(False)
    names = module_names(model)
    graphs = graphs_of(model, torch.randn(2, 4))
    assert len(graphs) > 1
    found = [site_path(n, names, frame_path(g, names)) for g in graphs for n in calls(g, ATEN.softmax.int)]
    assert {"layers.0", "layers.2"} <= set(found)
    assert set(found) <= {"layers.0", "layers.1", "layers.2", ""}


def test_source_lines() -> None:
    line = Layer.forward.__code__.co_firstlineno + 2
    model, x = Model(1), torch.randn(2, 4)
    (graph,) = graphs_of(model, x)
    assert source_line(calls(graph, ATEN.softmax.int)[0]) == f"test_capture.py:{line}"
    other = exported(torch.export.export(model, (x,)))
    assert source_line(calls(other, ATEN.softmax.int)[0]) == f"test_capture.py:{line}"
    assert source_line(graph.graph.find_nodes(op="placeholder")[0]) == ""


# --- the way in ------------------------------------------------------------------------------------------------------


def eager(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
    return gm.forward


def test_many_models_in_one_process() -> None:
    """dynamo limits the recompilations of a code object to eight, and all these models share their forward."""
    seen: list[int] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        seen.append(1)
        return gm.forward

    for width in range(1, 21):
        model = nn.Linear(width, 3)
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            compiled(model, backend, dynamic=False)(torch.randn(2, width))
    assert len(seen) == 20


def test_the_model_itself_is_untouched() -> None:
    model = Model()
    before = dict(vars(model))
    compiled(model, eager)(torch.randn(2, 4))
    assert vars(model) == before
    assert model._compiled_call_impl is None


def test_hooks_run() -> None:
    model, seen = Model(), []
    model.register_forward_hook(lambda module, args, out: seen.append(1))
    compiled(model, eager)(torch.randn(2, 4))
    assert seen


def test_a_model_that_breaks_the_graph_is_no_error() -> None:
    class Breaks(Layer):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            if x.sum().item() > 0:
                x = x + 1
            return super().forward(x)

    model, x = Breaks().requires_grad_(False), torch.randn(2, 4)
    with capture_errors():
        assert torch.equal(compiled(model, eager)(x), model(x))


def test_errors_of_the_model_pass_through() -> None:
    class Wrong(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("the model's own")

    with pytest.raises(KeyError, match="the model's own"), capture_errors():
        compiled(Wrong(), eager)(torch.randn(2))


def test_what_the_backend_raises_is_one_sentence() -> None:
    def failing(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        raise ValueError("first line\nsecond line")

    with pytest.raises(CaptureError) as caught, capture_errors():
        compiled(Model(), failing)(torch.randn(2, 4))
    assert "ValueError: first line" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_our_own_errors_stay_themselves() -> None:
    def failing(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        raise OptionError("what was wrong")

    with pytest.raises(OptionError, match=r"^what was wrong$"), capture_errors():
        compiled(Model(), failing)(torch.randn(2, 4))


def test_what_dynamo_cannot_capture_is_one_sentence() -> None:
    with pytest.raises(CaptureError) as caught, capture_errors():
        raise torch._dynamo.exc.Unsupported("a thing\nand its details", gb_type="", skip_frame=False)
    assert "torch.compile cannot capture this model" in str(caught.value)
    assert "torch.compiler.disable" in str(caught.value)
    assert "\n" not in str(caught.value)


# --- debugging -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "level"), [("", 0), ("0", 0), ("2", 2), ("4", 4), ("no", 0), ("-1", 0)])
def test_debug_levels(monkeypatch: pytest.MonkeyPatch, text: str, level: int) -> None:
    monkeypatch.setenv("REWRITER_DEBUG", text)
    assert debug.level() == level


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_what_is_printed(
    rewrite: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], level: int
) -> None:
    monkeypatch.setenv("REWRITER_DEBUG", str(level))
    x = torch.randn(1, 2, 5, 4)
    rewrite(lambda x: (x @ x.mT).softmax(-1) @ x + (x @ x.mT).sin().softmax(-1) @ x, x)
    printed = capsys.readouterr().err
    assert ("2 heads of 4, 5x5 tokens" in printed) == (level >= 1)
    assert ("refused: test_capture.py" in printed) == (level >= 2)
    assert ("after capture" in printed and "after lower" in printed and "aten.softmax.int" in printed) == (level >= 3)


def test_a_part_under_vmap(rewrite: Any) -> None:
    """Masks are made by `vmap` in some models: that part is copied as it is, also beside changes in place."""

    def visible(i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i - j < 3)

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        place = torch.arange(q.shape[-2])
        mask = torch.vmap(torch.vmap(visible, (None, 0)), (0, None))(place, place)
        scores = q @ k.mT
        scores[..., :1].mul_(1.0)  # a change through a view
        return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v

    q, k, v = (torch.randn(2, 3, 7, 8) for _ in range(3))
    result = rewrite(model, q, k, v, variant="sdpa")
    assert len(result.sites) == 1
    assert error(result.out, model(q, k, v)) <= tolerance(torch.float32)


def test_a_number_that_is_a_tensor(rewrite: Any) -> None:
    """`alpha` has to be a number, which dynamo gives as a constant tensor where NumPy made it."""

    def model(q: Tensor) -> Tensor:
        return torch.add(1e-6, (q @ q.mT).softmax(-1) @ q, alpha=np.sqrt(q.numel() / 8))

    q = torch.randn(2, 3, 7, 8)
    result = rewrite(model, q, variant="sdpa")
    assert len(result.sites) == 1
    assert error(result.out, model(q)) <= tolerance(torch.float32)


@pytest.mark.parametrize("halved", [False, True], ids=["call by call", "as a whole"])
def test_the_data_of_a_tensor(rewrite: Any, halved: bool) -> None:
    """`x.data` is no operator: what is read from it is the tensor's, and what is written there no backward is told."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.randn(7, 8))
            self.register_buffer("code", torch.randn(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            zeros = torch.zeros(7, 8)
            if halved:
                zeros.data[2:].copy_(x.data[0, 2:])
            x = (x + self.shift.data + zeros) @ self.code
            if halved:
                self.code.data.mul_(0.5)
            return (x @ x.mT).softmax(-1) @ x

    def out_and_gradient(run: Any, model: Model) -> tuple[Tensor, Tensor]:
        x = torch.arange(56.0).reshape(1, 7, 8).div(56).requires_grad_()
        with torch.no_grad():
            model.code.copy_(torch.eye(8))
        out = run(x)
        out.sum().backward()
        assert x.grad is not None
        return out, x.grad

    model = Model()
    result = rewrite(model, torch.randn(1, 7, 8), variant="sdpa")
    assert len(result.sites) == 1
    for actual, expected in zip(out_and_gradient(result.run, model), out_and_gradient(model, model), strict=True):
        assert error(actual, expected) <= tolerance(torch.float32)


@pytest.mark.parametrize("held", [lambda weight: weight.data, lambda weight: weight.detach()], ids=["data", "detached"])
def test_a_product_with_the_data_of_a_parameter_is_a_linear_layer(rewrite: Any, held: Any) -> None:
    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 8))

        def forward(self, x: Tensor) -> Tensor:
            return (x @ held(self.weight).mT).softmax(-1) @ x[:, :5]

    assert rewrite(Router(), torch.randn(1, 7, 8)).sites == []


A, B = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
OPERATORS: dict[str, Any] = {
    "index_fill": lambda x, y: x.index_fill(-2, torch.tensor([-1, 1]), 2.0),
    "index_fill of one place": lambda x, y: x.index_fill(0, torch.tensor(-3), 2.0),
    "tensordot": lambda x, y: torch.tensordot(x, y, dims=([-1, 0], [2, -3])),
    "tensordot of several": lambda x, y: torch.tensordot(x, y.permute(1, 2, 0), dims=2),
    "einsum of three": lambda x, y: torch.einsum("abc,abd,ae->de", x, y, y[:, 0]),
    "einsum of three, in its own order": lambda x, y: torch.einsum("zbc,zbd,zd", x, y, y[:, 0]),
    "einsum without a sum": lambda x, y: torch.einsum("abc,ac->cab", x, y[:, 0]),
    "einsum of an axis that is one long": lambda x, y: torch.einsum("abc,abd,ad->acd", x, y, y[:1, 0]),
    "einsum of a diagonal": lambda x, y: torch.einsum("aab,ac,bd->cd", x[:, :3], y[:, 0], y[0, :, 1:].new_ones(5, 2)),
    "cosine_similarity": lambda x, y: F.cosine_similarity(x, y, dim=-1),
    "cosine_similarity of nothing": lambda x, y: F.cosine_similarity(x * 0, y, dim=0, eps=1e-3),
    "addcmul": lambda x, y: torch.addcmul(x, y, y, value=-0.5),
    "addcdiv": lambda x, y: torch.addcdiv(x, y, y.abs() + 1, value=2),
    "addcmul of wholes": lambda x, y: torch.addcmul(x.long(), y.long(), y.long(), value=2),
    "mv": lambda x, y: torch.mv(x[0], y[0, 0]),
    "linalg.matmul": lambda x, y: torch.linalg.matmul(x, y.mT),
}


@pytest.mark.parametrize("compute", OPERATORS.values(), ids=OPERATORS)
def test_operators_that_are_written_out_compute_the_same(compute: Any) -> None:
    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        return to_aten(gm, example_inputs).forward

    expected, actual = compute(A, B), torch.compile(compute, backend=backend)(A, B)
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
