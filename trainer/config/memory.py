"""Parameters, bytes and FLOPs of a training, from the model's config alone.

A first estimate: constants are counted from tensor shapes of a Llama-like layer, not fitted. No torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import yaml

from trainer.config.recipe import LoraSettings, Recipe
from trainer.config.shape import TrainingShape
from trainer.errors import ModelError

GIB: Final = 2**30
HEAD_TILE_ROWS: Final = 256
"""Trained positions that the LM head handles at a time; the policy uses the same number."""
PROCESS_GIB: Final = {"cpu": 0.8, "cuda": 1.2}
"""Libraries and allocator of a process; context and workspaces of a GPU."""
FRAGMENTATION_FRAC: Final = 0.1


@final
@dataclass(frozen=True)
class ModelFacts:
    """The sizes that memory and FLOPs depend on."""

    hidden: int
    layers: int
    query_width: int
    """Attention heads times head size."""
    key_width: int
    """Key-value heads times head size."""
    intermediate: int
    vocab: int
    is_tied: bool
    num_experts: int = 1
    active_experts: int = 1

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelFacts | None:
        """Read a config.json; None where it does not describe a decoder that we can count."""
        config = config.get("text_config", config)
        try:
            heads = int(config["num_attention_heads"])
            head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
            num_experts = int(config.get("num_experts") or config.get("num_local_experts") or 1)
            width = config.get("moe_intermediate_size") if num_experts > 1 else None
            return cls(
                hidden=int(config["hidden_size"]),
                layers=int(config["num_hidden_layers"]),
                query_width=heads * head_dim,
                key_width=int(config.get("num_key_value_heads") or heads) * head_dim,
                intermediate=int(width or config["intermediate_size"]),
                vocab=int(config["vocab_size"]),
                is_tied=bool(config.get("tie_word_embeddings", False)),
                num_experts=num_experts,
                active_experts=int(config.get("num_experts_per_tok") or 1),
            )
        except (KeyError, TypeError, ValueError):
            return None

    def linears(self, experts: int) -> list[tuple[str, int, int]]:
        """(name, in, out) of every linear layer of a block, as Llama-like models call them."""
        attention = [
            ("q_proj", self.hidden, self.query_width),
            ("k_proj", self.hidden, self.key_width),
            ("v_proj", self.hidden, self.key_width),
            ("o_proj", self.query_width, self.hidden),
        ]
        mlp = [
            ("gate_proj", self.hidden, self.intermediate),
            ("up_proj", self.hidden, self.intermediate),
            ("down_proj", self.intermediate, self.hidden),
        ]
        return attention + mlp * experts

    @property
    def block_params(self) -> int:
        """Parameters of all blocks, norms included."""
        linear = sum(i * o for _, i, o in self.linears(self.num_experts))
        return self.layers * (linear + 2 * self.hidden)

    @property
    def params(self) -> int:
        """All parameters."""
        return self.block_params + self.embedding_params + self.hidden

    @property
    def embedding_params(self) -> int:
        """Parameters of embedding and head."""
        return self.vocab * self.hidden * (1 if self.is_tied else 2)

    @property
    def active_block_params(self) -> int:
        """Parameters that one token passes through, without embedding and head."""
        return self.layers * sum(i * o for _, i, o in self.linears(self.active_experts))

    def lora_params(self, lora: LoraSettings) -> int:
        """Parameters of the adapters; a list with names that we do not know counts as `all-linear`, an upper bound."""
        linears = self.linears(self.num_experts)
        if isinstance(lora.target_modules, list):
            named = {module.rpartition(".")[2] for module in lora.target_modules}
            if named <= {name for name, _, _ in linears}:
                linears = [linear for linear in linears if linear[0] in named]
        return self.layers * lora.rank * sum(i + o for _, i, o in linears)


def find_model_facts(path: str, model_card_dirs: list[Path]) -> ModelFacts | None:
    """Facts from a directory's config.json, from the hub's local cache, or from our cards of well-known hub names."""
    for config in (Path(path) / "config.json", *_cached_configs(path)):
        if config.is_file():
            return ModelFacts.from_config(_read_config(config))
    for place in model_card_dirs:
        for card in sorted(place.glob("*.yaml")):
            known = yaml.safe_load(card.read_text(encoding="utf-8"))
            if path in known:
                return ModelFacts.from_config(known[path])
    return None


def _cached_configs(hub_name: str) -> list[Path]:
    """config.json of every revision of a hub name that huggingface_hub has downloaded; without importing it."""
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")
    return sorted(cache.glob(f"models--{hub_name.replace('/', '--')}/snapshots/*/config.json"))


def _read_config(file: Path) -> Mapping[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise ModelError(f"{file}: not JSON ({error}). Copy the model again.") from None
    if not isinstance(config, dict):
        raise ModelError(f"{file}: not a model's config. Copy the model again.")
    return config


@final
@dataclass(frozen=True)
class MemoryEstimate:
    """GiB of one device by what holds them."""

    parts: Mapping[str, float]
    available_gib: float

    @property
    def total_gib(self) -> float:
        """Peak, allowance for fragmentation included."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether the peak is within the device's memory."""
        return self.total_gib <= self.available_gib


