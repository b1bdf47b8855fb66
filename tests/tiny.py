"""Tiny models on disk for tests: two layers, random weights, a byte-level tokenizer and SmolLM2's chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import trainer

ComputeDtype: TypeAlias = Literal["bfloat16", "float32"]
SPECIAL_TOKENS: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Ids 0, 1 and 2, as in SmolLM2."""
SENTENCES: Final = (
    "the quick brown fox jumps over the lazy dog and sees 12 cats, 34 birds and 567 fish.",
    "what is the sum of 8 and 90? the answer is 98.",
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    "system\nuser\nassistant\nanswer the question with one number.",
)
VOCAB_SIZE: Final = 320
HIDDEN: Final = 32

_SLIDING: Final = {"sliding_window": 8}
_MIXTURE: Final = {"num_local_experts": 4, "num_experts_per_tok": 2}
_EXPERTS: Final = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
_LINEAR: Final = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_ARCHITECTURES: Final[dict[str, dict[str, Any]]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mistral": _SLIDING,
    "mixtral": _MIXTURE,
    "gemma2": {**_SLIDING, "head_dim": 16, "query_pre_attn_scalar": 16},
    "gemma4_text": {
        **_SLIDING,
        "head_dim": 16,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt_oss": {**_SLIDING, **_MIXTURE, "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen2_moe": {
        **_EXPERTS,
        "layer_types": ["sliding_attention", "full_attention"],
        **_SLIDING,
        "use_sliding_window": True,
    },
    "qwen3_next": {**_EXPERTS, **_LINEAR, "head_dim": 16, "layer_types": ["linear_attention", "full_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "expand": 2, "chunk_size": 8},
    "diffllama": {},
    "falcon": {},
    "stablelm": {},
    "mpt": {"d_model": HIDDEN, "n_heads": 4, "n_layers": 2},
}
"""Families worth a test: windows of 8 tokens, soft caps (gemma2), stored buffers (gemma4_text), sinks (gpt_oss),
experts; and what is not packed: windows only in the mask (qwen2_moe), recurrent state (qwen3_next, mamba2),
convolutions (lfm2), attention of their own (falcon, stablelm, mpt). diffllama packs, but decodes with its own cache.
"""


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of `VOCAB_SIZE` tokens that encodes any text, with SmolLM2's chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    learner = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, learner)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )
    template = Path(trainer.__file__).parent / "data" / "templates" / "smollm2.jinja"
    fast.chat_template = template.read_text(encoding="utf-8")
    return fast


def tiny_model(arch: str = "llama", *, seed: int = 0, scale: float = 15.0, **overrides: Any) -> PreTrainedModel:
    """A random float32 model; weights are `scale` times the usual, so that its distributions are far from uniform."""
    settings = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    config = AutoConfig.for_model(arch, **{**settings, **_ARCHITECTURES[arch], **overrides})
    config.dtype = "float32"
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(scale)
    return model.eval()


def tiny_model_dir(path: Path, arch: str = "llama", *, seed: int = 0, scale: float = 15.0, **overrides: Any) -> Path:
    """Save a tiny model and its tokenizer as a model directory; returns `path`.

    Args:
        path: the directory, made where it is missing.
        arch: a key of `_ARCHITECTURES`.
        seed: of the weights.
        scale: factor on the weights.
        **overrides: fields of the model's config.json.
    """
    path.mkdir(parents=True, exist_ok=True)
    tiny_model(arch, seed=seed, scale=scale, **overrides).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path
