"""How the tokens of each attention lie is told from where they come from, and never from their number."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rewriter.capture import exported
from rewriter.detect import detect
from rewriter.nodes import mark_data
from rewriter.site import AttentionSite, Full
from rewriter.tokens import layouts

WIDTH = 8


class Attention(nn.Module):
    """Self-attention over (B, S, C)."""

    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.norm = nn.Linear(WIDTH, 3 * WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)


class Model(nn.Module):
    """`forward` gets the parts: layers by name, and parameters."""

    def __init__(self, function: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(self, *args)


def patches(size: Any = 4, dims: int = 2) -> nn.Module:
    return (nn.Conv2d if dims == 2 else nn.Conv3d)(3, WIDTH, size, size)


def flat(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


@pytest.fixture
def tokens(rewrite: Any) -> Callable[..., list[str | None]]:
    def told(model: nn.Module, *args: Any, **kwargs: Any) -> list[str | None]:
        result = rewrite(model.eval(), *args, variant=None, **kwargs)
        assert result.sites
        return [site.tokens for site in result.sites]

    return told


# --- grids -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "grid"), [((24, 24), "6x6"), ((16, 36), "4x9"), ((36, 16), "9x4")])
def test_patches_of_an_image(tokens: Any, size: Any, grid: str) -> None:
    model = Model(lambda m, x: m.b(m.a(flat(m.patch(x)))), patch=patches(), a=Attention(), b=Attention())
    assert tokens(model, torch.randn(2, 3, *size)) == [grid, grid]


@pytest.mark.parametrize("front", [1, 5])
def test_tokens_in_front_of_the_patches(tokens: Any, front: int) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = flat(m.patch(x))
        x = torch.cat([m.extra.expand(len(x), -1, -1), x], 1) + m.position
        return m.b(m.a(x))[:, 0]

    parts = {"extra": nn.Parameter(torch.randn(1, front, WIDTH)), "a": Attention(), "b": Attention()}
    model = Model(forward, patch=patches(), position=nn.Parameter(torch.randn(1, 24 + front, WIDTH)), **parts)
    assert tokens(model, torch.randn(2, 3, 16, 24)) == [f"4x6+{front}"] * 2


def test_class_token_then_registers_then_neither(tokens: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = torch.cat([m.cls.expand(len(x), -1, -1), flat(m.patch(x))], 1)
        x = m.a(x)
        x = m.b(torch.cat([x[:, :1], m.registers.expand(len(x), -1, -1), x[:, 1:]], 1))
        x = torch.cat([m.registers.expand(len(x), -1, -1), x], 1)
        x = m.c(m.b(x)[:, 2:])
        first, rest = x.split([3, 24], 1)
        return m.d(rest) + m.d(first).sum(1, True)

    parts = {name: Attention() for name in "abcd"}
    extra = {"cls": nn.Parameter(torch.randn(1, 1, WIDTH)), "registers": nn.Parameter(torch.randn(1, 2, WIDTH))}
    told = tokens(Model(forward, patch=patches(), **parts, **extra), torch.randn(2, 3, 16, 24))
    assert told == ["4x6+1", "4x6+3", "4x6+5", "4x6+3", "4x6", None]


def test_tokens_behind_the_patches_and_around_them(tokens: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = flat(m.patch(x))
        extra = m.extra.expand(len(x), -1, -1)
        x = m.a(torch.cat([x, extra], 1))
        x = m.b(torch.cat([extra[:, :1], x], 1))
        return m.c(x[:, 1:-2])

    parts: dict[str, Any] = {name: Attention() for name in "abc"}
    model = Model(forward, patch=patches(), extra=nn.Parameter(torch.randn(1, 2, WIDTH)), **parts)
    assert tokens(model, torch.randn(2, 3, 16, 24)) == ["4x6+0+2", "4x6+1+2", "4x6"]


@pytest.mark.parametrize(
    ("way", "grid"), [("even", "4x6"), ("all", "4x6"), ("shuffled", None), ("first", None), ("over", None)]
)
def test_what_is_written_into_an_empty_tensor(tokens: Any, way: str, grid: str | None) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = flat(m.patch(x))
        y = torch.empty_like(x)
        if way == "even":
            y[..., 0::2] = x[..., 1::2] * 2
            y[..., 1::2] = x[..., 0::2]
        elif way == "first":
            y[:, :5] = x[:, :5]
            y[:, 5:] = x[:, 5:]
        else:
            y[:] = x
        if way == "shuffled":
            y[..., 1::2] = x[:, torch.randperm(24)][..., 1::2]
        elif way == "over":
            y[:, 3] = x[:, 5]
        return m.a(y)

    assert tokens(Model(forward, patch=patches(), a=Attention()), torch.randn(2, 3, 16, 24)) == [grid]


@pytest.mark.parametrize(("frames", "grid"), [(16, "8x2x3"), (18, "9x2x3")])
def test_patches_of_a_video(tokens: Any, frames: int, grid: str) -> None:
    model = Model(lambda m, x: m.a(flat(m.patch(x))), patch=patches((2, 8, 8), 3), a=Attention())
    assert tokens(model, torch.randn(1, 3, frames, 16, 24)) == [grid]


def test_frames_one_by_one_and_together(tokens: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        batch, frames = x.shape[:2]
        x = m.a(flat(m.patch(x.flatten(0, 1))))  # in each frame
        x = x.unflatten(0, (batch, frames))
        x = m.b(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (batch, -1)).transpose(1, 2)  # over the frames
        return m.c(x.flatten(1, 2))

    model = Model(forward, patch=patches(8), a=Attention(), b=Attention(), c=Attention())
    assert tokens(model, torch.randn(2, 5, 3, 16, 24)) == ["2x3", None, "5x2x3"]


@pytest.mark.parametrize("cls", [False, True])
def test_patches_cut_by_views(tokens: Any, cls: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = x.unflatten(2, (-1, 4)).unflatten(4, (-1, 4)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        x = m.embed(x)
        return m.a(torch.cat([m.cls.expand(len(x), -1, -1), x], 1) if cls else x)

    parts = {"embed": nn.Linear(48, WIDTH), "cls": nn.Parameter(torch.randn(1, 1, WIDTH)), "a": Attention()}
    assert tokens(Model(forward, **parts), torch.randn(2, 3, 16, 24)) == ["4x6+1" if cls else "4x6"]


def test_pooling_between(tokens: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.patch(x)
        size = x.shape[-2:]
        x = m.a(flat(x)).transpose(1, 2).unflatten(2, size)
        x = m.b(flat(F.max_pool2d(x, 2)))
        x = x.transpose(1, 2).unflatten(2, (size[0] // 2, size[1] // 2))
        x = m.c(flat(m.conv(x)))
        x = F.interpolate(x.transpose(1, 2).unflatten(2, (2, 3)), scale_factor=3.0)
        return m.d(flat(x))

    parts = {name: Attention() for name in "abcd"}
    model = Model(forward, patch=patches(), conv=nn.Conv2d(WIDTH, WIDTH, 3, 2, 1), **parts)
    assert tokens(model, torch.randn(2, 3, 32, 48)) == ["8x12", "4x6", "2x3", "6x9"]


def test_a_feature_map(tokens: Any) -> None:
    """A non-local block: queries, keys and values from kernels of size 1, spelled out."""

    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = (conv(x).flatten(2) for conv in (m.q, m.k, m.v))
        return x + ((q.mT @ k).softmax(-1) @ v.mT).mT.unflatten(2, x.shape[2:])

    parts = {name: nn.Conv2d(WIDTH, WIDTH, 1) for name in "qkv"}
    assert tokens(Model(forward, **parts), torch.randn(2, WIDTH, 3, 5)) == ["3x5"]


def test_a_normalised_feature_map(tokens: Any) -> None:
    """The middle of an autoencoder: one head, from linear layers."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = F.silu(m.norm(m.conv(x)))
        return x + m.a(flat(x)).mT.reshape(x.shape)

    model = Model(forward, conv=nn.Conv2d(3, WIDTH, 3, padding=1), norm=nn.GroupNorm(2, WIDTH), a=Attention(1))
    assert tokens(model, torch.randn(2, 3, 5, 3)) == ["5x3"]


