"""Base weights in 4 bits (QLoRA, arXiv:2305.14314), by bitsandbytes."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from trainer.config.recipe import ModelSettings
from trainer.errors import ModelError


def quantized_loading(model: ModelSettings, device: torch.device) -> dict[str, Any]:
    """Arguments of `from_pretrained` that quantize linear layers while loading.

    Raises:
        ModelError: bitsandbytes is missing, or does not support the device.
    """
    field = f"model.quantization: {model.quantization}"
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(f"{field} needs bitsandbytes; install the extra: pip install 'tunesmith[qlora]'")
    import bitsandbytes

    if device.type not in bitsandbytes.supported_torch_devices:
        known = ", ".join(sorted(bitsandbytes.supported_torch_devices))
        raise ModelError(
            f"{field}: bitsandbytes {bitsandbytes.__version__} has no backend for {device.type}, only {known}"
        )
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=getattr(torch, model.compute_dtype),
    )
    return {"quantization_config": config, "device_map": {"": device}}


def keep_differentiable(causal_lm: torch.nn.Module) -> None:
    """Keep bitsandbytes from repacking weights in the first evaluation pass on a CPU.

    Repacked weights have no backward, so the layers below would silently receive no gradient from then on.
    """
    from bitsandbytes.nn import Linear4bit

    for module in causal_lm.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
