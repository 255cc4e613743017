"""Every variant against its definition: all cases and configs, gradients, other sizes, strides, and poisoned memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from rewriter.errors import OptionError
from rewriter.guard import tolerance
from rewriter.site import AttentionSite, Causal, Dense, Full, Padding, Refusal, SlidingWindow
from rewriter.target import Target
from rewriter.testing import assert_close, brute_force, inputs
from rewriter.variant import ORIGINAL, Config, Implementation, Variant, variants

CPU = Target.current()
WITH_KEYS = [variant for variant in variants().values() if "samples" not in variant.elements]
POINTS = [
    pytest.param(variant, case.site, config, id=f"{variant.name}-{number}-{'-'.join(map(str, config.values()))}")
    for variant in WITH_KEYS
    for number, case in enumerate(variant.cases)
    for config in (variant.configs(case.site, CPU) if case.configs is None else case.configs)
]
FACTS = ("variant", "site", "config")
EVERY_POINT = pytest.mark.parametrize(FACTS, POINTS)
PADDED = pytest.mark.parametrize(FACTS, [p for p in POINTS if p.values[1].mask.has(Padding)])
CAUSAL = pytest.mark.parametrize(
    FACTS, [p for p in POINTS if p.values[1].mask == Causal() and p.values[1].bias == "none"]
)
EVERY_VARIANT = pytest.mark.parametrize("variant", variants().values(), ids=variants())
EVERY_ONE_WITH_KEYS = pytest.mark.parametrize("variant", WITH_KEYS, ids=[variant.name for variant in WITH_KEYS])


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The tensors are small; threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that was never written reads as NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def define(variant: Variant, site: AttentionSite, config: Config, built: Implementation, *arguments: Any) -> Tensor:
    """The variant's reference, in float64."""
    wide = [t.double() if t is not None and t.is_floating_point() else t for t in arguments]
    module = {"module": built} if variant.fidelity == "learned" else {}
    return variant.reference(*wide, site, config, **module)


def fitted(variant: Variant, site: AttentionSite, config: Config) -> Implementation:
    """What `build` gives, its parameters moved from where they start."""
    built = variant.build(site, config)
    for parameter in parameters(built):
        nn.init.normal_(parameter.data, std=parameter.shape[-1] ** -0.5)
    return built


def parameters(built: Implementation) -> list[nn.Parameter]:
    return list(built.parameters()) if isinstance(built, nn.Module) else []


# --- what each variant declares --------------------------------------------------------------------------------------


@EVERY_VARIANT
def test_declares_where_it_applies_and_where_it_nearly_does(variant: Variant) -> None:
    assert variant.cases
    assert bool(variant.near_misses) == (variant.name != ORIGINAL)
    for case in variant.cases:
        assert variant.takes(case.site, CPU) is True
        assert list(variant.configs(case.site, CPU))
        assert variant.takes(replace(case.site, batch=None, q_len=None, kv_len=None), CPU) is True
    computed = frozenset().union(*(case.site.elements for case in variant.cases))
    assert variant.elements == computed, "each element that it computes is tested"
    for site in variant.near_misses:
        refusal = variant.takes(site, CPU)
        assert isinstance(refusal, Refusal)
        assert len(refusal.reason.split()) > 4
        assert refusal.path == site.path


@EVERY_VARIANT
def test_parameters_start_in_float32_and_only_where_learned(variant: Variant) -> None:
    """Or buffers, where what is learned has no gradient."""
    site = replace(variant.cases[0].site, dtype="bfloat16")
    built = variant.build(site, next(iter(variant.configs(site, CPU))))
    found, buffers = parameters(built), list(built.buffers()) if isinstance(built, nn.Module) else []
    assert bool(found or buffers) == (variant.fidelity == "learned")
    assert all(p.dtype == torch.float32 for p in (*found, *buffers)) and all(p.requires_grad for p in found)


# --- every variant, case and config ----------------------------------------------------------------------------------


@EVERY_POINT
def test_equals_its_reference(variant: Variant, site: AttentionSite, config: Config) -> None:
    built = fitted(variant, site, config)
    arguments = inputs(site, seed=1)
    with torch.no_grad():
        out = built(*arguments)
    assert out.dtype == site.torch_dtype
    expected = define(variant, site, config, built, *arguments)
    assert_close(out, expected, site.torch_dtype)
    if variant.fidelity == "exact":
        assert_close(expected, brute_force(*arguments, site=site), torch.float64)


