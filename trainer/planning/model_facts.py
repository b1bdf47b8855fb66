"""Sizes of a model for memory and FLOPs estimates, read from config.json; does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import yaml

from trainer.config.recipe import LoraSettings
from trainer.planning.hub import any_cached_config, cached_model, read_config

EXPERTS: Final = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Names of the number of experts in configs."""
INNER_NORMS: Final = frozenset({"qwen3", "qwen3_moe", "gemma3_text", "olmoe"})
"""Model types that normalize queries and keys."""
OTHER_NORMS: Final = frozenset({"gemma", "gemma2", "gemma3_text", "gpt_oss", "olmo2", "olmo3", "qwen3_next"})
"""Model types whose RMS norms round at other points than Llama's."""
OUTPUT_NORMS: Final = frozenset({"gemma2", "gemma3_text", "glm4"})
"""Model types that also normalize the outputs of attention and MLP."""
ADAPTED_EXPERTS: Final = frozenset({
    "afmoe", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "exaone_moe",
    "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe", "longcat_flash", "mellum",
    "minimax", "minimax_m2", "mixtral", "olmoe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_text",
    "qwen3_omni_moe_thinker", "solar_open",
})  # fmt: skip
"""Model types whose experts and router PEFT adapts with `all-linear`; it then leaves out every other MLP."""


