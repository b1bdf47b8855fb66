"""Models of real dimensions with random weights, created on the device; nothing is downloaded or written."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from trainer.config.recipe import LoraSettings, ModelSettings, SFTRecipe
from trainer.config.shape import ShapeLimit, ShapeLimits, TrainingShape
from trainer.model import attention
from trainer.model.policy import Policy, make_policy
from trainer.planning.memory import MemoryEstimate, estimate_memory
from trainer.planning.model_facts import ModelFacts

CARDS: Final = Path(__file__).parents[1] / "configs" / "models" / "known.yaml"
KINDS: Final[dict[str, tuple[str, str]]] = {
    "Qwen2.5-1.5B": ("qwen2", "Qwen/Qwen2.5-1.5B-Instruct"),
    "Qwen3-8B": ("qwen3", "Qwen/Qwen3-8B"),
}
"""Model type of transformers, and the name in configs/models/known.yaml."""
TINY: Final[dict[str, Any]] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 128, "vocab_size": 512, "tie_word_embeddings": True,
}  # fmt: skip
"""For smoke tests on a CPU."""


def model_sizes(name: str) -> dict[str, Any]:
    """The config.json of a name of `KINDS`, or of `tiny`."""
    if name == "tiny":
        sizes, kind = TINY, "qwen2"
    else:
        kind, card = KINDS[name]
        sizes = yaml.safe_load(CARDS.read_text(encoding="utf-8"))[card]
    # rope_theta and other defaults affect neither shapes nor time
    return {"model_type": kind, "max_position_embeddings": 32_768, **sizes}


def model_facts(name: str) -> ModelFacts:
    """The sizes that memory and FLOPs depend on."""
    facts = ModelFacts.from_config(model_sizes(name))
    assert facts is not None
    return facts


def random_causal_lm(
    name: str, device: torch.device, attn: str = attention.PACKED_ATTENTION, dtype: torch.dtype = torch.bfloat16
) -> PreTrainedModel:
    """A frozen model with random weights; equal calls give equal weights."""
    attention.register()
    sizes = model_sizes(name)
    config = AutoConfig.for_model(sizes.pop("model_type"), **sizes)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attn)
    model.requires_grad_(False)
    return model.eval()


def random_policy(name: str, device: torch.device, lora: LoraSettings | None, *, checkpointing: bool = False) -> Policy:
    """The trainer's policy of this model."""
    settings = ModelSettings(path=name, gradient_checkpointing=checkpointing)
    return make_policy(random_causal_lm(name, device), settings, lora, 0)


def predicted_memory(
    name: str, device: torch.device, lora: LoraSettings | None, tokens: int, *, checkpointing: bool = False
) -> MemoryEstimate:
    """Prediction of `trainer check` for SFT with packs of this many tokens."""
    recipe = SFTRecipe.model_validate(
        {
            "name": "predicted", "method": "sft", "steps": 1,
            "model": {"path": name, "gradient_checkpointing": checkpointing},
            "lora": lora.model_dump() if lora is not None else None,
            "data": {"train": {"path": "rows.jsonl"}, "max_seq_tokens": tokens},
        }
    )  # fmt: skip
    return estimate_memory(recipe, one_device(device, tokens), model_facts(name))


def one_device(device: torch.device, tokens: int) -> TrainingShape:
    """A shape of this one device."""
    is_gpu = device.type == "cuda"
    memory = torch.cuda.get_device_properties(device).total_memory / 2**30 if is_gpu else 16.0
    limit = ShapeLimit(max_params_b=100, max_seq_tokens=1_000_000, basis="estimated")
    return TrainingShape(
        name="one", device="cuda" if is_gpu else "cpu", device_name=device.type, gpus=int(is_gpu),
        gpu_memory_gib=memory, micro_batch_tokens=tokens, limits=ShapeLimits(lora=limit, full=limit),
        accelerate="single" if is_gpu else "cpu",
    )  # fmt: skip


def allocated_gib(estimate: MemoryEstimate) -> float:
    """The part of a prediction that torch's allocator counts: without the process and without fragmentation."""
    return sum(size for name, size in estimate.parts.items() if name not in {"process", "fragmentation"})


def word_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """A word-level tokenizer for libraries that require one; rows are token ids already."""
    words = {f"w{number}": number for number in range(vocab)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w1", eos_token="w2", unk_token="w0")
