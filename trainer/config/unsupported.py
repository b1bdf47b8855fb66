"""What runs do not support, in the words of both `trainer check` and the run.

`check` refuses what recipe, shape and config.json are enough to see; the run refuses it where it would go wrong.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from trainer.config.recipe import LoraSettings
from trainer.config.rft_sections import RolloutSettings

VLLM_FULL: Final = (
    "full-parameter training publishes only to vLLM servers that the run starts: leave out rollout.vllm_url, use LoRA, "
    "or rollout.sampler: local"
)
VLLM_FULL_SHARDED: Final = (
    "full-parameter training on shards does not publish to vLLM: use LoRA, or a shape without sharding"
)
"""Of a shape."""
SERVED_NOWHERE: Final = (
    "`sampler: served` needs `rollout.server_url`, the address of a server, for example of `trainer serve`"
)
VLLM_MACHINES: Final = (
    "vLLM servers that the run starts serve one machine only: set rollout.vllm_url to the address of a server"
)
"""Of a shape."""
VLLM_DEVICES: Final = (
    "reserves no devices for vLLM (vllm_gpus): name a server with rollout.vllm_url, or use a shape that reserves some"
)
"""Of a shape."""
VLLM_ASLEEP_CPU: Final = "vLLM on CPUs cannot sleep: rollout.vllm.placement: colocated needs GPUs"
"""Of a shape."""
VLLM_BESIDE: Final = (
    "reserves devices for vLLM (vllm_gpus), which rollout.vllm.placement: colocated would leave idle: use a shape "
    "without them, or placement: reserved"
)
"""Of a shape."""
VLLM_QUANTIZATION: Final = (
    "the run starts no vLLM server with quantized weights: remove it, name a server with rollout.vllm_url, or set "
    "rollout.sampler to local"
)
VLLM_DORA: Final = "vLLM serves no DoRA adapters: set lora.dora to false, or rollout.sampler to local"
VLLM_TRUNCATED: Final = (
    "vLLM has no logprobs of the untruncated distribution at a temperature other than 1: turn off "
    "rollout.top_p, top_k and min_p, or set rollout.temperature to 1, or rollout.sampler to local"
)
SHARDED_SAMPLING: Final = "shards the base model, which the local sampler does not support: `rollout.sampler: vllm`"
"""Of a shape."""
SHARDED_QUANTIZATION: Final = (
    "shards the base model, which is not supported for 4-bit weights: remove `model.quantization`, or use a shape "
    "without sharding"
)
"""Of a shape."""
EIGHT_BIT_SHARDED: Final = (
    "shards the trained parameters, which is not supported for moments in 8 bits: set optimizer.name to adamw, use "
    "LoRA, or a shape without sharding"
)
"""Of a shape."""
EIGHT_BIT_MISSING: Final = (
    "optimizer.name: adamw_8bit needs bitsandbytes; install the extra: pip install 'tunesmith[qlora]'"
)
SELECTIVE_UNCOMPILED: Final = (
    "recomputes only in compiled layers, which are on GPU shapes without context_parallel and have no experts, 4-bit "
    "weights, DoRA or dropout, with model.compile_layers on: set model.gradient_checkpointing to true"
)
"""Of `model.gradient_checkpointing: selective`."""
OFFLOAD_KEEPS: Final = (
    "moves what gradient checkpointing keeps: set `gradient_checkpointing: true`, or remove activation_offload"
)
OFFLOAD_CPU: Final = "has its activations in host memory: remove model.activation_offload, or use a GPU shape"
"""Of a shape."""
CONTEXT_RFT: Final = (
    "splits packs over several ranks (context_parallel), which rft does not support: use a shape without it"
)
"""Of a shape."""
CONTEXT_SEPARATE: Final = (
    "splits packs over several ranks (context_parallel), which needs packed attention in every layer, and {}: use a "
    "shape without it"
)
"""Of a shape, and why a model's sequences are not packed."""
CONTEXT_TREES: Final = "sequences that share a prefix are not split over several ranks (context_parallel) on a CPU"
FULL_EXPERTS: Final = "full-parameter training of mixture-of-experts models needs a router loss; use LoRA"
ATTENTION_DROPOUT: Final = "attention dropout is not supported; set attention_dropout to 0 in the model's config.json"
SELECTED_KEYS: Final = (
    "selects {} keys per query by scores that can tie, so that sampler and trainer may attend to different keys in "
    "longer sequences, which rft cannot correct: set data.max_seq_tokens to {}"
)
"""Of a model with an indexer."""
SCALE_LEFT_OUT: Final = frozenset({"aya_vision", "cohere2_vision"})
"""Model types whose class in transformers ignores the `logit_scale` of their language model."""
LOGIT_SCALE: Final = (
    "does not apply the logit_scale {:g} of its language model, so its probabilities are not the model's: not supported"
)
"""Of a class of transformers."""
TOOLS_REMEDY: Final = (
    "Set `model.chat_template` to `hermes`, or to a file that renders tools in the form of Hermes and Qwen."
)
NO_TOOLS: Final = f"the chat template shows no tools to the model. {TOOLS_REMEDY}"
HEAD_ADAPTER: Final = "the head cannot have an adapter; leave it out"
HEAD_NAME: Final = "lm_head"
"""Name of the head in most models; the run knows the head of every model."""
ADAPTER_FIELDS: Final[Mapping[str, tuple[str, object]]] = {
    "r": ("rank", 8),
    "lora_alpha": ("alpha", 8),
    "use_rslora": ("rslora", False),
    "use_dora": ("dora", False),
    "alpha_pattern": ("alpha_pattern", {}),
}
"""PEFT's name -> the recipe's name, and the value where adapter_config.json has none (of PEFT 0.21)."""


def truncates(rollout: RolloutSettings) -> bool:
    """Whether improbable tokens are never sampled."""
    return rollout.top_p < 1.0 or rollout.top_k > 0 or rollout.min_p > 0.0


def server_url_problem(url: str) -> str | None:
    """Return what is wrong with the address of a server; None if it may be one."""
    is_web = urlsplit(url).scheme in ("http", "https")
    return None if is_web else f"must begin with http:// or https://, got {url!r}"


def warm_start_problem(
    lora: LoraSettings, directory: Path, alpha_pattern: Mapping[str, object] | None = None
) -> str | None:
    """Return why an adapter is not one to start from; None if it fits the recipe's.

    Args:
        lora: The recipe's adapter.
        directory: Holds adapter_config.json.
        alpha_pattern: Alphas of single modules, which PEFT sets for the model's experts; None if not known yet.
    """
    file = directory / "adapter_config.json"
    if not file.is_file():
        return f"{directory} holds no adapter (no adapter_config.json)"
    try:
        theirs: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        kind = theirs["peft_type"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        return f"{file} cannot be read: {error}"
    if kind != "LORA":
        return f"{directory} holds an adapter of type {kind}, not LORA"
    ours: dict[str, object] = {
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
    }
    ours |= {"alpha_pattern": alpha_pattern} if alpha_pattern is not None else {}
    for name, here in ours.items():
        field, default = ADAPTER_FIELDS[name]
        there = theirs.get(name) or default
        if there != here:
            return f"{directory} was trained with {field} {there}; the recipe has {here}. Make them equal."
    return None
