"""Tiny configurations of every model family that transformers knows.

The default configuration of a family is shrunk by rules on the names of its fields, in all of its sections; what the
rules get wrong stands in `OVERRIDES`. A family that has several kinds of layers keeps one of each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final

from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto import modeling_auto

VOCAB: Final = 320
HIDDEN: Final = 64
WINDOW: Final = 8
"""Tokens of a sliding window, a chunk or a sparse selection: shorter than the sequences that are compared."""
_SIZES: Final[Mapping[int, Sequence[str]]] = {
    VOCAB: (
        "vocab_size", "decoder_vocab_size", "n_tokens", "vocab_size_per_layer_input", "original_vocab_size",
    ),
    HIDDEN: (
        "hidden_size", "d_model", "n_embd", "embed_dim", "out_hidden_size", "dim", "projection_dim", "lru_width",
        "word_embed_proj_dim", "text_hidden_size", "encoder_hidden_size", "backbone_hidden_size",
        "projector_output_dim", "projector_input_dim", "vision_output_dim", "projector_hidden_size", "hidden_dim",
        "embedding_dim", "emb_dim", "cross_attention_hidden_size", "vision_hidden_size", "input_dim", "output_dim",
        "decoder_hidden_size", "input_embedding_size", "output_embedding_size", "mm_hidden_size", "adapter_in_dim",
        "projection_hidden_size", "projection_hidden_dim", "expert_hidden_size", "language_hidden_size",
    ),
    96: (
        "intermediate_size", "ffn_dim", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "dff", "dim_ff",
        "ffn_hidden_size", "mlp_dim", "feed_forward_size", "alignment_intermediate_size", "moe_hidden_size",
        "dense_intermediate_size", "block_ff_dim", "intermediate_size_mlp",
    ),
    32: (
        "moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size",
        "expert_ffn_hidden_size", "moe_shared_expert_intermediate_size", "moe_ffn_hidden_size", "share_expert_dim",
        "q_lora_rank", "kv_lora_rank", "o_lora_rank", "index_head_dim", "router_hidden_size", "moe_latent_size",
        "prefix_dense_intermediate_size", "aux_hidden_size",
    ),
    16: (
        "head_dim", "global_head_dim", "attention_head_dim", "dim_head", "swa_head_dim", "d_head", "d_kv",
        "attention_head_size", "v_head_dim", "qk_head_dim", "hidden_size_per_layer_input", "laurel_rank",
        "mamba_d_state", "ssm_state_size", "state_size", "mamba_d_head", "linear_key_head_dim",
        "linear_value_head_dim", "linear_head_dim", "mamba_head_dim", "mamba_headdim", "swa_v_head_dim",
        "adapter_rank", "time_step_rank", "mamba_dt_rank", "chunk_size", "mamba_chunk_size", "d_rel", "hc_lowrank",
        "ple_embed_dim", "gated_norm_rank",
    ),
    8: (
        "qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim", "sliding_window", "attention_chunk_size",
        "sliding_window_size", "attention_window_size", "local_attention", "window_size", "index_topk",
        "keep_window_size",
        "rel_extent", "mamba_n_heads", "mamba_num_heads",
        "local_attention_window_len", "local_window",
    ),
    4: (
        "num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads",
        "attention_heads", "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts",
        "swa_num_attention_heads", "num_sliding_attention_heads", "index_n_heads", "linear_num_value_heads",
        "linear_num_heads", "num_encoder_attention_heads", "num_decoder_attention_heads", "resampler_heads",
        "num_global_attention_heads", "conf_num_attention_heads",
    ),
    2: (
        "num_key_value_heads", "num_kv_heads", "kv_n_heads", "swa_num_key_value_heads", "linear_num_key_heads",
        "num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "num_experts_per_token", "top_k_experts", "depth",
        "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
        "num_encoder_layers", "num_decoder_layers", "num_query_groups", "num_global_key_value_heads",
        "mamba_n_groups", "n_groups", "ssm_n_groups", "conf_num_hidden_layers",
    ),
    1: ("n_group", "topk_group", "num_shared_experts", "n_shared_experts"),
    512: ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len", "context_length"),
    56: ("image_size",),
    14: ("patch_size",),
}  # fmt: skip
_SIZE_OF: Final[Mapping[str, int]] = {name: size for size, names in _SIZES.items() for name in names}
_LAYER_COUNTS: Final = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
_LAYER_INDICES: Final = (
    "deepstack_visual_indexes", "fullatt_block_indexes", "global_attn_indexes", "cross_attention_layers",
    "hybrid_layer_ids", "full_attn_idxs", "attn_layer_indices", "mlp_only_layers", "kv_source_layers",
    "rope_scaling_layers", "full_attention_layers", "dense_layers",
)  # fmt: skip
_MOST_KINDS: Final = 6


def families() -> dict[str, str]:
    """Every family with a causal language model, alone or inside a model of images and text, and its class."""
    alone = dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    wrappers = dict(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    return dict(sorted({**alone, **wrappers}.items()))


def tiny_config(family: str, changes: Mapping[str, Any] | None = None) -> PretrainedConfig:
    """The family's default configuration, shrunk.

    Args:
        family: a model type.
        changes: fields that are set last, such as a kind of rotary embedding.
    """
    kind = CONFIG_MAPPING[family]
    extra = {**OVERRIDES.get(family, {}), **(changes or {})}
    arguments = _shrunk(kind(), extra)
    if family in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and "is_decoder" in _field_names(kind):
        arguments["is_decoder"] = True
    config = kind(**arguments)
    config.dtype = "float32"
    return config


def _field_names(kind: type[PretrainedConfig]) -> set[str]:
    return {field.name for field in dataclasses.fields(kind) if field.init}


def _shrunk(default: PretrainedConfig, extra: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the configuration's class that make it tiny; fields that the rules do not know stay out."""
    fields = _field_names(type(default))
    fields |= set(type(default).attribute_map.values()) & set(vars(default))
    values = {name: value for name, value in vars(default).items() if name in fields}
    chosen: dict[str, Any] = {
        name: _SIZE_OF[name]
        for name, value in values.items()
        if (name in _SIZE_OF and isinstance(value, int) and not isinstance(value, bool) and value > 0)
        or (name in ("head_dim", "num_key_value_heads") and value is None and name in _SIZE_OF)
    }
    if "num_key_value_heads" in chosen and "kv_lora_rank" in chosen:  # latent attention has no groups
        chosen["num_key_value_heads"] = chosen["num_attention_heads"]
    chosen |= _chosen_layers(values)
    for name, value in values.items():
        if isinstance(value, float) and ("drop" in name or "jitter" in name):
            chosen[name] = 0.0
        elif name.endswith("_token_id") and isinstance(value, int):
            chosen[name] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}.get(name, VOCAB - 1)
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            chosen[name] = VOCAB - 1
        elif name.startswith("rope_") and isinstance(value, dict):
            chosen[name] = _rope(value)
    for name in type(default).sub_configs:
        section = values.get(name)
        changes = extra.get(name, {})
        if isinstance(section, PretrainedConfig) and isinstance(changes, Mapping):
            chosen[name] = {**_shrunk(section, changes), "model_type": section.model_type}
    plain = {name: value for name, value in extra.items() if not isinstance(values.get(name), PretrainedConfig)}
    return {**chosen, **plain}


