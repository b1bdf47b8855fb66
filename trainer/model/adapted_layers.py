"""Which layers of a model get adapters: those of its language part that compute W x + b."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Final

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from torch import nn
from transformers import PreTrainedModel

from trainer.config.recipe import LoraSettings
from trainer.errors import ModelError
from trainer.planning.module_names import target_problems

_NO_EFFECT: Final[Mapping[str, str]] = {
    "gemma3n_text": r".*\.correction_coefs",
    "longcat_flash": r".*\.classifier",
    "inkling2_text": r".*\.weight_proj",
    "laguna": r".*\.mlp\.shared_experts\..*",
    "mistral_large4_text": r".*\.mlp\.shared_experts\..*",
}
"""By model type, a pattern of layers whose adapter would have no effect: the model multiplies the weight itself, at
least in training (the first two), or PEFT 0.21 renames them wrongly when it loads a saved adapter (the others)."""
_MAMBA_MIXER: Final = frozenset({"A_log", "D"})
"""Parameters of every Mamba mixer. Its GPU kernels read the weights of `_MAMBA_READ` without calling the layers, so an
adapter there would have an effect on a CPU only; PEFT refuses them for some model types."""
_MAMBA_READ: Final = ("out_proj", "conv1d", "dt_proj", "x_proj")
_LIKE_LINEAR: Final = frozenset({"FalconLinear", "Linear4bit", "Linear8bitLt"})
"""Subclasses of `nn.Linear` with a forward of their own that computes W x + b."""
_OWN_ADAPTERS: Final = "_adapter_list"
"""Ends the names of Zamba2's own low-rank layers: each shared layer holds those of all its places, and uses one."""
_UNUSED_BY_TEXT: Final = (
    *("MllamaCrossAttentionDecoderLayer", "GitVisionModel", "GitProjection"),
    *("Phi4MultimodalFeatureEmbedding", "EvollaProteinEncoder", "EvollaSequenceAlignerCrossAttention"),
)
"""Classes of modules inside a language part that run only where there are images, sound or proteins."""
_CROSS_ATTENTION: Final = ".encoder_attn"
"""Name of attention to an encoder, which a decoder alone (BART, Whisper) does not run."""
_INDEXER: Final = "Indexer"
"""Ends the class names of modules that select the tokens to attend to: the selection has no gradient."""
_ADAPTER_PART: Final = re.compile(r"\.(base_layer|lora_[a-zA-Z_]+)(\.|$)")
"""In the names of the modules that PEFT puts into an adapted layer."""


def lora_config(causal_lm: PreTrainedModel, lora: LoraSettings) -> peft.LoraConfig:
    """PEFT's configuration of an adapter, which leaves out layers that cannot have one.

    Args:
        causal_lm: the base model.
        lora: rank, targets and so on.
    """
    return peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        exclude_modules=_excluded(causal_lm),
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        task_type="CAUSAL_LM",
    )


def refuse_unmatched(causal_lm: PreTrainedModel, targets: str | list[str] | set[str] | None) -> None:
    """Refuse an embedding, the head, and a name that selects no layer, which PEFT ignores where another selects some.

    Args:
        causal_lm: the base model, with or without adapters.
        targets: names that are left when PEFT has replaced those of fused experts.

    Raises:
        ModelError: a name selects no layer that can have an adapter.
    """
    if targets is None or isinstance(targets, str):
        return
    excluded = re.compile(_excluded(causal_lm) or r"(?!)")
    named = [(name, module) for name, module in causal_lm.named_modules() if not _ADAPTER_PART.search(name)]
    layers = [name for name, module in named if _has_matrix(module) and not excluded.fullmatch(name)]
    problems = target_problems(sorted(targets), layers)
    if problems:
        raise ModelError("\n".join(f"lora.target_modules: {problem}" for problem in problems))