@EVERY_POINT
def test_gradients_equal_those_of_its_reference(variant: Variant, site: AttentionSite, config: Config) -> None:
    # In float64, where a row that sees one key, whose gradients cancel, does not drown in roundings.
    site = replace(site, dtype="float64")
    built = fitted(variant, site, config)
    arguments = inputs(site, seed=2, requires_grad=True)
    leaves = [*arguments[:3], *arguments[5:], *parameters(built)]
    out = built(*arguments)
    direction = torch.randn_like(out)
    found = torch.autograd.grad(out, leaves, direction)
    expected = torch.autograd.grad(define(variant, site, config, built, *arguments), leaves, direction)
    for gradient, defined in zip(found, expected, strict=True):
        assert_close(gradient, defined, gradient.dtype)


@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (2, 2), (137, 137), (257, 257), (1, 257), (5, 137), (130, 257)])
@EVERY_POINT
def test_reads_sizes_from_its_arguments(
    variant: Variant, site: AttentionSite, config: Config, q_len: int, kv_len: int
) -> None:
    built = fitted(variant, site, config)
    site = site.sized(batch=2, q_len=q_len, kv_len=kv_len)
    arguments = inputs(site, seed=3)
    with torch.no_grad():
        assert_close(built(*arguments), define(variant, site, config, built, *arguments), site.torch_dtype)


@EVERY_POINT
def test_reads_any_strides_and_leaves_its_arguments_alone(
    variant: Variant, site: AttentionSite, config: Config
) -> None:
    built = fitted(variant, site, config)
    arguments = inputs(site, seed=4)
    tensors, others = arguments[:3], arguments[3:]
    columns = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in tensors]
    before = [t.clone() for t in columns]
    with torch.no_grad():
        assert_close(built(*columns, *others), built(*tensors, *others), site.torch_dtype)
    assert all(map(torch.equal, columns, before))


@PADDED
def test_a_query_that_sees_nothing_gives_zeros(variant: Variant, site: AttentionSite, config: Config) -> None:
    built = fitted(variant, site, config)
    query, key, value, mask, padding, *sink = inputs(site, seed=5, requires_grad=True)
    padding[0] = False
    seen = padding[:, None, None, :]
    mask = mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, float("-inf"))
    out = built(query, key, value, mask, padding, *sink)
    assert out[0].abs().max() == 0
    for gradient in torch.autograd.grad(out.square().sum(), [query, key, value, *sink, *parameters(built)]):
        assert gradient.isfinite().all()


@CAUSAL
def test_a_step_of_decoding_is_the_last_row(variant: Variant, site: AttentionSite, config: Config) -> None:
    built = fitted(variant, site, config)
    site = site.sized(batch=2, q_len=300, kv_len=300)
    query, key, value, _, _, *sink = inputs(site, seed=6)
    with torch.no_grad():
        every = built(query, key, value, None, None, *sink)
        for rows in (1, 3, 140):
            step = built(query[:, :, -rows:], key, value, None, None, *sink)
            assert_close(step, every[:, :, -rows:], site.torch_dtype)


@EVERY_ONE_WITH_KEYS
def test_traces_with_symbolic_sizes(variant: Variant) -> None:
    """It may specialise to these sizes, but must not fail."""
    site = variant.cases[0].site
    built = variant.build(site, list(variant.configs(site, CPU))[-1])
    query, key, value, _, _ = inputs(site, seed=7)
    with torch.no_grad():
        traced = make_fx(
            lambda q, k, v: built(q, k, v, None, None), tracing_mode="symbolic", _allow_non_fake_inputs=True
        )
        assert_close(traced(query, key, value)(query, key, value), built(query, key, value, None, None), torch.float32)


