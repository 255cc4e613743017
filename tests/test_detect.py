"""Every attention of a model is found where it is, and what is not taken is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

import rewriter
from rewriter.backend import GraphRewriter
from rewriter.capture import compiled, exported
from rewriter.detect import detect
from rewriter.guard import error, tolerance
from rewriter.instances import Names
from rewriter.lower import Lowered
from rewriter.passes import Rewrite, rewritten
from rewriter.select import Selector
from rewriter.site import Causal, Dense, Full, Padding
from rewriter.variant import variants

EXACT = 10 * tolerance(torch.float32)  # Of a whole model: rounding adds up.


class Block(nn.Module):
    """One self-attention, as the eager code of many models."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split(project(x)) for project in (self.q, self.k, self.v))
        weights = (q @ k.mT * 0.3).softmax(-1)
        return x + (weights @ v).transpose(1, 2).flatten(2)


class Tower(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def paths(result: Any) -> list[str]:
    return [site.path for site in result.sites]


# --- models of libraries ---------------------------------------------------------------------------------------------

FACTS: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip


def text(model: str, config: str, *names: str, **facts: Any) -> tuple[Callable[[str], nn.Module], list[str], str]:
    def build(impl: str) -> nn.Module:
        return getattr(hf, model)(getattr(hf, config)(**(FACTS | facts), attn_implementation=impl))

    return build, list(names), "text"


def image(model: str, config: str, *names: str, **facts: Any) -> tuple[Callable[[str], nn.Module], list[str], str]:
    def build(impl: str) -> nn.Module:
        return getattr(hf, model)(getattr(hf, config)(**(VISION | facts), attn_implementation=impl))

    return build, list(names), "image"


def two(form: str) -> tuple[str, str]:
    return form.format(0), form.format(1)


MODELS = {
    "gpt2": text("GPT2LMHeadModel", "GPT2Config", *two("transformer.h.{}.attn"), n_embd=16, n_layer=2, n_head=2),
    "bert": text("BertModel", "BertConfig", *two("encoder.layer.{}.attention.self")),
    "distilbert": text(
        "DistilBertModel", "DistilBertConfig", *two("transformer.layer.{}.attention"),
        dim=16, hidden_dim=16, n_layers=2, n_heads=2,
    ),
    "neox": text("GPTNeoXForCausalLM", "GPTNeoXConfig", *two("gpt_neox.layers.{}.attention")),
    "opt": text(
        "OPTForCausalLM", "OPTConfig", *two("model.decoder.layers.{}.self_attn"), ffn_dim=16, word_embed_proj_dim=16
    ),
    "modernbert": text(
        "ModernBertModel", "ModernBertConfig", *two("layers.{}.attn"), local_attention=4, cls_token_id=1,
        sep_token_id=2,
    ),
    "router": text(  # The softmax of its router is none.
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig", *two("model.layers.{}.self_attn"), head_dim=8, num_experts=4,
        num_key_value_heads=1, num_experts_per_tok=2, moe_intermediate_size=8,
    ),
    "phi3": text("Phi3ForCausalLM", "Phi3Config", *two("model.layers.{}.self_attn"), num_key_value_heads=1),
    "encoder-decoder": text(
        "BartModel", "BartConfig", *two("encoder.layers.{}.self_attn"), "decoder.layers.0.self_attn",
        "decoder.layers.0.encoder_attn", d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
    ),
    "vit": image("ViTModel", "ViTConfig", *two("layers.{}.attention")),
    "dinov2": image("Dinov2Model", "Dinov2Config", *two("encoder.layer.{}.attention")),
    "siglip": image("SiglipVisionModel", "SiglipVisionConfig", *two("encoder.layers.{}.self_attn"), "head.attention"),
}  # fmt: skip
QUICK = {"gpt2-eager", "phi3-sdpa", "modernbert-eager", "router-sdpa", "vit-eager", "siglip-sdpa"}
RUNS = [
    pytest.param(*model, impl, id=f"{name}-{impl}", marks=[] if f"{name}-{impl}" in QUICK else [pytest.mark.slow])
    for name, model in MODELS.items()
    for impl in ("eager", "sdpa")
]


@pytest.mark.parametrize(("build", "expected", "kind", "impl"), RUNS)
def test_models(rewrite: Any, build: Any, expected: list[str], kind: str, impl: str) -> None:
    model = build(impl).eval()
    call = (
        {"pixel_values": torch.randn(2, 3, 16, 16)} if kind == "image" else {"input_ids": torch.randint(3, 64, (2, 7))}
    )
    with torch.no_grad():
        result = rewrite(model, **call)
        assert paths(result) == expected, result.refusals
        assert not result.refusals
        assert len(result.graphs) == 1
        assert result.sites[0].spelling == impl
        assert error(result.out[0], model(**call)[0]) <= EXACT


def test_a_vision_transformer_of_timm(rewrite: Any) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3).eval()
    x = torch.randn(2, 3, 32, 32)
    for fused in (True, False):
        for block in model.blocks:
            block.attn.fused_attn = fused
        result = rewrite(model, x)
        assert paths(result) == ["blocks.0.attn", "blocks.1.attn"]
        assert {site.spelling for site in result.sites} == {"sdpa" if fused else "eager"}
        assert error(result.out, model(x)) <= EXACT


