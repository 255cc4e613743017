"""Hugging Face's transformers: one family of spelling each, in the eager form, the fused one, or both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from zoo.entry import LAYERS, Entry, image, seeded, tokens

LIBRARY = "transformers"
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    **SPECIAL,
}
DECODER = {key: value for key, value in TEXT.items() if "prob" not in key} | {"use_cache": False, "head_dim": 8}
GROUPED = DECODER | {"num_key_value_heads": 2}
GPT = {
    "vocab_size": 64,
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_inner": 48,
    "use_cache": False,
    **SPECIAL,
}
PAIR = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "use_cache": False,
    "decoder_start_token_id": 1,
    **SPECIAL,
}
T5 = {
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": LAYERS,
    "num_decoder_layers": LAYERS,
    "num_heads": 4,
    "use_cache": False,
    "decoder_start_token_id": 0,
    **SPECIAL,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
SPEECH = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "conv_dim": (16, 16),
    "conv_stride": (4, 4),
    "conv_kernel": (8, 4),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "apply_spec_augment": False,
}
FULL, CAUSAL = frozenset({"full"}), frozenset({"causal(0)"})
EAGER, BOTH = ("eager",), ("eager", "sdpa")

Inputs = Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Family:
    """`model` and its configuration by name, the settings that make it small, and the sites that follow from them.

    What the settings do not say of a spelling is said by `forms`: the implementations to build it with. None leaves
    the model's own.
    """

    name: str
    model: str
    config: str
    settings: dict[str, Any]
    sites: int
    inputs: Inputs
    forms: Iterable[str | None] = EAGER
    masks: frozenset[str] | None = None
    fast: str = ""
    wrap: Callable[[Any], nn.Module] | None = None
    parts: dict[str, tuple[str, dict[str, Any]]] | None = None

    def entries(self) -> Iterator[Entry]:
        """One for each form."""
        for form in self.forms:
            name = f"{LIBRARY}/{self.name}" + (f"@{form}" if form else "")
            fast = bool(form) and form in self.fast.split()
            yield Entry(name, LIBRARY, seeded(lambda form=form: self.built(form)), self.sites, self.masks, fast)

    def built(self, form: str | None) -> tuple[Any, dict[str, Any]]:
        """The model and the keyword arguments of a call."""
        given = dict(self.settings)
        for key, (config, settings) in (self.parts or {}).items():
            given[key] = known(config)(**settings)
        if form:
            given["attn_implementation"] = form
        model = known(self.model)(known(self.config)(**given)).eval()
        return self.wrap(model) if self.wrap else model, self.inputs()


def known(name: str) -> Any:
    """A class of the library. One that its version does not have yet counts as missing."""
    import transformers

    try:
        return getattr(transformers, name)
    except AttributeError:
        raise ModuleNotFoundError(f"this version has no {name}", name=f"{LIBRARY}.{name}") from None


def text() -> dict[str, Any]:
    return {"input_ids": tokens()}


def long() -> dict[str, Any]:
    return {"input_ids": tokens(length=19)}


def padded(side: str = "right") -> Inputs:
    def inputs() -> dict[str, Any]:
        real = (torch.arange(11) < torch.tensor([[11], [7]])).long()
        return {"input_ids": tokens(), "attention_mask": real.flip(1) if side == "left" else real}

    return inputs


def two_texts() -> dict[str, Any]:
    return {"input_ids": tokens(length=11), "decoder_input_ids": tokens(length=6)}


def pixels(size: int = 32, channels: int = 3) -> Inputs:
    return lambda: {"pixel_values": image(size, channels=channels)}


def waves() -> dict[str, Any]:
    return {"input_values": torch.randn(2, 400)}


def spectra() -> dict[str, Any]:
    return {"input_features": torch.randn(2, 24, 16)}


def video() -> dict[str, Any]:
    return {"pixel_values": torch.randn(1, 4, 3, 16, 16)}


class Step(nn.Module):
    """One token after a cached past, which comes as tensors: the model writes into its cache."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        from transformers import DynamicCache

        past = DynamicCache()
        for layer in range(LAYERS):
            past.update(keys[layer], values[layer], layer)
        out: Tensor = self.model(input_ids=input_ids, past_key_values=past, use_cache=True)[0]
        return out


def step(kv_heads: int) -> Inputs:
    def inputs() -> dict[str, Any]:
        keys, values = torch.randn(2, LAYERS, 2, kv_heads, 9, 8)
        return {"input_ids": tokens(length=1), "keys": keys, "values": values}

    return inputs


