"""How calls are routed: limits, an inner compile, and that the session keeps nothing alive."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewriter
from rewriter import exact, session
from rewriter.errors import CaptureError
from rewriter.guard import error, tolerance
from rewriter.session import route, session_of
from rewriter.tune.measure import SiteBench


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return (x @ x.transpose(-2, -1)).softmax(-1) @ x


def data(length: int = 24) -> Tensor:
    return torch.randn(1, 2, length, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def costs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(SiteBench, "compare", lambda self, found, **options: [1.0] + [0.5] * len(found))
    monkeypatch.setattr(exact, "_MEASURED", {})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def graphs(model: nn.Module) -> int:
    found = session_of(model)
    assert found is not None
    return found.rewriter.graphs


def test_many_graphs_of_one_model() -> None:
    """More than dynamo's own limit of 8; and torch's settings are as before."""
    limit = torch._dynamo.config.recompile_limit
    model = rewriter.optimize(Net().eval(), dynamic=False)
    for length in range(10, 10 + limit + 4):
        model(data(length))
    assert graphs(model) == limit + 4 and torch._dynamo.config.recompile_limit == limit


def test_settings_are_put_back_after_an_error() -> None:
    before = torch._dynamo.config.recompile_limit, torch._dynamo.config.skip_nnmodule_hook_guards
    model = rewriter.optimize(Net().eval())
    with pytest.raises(RuntimeError):
        model(data()[..., 1:])
    assert (torch._dynamo.config.recompile_limit, torch._dynamo.config.skip_nnmodule_hook_guards) == before


def test_one_graph_for_many_lengths() -> None:
    model = rewriter.optimize(Net().eval())
    original = rewriter.restore(Net().eval())
    original.load_state_dict(model.state_dict())
    for length in (24, 30, 31, 600):
        assert error(model(data(length)), original(data(length))) <= tolerance(torch.float32)
    assert graphs(model) == 2


def test_dynamic_from_the_start_is_kept_when_installed_again() -> None:
    model = rewriter.optimize(Net().eval(), dynamic=True)
    with pytest.raises(rewriter.RewriterError):
        rewriter.optimize(model, [])
    for length in (24, 30):
        model(data(length))
    assert graphs(model) == 1


def test_routing_and_back() -> None:
    model = Net()
    assert "_compiled_call_impl" not in vars(model)
    route(model, None)
    assert "_compiled_call_impl" not in vars(model)
    route(model, lambda x: "one")
    route(model, lambda x: "two")
    assert model(data()) == "two"
    route(model, None)
    assert "_compiled_call_impl" not in vars(model) and isinstance(model(data()), Tensor)


def test_strictness(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: Any) -> Any:
        raise CaptureError("it is so")

    model = rewriter.optimize(Net().eval())
    expected = model._call_impl(data())
    found = session_of(model)
    assert found is not None and not found.strict
    route(model, failing, found)
    assert torch.equal(model(data()), expected)
    assert found.current_report().notes[-1] == "a call ran the original code: it is so"
    found.strict = True
    with pytest.raises(CaptureError):
        model(data())


def test_the_session_dies_with_the_model() -> None:
    model = rewriter.optimize(Net().eval())
    model(data())
    found = weakref.ref(session_of(model))
    count = len(session._SESSIONS)
    del model
    gc.collect()
    assert found() is None and len(session._SESSIONS) < count


def test_calls_from_several_threads() -> None:
    model = rewriter.optimize(Net().eval())
    original = Net().eval()
    original.load_state_dict(model.state_dict())
    wrong: list[Any] = []

    def work() -> None:
        try:
            with torch.no_grad():
                for length in (24, 30, 31):
                    if error(model(data(length)), original(data(length))) > tolerance(torch.float32):
                        wrong.append(length)
        except BaseException as failure:
            wrong.append(failure)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