BOTH = pytest.mark.parametrize("impl", ["eager", pytest.param("sdpa", marks=pytest.mark.slow)])


@BOTH
def test_training_with_gradients(rewrite: Any, tiny_lm: Any, impl: str) -> None:
    model, tokens = tiny_lm(impl).train(), torch.randint(3, 128, (2, 9))
    result = rewrite(model, input_ids=tokens, labels=tokens)
    assert paths(result) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    parameters = list(model.parameters())
    actual = torch.autograd.grad(result.out.loss, parameters)
    wanted = torch.autograd.grad(model(input_ids=tokens, labels=tokens).loss, parameters)
    assert max(map(error, actual, wanted)) <= EXACT


def test_dropout_in_training(rewrite: Any, tiny_lm: Any) -> None:
    model = tiny_lm("eager", num_hidden_layers=1, attention_dropout=0.1).train()
    result = rewrite(model, input_ids=torch.randint(3, 128, (2, 9)))
    assert [site.dropout_p for site in result.sites] == [0.1]


@BOTH
def test_generate(rewrite: Any, tiny_lm: Any, impl: str) -> None:
    model, tokens = tiny_lm(impl, num_hidden_layers=1), torch.randint(3, 128, (2, 7))
    call = {"attention_mask": torch.ones(2, 7, dtype=torch.long), "max_new_tokens": 6, "do_sample": False}
    call["attention_mask"][0, :3] = 0
    expected = model.generate(tokens, **call)
    result = rewrite(model)
    model._compiled_call_impl = result.run
    assert torch.equal(model.generate(tokens, **call), expected)
    assert not result.refusals
    assert set(paths(result)) == {"model.layers.0.self_attn"}
    found = [(site.q_len, site.kv_len, site.mask) for site in result.sites]
    assert found[0] == (7, 7, Causal() & Padding())
    assert found[-1] == (1, None, Padding())


# --- exported programs -----------------------------------------------------------------------------------------------


def check_export(model: nn.Module, *args: Any, dynamic: Any = None) -> list[Any]:
    program = torch.export.export(model, args, dynamic_shapes=dynamic)
    work = Rewrite(exported(program), {})
    work.detection = detect(work.graph)
    expected = work.graph(*args)
    graph = rewritten(work, lambda match: variants()["original"].build(match.site, {}))
    actual = expected if graph is None else graph(*args)
    first = [t if isinstance(t, Tensor) else t[0] for t in (actual, expected)]
    assert error(*first) <= EXACT if first[0].dtype == torch.float32 else tolerance(first[0].dtype)
    return work.detection.sites


@pytest.mark.parametrize(("impl", "dtype"), [("eager", torch.bfloat16), ("sdpa", torch.float32)])
def test_exported_language_model(tiny_lm: Any, impl: str, dtype: torch.dtype) -> None:
    """The bfloat16 one normalises in float32: export puts assertions about that type beside the cast."""
    model = tiny_lm(impl, use_cache=False).to(dtype)
    sites = check_export(model, torch.randint(3, 128, (2, 9)))
    assert [(s.path, s.mask) for s in sites] == [(f"model.layers.{i}.self_attn", Causal()) for i in range(2)]


def test_exported_with_symbolic_sizes() -> None:
    shape = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", min=2)}
    sites = check_export(Tower(Block()), torch.randn(2, 9, 16), dynamic=(shape,))
    assert [(s.path, s.batch, s.q_len, s.heads) for s in sites] == [("layers.0", None, None, 2)]


