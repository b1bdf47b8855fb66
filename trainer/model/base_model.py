"""Load a base model from disk, and its facts that the policy needs."""

from __future__ import annotations

from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from trainer.config.recipe import ModelSettings
from trainer.errors import ModelError
from trainer.model import attention
from trainer.model.lm_head import LogitTransform
from trainer.model.quantization import keep_differentiable, quantized_loading


def load_base(
    model: ModelSettings, device: torch.device, attention_name: str | None = attention.PACKED_ATTENTION
) -> PreTrainedModel:
    """Load the base model in the compute dtype, from safetensors only.

    Args:
        model: path, revision, dtype, quantization.
        device: where the model goes.
        attention_name: implementation of its attention; None is the model's own, which is also taken where the model's
            code chooses attention by itself.

    Raises:
        ModelError: it cannot be loaded, with the reason.
    """
    attention.register()
    try:
        causal_lm, info = AutoModelForCausalLM.from_pretrained(
            model.path,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            use_safetensors=True,
            dtype=getattr(torch, model.compute_dtype),
            attn_implementation=attention_name,
            output_loading_info=True,
            **(quantized_loading(model, device) if model.quantization is not None else {}),
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if reason == repr(attention_name):
            return load_base(model, device, attention_name=None)
        raise ModelError(f"{model.path}: cannot be loaded: {reason}") from None
    if info["missing_keys"]:  # transformers would initialize them at random
        first, *others = sorted(info["missing_keys"])
        raise ModelError(f"{model.path}: the weights lack {first} and {len(others)} more; is the directory complete?")
    if causal_lm.base_model is causal_lm:
        raise ModelError(f"{model.path}: {type(causal_lm).__name__} has no backbone apart from its head")
    if causal_lm.get_output_embeddings() is None:
        raise ModelError(f"{model.path}: {type(causal_lm).__name__} has no language-model head")
    causal_lm.requires_grad_(False)
    if model.quantization is None:
        causal_lm.to(device)
    else:  # it was quantized on the device
        keep_differentiable(causal_lm)
    return causal_lm.eval()


def has_experts(causal_lm: PreTrainedModel) -> bool:
    """Whether the model is a mixture of experts."""
    config: dict[str, Any] = causal_lm.config.get_text_config().to_dict()
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return any((config.get(name) or 0) > 1 for name in names)


def logit_transform(causal_lm: PreTrainedModel) -> LogitTransform:
    """What the model's own forward does to the products of its LM head."""
    config: dict[str, Any] = causal_lm.config.get_text_config().to_dict()
    scale = float(config.get("logit_scale") or 1.0) / float(config.get("logits_scaling") or 1.0)
    return LogitTransform(scale=scale, softcap=config.get("final_logit_softcapping"))
