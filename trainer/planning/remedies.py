"""What would make a recipe fit: the smallest changes, each with its predicted total."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, final

from trainer.config.load import all_shapes, config_dirs
from trainer.config.recipe import LoraSettings, Recipe
from trainer.config.shape import TrainingShape
from trainer.planning.memory import estimate_memory
from trainer.planning.model_facts import ModelFacts, find_model_facts

SMALLEST_MICRO_BATCH: Final = 64


@final
@dataclass(frozen=True)
class Remedy:
    """One change after which the estimate fits."""

    change: str
    total_gib: float
    available_gib: float

    def __str__(self) -> str:
        return f"{self.change}: {self.total_gib:.1f} of {self.available_gib:g} GiB"


def find_remedies(recipe: Recipe, shape: TrainingShape, facts: ModelFacts, shapes: list[TrainingShape]) -> list[Remedy]:
    """Single changes that make the recipe fit, the cheapest first; where none does, pairs with checkpointing.

    Args:
        recipe: which does not fit.
        shape: that it should fit on.
        facts: of the model.
        shapes: the others, smallest first.
    """
    checkpointed = _with(recipe, "model", gradient_checkpointing=True)
    found = _of_recipe(recipe, shape, facts, "")
    if not found and not recipe.model.gradient_checkpointing:
        found = _of_recipe(checkpointed, shape, facts, "`model.gradient_checkpointing: true` and ")
    larger = next((each for each in shapes if each.name != shape.name and _fits(recipe, each, facts)), None)
    if larger is not None:
        sharded = ", which shards the base model" if larger.sharding == "full" and shape.sharding == "none" else ""
        found.append(_remedy(f"`--shape {larger.name}`{sharded}", recipe, larger, facts))
    return found


def _of_recipe(recipe: Recipe, shape: TrainingShape, facts: ModelFacts, prefix: str) -> list[Remedy]:
    """On the same devices."""
    found = []
    if not recipe.model.gradient_checkpointing:
        checkpointed = _with(recipe, "model", gradient_checkpointing=True)
        if _fits(checkpointed, shape, facts):
            found.append(_remedy(f"{prefix}`model.gradient_checkpointing: true`", checkpointed, shape, facts))
    smaller = _smaller_micro_batch(recipe, shape, facts)
    if smaller is not None:
        text = f"{prefix}`micro_batch_tokens: {smaller.micro_batch_tokens}` in a copy of the shape {shape.name}"
        found.append(_remedy(f"{text} (configs/shapes/)", recipe, smaller, facts))
    if recipe.lora is None:
        adapter = recipe.model_copy(update={"lora": LoraSettings()})
        if _fits(adapter, shape, facts):
            found.append(_remedy(f"{prefix}`lora: {{}}` in place of full parameters", adapter, shape, facts))
    return found


def _smaller_micro_batch(recipe: Recipe, shape: TrainingShape, facts: ModelFacts) -> TrainingShape | None:
    """The shape with its micro-batch halved until the recipe fits; below the longest sequence it changes nothing."""
    tokens = shape.micro_batch_tokens // 2
    while tokens >= SMALLEST_MICRO_BATCH:
        smaller = shape.model_copy(update={"micro_batch_tokens": tokens})
        if _fits(recipe, smaller, facts):
            return smaller
        tokens //= 2
    return None


def _with(recipe: Recipe, section: str, **values: object) -> Recipe:
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=values)})


def _fits(recipe: Recipe, shape: TrainingShape, facts: ModelFacts) -> bool:
    limit = shape.limits.lora if recipe.lora is not None else shape.limits.full
    if limit is None or recipe.data.max_seq_tokens > limit.max_seq_tokens or facts.params > limit.max_params_b * 1e9:
        return False
    return estimate_memory(recipe, shape, facts).fits


def _remedy(change: str, recipe: Recipe, shape: TrainingShape, facts: ModelFacts) -> Remedy:
    memory = estimate_memory(recipe, shape, facts)
    return Remedy(change, memory.total_gib, memory.available_gib)


def remedy_lines(recipe: Recipe, shape: TrainingShape) -> list[str]:
    """The remedies as text; a list of general ones where the model's sizes are not known."""
    facts = find_model_facts(recipe.model.path, config_dirs("models"))
    found = find_remedies(recipe, shape, facts, all_shapes()) if facts is not None else []
    if not found:
        return ["Lower `data.max_seq_tokens`, take a smaller model, or a larger shape."]
    return ["What would fit, as predicted:", *(f"  {remedy}" for remedy in found)]