@final
@dataclass(frozen=True)
class ModelFacts:
    """Sizes of a decoder. SmolLM2-135M has hidden 576, layers 30, query_width 576 and key_width 192 (3 heads of 64)."""

    hidden: int
    """Width of the residual stream."""
    layers: int
    query_width: int
    """Attention heads times head size."""
    key_width: int
    """Key-value heads times head size."""
    intermediate: int
    """Inner width of the MLP, or of one expert."""
    vocab: int
    is_tied: bool
    """Embedding and LM head share their weight."""
    heads: int = 1
    num_experts: int = 1
    active_experts: int = 1
    shared_intermediate: int = 0
    """Total inner width of the experts that process every token."""
    model_type: str = ""
    has_inner_norms: bool = False
    """Queries and keys are normalized per head."""
    has_fused_norms: bool = True
    """Norms are Llama's, so `trainer.model.rms_norm` computes them."""
    has_eager_attention: bool = False
    """Attention scores are capped or have sinks, which the fused CPU kernel does not support."""
    is_swiglu: bool = True
    """The gate of the MLP is silu, and its layers have no biases."""
    stored_bytes: int = 2
    """Bytes per weight in the files."""
    attention_dropout: float = 0.0
    """Fraction of attention probabilities that training would drop."""
    wrapper_type: str = ""
    """Model type of the whole, which in a model of images and text is not that of its decoder."""
    selected_keys: int | None = None
    """Keys that an indexer selects for each query (`index_topk`); None: attention reads all of them."""
    per_layer_vocab: int = 0
    """Rows of the embedding that each block has of its own (Gemma 3n and 4: 262,144); 0 if there is none."""
    per_layer_width: int = 0
    """Width of that embedding (256)."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelFacts | None:
        """Read the content of a config.json; None if it does not describe a supported decoder."""
        stored = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
        wrapper, config = config, config.get("text_config", config)
        try:
            heads = int(config["num_attention_heads"])
            head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
            experts = int(next((config[name] for name in EXPERTS if config.get(name)), 1))
            width = config.get("moe_intermediate_size") if experts > 1 else None
            width = width or config["intermediate_size"]
            model_type = str(config.get("model_type") or "")
            tied = config.get("tie_word_embeddings", model_type.startswith("gemma"))
            return cls(
                hidden=int(config["hidden_size"]),
                layers=int(config["num_hidden_layers"]),
                query_width=heads * head_dim,
                key_width=int(config.get("num_key_value_heads") or heads) * head_dim,
                intermediate=int(max(width) if isinstance(width, list) else width),
                vocab=int(config["vocab_size"]),
                is_tied=bool(wrapper.get("tie_word_embeddings", tied)),
                heads=heads,
                num_experts=experts,
                active_experts=int(config.get("num_experts_per_tok") or 1) if experts > 1 else 1,
                shared_intermediate=_shared(config) if experts > 1 else 0,
                model_type=model_type,
                has_inner_norms=model_type in INNER_NORMS,
                has_fused_norms=model_type not in OTHER_NORMS,
                has_eager_attention=bool(config.get("attn_logit_softcapping")) or model_type == "gpt_oss",
                is_swiglu=_has_silu(config, model_type) and not config.get("mlp_bias"),
                stored_bytes=4 if stored == "float32" else 2,
                attention_dropout=float(config.get("attention_dropout") or 0.0),
                wrapper_type=str(wrapper.get("model_type") or ""),
                selected_keys=int(config["index_topk"]) if config.get("index_topk") else None,
                per_layer_vocab=int(config.get("vocab_size_per_layer_input") or 0),
                per_layer_width=int(config.get("hidden_size_per_layer_input") or 0),
            )
        except (KeyError, TypeError, ValueError):
            return None

    def attention_linears(self) -> list[tuple[str, int, int]]:
        """Return (name, in, out) of the linear layers of a block's attention, with Llama's names."""
        return [
            ("q_proj", self.hidden, self.query_width),
            ("k_proj", self.hidden, self.key_width),
            ("v_proj", self.hidden, self.key_width),
            ("o_proj", self.query_width, self.hidden),
        ]

    def mlp_linears(self, width: int) -> list[tuple[str, int, int]]:
        """Return (name, in, out) of the linear layers of a gated MLP with this inner width."""
        return [("gate_proj", self.hidden, width), ("up_proj", self.hidden, width), ("down_proj", width, self.hidden)]

    def linears(self, experts: int) -> list[tuple[str, int, int]]:
        """Return (name, in, out) of the linear layers of a block with this many experts, and its shared experts."""
        shared = self.mlp_linears(self.shared_intermediate) if self.shared_intermediate else []
        return self.attention_linears() + self.mlp_linears(self.intermediate) * experts + shared

    def plain_linears(self) -> list[tuple[str, int, int]]:
        """Return the layers of a block that are linear layers in transformers, which experts are not."""
        if self.num_experts == 1:
            return self.linears(1) + self._per_layer_linears()
        shared = self.mlp_linears(self.shared_intermediate) if self.shared_intermediate else []
        return self.attention_linears() + shared + self._per_layer_linears()

    def adapted_linears(self) -> list[tuple[str, int, int]]:
        """Return the linear layers of a block that `all-linear` adapts; for experts see `lora_params`."""
        return self.attention_linears() if self.has_adapted_experts else self.plain_linears()

    def _per_layer_linears(self) -> list[tuple[str, int, int]]:
        """Return the layers that bring a block's own embedding into the residual stream."""
        width = self.per_layer_width
        inward = ("per_layer_input_gate", self.hidden, width)
        return [inward, ("per_layer_projection", width, self.hidden)] if width else []

    @property
    def has_sinks(self) -> bool:
        """Whether attention has sinks: a learned share of the probability that goes to no token."""
        return self.model_type == "gpt_oss"

    @property
    def has_adapted_experts(self) -> bool:
        """Whether experts get adapters too."""
        return self.num_experts > 1 and (self.wrapper_type or self.model_type) in ADAPTED_EXPERTS

    @property
    def adapted_parts(self) -> str | None:
        """What `all-linear` adapts in a mixture of experts, as text; None for a dense model."""
        if self.num_experts == 1:
            return None
        shared = "shared experts" if self.shared_intermediate else ""
        experts = f"the {self.num_experts} experts of a block"
        if self.has_adapted_experts:
            left = f"; {shared} and dense blocks get no adapter in the MLP" if shared else ""
            return f"attention, router and {experts}{left}"
        return f"attention{f' and {shared}' if shared else ''}; {experts} and the router get no adapter"

    @property
    def block_params(self) -> int:
        """Parameters of all blocks, including norms."""
        linear = sum(i * o for _, i, o in self.linears(self.num_experts))
        router = self.num_experts * self.hidden if self.num_experts > 1 else 0
        per_layer = sum(i * o for _, i, o in self._per_layer_linears())
        return self.layers * (linear + router + per_layer + 2 * self.hidden)

    @property
    def params(self) -> int:
        """All parameters of the decoder."""
        return self.block_params + self.embedding_params + self.per_layer_params + self.hidden

    @property
    def per_layer_params(self) -> int:
        """Parameters of the embeddings that each block has of its own, and of their projection."""
        return self.layers * self.per_layer_width * (self.per_layer_vocab + self.hidden)

    @property
    def embedding_params(self) -> int:
        """Parameters of embedding and head."""
        return self.vocab * self.hidden * (1 if self.is_tied else 2)

    @property
    def unsplit_params(self) -> int:
        """Parameters of a frozen base that a sharded shape leaves whole on each rank: those in no block."""
        return self.params - self.block_params

    @property
    def quantizable_params(self) -> int:
        """Parameters of the linear layers that 4-bit loading quantizes; experts are not quantized."""
        return self.layers * sum(i * o for _, i, o in self.plain_linears())

    @property
    def active_block_params(self) -> int:
        """Parameters that process one token, without embedding and head."""
        return self.layers * sum(i * o for _, i, o in self.linears(self.active_experts))

    def lora_params(self, lora: LoraSettings) -> int:
        """Return the parameters of the adapters; unknown target modules count as `all-linear`, an upper bound."""
        linears = self.adapted_linears() + self._expert_factors()
        if isinstance(lora.target_modules, list):
            named = {module.rpartition(".")[2] for module in lora.target_modules}
            if named <= {name for name, _, _ in linears}:
                linears = [linear for linear in linears if linear[0] in named]
        return self.layers * lora.rank * sum(i + o for _, i, o in linears)

    def _expert_factors(self) -> list[tuple[str, int, int]]:
        """Return (name, in, out) of adapted experts: the router, gate and up fused with twice the rank, and down."""
        if not self.has_adapted_experts:
            return []
        inward = ("gate_up_proj", self.hidden, 2 * self.intermediate)
        outward = ("down_proj", self.intermediate, self.hidden)
        return [("gate", self.hidden, self.num_experts), *[inward, inward, outward] * self.num_experts]