@EVERY_ONE_WITH_KEYS
def test_one_graph_serves_a_growing_cache(variant: Variant) -> None:
    site = variant.cases[0].site
    built = variant.build(site, list(variant.configs(site, CPU))[-1])
    counter = CompileCounterWithBackend("eager")

    @torch.compile(backend=counter, fullgraph=True)
    def compiled(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return built(query, key, value, None, None)

    for kv_len in range(600, 606):
        query, key, value, _, _ = inputs(site.sized(batch=1, q_len=1, kv_len=kv_len), seed=kv_len)
        with torch.no_grad():
            assert_close(compiled(query, key, value), built(query, key, value, None, None), torch.float32)
    assert counter.frame_count == 2, "one for the first length, and one for all others"


# --- exact variants and the masks of real models ---------------------------------------------------------------------


@pytest.mark.parametrize("name", [v.name for v in WITH_KEYS if v.fidelity == "exact"])
@pytest.mark.parametrize("shape", [(3, 6, 9, 9), (3, 1, 9, 9), (1, 1, 9, 9), (3, 1, 1, 9), (6, 9, 9), (9, 9), (9,)])
@pytest.mark.parametrize("additive", [False, True])
def test_exact_with_any_mask_that_broadcasts(name: str, shape: tuple[int, ...], additive: bool) -> None:
    variant = variants()[name]
    site = replace(variant.cases[0].site, mask=Dense(), batch=3, q_len=9, kv_len=9)
    query, key, value, _, _ = inputs(site, seed=8)
    mask = torch.rand(shape) > 0.4
    mask[..., 0] = True  # the eager models that build additive masks do not define rows without any key
    if additive:
        mask = torch.randn(shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    out = variant.build(site, {})(query, key, value, mask, None)
    assert_close(out, brute_force(query, key, value, mask, None, site=site), torch.float32)


def test_sdpa_builds_no_mask_where_none_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, bool]] = []
    fused = F.scaled_dot_product_attention

    def spy(*arguments: Any, **options: Any) -> Tensor:
        seen.append((arguments[3] is not None, options["is_causal"]))
        return fused(*arguments, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    site = variants()["sdpa"].cases[0].site
    for mask, q_len in ((Causal(), 9), (Causal(), 1), (Full(), 4), (Causal(), 4), (SlidingWindow(2, 0), 9)):
        sized = replace(site, mask=mask).sized(batch=1, q_len=q_len, kv_len=9)
        plain: Any = variants()["sdpa"].build(sized, {})
        plain.plain(*inputs(sized, seed=9))
    assert seen == [(False, True), (False, False), (False, False), (True, False), (True, False)]


# --- the window ------------------------------------------------------------------------------------------------------

WINDOW = variants()["sliding_window"]
CASE = WINDOW.cases[0].site


@pytest.mark.parametrize("mask", [Causal(), Full(), Causal() & Padding(), Full() & Padding()], ids=str)
@pytest.mark.parametrize(("window", "sinks"), [(200, 4), (1000, 0)])
def test_a_window_over_everything_is_exact(mask: Any, window: int, sinks: int) -> None:
    site = replace(CASE, mask=mask).sized(batch=3, q_len=200, kv_len=200)
    arguments = inputs(site, seed=10)
    out = WINDOW.build(site, {"window": window, "sinks": sinks})(*arguments)
    assert_close(out, brute_force(*arguments, site=site), torch.float32)


@pytest.mark.parametrize("mask", [Causal(), Full(), Causal() & Padding(), Full() & Padding()], ids=str)
@pytest.mark.parametrize("window", [1, 2, 31, 64, 127])
@pytest.mark.parametrize("sinks", [0, 1, 40])
def test_windows_of_odd_sizes(mask: Any, window: int, sinks: int) -> None:
    config: Config = {"window": window, "sinks": sinks}
    for q_len, kv_len in ((263, 263), (70, 263), (1, 263), (263, 70)):
        site = replace(CASE, mask=mask).sized(batch=2, q_len=q_len, kv_len=kv_len)
        built, arguments = WINDOW.build(site, config), inputs(site, seed=11)
        assert_close(built(*arguments), define(WINDOW, site, config, built, *arguments), torch.float32)


def test_windows_go_from_wide_to_narrow_and_never_keep_half() -> None:
    for kv_len in (None, 257, 2048, 10_000):
        found = [config["window"] for config in WINDOW.configs(replace(CASE, kv_len=kv_len), CPU)]
        assert found == sorted(found, reverse=True)
        assert found and (kv_len is None or max(found) < kv_len / 2)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operator gave."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


def flops(query: Any, key: Any, value: Any, *_: Any, out_val: Any = None, **__: Any) -> int:
    return 2 * query[0] * query[1] * query[2] * key[2] * (query[3] + value[3])


@pytest.mark.parametrize(
    ("name", "config", "mask", "share"),
    [
        ("sliding_window", {"window": 128, "sinks": 4}, Causal(), 0.15),
        ("sliding_window", {"window": 128, "sinks": 4}, Causal() & Padding(), 0.15),
        ("sliding_window", {"window": 128, "sinks": 4}, Full(), 0.25),
        ("linear", {"feature_map": "hedgehog"}, Causal(), 0.3),
        ("linear", {"feature_map": "hedgehog"}, Full(), 0.3),
        ("ecoformer", {"bits": 16, "anchors": 25, "bias_mode": "paper"}, Causal(), 0.3),
        ("ecoformer", {"bits": 16, "anchors": 25, "bias_mode": "official"}, Full(), 0.3),
    ],
    ids=str,
)
def test_work_and_memory_are_linear(name: str, config: Config, mask: Any, share: float) -> None:
    site = replace(CASE, heads=9, kv_heads=3, mask=mask).sized(batch=1, q_len=2048, kv_len=2048)
    *tensors, _, padding = inputs(site, seed=12)  # a mask of N * N is the caller's
    built = variants()[name].build(site, config)
    plain = getattr(built, "plain", built)
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping={fused: flops}) as counter:
        plain(*tensors, None, padding)
    query, key, value = (t.shape for t in tensors)
    assert 0 < counter.get_total_flops() < share * flops(query, key, value)
    with torch.no_grad():
        built(*tensors, None, padding)  # the first call builds and compares
        for each in (built, plain):
            with Largest() as largest:
                each(*tensors, None, padding)
            assert largest.numel < 3 * query.numel()


