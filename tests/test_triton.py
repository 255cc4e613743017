"""The generated Triton kernels against the formula's definition: on a GPU, or in Triton's interpreter.

The interpreter is chosen when Triton is imported (`TRITON_INTERPRET=1`, as `make test` does for this file).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from rewriter.codegen.configs import default  # noqa: E402
from rewriter.codegen.expression import kind_of_type  # noqa: E402
from rewriter.codegen.formula import Formula, biased, capped, causal, chunked, prefix_causal, reading, tokens  # noqa: E402
from rewriter.codegen.fragments import KERNELS, Blocks, captured  # noqa: E402
from rewriter.codegen.implementation import Generated, generated  # noqa: E402
from rewriter.codegen.softmax import SoftmaxKernel, contenders  # noqa: E402
from rewriter.errors import OptionError  # noqa: E402
from rewriter.guard import error, tolerance  # noqa: E402
from rewriter.site import AttentionSite, Causal, Full, Padding  # noqa: E402
from rewriter.target import Target  # noqa: E402
from rewriter.testing import inputs  # noqa: E402
from rewriter.variant import Case, Variant, variants  # noqa: E402
from tests.formulas import alibi, near, same_segment, unusual  # noqa: E402

INTERPRETED = bool(triton.knobs.runtime.interpret)
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
pytestmark = pytest.mark.gpu
SMALL = Blocks(16, 16)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that was never written reads as NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def relative(s: Any, h: Any, i: Any, j: Any, table: Any) -> Any:
    return s + table[(i - j).clamp(-3, 3) + 3, h]


def gated(s: Any, j: Any, gates: Any) -> Any:
    return torch.where(j % 2 == 0, s * torch.sigmoid(gates[j]), torch.exp(-s.abs()) + torch.minimum(s, s * 0.5))


def compared(
    formula: Formula,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    q_len: int = 41,
    kv_len: int = 53,
    width: int = 16,
    v_width: int = 16,
    blocks: Blocks = SMALL,
    dtype: torch.dtype = torch.float32,
    scale: float = 0.3,
    batch: int = 2,
    layout: Callable[[Tensor], Tensor] = lambda t: t,
    sink: Tensor | None = None,
    **tensors: Tensor,
) -> None:
    """The kernel's output and gradients against those of the definition in float64."""
    shapes = (heads, q_len, width), (kv_heads, kv_len, width), (kv_heads, kv_len, v_width)
    operands = [layout(torch.randn(batch, *shape, device=DEVICE).to(dtype)).requires_grad_() for shape in shapes]
    given = {name: t.to(DEVICE).detach().requires_grad_(t.requires_grad) for name, t in tensors.items()}
    own = sink.to(DEVICE).requires_grad_() if sink is not None else None
    leaves = [*operands, *(t for t in (*given.values(), own) if t is not None and t.requires_grad)]
    out = SoftmaxKernel(formula, blocks)(*operands, scale, sink=own, **given)

    def wide(t: Tensor) -> Tensor:
        return t.double() if t.is_floating_point() else t

    expected = formula.reference(
        *map(wide, operands), scale, sink=wide(own) if own is not None else None,
        **{name: wide(t) for name, t in given.items()},
    )  # fmt: skip
    assert out.shape == expected.shape
    assert out.dtype == dtype
    assert error(out.double(), expected) <= tolerance(dtype)
    above = torch.randn_like(out)
    actual = torch.autograd.grad(out, leaves, above)
    # A score may not depend on queries and keys: nothing flows to them then.
    wanted = torch.autograd.grad(expected, leaves, above.double(), materialize_grads=True)
    for got, truth in zip(actual, wanted, strict=True):
        assert error(got.double(), truth.double()) <= 2 * tolerance(dtype)