def _chosen_layers(values: Mapping[str, Any]) -> dict[str, Any]:
    """Per-layer lists cut down to one layer of each kind, and the number of layers that is left."""
    count_name = next((name for name in _LAYER_COUNTS if isinstance(values.get(name), int)), None)
    if count_name is None:
        return {}
    total = values[count_name]
    lists = {
        name: value
        for name, value in values.items()
        if isinstance(value, list | tuple) and len(value) == total and name not in _LAYER_INDICES
    }
    indices = {name: value for name, value in values.items() if name in _LAYER_INDICES and isinstance(value, list)}
    kinds = [(*(str(each[layer]) for each in lists.values()), *(layer in each for each in indices.values()))
             for layer in range(total)]  # fmt: skip
    kept = sorted({kind: layer for layer, kind in reversed(list(enumerate(kinds)))}.values())[:_MOST_KINDS]
    if len(kept) < 2:
        kept = [0, total - 1] if total > 1 else kept
    chosen: dict[str, Any] = {
        name: [_SIZE_OF[name]] * len(kept) if name in _SIZE_OF else [value[layer] for layer in kept]
        for name, value in lists.items()
    }
    chosen |= {name: [place for place, layer in enumerate(kept) if layer in value] for name, value in indices.items()}
    return {**chosen, count_name: len(kept)}