# --- windows ---------------------------------------------------------------------------------------------------------


def partition(x: Tensor, height: int, width: int) -> Tensor:
    batch, h, w, channels = x.shape
    x = x.view(batch, h // height, height, w // width, width, channels)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, height * width, channels)


def whole(x: Tensor, height: int, width: int, h: int, w: int) -> Tensor:
    x = x.view(-1, h // height, w // width, height, width, x.shape[-1])
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, h, w, x.shape[-1])


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("pad", [0, 1])
def test_windows_of_a_grid(tokens: Any, shift: int, pad: int) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = F.pad(m.patch(x).permute(0, 2, 3, 1), (0, 0, 0, 0, 0, pad))
        h, w = x.shape[1:3]
        x = torch.roll(x, (-shift, -shift), (1, 2)) if shift else x
        x = whole(m.a(partition(x, 2, 3)), 2, 3, h, w)
        x = torch.roll(x, (shift, shift), (1, 2)) if shift else x
        x = x[:, : h - pad]
        other = 4 if not pad else 3
        x = whole(m.b(partition(x, other, 2)), other, 2, *x.shape[1:3])  # cut otherwise than before
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 1::2]], -1)[..., :WIDTH] if not pad else x
        return m.c(x.flatten(1, 2))

    model = Model(forward, patch=patches(), a=Attention(), b=Attention(), c=Attention())
    told = tokens(model, torch.randn(2, 3, 4 * (8 - pad * 5), 24))
    assert told == (["2x3", "3x2", "3x6"] if pad else ["2x3", "4x2", "4x3"])