class State(nn.Module):
    """Attention with a number that belongs to the model's state: it may be trained or loaded after the export."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        number = torch.tensor(0.3)
        if kind == "parameter":
            self.number: Any = nn.Parameter(number)
        elif kind == "constant":
            self.number = 0.3
        else:
            self.register_buffer("number", number, persistent=kind == "buffer")

    def forward(self, q: Tensor) -> Tensor:
        return (q @ q.mT * self.number).softmax(-1) @ q


@pytest.mark.parametrize(
    ("kind", "scale", "factor"),
    [("constant", 0.3, None), ("parameter", 1.0, "scalar"), ("buffer", 1.0, "scalar"), ("temporary", 1.0, "scalar")],
)
def test_state_is_no_constant_of_an_exported_program(kind: str, scale: float, factor: str | None) -> None:
    model, x = State(kind), torch.randn(1, 2, 5, 4)
    (site,) = check_export(model, x)
    assert (site.scale, site.factor, site.edits) == (pytest.approx(scale), factor, ())
    work = Rewrite(exported(torch.export.export(model, (x,))), {})
    work.detection = detect(work.graph)
    graph = rewritten(work, lambda match: variants()["original"].build(match.site, {}))
    assert graph is not None and any(isinstance(module, Lowered) for module in graph.children())
    held = [*graph.parameters(), *graph.buffers()]
    if kind != "constant":
        assert len(held) == 1 and held[0] == 0.3
        model.number.data.fill_(0.7)
        held[0].data.fill_(0.7)
    assert error(graph(x), model(x)) <= EXACT


class Called(nn.Module):
    """One call of the fused operator, with a mask that is given or a causal one."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal, self.project = causal, nn.Linear(16, 48)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.project(x).chunk(3, -1))
        seen = None if self.causal else mask
        out = F.scaled_dot_product_attention(q, k, v, seen, is_causal=self.causal, scale=0.25)
        return out.transpose(1, 2).flatten(2)


_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_exported_and_decomposed(fused: bool, causal: bool) -> None:
    """A program of core operators holds the kernel that the call chose on a CPU, or what that is written out."""
    model, x, mask = Called(causal).eval().requires_grad_(False), torch.randn(2, 5, 16), torch.rand(5, 5) > 0.3
    mask[:, 0] = True
    table = torch.export.default_decompositions()
    if fused:
        table.pop(_FLASH.default)
    program = torch.export.export(model, (x, mask)).run_decompositions(table)
    assert bool(program.graph.find_nodes(op="call_function", target=_FLASH.default)) == fused
    (site,) = rewriter.explain(program).sites
    assert (site.heads, site.scale, site.mask) == (2, pytest.approx(0.25), Causal() if causal else Dense())
    assert site.spelling == ("sdpa" if fused else "eager")
    module = rewriter.optimize(program)
    assert not module.graph.find_nodes(op="call_function", target=_FLASH.default)
    assert error(module(x, mask), model(x, mask)) <= tolerance(torch.float32)


def test_a_kernel_whose_logarithms_are_used() -> None:
    """What a kernel returns beside the output is nothing that its replacement has."""

    class Both(nn.Module):
        def forward(self, q: Tensor) -> Any:
            out, logarithms = _FLASH(q, q, q)
            return out, logarithms

    report = rewriter.explain(torch.export.export(Both(), (torch.randn(1, 2, 5, 8),)))
    assert not report.sites
    assert [refusal.reason for refusal in report.refusals] == ["more than the output of a kernel for attention is used"]


def test_exported_cast_to_the_type_of_the_tokens() -> None:
    class Cast(Block):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (self.split(project(x)) for project in (self.q, self.k, self.v))
            return ((q @ k.mT).double().softmax(-1).type_as(x) @ v).transpose(1, 2).flatten(2)

    (site,) = check_export(Cast(), torch.randn(2, 5, 16))
    assert site.softmax_dtype == "float64"


def test_exported_masks_and_biases() -> None:
    """Parameters and buffers stand in the graph as real tensors among fake ones."""

    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.randn(1, 2, 5, 5))
            self.register_buffer("mask", torch.ones(5, 5, dtype=torch.bool).tril())

        def forward(self, q: Tensor) -> Tensor:
            out = (q @ q.mT + self.bias).masked_fill(~self.mask, float("-inf")).softmax(-1) @ q
            return out + F.scaled_dot_product_attention(q, q, q, self.mask)

    assert len(check_export(Biased(), torch.randn(1, 2, 5, 4))) == 2