def _has_silu(config: Mapping[str, Any], model_type: str) -> bool:
    default = "gelu" if model_type.startswith("gemma") else "silu"
    return (config.get("hidden_act") or config.get("hidden_activation") or default) == "silu"


def _shared(config: Mapping[str, Any]) -> int:
    experts, width = config.get("n_shared_experts"), config.get("moe_intermediate_size")
    return int(config.get("shared_expert_intermediate_size") or (experts or 0) * (width or 0))


def find_model_config(path: str, model_card_dirs: list[Path], revision: str | None = None) -> Mapping[str, Any] | None:
    """Return the config.json of a directory or of the local hub cache, or the card of a well-known hub model.

    Args:
        path: Directory or hub name of the model.
        model_card_dirs: Directories with cards.
        revision: Commit of a hub model, preferred to others in the cache.
    """
    at_revision = cached_model(path, revision).config_file if revision is not None else None
    for config in (Path(path) / "config.json", at_revision, any_cached_config(path)):
        if config is not None and config.is_file():
            return read_config(config)
    for directory in model_card_dirs:
        for card in sorted(directory.glob("*.yaml")):
            known = yaml.safe_load(card.read_text(encoding="utf-8"))
            if path in known:
                return dict(known[path])
    return None


def find_model_facts(path: str, model_card_dirs: list[Path], revision: str | None = None) -> ModelFacts | None:
    """Return the sizes of a model; None if its config is not found or not supported.

    Args:
        path: Directory or hub name of the model.
        model_card_dirs: Directories with cards.
        revision: Commit of a hub model.
    """
    config = find_model_config(path, model_card_dirs, revision)
    return ModelFacts.from_config(config) if config is not None else None


def flops_per_token(facts: ModelFacts, *, is_lora: bool) -> float:
    """Return the model FLOPs of training one token: 4 N for LoRA, 6 N in full. Counts the LM head for every token."""
    head = facts.vocab * facts.hidden
    return (4.0 if is_lora else 6.0) * (facts.active_block_params + head)
