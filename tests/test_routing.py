"""Attention inside clusters: against loops over tokens, what it shows of the future, and how centroids move."""

from __future__ import annotations

import copy
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import rewriter
from rewriter.codegen import native
from rewriter.codegen.blocks import lists_of
from rewriter.codegen.families import kernels_of
from rewriter.kernels.sparse.routing import VARIANT, Routing
from rewriter.raising import Operands
from rewriter.recover import fit
from rewriter.site import AttentionSite, Causal, Full, Mask, Padding
from rewriter.target import Target
from rewriter.testing import assert_close, brute_force, inputs
from rewriter.variant import Config

SITE = AttentionSite(
    path="a", heads=4, kv_heads=2, head_dim=8, v_head_dim=6, dtype="float32", scale=0.3, mask=Causal(),
    batch=2, q_len=30, kv_len=30,
)  # fmt: skip
FORMS = [("past", Causal()), ("position", Causal()), ("rank", Causal()), ("none", Full())]
EVERY_FORM = pytest.mark.parametrize(("causal", "mask"), FORMS, ids=[name for name, _ in FORMS])
SHARED = pytest.mark.parametrize("shared", [True, False], ids=["shared", "separate"])


def built(site: AttentionSite, causal: str, shared: bool, clusters: int = 4, window: int = 6) -> Routing:
    config: Config = {"clusters": clusters, "window": window, "causal": causal, "shared": shared}
    module = VARIANT.build(site, config)
    assert isinstance(module, Routing)
    return module


def direction(x: Tensor) -> Tensor:
    """On the sphere, number by number."""
    x = x.double() - x.double().mean()
    return x / x.norm()


