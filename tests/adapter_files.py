"""PEFT adapters on disk with random weights, for tests that need trained ones of any rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM


def adapter_dir(path: Path, model: Path, *, rank: int = 4, seed: int = 0, scale: float = 0.3, **config: Any) -> Path:
    """Save an adapter whose B is not zero; returns `path`.

    Args:
        path: the directory.
        model: the base model's directory.
        rank: of the adapter.
        seed: of the weights.
        scale: of B.
        **config: further fields of `peft.LoraConfig`; all linear layers are adapted by default.
    """
    settings = {"target_modules": "all-linear", "lora_alpha": 2 * rank, **config}
    base = AutoModelForCausalLM.from_pretrained(model)
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=rank, task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(adapted.named_parameters()):
            if "lora_" in name:
                factor = scale if "lora_B" in name else parameter.shape[1] ** -0.5
                parameter.copy_(factor * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(str(path))
    return path