def refuse_lost(adapted: peft.PeftModel, name: str, parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuse an adapter that PEFT would not find again in its file: it renames tensors as those of old checkpoints.

    Args:
        adapted: the model with the adapter.
        name: of the adapter.
        parameters: of the adapter, by their name in the model.

    Raises:
        ModelError: names a tensor that would be lost.
    """
    shapes = {key: torch.empty(value.shape, device="meta") for key, value in parameters.items()}
    saved = peft.get_peft_model_state_dict(adapted, state_dict=shapes, adapter_name=name)
    config = adapted.peft_config[name]
    found = convert_peft_adapter_state_dict_for_transformers(adapted, config, dict(saved), name)
    lost = sorted(saved.keys() - found.keys())
    if lost:
        raise ModelError(
            f"lora.target_modules: PEFT {peft.__version__} would not find {lost[0]} and {len(lost) - 1} more tensors "
            "again when it loads the adapter; leave these modules out"
        )


def language_part(causal_lm: PreTrainedModel) -> nn.Module:
    """The decoder of text: in a model of images and text a part of the backbone, otherwise the backbone."""
    backbone = causal_lm.base_model
    decoder = causal_lm.get_decoder()
    embedding = causal_lm.get_input_embeddings()
    is_inside = any(module is decoder for module in backbone.modules())
    return decoder if is_inside and any(module is embedding for module in decoder.modules()) else backbone


def beside_language_part(causal_lm: PreTrainedModel) -> list[nn.Module]:
    """The parts of a model that text does not pass, such as the vision tower and its projector."""
    names = _beside(causal_lm, language_part(causal_lm), causal_lm.get_output_embeddings())
    return [causal_lm.get_submodule(name) for name in names]


def _excluded(causal_lm: PreTrainedModel) -> str | None:
    """A pattern of the names of layers that get no adapter; None if there are none.

    Left out are the parts beside the language part and inside of it those that run only where there are images: their
    adapters would never learn from text. Also left out are linear layers whose output is not W x + b, such as the
    router of PhiMoE, which returns two tensors, and the layers that a Mamba mixer does not call.
    """
    part = language_part(causal_lm)
    patterns = [rf"{re.escape(name)}(\..*)?" for name in _beside(causal_lm, part, causal_lm.get_output_embeddings())]
    has_other_parts = bool(patterns)
    for name, module in causal_lm.named_modules():
        if has_other_parts and name.rpartition(".")[2].isdigit() and not isinstance(module, nn.Linear):
            patterns.append(_in_every_layer(name))  # PEFT shortens `visual.mlp.0` to `0`, which also names layer 0
        kind = type(module).__name__
        if kind in _UNUSED_BY_TEXT:
            patterns.append(rf"{re.escape(name)}\..*")
        elif kind.endswith(_INDEXER) or name.endswith((_CROSS_ATTENTION, _OWN_ADAPTERS)):
            patterns.append(_in_every_layer(name) + r"\..*")
        elif module._parameters.keys() >= _MAMBA_MIXER:
            patterns += [_in_every_layer(f"{name}.{child}") for child in _MAMBA_READ]
        elif _is_unlike_linear(module):
            patterns.append(_in_every_layer(name))
    no_effect = _NO_EFFECT.get(causal_lm.config.get_text_config().model_type)
    patterns += [no_effect] if no_effect is not None else []
    return "|".join(dict.fromkeys(patterns)) or None


def without_adapter(causal_lm: PreTrainedModel) -> list[str]:
    """Names of the linear layers of the language part that cannot have an adapter, such as `out_proj`."""
    excluded, part = re.compile(_excluded(causal_lm) or r"(?!)"), language_part(causal_lm)
    inside = {id(module) for module in part.modules()}
    named = [(name, module) for name, module in causal_lm.named_modules() if excluded.fullmatch(name)]
    linear = [name for name, module in named if id(module) in inside and isinstance(module, nn.Linear)]
    return sorted({name.rpartition(".")[2] for name in linear})


def _beside(module: nn.Module, part: nn.Module, head: nn.Module | None, prefix: str = "") -> Iterator[str]:
    """Names of the largest parts of a model that do not contain the language part: `model.visual`.

    There are none if the language part is a child of the model: then only the head and its layers are beside it.

    Args:
        module: contains the language part.
        part: the language part.
        head: the head, which belongs to the language part.
        prefix: of the names.
    """
    children = dict(module.named_children())
    if module is part or (not prefix and any(child is part for child in children.values())):
        return
    for name, child in children.items():
        if any(each is part for each in child.modules()):
            yield from _beside(child, part, head, f"{prefix}{name}.")
        elif child is not head:
            yield f"{prefix}{name}"


def _in_every_layer(name: str) -> str:
    """The pattern of a name in all layers: `layers.0.router` and `layers.1.router` have the same."""
    return r"\.".join("[0-9]+" if each.isdigit() else re.escape(each) for each in name.split("."))


def _has_matrix(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return isinstance(module, BaseTunerLayer) or (weight is not None and weight.ndim >= 2)


def _is_unlike_linear(module: nn.Module) -> bool:
    has_other_forward = isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
    return has_other_forward and type(module).__name__ not in _LIKE_LINEAR