# --- where a site is -------------------------------------------------------------------------------------------------


def test_two_attentions_of_one_module(rewrite: Any) -> None:
    class Twice(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(super().forward(x))

    model, x = Tower(Twice(), Block()), torch.randn(2, 5, 16)
    result = rewrite(model, x)
    assert paths(result) == ["layers.0", "layers.0#1", "layers.1"]
    assert error(result.out, model(x)) <= EXACT


def test_one_module_called_twice(rewrite: Any) -> None:
    shared = Block()
    model, x = Tower(shared, shared), torch.randn(2, 5, 16)
    result = rewrite(model, x)
    assert paths(result) == ["layers.0", "layers.0#1"]
    assert error(result.out, model(x)) <= EXACT


def test_an_attention_of_the_root_has_no_path(rewrite: Any) -> None:
    assert paths(rewrite(Block(), torch.randn(2, 5, 16))) == [""]


class Broken(Block):
    """A graph break between the projections and the attention."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        torch._dynamo.graph_break()
        return super().forward(x)


def test_graph_breaks(rewrite: Any) -> None:
    """Each layer's forward has a graph of its own then, whose nodes do not know the layer."""
    model = Tower(Block(), Broken(), Block(heads=4)).requires_grad_(False)
    x = torch.randn(2, 5, 16)
    result = rewrite(model, x)
    assert len(result.graphs) == 4
    assert paths(result) == ["layers.0", "layers.1", "layers.1", "layers.2"]
    assert error(result.out, model(x)) <= EXACT


def test_equal_layers_after_a_graph_break() -> None:
    """dynamo runs one graph for all of them, and guards none."""
    model, x = Tower(Block(), Broken(), Block(), Broken()).requires_grad_(False), torch.randn(2, 5, 16)
    found = [site.path for site in rewriter.explain(model, x).sites]
    assert found == ["layers.0", "layers.1", "layers.1#1", "layers.2", "layers.3", "layers.3#1"]


def test_a_site_keeps_its_number_where_another_graph_begins_elsewhere() -> None:
    """With a break between the layers each forward has a graph of its own; without, the whole model is one."""

    class Sometimes(Tower):
        broken = False

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                if self.broken:
                    torch._dynamo.graph_break()
                x = layer(x)
            return x

    class Twice(Block):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            return super().forward(x)

    model, x = Sometimes(Twice(), Twice()).requires_grad_(False), torch.randn(2, 5, 16)
    seen = GraphRewriter(None, names=Names.of(model))
    run = compiled(model, seen)
    run(x)
    paths = ["layers.0", "layers.0#1", "layers.1", "layers.1#1"]
    assert list(seen.sites) == paths and seen.graphs == 1
    model.broken = True
    run(x)
    assert list(seen.sites) == paths and seen.graphs > 1


def test_equal_layers_after_a_graph_break_have_decisions_of_their_own() -> None:
    model, x = Tower(Broken(), Broken(), Broken()).requires_grad_(False), torch.randn(2, 300, 16)
    found = Selector()
    run_by(model, found)(x)
    assert list(found.decisions) == [f"layers.{n}{after}" for n in range(3) for after in ("", "#1")]
    kept = {path: replace(each, variant="original", config={}) for path, each in found.decisions.items()}
    near = {"variant": "sliding_window", "config": {"window": 128, "sinks": 0}, "fidelity": "approximate"}
    changed = replace(kept["layers.1#1"], **near)
    run = run_by(model, Selector({**kept, "layers.1#1": changed}))
    alone = Tower(model.layers[1])
    middle = run_by(alone, Selector({"layers.0": kept["layers.1"], "layers.0#1": replace(changed, path="layers.0#1")}))
    for length in (300, 301, 302):  # the second one makes lengths symbolic
        x = torch.randn(2, length, 16)
        expected = model.layers[2](middle(model.layers[0](x)))
        assert error(run(x), expected) <= EXACT
        assert not error(expected, model(x)) <= EXACT


def run_by(model: nn.Module, chooser: Selector) -> Any:
    return compiled(model, GraphRewriter(chooser, names=Names.of(model)))


def test_a_break_in_the_middle_of_an_attention(rewrite: Any) -> None:
    class Middle(Block):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (self.split(project(x)) for project in (self.q, self.k, self.v))
            weights = (q @ k.mT * 0.3).softmax(-1)
            torch._dynamo.graph_break()
            return x + (weights @ v).transpose(1, 2).flatten(2)

    model, x = Tower(Block(), Middle()).requires_grad_(False), torch.randn(2, 5, 16)
    result = rewrite(model, x)
    assert paths(result) == ["layers.0"]
    assert error(result.out, model(x)) <= EXACT


# --- what is told about what is not taken ----------------------------------------------------------------------------


def test_refusals_name_the_place_the_node_and_the_line(rewrite: Any) -> None:
    class Waves(Block):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (self.split(project(x)) for project in (self.q, self.k, self.v))
            scores = q @ k.mT
            scores = 5 * (scores / 5).sin()  # the line that is told
            return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    line = Waves.forward.__code__.co_firstlineno + 3
    result = rewrite(Tower(Block(), Waves()), torch.randn(2, 5, 16))
    assert paths(result) == ["layers.0"]
    (refusal,) = result.refusals
    assert refusal.startswith("layers.1, test_detect.py:")
    reason = f"the reading of the scores stopped at aten.sin.default (test_detect.py:{line}), after scale"
    assert refusal.endswith(reason), "the best partial match"


def test_what_a_graph_break_parts_is_told(rewrite: Any) -> None:
    class Broken(Block):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (self.split(project(x)) for project in (self.q, self.k, self.v))
            scores = q @ k.mT
            torch._dynamo.graph_break()
            return ((scores + 0.1).softmax(-1) @ v).transpose(1, 2).flatten(2)

    result = rewrite(Tower(Block(), Broken()).requires_grad_(False), torch.randn(2, 5, 16))
    assert paths(result) == ["layers.0"]
    (refusal,) = result.refusals
    assert "the scores are made before this graph" in refusal


def test_windows_of_weights_that_are_padded_are_told(rewrite: Any) -> None:
    """Of windows in chunks with overlap, whose scores are copied piece by piece (Beltagy et al. 2020)."""

    class Windows(Block):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (self.split(project(x)) for project in (self.q, self.k, self.v))
            scores = torch.zeros(*q.shape[:-1], 3)
            scores[..., 0] = (q * k.roll(1, -2)).sum(-1)
            scores[..., 1] = (q * k).sum(-1)
            scores[..., 2] = (q * k.roll(-1, -2)).sum(-1)
            weights = F.pad(F.dropout(scores.softmax(-1).to(v.dtype), 0.0), (0, 1)).flatten(2)
            wide = weights.view(*q.shape[:-1], 4)[..., :3].unsqueeze(-2)
            near = torch.stack((v.roll(1, -2), v, v.roll(-1, -2)), -2)
            return (wide @ near).squeeze(-2).transpose(1, 2).flatten(2)

    result = rewrite(Tower(Block(), Windows()), torch.randn(2, 5, 16))
    assert paths(result) == ["layers.0"]
    (refusal,) = result.refusals
    assert refusal.startswith("layers.1, test_detect.py:")


def test_kept_sites_stand_among_the_others(rewrite: Any) -> None:
    """In the order of the graph, and numbered with them where they share a path."""

    class Edited(Block):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (self.split(project(x)) for project in (self.q, self.k, self.v))
            x = x + ((q @ k.mT).softmax(-1).square() @ v).transpose(1, 2).flatten(2)
            return super().forward(x)

    model, x = Tower(Edited(), Block()), torch.randn(2, 5, 16)
    result = rewrite(model, x)
    assert [(s.path, s.edits) for s in result.sites] == [
        ("layers.0", ("squared",)),
        ("layers.0#1", ()),
        ("layers.1", ()),
    ]
    assert [match.site.path for match in result.matches] == ["layers.0#1", "layers.1"]
    assert not result.refusals
    assert error(result.out, model(x)) <= EXACT


def test_detection_changes_nothing_and_repeats() -> None:
    program = torch.export.export(Tower(Block(), Block()), (torch.randn(2, 5, 16),))
    graph = exported(program)
    before = graph.code
    first, second = detect(graph), detect(graph)
    assert graph.code == before
    assert first.sites == second.sites
    assert [site.mask for site in first.sites] == [Full(), Full()]