def declared() -> Iterator[Any]:
    """The softmax formulas of all variants at their cases."""
    for variant in variants().values():
        for number, case in enumerate(variant.cases):
            for config in case.configs or list(variant.configs(case.site, Target.current()))[:1]:
                formula = variant.formula and variant.formula(case.site, config)
                if isinstance(formula, Formula):
                    yield pytest.param(formula, case.site, id=f"{variant.name}-{number}")


@pytest.mark.parametrize(("formula", "site"), [*declared()])
def test_formulas_of_variants(formula: Formula, site: AttentionSite) -> None:
    """A few of the last queries, and more keys than small patterns repeat after. What is read beyond is anything."""
    tensors = {"padding": torch.rand(1, 300) < 0.7} if site.mask.has(Padding) else {}
    kinds = {name: kind_of_type(dtype) for name, dtype in formula.types.items()}
    for name, rank in captured(*formula.expressions(kinds)).items():
        floats, whole = torch.rand((5,) * rank), torch.randint(2 if kinds[name] == "bool" else 9, (5,) * rank)
        tensors[name] = floats.requires_grad_() if kinds[name] == "float" else whole.to(formula.types[name])
    compared(
        reading(formula, tensors), heads=site.heads, kv_heads=site.kv_heads, q_len=19, kv_len=300, batch=1,
        blocks=Blocks(32, 64), sink=torch.randn(site.heads) if formula.sink else None, **tensors,
    )  # fmt: skip


LEARNED = [
    pytest.param(variant, case, id=f"{variant.name}-{number}")
    for variant in variants().values()
    for number, case in enumerate(variant.cases)
    if variant.fidelity == "learned" and any(f"{variant.name}-{number}" == each.id for each in declared())
]


