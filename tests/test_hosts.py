"""Every variant that is not exact, in models of libraries: it is what runs there, and the guard says what it costs.

The models are small and have random weights. What they should give is computed apart from any rewriting: the model as
its author wrote it, where PyTorch's function for attention gives way to the definition of the variant.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rewriter
from rewriter.guard import error, model_tolerance
from rewriter.metrics import primary
from rewriter.plan import Plan
from rewriter.session import unrouted
from rewriter.site import AttentionSite
from rewriter.target import Target
from rewriter.variant import Config, Variant, variants

Made = tuple[nn.Module, Callable[[], dict[str, Any]]]
"""A model, and what makes the keyword arguments of a call."""


@dataclass(frozen=True)
class Host:
    """A model of a library. `tokens` of its self-attentions, `real` the part of its output that is no padding."""

    make: Callable[[], Made]
    tokens: str | None = None
    real: Callable[[Tensor, Mapping[str, Any]], Tensor] = lambda out, call: out


def language_model() -> Made:
    """Grouped heads, and a batch that is padded on the right."""
    hf = pytest.importorskip("transformers")
    config = hf.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, use_cache=False,
    )  # fmt: skip

    def call() -> dict[str, Any]:
        ids, mask = torch.randint(0, 64, (2, 1100)), torch.ones(2, 1100, dtype=torch.long)
        mask[1, 1000:] = 0
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    return hf.LlamaForCausalLM(config), call


def encoder() -> Made:
    """Both directions, and a batch that is padded."""
    hf = pytest.importorskip("transformers")
    config = hf.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=700,
    )  # fmt: skip

    def call() -> dict[str, Any]:
        mask = torch.ones(2, 700, dtype=torch.long)
        mask[1, 600:] = 0
        return {"input_ids": torch.randint(0, 64, (2, 700)), "attention_mask": mask}

    return hf.BertModel(config), call


def picture() -> Made:
    """A grid of odd sides behind a token of class and registers."""
    timm = pytest.importorskip("timm.models")
    model = timm.VisionTransformer(
        img_size=(92, 108), patch_size=4, embed_dim=32, depth=1, num_heads=2, reg_tokens=4, num_classes=0,
        global_pool="",
    )  # fmt: skip
    return model, lambda: {"x": torch.randn(2, 3, 92, 108)}


def diffusion() -> Made:
    """A grid alone, that attends to a text beside."""
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=1, norm_num_groups=1,
        cross_attention_dim=16, sample_size=48, patch_size=2, caption_channels=12, use_additional_conditions=False,
    )  # fmt: skip
    return model, lambda: {
        "hidden_states": torch.randn(2, 4, 52, 40),
        "encoder_hidden_states": torch.randn(2, 7, 12),
        "timestep": torch.tensor([3, 5]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def video() -> Made:
    """Tubes of a video."""
    hf = pytest.importorskip("transformers")
    config = hf.VideoMAEConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=48, patch_size=4,
        num_frames=8, tubelet_size=2,
    )  # fmt: skip
    return hf.VideoMAEModel(config), lambda: {"pixel_values": torch.randn(2, 8, 3, 48, 48)}


def text_and_video() -> Made:
    """A video behind the text that it attends to jointly."""
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=4,
        text_embed_dim=12, num_layers=1, sample_width=32, sample_height=24, sample_frames=21, patch_size=2,
        max_text_seq_length=7,
    )  # fmt: skip
    return model, lambda: {
        "hidden_states": torch.randn(2, 6, 4, 24, 32),
        "encoder_hidden_states": torch.randn(2, 7, 12),
        "timestep": torch.tensor([3, 5]),
    }


def picture_and_text() -> Made:
    """A picture in front of the text that it attends to jointly."""
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.SD3Transformer2DModel(
        sample_size=64, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        caption_projection_dim=16, joint_attention_dim=12, pooled_projection_dim=10, out_channels=4,
        pos_embed_max_size=64,
    )  # fmt: skip
    return model, lambda: {
        "hidden_states": torch.randn(2, 4, 64, 40),
        "encoder_hidden_states": torch.randn(2, 7, 12),
        "pooled_projections": torch.randn(2, 10),
        "timestep": torch.tensor([3, 5]),
    }


def rotated_video() -> Made:
    """Rotated positions that are written into an empty tensor, part by part."""
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=12,
        freq_dim=16, ffn_dim=32, num_layers=1, rope_max_seq_len=64,
    )  # fmt: skip
    return model, lambda: {
        "hidden_states": torch.randn(2, 4, 5, 18, 26),
        "encoder_hidden_states": torch.randn(2, 7, 12),
        "timestep": torch.tensor([3, 5]),
    }


def padded_video() -> Made:
    """A batch of videos of which one is smaller."""
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, num_layers=1,
        cross_attention_dim=48, sample_width=24, sample_height=16, sample_frames=6, caption_channels=12,
    )  # fmt: skip

    def call() -> dict[str, Any]:
        mask = torch.ones(2, 6, 16, 24)
        mask[1, :, :, 20:] = 0
        return {
            "hidden_states": torch.randn(2, 4, 6, 16, 24),
            "encoder_hidden_states": torch.randn(2, 7, 12),
            "timestep": torch.tensor([3, 5]),
            "attention_mask": mask,
            "encoder_attention_mask": torch.ones(2, 7),
        }

    return model, call


HOSTS = {
    "language_model": Host(language_model, None, lambda out, call: out[call["attention_mask"] == 1]),
    "encoder": Host(encoder, None, lambda out, call: out[call["attention_mask"] == 1]),
    "picture": Host(picture, "23x27+5"),
    "diffusion": Host(diffusion, "26x20"),
    "video": Host(video, "4x12x12"),
    "text_and_video": Host(text_and_video, "6x12x16+7"),
    "picture_and_text": Host(picture_and_text, "32x20+0+7"),
    "rotated_video": Host(rotated_video, "5x9x13"),
    "padded_video": Host(padded_video, "6x8x12", lambda out, call: out[:, :, call["attention_mask"][1] == 1]),
}
CONFIGS = {"sale": {"tau": 0.1, "local": 128, "steps": "token", "rounded": False, "floor": 1024}}
"""Where what a variant offers first changes nothing: random weights prefer no part of a text."""
APPROXIMATIONS = [name for name, variant in variants().items() if variant.fidelity != "exact"]


@dataclass(frozen=True)
class Ready:
    """A host with what is known of it: its calls, and the sites of its self-attentions."""

    model: nn.Module
    calls: Sequence[dict[str, Any]]
    sites: Sequence[AttentionSite]

    def suits(self, variant: Variant) -> bool:
        """Does it apply here, and need what is known here? Who needs no grid is tried where there is none."""
        target = Target.current()
        blind = any(site.tokens and variant.takes(replace(site, tokens=None), target) for site in self.sites)
        return not blind and all(variant.takes(site, target) for site in self.sites)


@cache
def ready(host: str) -> Ready:
    """The model, with weights large enough that attention prefers some tokens, and some calls."""
    torch.manual_seed(1)
    model, call = HOSTS[host].make()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=1.5 / math.sqrt(parameter[0].numel()))
    calls = [call() for _ in range(3)]
    sites = rewriter.explain(model.eval(), **calls[0]).sites
    return Ready(model, calls, [site for site in sites if site.q_len == site.kv_len])


def defined(model: nn.Module, plan: Plan, sites: Sequence[AttentionSite]) -> Callable[..., Tensor]:
    """`scaled_dot_product_attention` as the plan defines it. The calls are those of the sites, in their order."""
    original, left = F.scaled_dot_product_attention, iter(sites)

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **rest: Any) -> Any:
        if query.shape[2] != key.shape[2]:
            return original(query, key, value, attn_mask, **rest)
        site = next(left)
        decision = plan.decision_for(site.path)
        learned = {"module": model.rewriter[site.path.replace(".", "__")]} if decision.fidelity == "learned" else {}
        key, value = (t[:, :: t.shape[1] // site.kv_heads] for t in (key, value))
        padding = None
        if attn_mask is not None:
            seen = attn_mask if attn_mask.dtype == torch.bool else attn_mask > -1000
            padding = seen.flatten(1, 2).any(1)
        reference = variants()[decision.variant].reference
        return reference(query, key, value, attn_mask, padding, site, decision.config, **learned)

    return attend


@torch.no_grad()
def check(host: str, name: str, monkeypatch: pytest.MonkeyPatch, configs: Sequence[Config] = ()) -> None:
    """Of the configs, the sites take turns; without any, all have the one that is offered first."""
    known, real = ready(host), HOSTS[host].real
    model, call = known.model, known.calls[0]

    def result() -> Tensor:
        return real(primary(model(**call)), call)

    original = result()
    configs = configs or ([CONFIGS[name]] if name in CONFIGS else [])
    turns: Any = itertools.cycle([(name, config) for config in configs] or [name])
    plan = Plan.for_model(model, dict(zip(known.sites, turns, strict=False)))
    rewriter.optimize(model, known.calls, plan=plan, max_drop=100.0, worst_drop=100.0)
    try:
        out, report, found = result(), rewriter.report_of(model), rewriter.plan_of(model)
        with unrouted(model), monkeypatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", defined(model, found, known.sites))
            expected = result()
    finally:
        rewriter.restore(model)
    assert error(out, expected) <= model_tolerance(torch.float32), "the host computes what the variant defines"
    assert error(original, expected) > 100 * model_tolerance(torch.float32), "which is something else"
    assert torch.equal(result(), original)

    assert {d.path: d.variant for d in found.decisions} == {site.path: name for site in known.sites}
    assert not any("original code" in note for note in report.notes if "not in the plan" not in note)
    verdict, timing = report.verdict, report.timings[0]
    assert verdict.held and verdict.samples == 6 and math.isfinite(verdict.upper) and verdict.drop != 0
    assert 0 < timing.original < math.inf and 0 < timing.result < math.inf


@pytest.mark.parametrize("host", HOSTS)
def test_how_tokens_lie_is_known(host: str) -> None:
    sites = ready(host).sites
    assert sites and {site.tokens for site in sites} == {HOSTS[host].tokens}


def suited(name: str) -> list[str]:
    """The hosts of a variant. Others begin with others."""
    found = [host for host in HOSTS if ready(host).suits(variants()[name])]
    turn = APPROXIMATIONS.index(name)
    return [host for n in range(3) for host in found[(turn + n) % 3 :: 3]]


@pytest.mark.parametrize("name", APPROXIMATIONS)
def test_a_variant_in_hosts_that_suit_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = suited(name)
    assert hosts
    for host in hosts[: -(-len(hosts) // 3)]:
        check(host, name, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", APPROXIMATIONS)
def test_a_variant_in_the_other_hosts_that_suit_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = suited(name)
    for host in hosts[-(-len(hosts) // 3) :]:
        check(host, name, monkeypatch)


@pytest.mark.parametrize(
    ("host", "name", "configs"),
    [
        ("picture", "halo", [{"block": "5x6", "halo": 2, "border": "zero"}]),
        ("rotated_video", "axial", [{"axis": "all"}]),
        ("picture_and_text", "axial", [{"axis": 0}, {"axis": 1}]),
    ],
    ids=["zeros around a picture", "all axes", "axes that take turns"],
)
def test_configs_in_hosts(host: str, name: str, configs: Sequence[Config], monkeypatch: pytest.MonkeyPatch) -> None:
    check(host, name, monkeypatch, configs)


WINDOWS = [("picture", (4, 4), (7, 5)), ("diffusion", (2, 2), (7, 5)), ("rotated_video", (1, 2, 2), (2, 3, 5))]


def cells(pixels: Tensor, sides: Sequence[int]) -> Tensor:
    """Of (channels, *pixels), the sum of each cell of a grid."""
    pixels = pixels.sum(0)
    for axis, side in enumerate(sides):
        pixels = pixels.unflatten(axis, (side, -1)).sum(axis + 1)
    return pixels


@pytest.mark.parametrize(("host", "patch", "window"), WINDOWS, ids=[each[0] for each in WINDOWS])
def test_a_query_sees_its_window_of_the_input(host: str, patch: Any, window: Any) -> None:
    """By gradients, and by nothing that is said of how tokens lie."""
    known = ready(host)
    model, call = known.model, dict(known.calls[0])
    name, pixels = next(iter(call.items()))
    pixels = pixels.clone().requires_grad_()
    sides = [size // part for size, part in zip(pixels.shape[2:], patch, strict=True)]
    config = {"window": "x".join(map(str, window))}
    rewriter.apply(model, Plan.for_model(model, {site: ("neighborhood", config) for site in known.sites}))
    try:
        out = primary(model(**call | {name: pixels}))[0]
    finally:
        rewriter.restore(model)
    out = out if out.dim() > 2 else out[-math.prod(sides) :].T.unflatten(1, sides)
    out = cells(out[:1], sides)  # of a channel: all that a norm gives has the sum 0
    for query in ([side // 2 for side in sides], [1, *(side - 1 for side in sides[1:])]):
        (found,) = torch.autograd.grad(out[*query], pixels, retain_graph=True)
        starts = [min(max(q - w // 2, 0), side - w) for q, w, side in zip(query, window, sides, strict=True)]
        expected = torch.zeros(sides, dtype=torch.bool)
        expected[*(slice(start, start + w) for start, w in zip(starts, window, strict=True))] = True
        assert torch.equal(cells(found[0].abs(), sides) > 0, expected) and not found[1:].any()
