"""Load a base model from disk, and its facts that the policy needs."""

from __future__ import annotations

from typing import Any, Final

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from trainer.config.recipe import ModelSettings
from trainer.config.unsupported import FULL_EXPERTS, LOGIT_SCALE, SCALE_LEFT_OUT
from trainer.errors import ModelError
from trainer.model import attention
from trainer.model.adapted_layers import beside_language_part
from trainer.model.lm_head import LogitTransform
from trainer.model.quantization import keep_differentiable, quantized_loading

_TEXT_CLASSES: Final = frozenset(
    {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()}
)
"""Names of the classes of transformers that generate text from text."""

_HEAD_HAS_LAYERS: Final = frozenset({"electra"})
"""Model types whose head is more than one matrix."""
_NEEDS_TOKEN_TYPES: Final = frozenset({"molmo2"})
"""Model types that in training refuse a text without `mm_token_type_ids`."""
_LOGIT_FACTORS: Final = ("logit_scale", "lm_head_multiplier", "output_multiplier")
"""Logits are multiplied by these: Cohere, Falcon-H1, Muse."""
_LOGIT_DIVISORS: Final = ("logits_scaling", "logits_mup_width_multiplier")
"""Logits, or the hidden states before the head, are divided by these: Granite and MiniCPM3, Inkling."""
_SOFT_CAPS: Final = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Gemma and others, RecurrentGemma, xLSTM."""
_SCALING_IS_FACTOR: Final = frozenset({"hyperclovax", "hyperclovax_vision_v2"})
"""Model types that multiply by `logits_scaling`."""


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
        causal_lm, info = model_class(
            model.path, model.revision, trust_remote_code=model.trust_remote_code
        ).from_pretrained(
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
        _find_backbone(causal_lm)
    if causal_lm.base_model is causal_lm:
        raise ModelError(f"{model.path}: {type(causal_lm).__name__} has no backbone apart from its head")
    if causal_lm.get_output_embeddings() is None:
        raise ModelError(f"{model.path}: {type(causal_lm).__name__} has no language-model head")
    if causal_lm.config.model_type in _HEAD_HAS_LAYERS:
        raise ModelError(f"{model.path}: {type(causal_lm).__name__} has layers between its backbone and its head")
    if causal_lm.config.model_type in _NEEDS_TOKEN_TYPES:
        causal_lm.base_model.register_forward_pre_hook(_with_token_types, with_kwargs=True)
    causal_lm.requires_grad_(False)
    if model.quantization is None:
        causal_lm.to(device)
    else:  # it was quantized on the device
        keep_differentiable(causal_lm)
    return causal_lm.eval()


def _find_backbone(causal_lm: PreTrainedModel) -> None:
    """Let `base_model` be the backbone where the class names none: Llama 4, whose wrapper holds a causal model."""
    inner = causal_lm
    while isinstance(next_inner := getattr(inner, "language_model", getattr(inner, "model", None)), PreTrainedModel):
        inner = next_inner
    if inner is not causal_lm:
        object.__setattr__(causal_lm, "text_backbone", inner)  # no second name for its parameters
        causal_lm.base_model_prefix = "text_backbone"


def _with_token_types(_module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Say that every token is text."""
    return args, {"mm_token_type_ids": torch.zeros_like(kwargs["input_ids"]), **kwargs}


def model_class(path: str, revision: str | None = None, *, trust_remote_code: bool = False) -> Any:
    """The class to load a model with: the one that `architectures` in its config.json names, if it generates text.

    A model of images and text, such as Qwen2.5-VL, is loaded whole: what is saved has the names of its base.

    Args:
        path: directory or hub name.
        revision: of a hub model.
        trust_remote_code: whether code in the model's directory may run.

    Raises:
        OSError: there is no config.json.
        ValueError: transformers does not know the model's type.
    """
    config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    return class_of(config)


def class_of(config: PretrainedConfig) -> Any:
    """The class of a model with this configuration, as `model_class` chooses it."""
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):  # code of the model's own
        return AutoModelForCausalLM
    for name in config.architectures or ():
        named = getattr(transformers, name) if name in _TEXT_CLASSES else None
        if named is not None and isinstance(config, named.config_class):
            return named
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForCausalLM
    return AutoModelForImageTextToText


def empty_model(config: PretrainedConfig, dtype: torch.dtype, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model with this configuration and packed attention, without weights of its own.

    Args:
        config: of the model.
        dtype: of the parameters.
        trust_remote_code: whether code in the model's directory may run.
    """
    attention.register()
    kind = class_of(config)
    options = {"dtype": dtype, "attn_implementation": attention.PACKED_ATTENTION}
    if issubclass(kind, PreTrainedModel):
        return kind._from_config(config, **options)
    return kind.from_config(config, trust_remote_code=trust_remote_code, **options)


def has_experts(causal_lm: PreTrainedModel) -> bool:
    """Whether the model is a mixture of experts."""
    config: dict[str, Any] = causal_lm.config.get_text_config().to_dict()
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return any((config.get(name) or 0) > 1 for name in names)


def train_everything(causal_lm: PreTrainedModel) -> None:
    """Let all parameters of a model's language part be trained.

    Args:
        causal_lm: the model.

    Raises:
        ModelError: it is a mixture of experts.
    """
    if has_experts(causal_lm):
        raise ModelError(FULL_EXPERTS)
    unused = {id(value) for module in beside_language_part(causal_lm) for value in module.parameters()}
    for parameter in causal_lm.parameters():
        parameter.requires_grad_(parameter.is_floating_point() and id(parameter) not in unused)


def logit_transform(causal_lm: PreTrainedModel) -> LogitTransform:
    """What the model's own forward does to the products of its LM head, by the names of its configuration's fields.

    Raises:
        ModelError: transformers leaves out the scale that the configuration has.
    """
    config = causal_lm.config.get_text_config()
    fields = {name: float(getattr(config, name, None) or 1.0) for name in (*_LOGIT_FACTORS, *_LOGIT_DIVISORS)}
    if causal_lm.config.model_type in SCALE_LEFT_OUT and fields["logit_scale"] != 1.0:
        raise ModelError(
            f"model: {type(causal_lm).__name__} of transformers {LOGIT_SCALE.format(fields['logit_scale'])}"
        )
    if causal_lm.config.model_type in _SCALING_IS_FACTOR:
        fields["logits_scaling"] = 1.0 / fields["logits_scaling"]
    scale = 1.0
    for name in _LOGIT_FACTORS:
        scale *= fields[name]
    for name in _LOGIT_DIVISORS:
        scale /= fields[name]
    caps = [cap for name in _SOFT_CAPS if (cap := getattr(config, name, None)) is not None]
    return LogitTransform(scale=scale, softcap=caps[0] if caps else None)