def _rope(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary parameters whose sections fit a head of 16."""
    found: dict[str, Any] = {}
    for name, value in parameters.items():
        if isinstance(value, Mapping):
            found[name] = _rope(value)
        elif name == "mrope_section":
            found[name] = [2, 3, 3]
        elif value is not None or name.endswith("_attention"):  # None there is a kind of layers without positions
            found[name] = value
    return found


_SECTIONS: Final = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_MROPE: Final = {"rope_parameters": _SECTIONS}
_MAMBA: Final = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1}
_INDEXER: Final = {
    "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": WINDOW,
    "indexer_compress_ratio": 2,
}  # fmt: skip
_GEMMA4: Final = {
    "head_dim": 16, "global_head_dim": 32, "num_hidden_layers": 3, "num_kv_shared_layers": 1,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
}  # fmt: skip
_GEMMA4_VISION: Final = {
    "hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 16, "global_head_dim": 16, "position_embedding_size": 64,
}  # fmt: skip
OVERRIDES: Final[Mapping[str, Mapping[str, Any]]] = {
    "apertus": {"hidden_act": "silu"},
    "bailing_hybrid": {"num_expert_group": 1, "kda_lower_bound": -5.0},
    "bamba": {"num_hidden_layers": 2, "attn_layer_indices": [1], **_MAMBA},
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": _SECTIONS}}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _SECTIONS}},
    "chameleon": {"vocabulary_map": {"<image>": VOCAB - 1}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}, "ffn_config": {"moe_top_k": 2}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2}},
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}},
    "deepseek_v3": {"first_k_dense_replace": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "emu3": {"vocabulary_map": {"<image>": VOCAB - 1}},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {**_SECTIONS, "mrope_section": [3, 3, 2]},
                                        "moe_intermediate_size": [32, 16]}},
    "falcon_h1": {"mamba_d_ssm": 128, "lm_head_multiplier": 0.5, "key_multiplier": 0.7, **_MAMBA},
    "gemma3n_text": {"num_hidden_layers": 4, "intermediate_size": [96] * 4, "num_kv_shared_layers": 2,
                     "activation_sparsity_pattern": [0.9, 0.0, 0.0, 0.0], "altup_num_inputs": 2,
                     "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma4": {"text_config": _GEMMA4, "vision_config": _GEMMA4_VISION},
    "gemma4_text": _GEMMA4,
    "gemma4_unified": {"text_config": _GEMMA4},
    "gemma4_unified_text": _GEMMA4,
    "glm46v": {"text_config": _MROPE},
    "glm4v": {"text_config": _MROPE},
    "glm4v_moe": {"text_config": {"rope_parameters": {**_SECTIONS, "partial_rotary_factor": 1.0}}},
    "glm5_next": {"text_config": {"num_key_value_heads": 4, "qk_rope_head_dim": 0, "index_kpool": 2}},
    "glm_ocr": {"text_config": _MROPE},
    "glmga": {"text_config": _MROPE},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite4_vision": {"deepstack_layer_map": [[0, 0]], "downsample_rate": "4/8"},
    "granitemoehybrid": {"num_hidden_layers": 2, "layer_types": ["mamba", "attention"], **_MAMBA},
    "hunyuan_vl": {"text_config": {"rope_parameters": {**_SECTIONS, "mrope_section": [2, 2, 2, 2]}}},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "lfm2": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"num_hidden_layers": 3, "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_vl": {"text_config": {"layer_types": ["conv", "full_attention"]}},
    "longcat_flash": {"head_dim": 8, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "paddleocr_vl": {"text_config": _MROPE},
    "qwen2_5_omni_thinker": {"text_config": _MROPE},
    "qwen2_5_vl": {"text_config": _MROPE},
    "qwen2_vl": {"text_config": _MROPE},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "step3p7": {"text_config": {"sliding_window": WINDOW}},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2,
              "attention_head_dim": 32},
    "zaya": {"num_experts_per_tok": 1},
    "zamba2": {"mamba_headdim": 16, "n_mamba_heads": 8, "num_hidden_layers": 4, "hybrid_layer_ids": [1, 3],
               "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
}  # fmt: skip
"""What the rules get wrong, by family; nested by section."""
VARIANTS: Final[Mapping[str, tuple[str, Mapping[str, Any]]]] = {
    "llama+dynamic": ("llama", {"max_position_embeddings": 16, "rope_parameters": {
        "rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}),
    "llama+llama3": ("llama", {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16}}),
    "llama+linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
    "phi3+longrope": ("phi3", {"original_max_position_embeddings": 16, "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8,
                            "long_factor": [float(n) for n in range(2, 10)],
                            "original_max_position_embeddings": 16, "factor": 4.0}}),
    "qwen2+window": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 8,
                               "layer_types": ["full_attention", "sliding_attention"]}),
    "qwen2+yarn": ("qwen2", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
                                                  "original_max_position_embeddings": 128}}),
}  # fmt: skip
"""Further forms of a family, by name: the family, and what is different."""