@pytest.mark.parametrize(("variant", "case"), LEARNED)
@pytest.mark.parametrize("q_len", [90, 21])
def test_variants_that_are_learned(variant: Variant, case: Case, q_len: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole implementation by kernels, with gradients of operands and parameters, beside its definition."""
    calls = []

    def launched(self: Generated, *given: Any, **own: Tensor) -> Tensor:
        calls.append(self)
        return self._called(SoftmaxKernel(self._seen(given, own)[0], Blocks(32, 32)))(*given, **own)

    monkeypatch.setattr(Generated, "__call__", launched)
    site = case.site.sized(batch=2, q_len=q_len, kv_len=90)
    config = next(iter(case.configs or variant.configs(case.site, Target.current())))
    built: Any = variant.build(site, config).to(DEVICE)  # type: ignore[attr-defined]
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter.data, mean=0.5, std=0.3)
    given: Any = [t if t is None else t.to(DEVICE) for t in inputs(site, seed=4)]
    operands = [t.requires_grad_() for t in given[:3]]
    out = built(*operands, *given[3:])
    assert calls and out.dtype == site.torch_dtype
    wide = [t.double() for t in operands]
    expected = variant.reference(*wide, *given[3:], site, config, module=built)
    assert error(out.double(), expected) <= tolerance(out.dtype)
    leaves, above = [*operands, *built.parameters()], torch.randn_like(out)
    actual = torch.autograd.grad(out, leaves, above)
    wanted = torch.autograd.grad(expected, leaves, above.double())
    for got, truth in zip(actual, wanted, strict=True):
        assert error(got.double(), truth.double()) <= 2 * tolerance(out.dtype)


_ROUTED = AttentionSite(
    path="a", heads=4, kv_heads=2, head_dim=16, v_head_dim=8, dtype="float32", scale=0.3, mask=Causal() & Padding(),
    batch=2, q_len=53, kv_len=53,
)  # fmt: skip


@pytest.mark.parametrize(
    ("how", "facts"),
    [
        ("past", {"q_len": 1}),
        ("past", {"q_len": 60}),
        ("rank", {}),
        ("rank", {"q_len": 19, "kv_heads": 4, "dtype": "bfloat16", "v_head_dim": 16}),
        ("none", {"mask": Full() & Padding()}),
    ],
    ids=str,
)
def test_tokens_sorted_by_cluster(how: str, facts: dict[str, Any]) -> None:
    """Gathered, attended, and put back, with gradients: what `test_variants_that_are_learned` has no case of."""
    routing, site = variants()["routing"], replace(_ROUTED, **facts)
    config = {"clusters": 3, "window": 22, "causal": how, "shared": how == "rank"}
    module: Any = routing.build(site, config)
    module.to(DEVICE)
    run = module.attend._called(SoftmaxKernel(module.attend.formula, SMALL))
    given: Any = [t if t is None else t.to(DEVICE) for t in inputs(site, seed=1)]
    leaves, padding = [t.requires_grad_() for t in given[:3]], given[4]
    out = run(*leaves, None, padding, **module.routed(*leaves[:2], padding))
    wide = [t.detach().double().requires_grad_() for t in leaves]
    expected = routing.reference(*wide, None, padding, site, config, module=module)
    assert error(out.double(), expected) <= tolerance(site.torch_dtype)
    above = torch.randn_like(out)
    actual = torch.autograd.grad(out, leaves, above)
    for got, truth in zip(actual, torch.autograd.grad(expected, wide, above.double()), strict=True):
        assert error(got.double(), truth) <= 2 * tolerance(site.torch_dtype)


def test_every_key() -> None:
    compared(Formula())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types(dtype: torch.dtype) -> None:
    compared(Formula((near,), numbers={"window": 20}), dtype=dtype, blocks=Blocks(16, 32))


@pytest.mark.parametrize(
    ("mask", "numbers"),
    [
        (causal, {"offset": 0}),
        (causal, {"offset": 5}),
        (near, {"window": 3}),
        (near, {"window": 20}),
        (chunked, {"chunk": 7}),
        (prefix_causal, {"prefix": 9}),
    ],
)
def test_masks(mask: Any, numbers: dict[str, float]) -> None:
    compared(Formula((mask,), numbers=numbers))


def test_queries_before_all_keys_see_nothing() -> None:
    compared(Formula((causal,), numbers={"offset": 0}), q_len=53, kv_len=30)


@pytest.mark.parametrize(("width", "v_width"), [(8, 8), (24, 40), (40, 24), (80, 16)])
def test_head_sizes(width: int, v_width: int) -> None:
    compared(Formula((causal,), numbers={"offset": 0}), width=width, v_width=v_width, q_len=20, kv_len=20)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 1), (6, 2)])
@pytest.mark.parametrize("q_len", [1, 2, 16])
@pytest.mark.parametrize("splits", [1, 3])
def test_decode(heads: int, kv_heads: int, q_len: int, splits: int) -> None:
    compared(
        Formula((causal, tokens), numbers={"offset": 0}), heads=heads, kv_heads=kv_heads, q_len=q_len,
        blocks=Blocks(16, 16, splits=splits), padding=torch.rand(2, 53) < 0.7,
    )  # fmt: skip


@pytest.mark.parametrize("splits", [1, 2])
def test_sink(splits: int) -> None:
    for q_len in (2, 41):
        compared(Formula(sink=True), sink=torch.randn(4), blocks=Blocks(16, 16, splits=splits), q_len=q_len)


@pytest.mark.parametrize("normaliser", ["sigmoid", "relu"])
def test_other_normalisers(normaliser: Any) -> None:
    compared(Formula((near,), (capped,), {"window": 20, "softcap": 5.0}, normaliser))
    compared(Formula(normaliser=normaliser), q_len=1, blocks=Blocks(16, 16, splits=2))


def test_scores_that_read_learned_tensors() -> None:
    numbers = {"window": 40, "softcap": 5.0}
    compared(Formula((near,), (alibi, capped), numbers), slopes=torch.rand(4, requires_grad=True))
    compared(Formula(scores=(relative,)), table=torch.randn(7, 4, requires_grad=True))
    compared(Formula(scores=(gated,)), gates=torch.randn(53, requires_grad=True))


@pytest.mark.parametrize("name", unusual(1))
def test_what_is_rarely_said(name: str) -> None:
    formula, tensors = unusual(53)[name]
    q_len = 53 if tensors else 41
    compared(formula, q_len=q_len, **tensors)


def test_the_slope_of_a_magnitude_at_zero() -> None:
    compared(Formula(scores=(lambda s: s.abs(),)), layout=torch.zeros_like)


def test_a_tensor_read_twice_gets_both_gradients() -> None:
    def both(s: Any, i: Any, j: Any, places: Any) -> Any:
        return s + places[i] * places[j]

    compared(Formula(scores=(both,)), places=torch.randn(53, requires_grad=True))


@pytest.mark.parametrize("shape", [(2, 4, 41, 53), (1, 4, 41, 53), (2, 1, 1, 53)])
def test_bias_tensors(shape: tuple[int, ...]) -> None:
    compared(Formula(scores=(biased,)), bias=torch.randn(shape).requires_grad_())


def test_documents() -> None:
    segment = torch.randint(0, 3, (2, 53)).sort(-1).values
    compared(Formula((same_segment, near), numbers={"window": 30}), segment=segment)


def test_a_mask_of_each_head() -> None:
    def of_head(h: Any, i: Any, j: Any) -> Any:
        return (i - j) % (h + 1) == 0

    for q_len in (1, 41):
        compared(Formula((of_head,)), q_len=q_len)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_below_one_maximum(scale: float) -> None:
    compared(Formula((causal,), numbers={"offset": 0}), scale=scale)


def test_strides() -> None:
    compared(Formula(), layout=lambda t: t.transpose(1, 2).contiguous().transpose(1, 2).detach())
    compared(Formula(), layout=lambda t: t.mT.contiguous().mT.detach())


def test_large_scores() -> None:
    compared(Formula((causal,), numbers={"offset": 0}), scale=8.0)


@pytest.mark.parametrize(
    "formula",
    [
        Formula(),
        Formula((near,), (capped,), {"window": 20, "softcap": 5.0}, sink=True),
        Formula((causal,), normaliser="sigmoid", numbers={"offset": 0}),
        Formula(normaliser="relu"),
    ],
)
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, at the first dual number
def test_forward_derivatives(formula: Formula) -> None:
    def made(*shape: int) -> Tensor:
        return torch.randn(2, *shape, device=DEVICE)

    operands, tangents = (
        [made(heads, n, width) for heads, n, width in ((4, 41, 24), (2, 53, 24), (2, 53, 16))] for _ in range(2)
    )
    given = {"sink": torch.randn(4, device=DEVICE)} if formula.sink else {}
    kernel = SoftmaxKernel(formula, SMALL)
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(t, dt) for t, dt in zip(operands, tangents, strict=True)]
        actual = torch.autograd.forward_ad.unpack_dual(kernel(*duals, 0.3, **given)).tangent
    assert actual is not None

    def exact(*tensors: Tensor) -> Tensor:
        return formula.reference(*tensors, 0.3, **{name: t.double() for name, t in given.items()})

    doubles, along = (tuple(t.double() for t in each) for each in (operands, tangents))
    _, expected = torch.func.jvp(exact, doubles, along)
    assert error(actual.double(), expected) <= 2 * tolerance(torch.float32)


def test_a_call_without_its_tensors() -> None:
    q = torch.randn(1, 1, 4, 16, device=DEVICE)
    with pytest.raises(OptionError, match=r"reads the tensors \('slopes',\)"):
        SoftmaxKernel(Formula(scores=(alibi,)), SMALL)(q, q, q, 1.0)
    with pytest.raises(OptionError, match="2 axes and is read at 1"):
        SoftmaxKernel(Formula(scores=(alibi,)), SMALL)(q, q, q, 1.0, slopes=torch.randn(1, 1, device=DEVICE))


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_configs_worth_a_measurement(target: str) -> None:
    """What is shipped comes first; of a narrow window smaller blocks follow, which compute the same."""
    formula = Formula((near,), numbers={"window": 5})
    long = torch.zeros(1, 1, 4096, 64, dtype=torch.bfloat16)
    kernels = SoftmaxKernel(formula, {"forward": default(target, "forward", 64)})
    for name in KERNELS:
        most = default(target, name, 64)
        shipped, *others = contenders(
            SoftmaxKernel(formula, {**kernels.blocks, name: most}), name, {}, long, long, target
        )
        assert shipped.blocks[name] == most
        assert others or most.block_m * most.block_n <= 64 * 64
        for each in others:
            assert each.blocks[name].block_m * each.blocks[name].block_n < most.block_m * most.block_n
            assert each.blocks.keys() == {"forward", name}, "the configs of the others stay"
    others = contenders(kernels, "forward", {}, long, long, target)[1:]
    query, key, value = (torch.randn(1, 2, 70, 16, device=DEVICE) for _ in range(3))
    out = others[0](query, key, value, 0.25)
    assert error(out, formula.reference(query, key, value, 0.25)) <= tolerance(torch.float32)
    one = long[:, :, :1]
    assert len(contenders(kernels, "forward", {}, one, long, target)) == 1, "a step of decoding has its own config"
    assert len(contenders(kernels, "forward", {}, long, long, "sm_1")) == 1, "of an unknown target no limits are known"


@pytest.mark.parametrize("learned", [False, True])
def test_kernel_after_kernel_gets_the_fastest_config(monkeypatch: pytest.MonkeyPatch, learned: bool) -> None:
    """With a stand-in for the clock, for which the third that is tried is the fastest."""
    target = replace(Target.current(torch.device(DEVICE)), capability="sm_90")
    monkeypatch.setattr("rewriter.codegen.softmax.Target", SimpleNamespace(current=lambda device: target))
    tried: list[int] = []
    monkeypatch.setattr(
        "rewriter.tune.measure.medians", lambda times: tried.append(len(times)) or [2.0, 2.0, 1.0, 2.0][: len(times)]
    )
    made: dict[Any, Any] = {}
    called = Generated._called

    def kept(self: Generated, kernel: Any) -> Any:
        made[run := called(self, kernel)] = kernel
        return run

    monkeypatch.setattr(Generated, "_called", kept)
    site = AttentionSite(
        path="case", heads=1, kv_heads=1, head_dim=16, v_head_dim=16, dtype="bfloat16", scale=0.25, mask=Full(),
        batch=1, q_len=160, kv_len=160,
    )  # fmt: skip
    formula = Formula((near,), numbers={"window": 5})
    built = generated(lambda site, config: formula)(site, {})
    assert isinstance(built, Generated)
    q, k, v = (torch.randn(1, 1, 160, 16, device=DEVICE, dtype=torch.bfloat16, requires_grad=learned) for _ in range(3))
    chosen = built._best_on_gpu((q, k, v, None, None), {}, (learned,), learned)
    names = KERNELS if learned else KERNELS[:1]
    assert list(made[chosen].blocks) == [*names]
    assert tried == [*[3] * (len(names) - 1), 4], "the plain implementation competes with what all kernels make"
    out, expected = chosen(q, k, v, None, None), formula.reference(q, k, v, 0.25)
    assert error(out, expected) <= tolerance(torch.bfloat16)
    if learned:
        for ours, theirs in zip(*(torch.autograd.grad(o.sum(), (q, k, v)) for o in (out, expected)), strict=True):
            assert error(ours, theirs) <= tolerance(torch.bfloat16)
    monkeypatch.setattr("rewriter.tune.measure.medians", lambda times: [2.0] * (len(times) - 1) + [1.0])
    assert built._best_on_gpu((q, k, v, None, None), {}, ("again", learned), learned) is built.plain