def boxes() -> dict[str, Any]:
    return {"input_ids": tokens(), "bbox": torch.randint(0, 32, (2, 11, 2)).repeat(1, 1, 2)}


MLA = DECODER | {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "head_dim": 8,
    "first_k_dense_replace": LAYERS,
    "n_routed_experts": 4,
    "moe_intermediate_size": 16,
}
FALCON = {key: value for key, value in DECODER.items() if key != "head_dim"}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

FAMILIES = (
    # Decoders
    Family("llama", "LlamaModel", "LlamaConfig", GROUPED, LAYERS, text, BOTH, CAUSAL, fast="eager"),
    Family(
        "llama_padded", "LlamaForCausalLM", "LlamaConfig", GROUPED, LAYERS, padded("left"), BOTH,
        frozenset({"causal(0) & padding"}), fast="eager",
    ),
    Family("llama_step", "LlamaModel", "LlamaConfig", GROUPED, LAYERS, step(2), BOTH, wrap=Step),
    Family("gpt2", "GPT2LMHeadModel", "GPT2Config", GPT, LAYERS, text, EAGER, CAUSAL, fast="eager"),
    Family(
        "gpt_neo", "GPTNeoModel", "GPTNeoConfig",
        {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 48,
         "attention_types": [[["global", "local"], 1]], "window_size": 6, "max_position_embeddings": 64, **SPECIAL},
        2, long,
    ),
    Family("gpt_neox", "GPTNeoXModel", "GPTNeoXConfig", DECODER, LAYERS, text, EAGER, CAUSAL),
    Family("gptj", "GPTJModel", "GPTJConfig", GPT | {"rotary_dim": 4}, LAYERS, text),
    Family("codegen", "CodeGenModel", "CodeGenConfig", GPT | {"rotary_dim": 4}, LAYERS, text, (None,)),
    Family("gpt_bigcode", "GPTBigCodeModel", "GPTBigCodeConfig", GPT | {"multi_query": True}, LAYERS, text, EAGER),
    Family("bloom", "BloomModel", "BloomConfig", GPT | {"hidden_size": 32}, LAYERS, padded(), (None,)),
    Family(
        "falcon", "FalconModel", "FalconConfig", FALCON | {"multi_query": True, "alibi": False}, LAYERS, text, EAGER
    ),
    Family(
        "falcon_slopes", "FalconModel", "FalconConfig",
        FALCON | {"multi_query": False, "alibi": True, "new_decoder_architecture": False}, LAYERS, padded(),
    ),
    Family(
        "mpt", "MptModel", "MptConfig",
        {"vocab_size": 64, "d_model": 32, "n_heads": 4, "n_layers": LAYERS, "max_seq_len": 64, "use_cache": False},
        LAYERS, text, (None,),
    ),
    Family(
        "opt", "OPTModel", "OPTConfig", DECODER | {"ffn_dim": 48, "word_embed_proj_dim": 32}, LAYERS, padded(), EAGER,
    ),
    Family("ctrl", "CTRLModel", "CTRLConfig", GPT | {"dff": 48}, LAYERS, text, (None,)),
    Family(
        "mistral_window", "MistralModel", "MistralConfig", GROUPED | {"sliding_window": 6}, LAYERS, long, BOTH,
        frozenset({"sliding_window(5, 0)"}), fast="eager",
    ),
    Family("mixtral", "MixtralModel", "MixtralConfig", GROUPED | EXPERTS, LAYERS, text),
    Family(
        "gemma2", "Gemma2Model", "Gemma2Config",
        GROUPED | {"attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 8, "sliding_window": 6}, LAYERS, long,
        masks=frozenset({"causal(0)", "sliding_window(5, 0)"}), fast="eager",
    ),
    Family(
        "gemma3", "Gemma3TextModel", "Gemma3TextConfig", GROUPED | {"sliding_window": 6, "num_hidden_layers": 6}, 6,
        long, BOTH, frozenset({"causal(0)", "sliding_window(5, 0)"}),
    ),
    Family("deepseek_v3", "DeepseekV3Model", "DeepseekV3Config", MLA, LAYERS, text, BOTH, CAUSAL, fast="eager"),
    Family("gpt_oss", "GptOssModel", "GptOssConfig", GROUPED | EXPERTS | {"sliding_window": 6}, LAYERS, long),
    # Two calls a layer, one for each half of the values.
    Family("diffllama", "DiffLlamaModel", "DiffLlamaConfig", GROUPED, 2 * LAYERS, text),
    Family(
        "llama4_chunks", "Llama4TextModel", "Llama4TextConfig",
        GROUPED | EXPERTS | {"attention_chunk_size": 6, "intermediate_size_mlp": 48, "num_hidden_layers": 4}, 4, long,
    ),
    Family(
        "lfm2", "Lfm2Model", "Lfm2Config",
        GROUPED | {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3}, 1, text,
    ),
    Family("doge", "DogeModel", "DogeConfig", GROUPED, LAYERS, text),
    Family(
        "xlnet", "XLNetModel", "XLNetConfig",
        {"vocab_size": 64, "d_model": 32, "n_layer": LAYERS, "n_head": 4, "d_inner": 48, **SPECIAL},
        LAYERS, text, (None,),
    ),
    # Encoders
    Family("bert", "BertModel", "BertConfig", TEXT, LAYERS, text, BOTH, FULL, fast="sdpa"),
    Family("bert_padded", "BertModel", "BertConfig", TEXT, LAYERS, padded(), BOTH, frozenset({"padding"})),
    Family(
        "distilbert", "DistilBertModel", "DistilBertConfig",
        {"vocab_size": 64, "dim": 32, "hidden_dim": 48, "n_layers": LAYERS, "n_heads": 4,
         "max_position_embeddings": 64, "pad_token_id": 0},
        LAYERS, padded(),
    ),
    Family("albert", "AlbertModel", "AlbertConfig", TEXT | {"embedding_size": 16}, LAYERS, text),
    Family(
        "deberta", "DebertaModel", "DebertaConfig",
        TEXT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 16},
        LAYERS, padded(), (None,),
    ),
    Family(
        "deberta_v2", "DebertaV2Model", "DebertaV2Config",
        TEXT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8,
                "max_relative_positions": 16},
        LAYERS, padded(), (None,),
    ),
    Family("mpnet", "MPNetModel", "MPNetConfig", TEXT, LAYERS, text, (None,)),
    Family(
        "longformer", "LongformerModel", "LongformerConfig", TEXT | {"attention_window": 4}, LAYERS,
        lambda: {"input_ids": tokens(length=16)}, (None,),
    ),
    Family(
        "big_bird", "BigBirdModel", "BigBirdConfig", TEXT | {"attention_type": "original_full"}, LAYERS, text, (None,)
    ),
    Family(
        "funnel", "FunnelBaseModel", "FunnelConfig",
        {"vocab_size": 64, "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48, "block_sizes": [1, 1],
         "num_decoder_layers": 1},
        2, lambda: {"input_ids": tokens(length=12)}, (None,),
    ),
    Family("convbert", "ConvBertModel", "ConvBertConfig", TEXT | {"embedding_size": 32}, LAYERS, text, (None,)),
    Family(
        "squeezebert", "SqueezeBertModel", "SqueezeBertConfig", TEXT | {"embedding_size": 32}, LAYERS, text, (None,)
    ),
    Family(
        "mobilebert", "MobileBertModel", "MobileBertConfig",
        TEXT | {"embedding_size": 16, "intra_bottleneck_size": 16, "num_feedforward_networks": 1}, LAYERS, text,
    ),
    Family("roformer", "RoFormerModel", "RoFormerConfig", TEXT | {"embedding_size": 32}, LAYERS, text, (None,)),
    Family(
        "esm", "EsmModel", "EsmConfig",
        TEXT | {"position_embedding_type": "rotary", "mask_token_id": 3}, LAYERS, text,
    ),
    Family(
        "layoutlmv3", "LayoutLMv3Model", "LayoutLMv3Config",
        TEXT | {"visual_embed": False, "coordinate_size": 6, "shape_size": 4, "max_2d_position_embeddings": 64,
                "has_relative_attention_bias": True, "has_spatial_attention_bias": True},
        LAYERS, boxes, (None,),
    ),
    Family(
        "lilt", "LiltModel", "LiltConfig",
        TEXT | {"hidden_size": 48, "channel_shrink_ratio": 2, "max_2d_position_embeddings": 64},
        2 * LAYERS, boxes, (None,),
    ),
    Family(
        "modernbert", "ModernBertModel", "ModernBertConfig",
        TEXT | {"local_attention": 8, "global_attn_every_n_layers": 2, "reference_compile": False,
                "sep_token_id": 2, "cls_token_id": 1},
        LAYERS, long, BOTH,
    ),
    Family(
        "xlm", "XLMModel", "XLMConfig",
        {"vocab_size": 64, "emb_dim": 32, "n_layers": LAYERS, "n_heads": 4, "max_position_embeddings": 64,
         "pad_index": 0, "use_cache": False},
        LAYERS, text, (None,),
    ),
    Family(
        "canine", "CanineModel", "CanineConfig",
        TEXT | {"downsampling_rate": 4, "upsampling_kernel_size": 4, "local_transformer_stride": 16,
                "num_hash_buckets": 32, "num_hash_functions": 4, "max_position_embeddings": 64},
        LAYERS + 2, lambda: {"input_ids": tokens(length=16)}, (None,),
    ),
    Family(
        "perceiver", "PerceiverModel", "PerceiverConfig",
        {"num_latents": 6, "d_latents": 16, "d_model": 32, "num_blocks": 1, "num_self_attends_per_block": LAYERS,
         "num_self_attention_heads": 4, "num_cross_attention_heads": 4},
        LAYERS + 1, lambda: {"inputs": torch.randn(2, 11, 32)}, (None,),
    ),
    # Encoders with decoders
    Family("t5", "T5Model", "T5Config", T5, 3 * LAYERS, two_texts, ("eager",), fast="eager"),
    Family("umt5", "UMT5Model", "UMT5Config", T5, 3 * LAYERS, two_texts),
    Family("longt5", "LongT5Model", "LongT5Config", T5 | {"local_radius": 3}, 3 * LAYERS, two_texts, (None,)),
    Family("bart", "BartModel", "BartConfig", PAIR, 3 * LAYERS, two_texts, BOTH),
    Family(
        "prophetnet", "ProphetNetModel", "ProphetNetConfig",
        {"vocab_size": 64, "hidden_size": 32, "encoder_ffn_dim": 48, "num_encoder_layers": LAYERS,
         "num_encoder_attention_heads": 4, "decoder_ffn_dim": 48, "num_decoder_layers": LAYERS,
         "num_decoder_attention_heads": 4, "max_position_embeddings": 64, "ngram": 2, "use_cache": False, **SPECIAL},
        # The decoder's own attention has a main stream and one for the n-grams.
        LAYERS + LAYERS * 3, two_texts, (None,),
    ),
    Family(
        "whisper", "WhisperModel", "WhisperConfig",
        PAIR | {"num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 16, "suppress_tokens": None,
                "begin_suppress_tokens": None},
        3 * LAYERS, lambda: {"input_features": torch.randn(2, 8, 24), "decoder_input_ids": tokens(length=6)}, EAGER,
    ),
    # Images
    Family("vit", "ViTModel", "ViTConfig", VISION, LAYERS, pixels(), BOTH, FULL),
    Family("beit", "BeitModel", "BeitConfig", VISION | {"use_relative_position_bias": True}, LAYERS, pixels(), EAGER),
    Family("swin", "SwinModel", "SwinConfig", SWIN, 4, pixels(), (None,), fast=""),
    Family("swinv2", "Swinv2Model", "Swinv2Config", SWIN, 4, pixels(), (None,)),
    Family(
        "sam_vision", "SamVisionModel", "SamVisionConfig",
        {"hidden_size": 32, "output_channels": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
         "image_size": 32, "patch_size": 4, "mlp_dim": 48, "window_size": 3, "global_attn_indexes": [1],
         "use_rel_pos": True},
        LAYERS, pixels(), BOTH,
    ),
    Family(
        "vitdet", "VitDetModel", "VitDetConfig",
        VISION | {"window_size": 2, "window_block_indices": [0], "use_relative_position_embeddings": True},
        LAYERS, pixels(), (None,),
    ),
    Family(
        "cvt", "CvtModel", "CvtConfig", {"embed_dim": [16, 24, 32], "num_heads": [2, 3, 4], "depth": [1, 2, 3]},
        1 + 2 + 3, pixels(64), (None,),
    ),
    Family(
        "segformer", "SegformerModel", "SegformerConfig",
        {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [4, 1], "hidden_sizes": [16, 32],
         "num_attention_heads": [2, 4], "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2]},
        2, pixels(), (None,),
    ),
    Family(
        "clip", "CLIPModel", "CLIPConfig",
        {"text_config": DECODER, "vision_config": VISION, "projection_dim": 16},
        2 * LAYERS, lambda: {"input_ids": tokens(), "pixel_values": image()}, EAGER,
    ),
    Family("siglip", "SiglipVisionModel", "SiglipVisionConfig", VISION, LAYERS + 1, pixels()),
    Family(
        "blip_qformer", "Blip2QFormerModel", "Blip2QFormerConfig",
        TEXT | {"cross_attention_frequency": 2, "encoder_hidden_size": 24}, LAYERS + 1,
        lambda: {"query_embeds": torch.randn(2, 5, 32), "encoder_hidden_states": torch.randn(2, 9, 24)},
    ),
    Family(
        "conditional_detr", "ConditionalDetrModel", "ConditionalDetrConfig",
        {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_queries": 5,
         "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None},
        1 + 2 * 2, pixels(64),
        parts={"backbone_config": ("ResNetConfig", {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 16],
                                                    "depths": [1, 1, 1, 1], "out_features": ["stage4"]})},
    ),
    Family(
        "timesformer", "TimesformerModel", "TimesformerConfig",
        VISION | {"image_size": 16, "num_frames": 4}, 2 * LAYERS, video, (None,),
    ),
    Family(
        "lxmert", "LxmertModel", "LxmertConfig",
        TEXT | {"l_layers": 1, "x_layers": 1, "r_layers": 1, "visual_feat_dim": 16}, 1 + 1 + 4,
        lambda: {"input_ids": tokens(), "visual_feats": torch.randn(2, 5, 16), "visual_pos": torch.rand(2, 5, 4)},
        (None,),
    ),
    # Sound and series
    Family("wav2vec2", "Wav2Vec2Model", "Wav2Vec2Config", SPEECH, LAYERS, waves, ("sdpa",)),
    Family("wavlm", "WavLMModel", "WavLMConfig", SPEECH, LAYERS, waves, (None,)),
    Family(
        "wav2vec2_conformer", "Wav2Vec2ConformerModel", "Wav2Vec2ConformerConfig",
        SPEECH | {"position_embeddings_type": "relative", "conv_depthwise_kernel_size": 3}, LAYERS, waves, (None,),
    ),
    Family(
        "wav2vec2_bert", "Wav2Vec2BertModel", "Wav2Vec2BertConfig",
        SPEECH | {"feature_projection_input_dim": 16, "conv_depthwise_kernel_size": 3,
                  "position_embeddings_type": "relative_key", "left_max_position_embeddings": 4,
                  "right_max_position_embeddings": 4},
        LAYERS, spectra, (None,),
    ),
    Family(
        "sew_d", "SEWDModel", "SEWDConfig",
        SPEECH | {"squeeze_factor": 2, "max_position_embeddings": 64, "position_buckets": 8}, LAYERS, waves, (None,),
    ),
    Family(
        "parakeet", "ParakeetEncoder", "ParakeetEncoderConfig",
        {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 48,
         "num_mel_bins": 16, "subsampling_factor": 4, "subsampling_conv_channels": 8, "conv_kernel_size": 3},
        LAYERS, spectra, EAGER,
    ),
    Family(
        "patchtst", "PatchTSTModel", "PatchTSTConfig",
        {"num_input_channels": 2, "context_length": 16, "patch_length": 4, "patch_stride": 4, "d_model": 32,
         "num_hidden_layers": LAYERS, "num_attention_heads": 4, "ffn_dim": 48},
        LAYERS, lambda: {"past_values": torch.randn(2, 16, 2)},
    ),
    # Without attention
    Family(
        "resnet", "ResNetModel", "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}, 0, pixels(), (None,),
    ),
    Family(
        "poolformer", "PoolFormerModel", "PoolFormerConfig",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_encoder_blocks": 2, "patch_sizes": [7, 3],
         "strides": [4, 2], "padding": [2, 1]},
        0, pixels(), (None,),
    ),
    Family("fnet", "FNetModel", "FNetConfig", TEXT, 0, text, (None,)),
    Family(
        "focalnet", "FocalNetModel", "FocalNetConfig",
        {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "hidden_sizes": [16, 32],
         "focal_levels": [2, 2], "focal_windows": [3, 3]},
        0, pixels(), (None,),
    ),
)  # fmt: skip


def entries() -> list[Entry]:
    """Every family in each of its forms."""
    return [entry for family in FAMILIES for entry in family.entries()]