def one_head(
    q: Tensor, k: Tensor, v: Tensor, real: list[bool], centroids: Tensor, causal: str, shared: bool, window: int,
    scale: float,
) -> list[Tensor]:  # fmt: skip
    """The definition in lists: q (n, D), k and v (m, D) -> n rows."""
    past = len(k) - len(q)
    near_k = [[float(c @ direction(x)) for c in centroids.double()] for x in k]
    near_q = near_k[past:] if shared else [[float(c @ direction(x)) for c in centroids.double()] for x in q]

    def softmax(i: int, keys: list[int]) -> Tensor:
        weights = torch.tensor([float(scale * q[i].double() @ k[j].double()) for j in keys]).double().softmax(0)
        return sum((w * v[j].double() for w, j in zip(weights, keys, strict=True)), torch.zeros(v.shape[1]).double())

    def nearest(near: list[list[float]], c: int, at: int) -> list[int]:
        order = sorted((i for i in range(len(near)) if real[i + at]), key=lambda i: -near[i][c])
        return sorted(order[:window])

    results: list[list[Tensor]] = [[] for _ in q]
    if causal == "past" or len(q) == 1:
        homes = [near.index(max(near)) if r else None for near, r in zip(near_k, real, strict=True)]
        for i, near in enumerate(near_q):
            keys = [j for j in range(past + i + 1) if homes[j] == near.index(max(near))]
            half = window // 2
            keys = keys[max((len(keys) - 1) // half - 1, 0) * half :]
            if keys:
                results[i].append(softmax(i, keys))
    else:
        for c in range(len(centroids)):
            queries, members = nearest(near_q, c, past), nearest(near_k, c, 0)
            for rank, i in enumerate(queries):
                keys = members
                if causal == "position":
                    keys = [j for j in members if j <= past + i]
                elif causal == "rank":
                    keys = members[: len(members) - len(queries) + rank + 1]
                if keys:
                    results[i].append(softmax(i, keys))
    zero = torch.zeros(v.shape[1]).double()
    return [sum(each, zero) / max(len(each), 1) for each in results]


def by_hand(module: Routing, site: AttentionSite, shared: bool, *given: Tensor) -> Tensor:
    query, key, value, padding = given
    rows = [
        one_head(
            query[b, h], key[b, h // 2], value[b, h // 2], padding[b].tolist(), module.centroids[h // 2],
            str(module.causal), shared, module.window, site.scale,
        )
        for b in range(len(query))
        for h in range(query.shape[1])
    ]  # fmt: skip
    return torch.stack([torch.stack(each) for each in rows]).unflatten(0, (len(query), -1))


@torch.no_grad()
@EVERY_FORM
@SHARED
@pytest.mark.parametrize("q_len", [30, 11, 1])
def test_it_is_the_loop_that_one_writes_by_hand(causal: str, mask: Mask, shared: bool, q_len: int) -> None:
    site = replace(SITE, mask=mask, q_len=q_len)
    module = built(site, causal, shared)
    query, key, value, _, _ = inputs(site, seed=1)
    everything = torch.ones(2, 30, dtype=torch.bool)
    out = module(query, key, value, None, None)
    assert_close(out, by_hand(module, site, shared, query, key, value, everything), torch.float32)


@torch.no_grad()
@EVERY_FORM
@SHARED
def test_padding_is_in_no_cluster(causal: str, mask: Mask, shared: bool) -> None:
    site = replace(SITE, mask=mask & Padding())
    module = built(site, causal, shared)
    query, key, value, _, padding = inputs(site, seed=2)
    if causal == "rank":  # of ranks in a list that padding does not shorten
        padding[:] = True
        padding[1, 20:] = False
        padding[:, :3] = False
    out = module(query, key, value, None, padding)
    hidden = ~padding[:, None, :, None]
    other = module(query, key.masked_fill(hidden, 9.0), value.masked_fill(hidden, 1e6), None, padding)
    assert torch.equal(other.masked_fill(hidden, 0), out.masked_fill(hidden, 0))
    assert causal == "past" or out.masked_fill(~hidden, 0).abs().max() == 0
    if causal != "rank":
        assert_close(out, by_hand(module, site, shared, query, key, value, padding), torch.float32)


@torch.no_grad()
@EVERY_FORM
@SHARED
@pytest.mark.parametrize("q_len", [30, 7])
def test_one_cluster_of_all_is_attention(causal: str, mask: Mask, shared: bool, q_len: int) -> None:
    site = replace(SITE, mask=mask & Padding(), q_len=q_len)
    query, key, value, _, padding = inputs(site, seed=3)
    padding[:] = True
    out = built(site, causal, shared, clusters=1, window=30)(query, key, value, None, padding)
    assert_close(out, brute_force(query, key, value, None, padding, site=site), torch.float32)


@torch.no_grad()
@SHARED
def test_only_the_past_form_is_causal(shared: bool) -> None:
    """Other tokens later: "past" gives the same, to the bit; the others choose others."""
    query, key, value, _, _ = inputs(SITE, seed=4)
    later = [t.clone() for t in (query, key, value)]
    for t in later:
        t[:, :, 20:] = torch.randn(t[:, :, 20:].shape, generator=torch.Generator().manual_seed(9))
    for causal, same in (("past", True), ("position", False), ("rank", False)):
        module = built(SITE, causal, shared)
        one, other = (module(*given, None, None)[:, :, :20] for given in ((query, key, value), later))
        assert torch.allclose(one, other, atol=1e-6) == same


@torch.no_grad()
@pytest.mark.parametrize(("causal", "shared", "leaks"), [
    ("rank", False, True), ("rank", True, False), ("position", False, False), ("position", True, False)
])  # fmt: skip
def test_ranks_show_values_of_the_future_unless_queries_and_keys_are_routed_together(
    causal: str, shared: bool, leaks: bool
) -> None:
    """Only values differ, so that the clusters are the same."""
    module = built(SITE, causal, shared)
    query, key, value, _, _ = inputs(SITE, seed=5)
    later = value.clone()
    later[:, :, 15:] += 100
    moved = module(query, key, later, None, None) - module(query, key, value, None, None)
    assert bool(moved[:, :, :15].abs().max() > 1) == leaks
    assert moved[:, :, 15:].abs().max() > 1


@torch.no_grad()
def test_a_growing_cache_is_routed_anew_and_gives_the_same() -> None:
    module = built(SITE, "past", shared=False)
    query, key, value, _, _ = inputs(SITE, seed=6)
    steps = [module(query[:, :, i : i + 1], key[:, :, : i + 1], value[:, :, : i + 1], None, None) for i in range(30)]
    assert_close(torch.cat(steps, 2), module(query, key, value, None, None), torch.float32)


@torch.no_grad()
@SHARED
def test_centroids_move_in_training_only(shared: bool) -> None:
    module = built(SITE, "past", shared)
    query, key, value, _, _ = inputs(SITE, seed=7)
    before = module.centroids.clone()
    frozen = module(query, key, value, None, None)
    assert torch.equal(module.centroids, before)
    module.train()
    assert torch.equal(module(query, key, value, None, None), frozen), "what is seen is that of before"
    for h in range(2):
        tokens = [direction(x) for x in key[:, h].flatten(0, 1)]
        if not shared:
            tokens += [direction(x) for x in query[:, 2 * h : 2 * h + 2].flatten(0, 2)]
        for c, old in enumerate(before[h].double()):
            members = [x for x in tokens if (before[h].double() @ x).argmax() == c]
            mean = F.normalize(torch.stack(members).sum(0), dim=0) if members else old
            assert_close(module.centroids[h, c], F.normalize(0.999 * old + 0.001 * mean, dim=0), torch.float32)
    assert not torch.equal(module.centroids, before)


def clustered(site: AttentionSite, seed: int) -> tuple[Operands, Tensor]:
    """Tokens of four kinds that attend to their own, and what comes of it."""
    query, key, value, mask, padding = inputs(site, seed=seed)
    random = torch.Generator().manual_seed(seed)
    kinds = torch.stack([torch.randperm(30, generator=random)[None] % 4 for _ in range(2)])
    centres = 4 * torch.eye(8)[:4][kinds]
    given = Operands(0.3 * query + centres, 0.3 * key + centres, value + centres[..., :6], mask, padding)
    return given, brute_force(*given.given, site=site).float()


@SHARED
@pytest.mark.parametrize(("mask", "window"), [(Causal() & Padding(), 30), (Full(), 8)], ids=str)
def test_centroids_are_found_in_data(mask: Mask, window: int, shared: bool) -> None:
    site, causal = replace(SITE, mask=mask, scale=1.0), "past" if mask.has(Causal) else "none"
    module, other = (built(site, causal, shared, window=window) for _ in range(2))
    samples = [clustered(site, 1), clustered(site, 2)]
    before, after = fit(module, samples)
    assert after < 0.8 * before
    assert fit(other, samples) == (before, after), "the same every time"
    operands = samples[0][0]
    found = module.moved(operands.query, operands.key, operands.padding)
    assert_close(module.centroids, found, torch.float32)  # where k-means rests
    assert list(module.state_dict()) == ["centroids"]
    third = built(site, causal, shared, window=window)
    third.load_state_dict(module.state_dict())
    given, _ = clustered(site, 3)
    assert torch.equal(third(*given.given), module(*given.given))


class Net(nn.Module):
    """One causal attention."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.outward = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inward(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        out: Tensor = self.outward(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return out


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_centroids_live_in_the_model_and_its_plan(inner: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(2, 40, 32)
    fresh = copy.deepcopy(model)
    exact = rewriter.plan_of(rewriter.optimize(copy.deepcopy(model), example=x))
    assert exact is not None
    config: Config = {"clusters": 3, "window": 8, "causal": "past", "shared": True}
    routed = [replace(each, variant="routing", fidelity="learned", config=config) for each in exact.decisions]
    rewriter.apply(model, replace(exact, decisions=tuple(routed)), inner=inner)
    (name,) = [name for name in model.state_dict() if name.startswith("rewriter.")]
    before, frozen = model.get_buffer(name).clone(), model(x)
    assert not torch.allclose(frozen, fresh(x), atol=1e-3)
    assert torch.equal(model.get_buffer(name), before)
    model.train()
    out = model(x)
    out.square().mean().backward()
    assert_close(out, frozen, torch.float32)
    assert model.inward.weight.grad is not None and model.inward.weight.grad.abs().max() > 0
    moved = model.get_buffer(name).clone()
    assert 0 < (moved - before).abs().max() < 0.01 if inner == "eager" else torch.equal(moved, before)
    model.eval()
    plan = rewriter.plan_of(model)
    assert plan is not None
    plan.save(tmp_path)
    rewriter.apply(fresh, rewriter.Plan.load(tmp_path))
    assert torch.equal(fresh.get_buffer(name), moved)
    assert_close(fresh(x), model(x), torch.float32)


def spread(shift: float, *shape: int) -> Tensor:
    """Numbers without order, each token's mean 0, so that the package's directions, which keep the mean, are ours."""
    x = ((torch.arange(torch.Size(shape).numel()).double() + 1) * 12.9898 + shift).sin() * 437.585
    x = ((x - x.floor()) * 4 - 2).view(shape)
    return (x - x.mean(-1, keepdim=True)).float()


PUBLISHED = {
    "none": [
        [-0.1116, -0.179, -0.1473, 0.4378], [0.3839, -0.2428, -0.7091, 0.5681], [-0.1536, -0.4314, 0.2033, 0.3817],
        [-0.401, -0.0251, -0.142, 0.5681], [0.5202, -0.4121, -0.781, 0.6729], [0.0, 0.0, 0.0, 0.0],
        [-0.3237, -0.0319, -0.3859, 0.7415], [0.0, 0.0, 0.0, 0.0], [0.0273, -0.1721, -0.515, 0.6597],
        [-1.2044, 1.2315, 0.9246, -0.9517], [-0.5118, -0.1164, 0.9002, -0.272], [-0.1462, -0.1686, 0.8064, -0.4916],
        [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [-0.0545, 0.2298, 0.5961, -0.7713],
        [0.0, 0.0, 0.0, 0.0], [-0.1381, -0.8178, 1.0447, -0.0889], [0.0, 0.0, 0.0, 0.0],
    ],
    "position": [
        [-0.3337, -0.2247, 0.1204, 0.438], [0.1193, -0.1951, -0.5947, 0.6704], [-0.2441, -0.197, -0.0878, 0.5289],
        [-0.7885, 0.2575, -0.946, 1.4769], [-1.0739, 0.3514, -0.061, 0.7835], [0.0, 0.0, 0.0, 0.0],
        [-0.6209, 0.1981, -0.3832, 0.806], [0.0, 0.0, 0.0, 0.0], [0.0273, -0.1721, -0.515, 0.6597],
        [-0.0349, -0.7241, 0.8696, -0.1107], [-0.0042, -0.5738, 0.8493, -0.2713], [-0.0103, -0.1766, 0.6631, -0.4762],
        [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0084, 0.1434, 0.5725, -0.7242],
        [0.0, 0.0, 0.0, 0.0], [-0.1381, -0.8178, 1.0447, -0.0889], [0.0, 0.0, 0.0, 0.0],
    ],
}  # fmt: skip
"""What routing-transformer 1.6.1 gives (PyPI, `KmeansAttention(3, 4, 2, 4)` without memories), to four digits."""
MOVED = [
    [-0.154741, -0.750209, 0.495913, 0.409037], [0.27828, -0.532068, -0.424132, 0.67792],
    [-0.598359, -0.223295, 0.767583, 0.054071], [-0.242989, 0.862961, -0.264864, -0.355108],
    [0.316035, 0.540955, -0.775103, -0.081887], [0.507405, 0.48359, -0.589427, -0.401568],
]  # fmt: skip
"""Its centroids after one step of training, made as long as one."""


@torch.no_grad()
@pytest.mark.parametrize(("causal", "mask"), [("none", Full()), ("position", Causal())])
def test_it_is_what_the_package_computes(causal: str, mask: Mask) -> None:
    site = replace(SITE, heads=2, head_dim=4, v_head_dim=4, scale=0.5, mask=mask)
    module = built(site, causal, shared=False, clusters=3, window=4)
    module.centroids.copy_(F.normalize(spread(4.0, 2, 3, 4), dim=-1))
    given = [spread(shift, 1, 2, 9, 4) for shift in (1.0, 2.0, 3.0)]
    difference = (module.train()(*given, None, None) - torch.tensor(PUBLISHED[causal]).view(1, 2, 9, 4)).abs().amax(-1)
    assert_close(module.centroids, torch.tensor(MOVED).view(2, 3, 4), torch.float32)
    if causal == "position":  # it averages in clusters in which a query sees no key, as if it saw all
        assert (difference[0, 0, :3] > 0.2).all()
        difference[0, 0, :3] = 0
    assert difference.max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize(("causal", "mask", "share"), [("past", Causal(), 0.2), ("none", Full(), 0.08)], ids=str)
def test_work_is_that_of_the_clusters(causal: str, mask: Mask, share: float) -> None:
    """Of what a dense attention computes of 2048 keys, 16 clusters of up to 128 need a sixteenth; tiles are whole."""
    site = replace(SITE, v_head_dim=8, mask=mask, batch=1, q_len=2048, kv_len=2048)
    module = built(site, causal, shared=True, clusters=16, window=128)
    given = inputs(site, seed=8)

    def pairs(query: Any, key: Any, value: Any, *_: Any, out_val: Any = None, **__: Any) -> int:
        return int(query[0] * query[1] * query[2] * key[2])

    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    near = module.routed(*given[:2], None)
    with FlopCounterMode(display=False, custom_mapping={fused: pairs}) as counter:
        module.attend.plain(*given[:3], **near)
    counted = counter.get_flop_counts()["Global"][fused]
    assert 0 < counted < share * 4 * 2048 * 2048


# --- generated kernels -----------------------------------------------------------------------------------------------


@torch.no_grad()
@EVERY_FORM
@SHARED
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_generated_for_a_cpu(
    causal: str, mask: Mask, shared: bool, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if native.compiler() is None:
        pytest.skip("there is no C++ compiler")
    site = replace(SITE, mask=mask & Padding(), dtype=dtype, q_len=190, kv_len=333)
    module = built(site, causal, shared, clusters=3, window=130)
    query, key, value, _, padding = inputs(site, seed=9)
    given, own = (query, key, value, None, padding), module.routed(query, key, padding)
    wide = (t.double() for t in (query, key, value))
    config: Config = {"clusters": 3, "window": 130, "causal": causal, "shared": shared}
    expected = VARIANT.reference(*wide, None, padding, site, config, module=module)
    found = dict(module.attend._on_cpu(given, own))
    assert found
    for run in (*found.values(), module.attend.tiled):
        assert_close(run(*given, **own), expected, site.torch_dtype)
    whole = next(iter(found.values()))(*given, **own)
    monkeypatch.setattr("rewriter.codegen.ordered._CACHED", 1)  # one head after the other
    assert torch.equal(next(iter(found.values()))(*given, **own), whole)


@torch.no_grad()
@EVERY_FORM
def test_blocks_that_are_visited_are_near_what_is_seen(causal: str, mask: Mask) -> None:
    """At 4,096 tokens; and their pairs are those that one counts."""
    site = replace(SITE, mask=mask, batch=1, q_len=4096, kv_len=4096)
    module = built(site, causal, shared=True, clusters=8, window=512)
    query, key, value, _, _ = inputs(site, seed=10)
    pairs = module.pairs(query, key, value, None, None)
    order = module.attend.orders(query, key, **module.routed(query, key, None))
    assert pairs == int((order.until - order.low + 1).clamp(min=0).sum()) > 0
    standing = [torch.empty(*at.shape, 1) for at in (order.queries, order.keys)]
    for block in (32, 64):
        runs = lists_of(module.attend.formula)(*standing, order.said, block, block)
        assert runs.visited * block**2 < (1.35 if causal == "past" else 1.15) * pairs


def test_a_length_is_in_no_source() -> None:
    site = replace(SITE, mask=Full(), head_dim=16, v_head_dim=16)
    texts = set()
    for window in (512, 1000):
        config: Config = {"clusters": 8, "window": window, "causal": "none", "shared": True}
        kernels = kernels_of(VARIANT.formula(site, config), site)  # type: ignore[misc, arg-type]
        texts.add(kernels.cpp() + kernels.triton(kernels.default(kernels.names[0], "sm_90")))
    assert len(texts) == 1


@torch.no_grad()
def test_it_can_be_copied_and_kept_after_a_call() -> None:
    module = built(SITE, "past", shared=True)
    query, key, value, _, _ = inputs(SITE, seed=11)
    out = module(query, key, value, None, None)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_close(other(query, key, value, None, None), out, torch.float32)
        other.centroids.copy_(other.centroids.flip(1).roll(1, 2))
        assert not torch.allclose(other(query, key, value, None, None), out, atol=1e-3)
    assert_close(module(query, key, value, None, None), out, torch.float32)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter cannot compile")
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_compiles_ahead_of_time(target: str) -> None:
    """On tensor cores."""
    pytest.importorskip("triton")
    site = replace(SITE, dtype="bfloat16", head_dim=64, v_head_dim=64)
    kernels = kernels_of(VARIANT.formula(site, next(iter(VARIANT.configs(site, Target.current())))), site)  # type: ignore[misc, arg-type]
    for name in kernels.names:
        binary = kernels.binary(name, kernels.default(name, target), target)
        assert binary.loop is not None and binary.loop.tensor