# --- the linear one --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 127, 128, 129, 256, 257])
@pytest.mark.parametrize("mask", [Causal(), Full(), Causal() & Padding()], ids=str)
def test_linear_at_the_edges_of_its_chunks(length: int, mask: Any) -> None:
    linear = variants()["linear"]
    for q_len, kv_len in ((length, length), (length, length + 140), (length + 140, length)):
        site = replace(linear.cases[0].site, mask=mask).sized(batch=2, q_len=q_len, kv_len=kv_len)
        built, arguments = fitted(linear, site, {}), inputs(site, seed=13)
        with torch.no_grad():
            assert_close(built(*arguments), define(linear, site, {}, built, *arguments), torch.float32)


def test_linear_maps_are_fitted_by_gradient_descent() -> None:
    linear = variants()["linear"]
    site = linear.cases[0].site.sized(batch=1, q_len=64, kv_len=64)
    arguments = inputs(site, seed=14)
    built = linear.build(site, {})
    wanted = brute_force(*arguments, site=site).float()
    optimizer = torch.optim.Adam(parameters(built), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = (built(*arguments) - wanted).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


# --- what authors test with ------------------------------------------------------------------------------------------


def test_inputs_are_what_the_site_says() -> None:
    site = replace(CASE, mask=Causal() & Padding(), dtype="bfloat16").sized(batch=4, q_len=7, kv_len=9)
    query, key, value, mask, padding = inputs(site, seed=15, requires_grad=True)
    assert query.shape == (4, 6, 7, 16) and key.shape == value.shape == (4, 2, 9, 16)
    assert query.dtype == torch.bfloat16 and query.requires_grad and query.is_leaf and not query.is_contiguous()
    assert padding.shape == (4, 9) and padding.any(-1).all() and padding.sum(-1).min() == 1
    assert not padding[0, 0] and padding[0, -1], "the first row is padded on the left"
    assert torch.equal(mask, site.mask.visible(7, 9) & padding[:, None, None, :])
    assert inputs(replace(site, mask=Causal()), seed=15)[3:] == (None, None)
    assert torch.equal(inputs(site, seed=15)[0], query)
    with pytest.raises(OptionError, match="concrete sizes"):
        inputs(replace(site, batch=None), seed=0)


def test_brute_force_is_the_sum_that_one_writes_by_hand() -> None:
    site = replace(CASE, mask=Causal(), heads=2, kv_heads=1).sized(batch=1, q_len=2, kv_len=3)
    query, key, value, _, _ = inputs(site, seed=16)
    out = brute_force(query, key, value, torch.tensor([True, False, True]), None, site=site)
    first, last = torch.zeros(16).double(), torch.zeros(16).double()
    first += value[0, 0, 0]  # query 0 is token 1: it sees keys 0 and 1, and key 1 is hidden
    scores = (site.scale * key[0, 0, [0, 2]] @ query[0, 1, 1]).double().exp()
    last += scores @ value[0, 0, [0, 2]].double() / scores.sum()
    assert_close(out[0, 1], torch.stack([first, last]), torch.float32)


def test_assert_close_is_relative_to_the_largest_magnitude() -> None:
    expected = torch.tensor([100.0, 0.0])
    assert_close(expected + 50 * tolerance(torch.float32), expected, torch.float32)
    for wrong in (expected + 0.1, expected + float("nan"), expected[:1]):
        with pytest.raises(AssertionError, match="tolerance"):
            assert_close(wrong, expected, torch.float32)