def estimate_memory(recipe: Recipe, shape: TrainingShape, facts: ModelFacts) -> MemoryEstimate:
    """Peak memory of one device while training."""
    compute_bytes = 2 if recipe.model.compute_dtype == "bfloat16" else 4
    shards = shape.num_ranks if shape.sharding == "full" else 1
    masters = 0 if compute_bytes == 4 else 4
    parts = {"base weights": facts.params * compute_bytes / shards}
    if recipe.lora is not None:
        trained = facts.lora_params(recipe.lora)
        parts["adapter, gradients, optimizer"] = trained * (compute_bytes + masters + 4 + 8)
    else:
        parts["masters, gradients, optimizer"] = facts.params * (masters + 4 + 8) / shards
        if recipe.method == "rft":
            parts["reference copy"] = facts.params * compute_bytes / shards
    tokens = max(shape.micro_batch_tokens, recipe.data.max_seq_tokens)
    block = activation_bytes_per_token(facts, compute_bytes)
    if recipe.model.gradient_checkpointing:
        parts["activations (checkpointed)"] = tokens * (facts.layers * facts.hidden * compute_bytes + block)
    else:
        parts["activations"] = tokens * facts.layers * block
    if shards > 1:
        parts["gathered block"] = 2 * facts.block_params / facts.layers * compute_bytes
        parts["gathered embedding and head"] = facts.embedding_params * compute_bytes
    parts["head tile"] = HEAD_TILE_ROWS * facts.vocab * (compute_bytes + 4 + 4)
    if recipe.method == "rft" and recipe.rollout is not None and recipe.rollout.sampler == "local":
        if shape.device == "cpu":
            parts["sampler's merged copy"] = facts.params * compute_bytes
        sampled = min(recipe.rollout.chunk_prompts, recipe.rows_per_step) * recipe.rollout.group_size
        width = 2 * facts.layers * facts.key_width * compute_bytes
        parts["KV cache of a chunk"] = float(sampled * recipe.data.max_seq_tokens * width)
    gib = {name: size / GIB for name, size in parts.items()}
    gib["fragmentation"] = FRAGMENTATION_FRAC * sum(gib.values())
    gib["process"] = PROCESS_GIB[shape.device]
    return MemoryEstimate(gib, shape.gpu_memory_gib)


def activation_bytes_per_token(facts: ModelFacts, compute_bytes: int) -> int:
    """Bytes that one block keeps of one token for its backward pass.

    Per norm the float32 input, the float32 normalized value and its cast; queries, keys and values before and after
    rotation and as attention keeps them; attention's output; gate, up, activation and product of the MLP.
    """
    norms = 2 * facts.hidden * (4 + 4 + compute_bytes)
    attention = (4 * facts.query_width + 6 * facts.key_width) * compute_bytes
    mlp = 4 * facts.intermediate * facts.active_experts * compute_bytes
    residual = 2 * facts.hidden * compute_bytes
    return norms + attention + mlp + residual


def flops_per_token(facts: ModelFacts, *, is_lora: bool) -> float:
    """Model FLOPs of training one token: 4 N for LoRA, 6 N for full; the head is counted on every token here."""
    head = facts.vocab * facts.hidden
    return (4.0 if is_lora else 6.0) * (facts.active_block_params + head)