@pytest.mark.parametrize("way", ["pooled", "rolled"])
def test_windows_that_are_pooled(tokens: Any, way: str) -> None:
    """Pooled inside and side by side again they are a smaller map; moved inside, they are none."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.patch(x).permute(0, 2, 3, 1)
        h, w = x.shape[1:3]
        y = partition(x, 4, 6).view(-1, 4, 6, WIDTH)
        if way == "rolled":
            y = whole(m.a(y.roll(1, 1).flatten(1, 2)), 4, 6, h, w)
            return m.b(y.flatten(1, 2))
        y = F.max_pool2d(y.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
        y = whole(m.a(y.flatten(1, 2)), 2, 3, h // 2, w // 2)
        y = y + F.max_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
        y = whole(m.b(partition(y, 1, 6)), 1, 6, h // 2, w // 2)
        return m.c(y.flatten(1, 2))

    model = Model(forward, patch=patches(), a=Attention(), b=Attention(), c=Attention())
    told = tokens(model, torch.randn(2, 3, 32, 48))
    assert told == ["2x3", None, "4x6"] if way == "pooled" else told[-1] != "8x12"


def test_a_dilated_grid_and_one_axis_alone(tokens: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.patch(x).permute(0, 2, 3, 1)
        batch, h, w, _ = x.shape
        y = x.view(batch, 2, h // 2, 3, w // 3, -1).permute(0, 2, 4, 1, 3, 5).reshape(-1, 6, WIDTH)
        return m.a(y).sum() + m.b(x.flatten(0, 1)).sum() + m.c(x.transpose(1, 2).flatten(1, 2)).sum()

    model = Model(forward, patch=patches(), a=Attention(), b=Attention(), c=Attention())
    assert tokens(model, torch.randn(2, 3, 16, 24)) == ["2x3", None, "6x4"]


# --- what is not known -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [16, 49, 50, 197])
def test_a_sequence_has_no_grid(tokens: Any, length: int) -> None:
    assert tokens(Model(lambda m, x: m.a(x), a=Attention()), torch.randn(2, length, WIDTH)) == [None]


def test_a_convolution_over_a_sequence(tokens: Any) -> None:
    model = Model(lambda m, x: m.a(m.conv(x).mT), conv=nn.Conv1d(3, WIDTH, 4, 4), a=Attention())
    assert tokens(model, torch.randn(2, 3, 64)) == [None]
    model = Model(lambda m, x: m.a(m.conv(x[:, None]).squeeze(-1).mT), conv=nn.Conv2d(1, WIDTH, (4, 8)), a=Attention())
    assert tokens(model, torch.randn(2, 19, 8)) == [None]


def mixed(way: str) -> Callable[[Any, Tensor], Tensor]:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = flat(m.patch(x))
        if way == "shuffled":
            x = x[:, torch.arange(24).flip(0)]
        elif way == "rolled":
            x = x.roll(1, 1)
        elif way == "cut":
            x = x[:, 1:]
        elif way == "two":
            x = torch.cat([x, x], 1)
        elif way == "transposed":
            x = x + x.view(-1, 4, 6, WIDTH).transpose(1, 2).reshape(x.shape)
        elif way == "by windows":  # in the order of a hierarchy, not of rows
            x = x.view(-1, 2, 2, 3, 2, WIDTH).transpose(2, 3).reshape(x.shape)
        elif way == "mixed":
            x = m.mix(x.mT).mT
        elif way == "dropped":
            x = torch.cat([x[:, :1], x[:, 12:]], 1)
        return m.a(x)

    return forward


@pytest.mark.parametrize("way", ["shuffled", "rolled", "cut", "two", "transposed", "by windows", "mixed", "dropped"])
def test_what_ends_the_knowledge(tokens: Any, way: str) -> None:
    model = Model(mixed(way), patch=patches(), mix=nn.Linear(24, 24), a=Attention())
    assert tokens(model, torch.randn(2, 3, 16, 24)) == [None]


@pytest.mark.parametrize(("sizes", "grid"), [((4, 6), "4x6"), ((2, 3, 4), "2x3x4"), ((24,), None)])
def test_positions_on_a_mesh_tell_the_grid(tokens: Any, sizes: Any, grid: str | None) -> None:
    """Of tokens that come packed: who turns queries by where they stand says where that is."""

    def forward(m: Any, x: Tensor) -> Tensor:
        mesh = torch.stack(torch.meshgrid(*map(torch.arange, sizes), indexing="ij")).flatten(1).T
        angles = (mesh.unsqueeze(-1) / torch.arange(1, 5)).flatten(1)[:, :4].repeat_interleave(2, -1)
        q = x * angles.cos() + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * angles.sin()
        return F.scaled_dot_product_attention(q, q, x)

    assert tokens(Model(forward), torch.randn(2, 24, WIDTH)) == [grid]


def test_queries_of_their_own_look_at_a_grid(tokens: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = flat(m.patch(x))
        q = m.queries.expand(len(x), -1, -1)
        return F.scaled_dot_product_attention(q, x, x).sum() + F.scaled_dot_product_attention(x, q, q).sum()

    model = Model(forward, patch=patches(), queries=nn.Parameter(torch.randn(1, 16, WIDTH)))
    # The second has parameters for keys, which makes it a linear layer.
    assert tokens(model, torch.randn(2, 3, 16, 24)) == [None]


def test_heads_are_no_axis_of_space(tokens: Any) -> None:
    """Queries, keys and values as inputs: of four axes, none is said to be of an image."""
    model = Model(F_sdpa)
    assert tokens(model, *(torch.randn(2, 4, 16, WIDTH) for _ in range(3))) == [None]
    model = Model(lambda m, q, k, v: F.scaled_dot_product_attention(*(x.flatten(1, 2) for x in (q, k, v))))
    assert tokens(model, *(torch.randn(2, 4, 16, WIDTH) for _ in range(3))) == [None]


def F_sdpa(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


@given(data=st.data())
@settings(max_examples=30)
def test_views_carry_places(data: st.DataObject) -> None:
    """What is said of each axis is what an index that goes through the same views says."""
    shape, steps = [2, WIDTH, 4, 6], []
    for _ in range(data.draw(st.integers(1, 5))):
        if data.draw(st.booleans()):
            order = data.draw(st.permutations(range(len(shape))))
            steps.append(("permute", order))
            shape = [shape[axis] for axis in order]
        else:
            primes = [p for size in shape for p in ([2] * (size & -size).bit_length())[1:] + [3] * (size % 3 == 0)]
            if data.draw(st.booleans()):
                primes = data.draw(st.permutations(primes))
            cuts = sorted(data.draw(st.sets(st.integers(1, len(primes) - 1), max_size=4)))
            shape = [math.prod(primes[i:j]) for i, j in itertools.pairwise([0, *cuts, len(primes)])]
            steps.append(("reshape", shape))

    def views(x: Tensor) -> Tensor:
        for name, numbers in steps:
            x = getattr(x, name)(list(numbers))
        return x

    model = Model(lambda m, x: views(m.patch(x)), patch=patches()).eval()
    graph = exported(torch.export.export(model, (torch.randn(2, 3, 16, 24),))).graph
    mark_data(graph)
    known = layouts(graph, {})
    last, first = (next(n for n in nodes if n in known) for nodes in (reversed(graph.nodes), _convolutions(graph)))
    if last is not first and list(last.meta["val"].shape) == shape:
        for place, size in enumerate(first.meta["val"].shape):
            (origin,) = (piece.of for piece in known[first][place])
            index = torch.arange(size).view(-1, *[1] * (3 - place)).expand(2, WIDTH, 4, 6)
            told = [
                sum(numbers(pieces, origin), torch.zeros(length, dtype=torch.long))
                for pieces, length in zip(known[last], shape, strict=True)
            ]
            if math.prod(piece.size for axis in known[last] for piece in axis if piece.of is origin) == size:
                expected = sum(axis.view(-1, *[1] * (len(shape) - 1 - i)) for i, axis in enumerate(told))
                assert torch.equal(views(index), expected.expand(shape))  # type: ignore[union-attr]


def _convolutions(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    return graph.find_nodes(op="call_function", target=torch.ops.aten.conv2d.default)


def numbers(pieces: Any, origin: Any) -> list[Tensor]:
    """For each place of an axis, what its pieces of this origin add to the place in the origin."""
    sizes = [piece.size for piece in pieces]
    found = []
    for i, piece in enumerate(pieces):
        if piece.of is origin:
            inner, outer = math.prod(sizes[i + 1 :]), math.prod(sizes[:i])
            found.append((torch.arange(piece.size) * piece.stride).repeat_interleave(inner).repeat(outer))
    return found


# --- what the attention itself tells, symbols, keys, cost ------------------------------------------------------------


def decomposed(m: Any, x: Tensor) -> Tensor:
    """Positions relative to each other, along each axis of a grid of 3 x 5."""
    q, k, v = (layer(x) for layer in (m.q, m.k, m.v))
    grid = q.view(-1, 3, 5, WIDTH)
    along_h = torch.einsum("bhwc,hkc->bhwk", grid, m.table_h)
    along_w = torch.einsum("bhwc,wkc->bhwk", grid, m.table_w)
    scores = (q @ k.mT).view(-1, 3, 5, 3, 5) + along_h[..., :, None] + along_w[..., None, :]
    return scores.view(-1, 15, 15).softmax(-1) @ v


def test_a_bias_for_each_axis_tells_the_grid(tokens: Any) -> None:
    tables = {"table_h": nn.Parameter(torch.randn(3, 3, WIDTH)), "table_w": nn.Parameter(torch.randn(5, 5, WIDTH))}
    model = Model(decomposed, **{name: nn.Linear(WIDTH, WIDTH) for name in "qkv"}, **tables)
    assert tokens(model, torch.randn(2, 15, WIDTH)) == ["3x5"]


def test_symbolic_sizes(tokens: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = flat(m.patch(x))
        return m.b(m.a(torch.cat([m.cls.expand(len(x), -1, -1), x], 1))[:, 1:])

    extra = {"cls": nn.Parameter(torch.randn(1, 1, WIDTH)), "a": Attention(), "b": Attention()}
    model = Model(forward, patch=patches(), **extra)
    assert tokens(model, torch.randn(2, 3, 16, 24), dynamic=True) == ["?x?+1", "?x?"]


def test_an_exported_program() -> None:
    model = Model(lambda m, x: m.a(flat(m.patch(x))), patch=patches(), a=Attention()).eval()
    (site,) = detect(exported(torch.export.export(model, (torch.randn(2, 3, 16, 24),)))).sites
    assert site.tokens == "4x6"


def test_the_key_says_it_where_it_is_known() -> None:
    facts: dict[str, Any] = {"path": "", "heads": 1, "kv_heads": 1, "head_dim": 8, "v_head_dim": 8, "dtype": "float32"}
    unknown = AttentionSite(**facts, scale=1.0, mask=Full())
    known = dataclasses.replace(unknown, tokens="4x6+1")
    assert "tokens" not in unknown.key() and known.key() == f"{unknown.key()},tokens=4x6+1"
    assert AttentionSite.parse(known.key()) == known and AttentionSite.parse(unknown.key()) == unknown


def test_the_cost_of_a_node(rewrite: Any) -> None:
    layers = nn.Sequential(*(Attention() for _ in range(8)))
    model = Model(lambda m, x: m.layers(flat(m.patch(x))), patch=patches(), layers=layers)
    result = rewrite(model, torch.randn(2, 3, 16, 24), variant=None)
    (graph,), ends = result.graphs, {match.output: match.reading for match in result.matches}
    mark_data(graph.graph)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        known = layouts(graph.graph, ends)
        seconds.append(time.perf_counter() - start)
    assert len(ends) == 8 and len(known) > len(graph.graph.nodes) // 3
    assert min(seconds) < 2e-4 * len(graph.graph.nodes)


# --- models of libraries ---------------------------------------------------------------------------------------------


def test_timm(tokens: Any) -> None:
    models = pytest.importorskip("timm.models")
    small: dict[str, Any] = {"embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 0}
    vit = models.VisionTransformer(img_size=224, patch_size=16, **small)
    assert tokens(vit, torch.randn(1, 3, 224, 224)) == ["14x14+1"]
    vit = models.VisionTransformer(img_size=(32, 48), patch_size=8, reg_tokens=4, **small)
    assert tokens(vit, torch.randn(1, 3, 32, 48)) == ["4x6+5"]
    vit = models.VisionTransformer(img_size=(32, 48), patch_size=8, class_token=False, global_pool="avg", **small)
    assert tokens(vit, torch.randn(1, 3, 32, 48)) == ["4x6"]


@pytest.mark.slow
def test_timm_windows(tokens: Any) -> None:
    timm = pytest.importorskip("timm")
    swin = timm.create_model("swin_tiny_patch4_window7_224", embed_dim=24, depths=(2, 2, 2, 2), num_heads=(2, 2, 2, 2))
    assert tokens(swin, torch.randn(1, 3, 224, 224)) == ["7x7"] * 8
    sam = timm.create_model("samvit_base_patch16", depth=3, embed_dim=64, num_heads=2, global_attn_indexes=(2,))
    assert tokens(sam, torch.randn(1, 3, 128, 192)) == ["14x14", "14x14", "8x12"]


@pytest.mark.slow
def test_torchvision(tokens: Any) -> None:
    models = pytest.importorskip("torchvision.models")
    facts: dict[str, Any] = {"patch_size": [2, 4, 4], "embed_dim": 8, "depths": [2], "num_heads": [2]}
    swin = models.video.SwinTransformer3d(window_size=[4, 3, 3], **facts)
    assert tokens(swin, torch.randn(1, 3, 16, 32, 48)) == ["4x3x3"] * 2
    vit = models.VisionTransformer(32, 8, 1, 2, 16, 16)
    assert tokens(vit, torch.randn(1, 3, 32, 32)) == ["4x4+1"]


@pytest.mark.slow
def test_transformers(tokens: Any) -> None:
    hf = pytest.importorskip("transformers")
    facts: dict[str, Any] = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": [32, 48], "patch_size": 8,
    }  # fmt: skip
    assert tokens(hf.ViTModel(hf.ViTConfig(**facts)), torch.randn(1, 3, 32, 48)) == ["4x6+1"]
    # Its tokens of detections stand behind those of the image.
    yolos = hf.YolosModel(hf.YolosConfig(**facts, num_detection_tokens=5))
    assert tokens(yolos, torch.randn(1, 3, 32, 48)) == ["4x6+1+5"]
    video = {**facts, "image_size": 32, "num_frames": 8}
    assert tokens(hf.VideoMAEModel(hf.VideoMAEConfig(**video)), torch.randn(1, 8, 3, 32, 32)) == ["4x4x4"]
