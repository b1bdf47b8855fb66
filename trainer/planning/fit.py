"""Whether a recipe fits a shape: the one rule, used by `check`, `shape: auto` and remedies."""

from __future__ import annotations

from trainer.config.recipe import Recipe, RFTRecipe
from trainer.config.shape import ShapeLimit, TrainingShape
from trainer.config.unsupported import (
    CONTEXT_RFT,
    EIGHT_BIT_SHARDED,
    OFFLOAD_CPU,
    SELECTED_KEYS,
    SELECTIVE_UNCOMPILED,
    SHARDED_QUANTIZATION,
    SHARDED_SAMPLING,
)
from trainer.planning.memory import base_bytes, compute_bytes_of, estimate_memory
from trainer.planning.model_facts import ModelFacts


def limit_of(recipe: Recipe, shape: TrainingShape) -> ShapeLimit | None:
    """Return the shape's limit for the recipe's kind of training; None if the shape does not support it."""
    return shape.limits.lora if recipe.lora is not None else shape.limits.full


def has_compiled_layers(recipe: Recipe, shape: TrainingShape, facts: ModelFacts | None) -> bool:
    """Return whether decoder layers are compiled; as `trainer.model.policy` decides it.

    Args:
        recipe: The recipe.
        shape: The shape.
        facts: Sizes of the model; None if unknown, then it is taken for one without experts.
    """
    model, lora = recipe.model, recipe.lora
    is_plain = model.compile_layers and model.quantization is None and (facts is None or facts.num_experts == 1)
    is_plain = is_plain and (lora is None or not (lora.dora or lora.dropout))
    return is_plain and shape.device == "cuda" and shape.context_parallel == 1


def misfit(recipe: Recipe, shape: TrainingShape, facts: ModelFacts | None) -> str | None:
    """Return why the recipe does not fit the shape, or None if it fits.

    Args:
        recipe: The recipe.
        shape: The shape.
        facts: Sizes of the model; None if unknown, then parameters and memory are not checked.
    """
    kind = "LoRA" if recipe.lora is not None else "full-parameter training"
    limit = limit_of(recipe, shape)
    if limit is None:
        return f"does not support {kind}"
    unsupported = _unsupported(recipe, shape, facts)
    if unsupported is not None:
        return unsupported
    if recipe.data.max_seq_tokens > limit.max_seq_tokens:
        return f"supports sequences up to {limit.max_seq_tokens:,} tokens ({limit.basis})"
    if facts is None:
        return None
    is_limit_for_it = recipe.lora is not None or recipe.optimizer.name == "adamw"  # limits assume moments in float32
    most = limit.max_params_b * 1e9 * compute_bytes_of(recipe)
    if is_limit_for_it and base_bytes(recipe, facts) > most:  # 4-bit weights count less
        return f"supports models up to {limit.max_params_b:g} B parameters for {kind} ({limit.basis})"
    memory = estimate_memory(recipe, shape, facts)
    if not memory.fits:
        return f"needs about {memory.total_gib:.1f} GiB per device and has {memory.available_gib:g}"
    return None


def _unsupported(recipe: Recipe, shape: TrainingShape, facts: ModelFacts | None) -> str | None:
    """Return what of the recipe the shape does not support, whatever the sizes."""
    is_sharded = shape.num_shards > 1
    if shape.context_parallel > 1 and isinstance(recipe, RFTRecipe):
        return CONTEXT_RFT
    if is_sharded and isinstance(recipe, RFTRecipe) and recipe.rollout.sampler == "local":
        return SHARDED_SAMPLING
    if is_sharded and recipe.model.quantization is not None:
        return SHARDED_QUANTIZATION
    if recipe.model.gradient_checkpointing == "selective" and not has_compiled_layers(recipe, shape, facts):
        return f"cannot be used: model.gradient_checkpointing: selective {SELECTIVE_UNCOMPILED}"
    if recipe.model.activation_offload and shape.device == "cpu":
        return OFFLOAD_CPU
    if is_sharded and recipe.lora is None and recipe.optimizer.name == "adamw_8bit":
        return EIGHT_BIT_SHARDED
    if facts is not None and facts.selected_keys is not None and isinstance(recipe, RFTRecipe):
        selected = facts.selected_keys
        if recipe.data.max_seq_tokens > selected:
            return f"cannot be used: {facts.model_type} {SELECTED_KEYS.format(selected, selected)}"
    return None
