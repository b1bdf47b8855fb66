"""Changes that make a recipe fit a shape; each is accepted by `misfit` and shown with its predicted memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, final

from trainer.config.recipe import LoraSettings, Recipe, RFTRecipe
from trainer.config.shape import TrainingShape
from trainer.planning.fit import limit_of, misfit
from trainer.planning.memory import estimate_memory
from trainer.planning.model_facts import ModelFacts

SMALLEST_MICRO_BATCH: Final = 64
SHORTEST_SEQUENCE: Final = 128
"""Smaller micro-batches and shorter sequences are not recommended."""


@final
@dataclass(frozen=True)
class Remedy:
    """A recipe and shape after one change or several, for example gradient checkpointing turned on."""

    changes: tuple[str, ...]
    """Each change as the user writes it."""
    recipe: Recipe
    shape: TrainingShape
    facts: ModelFacts | None

    @property
    def change(self) -> str:
        """All changes as text."""
        return " and ".join(self.changes)

    def __str__(self) -> str:
        if self.facts is None:
            return self.change
        memory = estimate_memory(self.recipe, self.shape, self.facts)
        return f"{self.change}: {memory.total_gib:.1f} of {memory.available_gib:g} GiB"

    def fits(self) -> bool:
        """Whether the changed recipe fits the changed shape."""
        return misfit(self.recipe, self.shape, self.facts) is None

    def with_recipe(self, change: str, recipe: Recipe) -> Remedy:
        """Return the remedy with one more change, of the recipe."""
        return replace(self, changes=(*self.changes, change), recipe=recipe)

    def with_shape(self, change: str, shape: TrainingShape) -> Remedy:
        """Return the remedy with one more change, of the shape."""
        return replace(self, changes=(*self.changes, change), shape=shape)


def find_remedies(
    recipe: Recipe, shape: TrainingShape, facts: ModelFacts | None, shapes: Sequence[TrainingShape]
) -> list[Remedy]:
    """Return the smallest changes after which the recipe fits: single ones, or else pairs.

    Args:
        recipe: A recipe that does not fit the shape, or ran out of memory there although it was predicted to fit.
        shape: The shape.
        facts: Sizes of the model; None if unknown.
        shapes: All shapes, smallest first.
    """
    unchanged = Remedy((), recipe, shape, facts)
    remedies = list(_on_same_devices(unchanged))
    if not remedies:
        remedies = [pair for first in _enabling(unchanged) for pair in _on_same_devices(first)]
    others = [other for other in shapes if other.name != shape.name and _is_roomier(unchanged, other)]
    remedies += list(_on_other_shapes(unchanged, others))[:1]
    if not remedies:
        remedies = [pair for first in _enabling(unchanged) for pair in list(_on_other_shapes(first, others))[:1]]
    return remedies


def find_remedies_on_any_shape(
    recipe: Recipe, facts: ModelFacts | None, shapes: Sequence[TrainingShape]
) -> list[Remedy]:
    """Return changes of a recipe that fits no shape, each with the smallest shape that it fits after the change.

    Args:
        recipe: The recipe.
        facts: Sizes of the model; None if unknown.
        shapes: All shapes, smallest first.
    """
    unchanged = [Remedy((), recipe, shape, facts) for shape in shapes]
    remedies = _changed_on_smallest(unchanged)
    if not remedies:
        remedies = _changed_on_smallest([each for start in unchanged if (each := checkpointed(start)) is not None])
    return remedies


def _changed_on_smallest(starts: Sequence[Remedy]) -> list[Remedy]:
    """Return each further change after which a recipe fits, with the smallest shape that it fits then."""
    remedies: list[Remedy] = []
    for change in (checkpointed, quantized, _with_adapter, _with_vllm, _within_limit):
        changed = [each for start in starts if (each := change(start)) is not None]
        fitting = [each for each in changed if each.fits()]
        if fitting:
            best = max(fitting, key=lambda each: each.recipe.data.max_seq_tokens)  # the first, smallest shape of those
            remedies.append(best.with_shape(f"`--shape {best.shape.name}`", best.shape))
    return remedies


def remedy_lines(remedies: Sequence[Remedy]) -> list[str]:
    """Return the remedies as text, or general advice if there are none."""
    if not remedies:
        return ["No single change makes it fit. Use a smaller model, or add a larger shape to configs/shapes/."]
    return ["What would fit, as predicted:", *(f"  {remedy}" for remedy in remedies)]


def _on_same_devices(start: Remedy) -> Iterator[Remedy]:
    """Yield each further change after which the recipe fits, on the same devices; the least costly first."""
    is_found = False
    for change in (checkpointed, _with_smaller_micro_batch, _with_adapter, _with_vllm, _within_limit):
        changed = change(start)
        if changed is not None and changed.fits():
            is_found = True
            yield changed
    for change in () if is_found else (quantized, _with_shorter_sequences):
        changed = change(start)
        if changed is not None and changed.fits():
            yield changed


def _enabling(start: Remedy) -> Iterator[Remedy]:
    """Yield the changes that are tried together with a second one."""
    for change in (checkpointed, _with_vllm, _with_adapter):
        changed = change(start)
        if changed is not None:
            yield changed


def _is_roomier(unchanged: Remedy, other: TrainingShape) -> bool:
    """Whether the other shape may help: the recipe does not fit now, or it is predicted to leave more memory free."""
    if not unchanged.fits() or unchanged.facts is None:
        return True
    now = estimate_memory(unchanged.recipe, unchanged.shape, unchanged.facts)
    then = estimate_memory(unchanged.recipe, other, unchanged.facts)
    return then.available_gib - then.total_gib > now.available_gib - now.total_gib


def _on_other_shapes(start: Remedy, shapes: Sequence[TrainingShape]) -> Iterator[Remedy]:
    """Yield the shapes that the recipe fits."""
    for shape in shapes:
        is_newly_sharded = shape.sharding != "none" and start.shape.sharding == "none"
        suffix = ", which shards the base model" if is_newly_sharded else ""
        moved = start.with_shape(f"`--shape {shape.name}`{suffix}", shape)
        if moved.fits():
            yield moved


def checkpointed(start: Remedy) -> Remedy | None:
    """Return the recipe with gradient checkpointing of all activations; None if it has it."""
    model = start.recipe.model
    if model.gradient_checkpointing is True:
        return None
    changed = model.model_copy(update={"gradient_checkpointing": True})
    return start.with_recipe("`model.gradient_checkpointing: true`", start.recipe.model_copy(update={"model": changed}))


def quantized(start: Remedy) -> Remedy | None:
    """Return the recipe with base weights in 4 bits, which changes the model; None on shards, and on a slow CPU."""
    recipe, model = start.recipe, start.recipe.model
    if recipe.lora is None or model.quantization is not None or start.shape.sharding != "none" or start.shape.gpus == 0:
        return None
    changed = model.model_copy(update={"quantization": "nf4"})
    return start.with_recipe("`model.quantization: nf4`", recipe.model_copy(update={"model": changed}))


def _with_smaller_micro_batch(start: Remedy) -> Remedy | None:
    """Halve the micro-batch until the recipe fits."""
    tokens = start.shape.micro_batch_tokens // 2
    while tokens >= SMALLEST_MICRO_BATCH:
        text = f"`micro_batch_tokens: {tokens}` in a copy of the shape {start.shape.name} (configs/shapes/)"
        smaller = start.with_shape(text, start.shape.model_copy(update={"micro_batch_tokens": tokens}))
        if smaller.fits():
            return smaller
        tokens //= 2
    return None


def _with_adapter(start: Remedy) -> Remedy | None:
    if start.recipe.lora is not None:
        return None
    changed = start.recipe.model_copy(update={"lora": LoraSettings()})
    return start.with_recipe("`lora: {}` instead of full-parameter training", changed)


def _with_vllm(start: Remedy) -> Remedy | None:
    recipe = start.recipe
    if not isinstance(recipe, RFTRecipe) or recipe.rollout.sampler == "vllm":
        return None
    if recipe.lora is None or recipe.lora.dora:
        return None  # vLLM serves neither
    rollout = recipe.rollout.model_copy(update={"sampler": "vllm"})
    return start.with_recipe("`rollout.sampler: vllm`", recipe.model_copy(update={"rollout": rollout}))


def _within_limit(start: Remedy) -> Remedy | None:
    """Lower the sequence length to the shape's limit."""
    limit = limit_of(start.recipe, start.shape)
    if limit is None or start.recipe.data.max_seq_tokens <= limit.max_seq_tokens:
        return None
    return _with_max_seq_tokens(start, limit.max_seq_tokens)


def _with_shorter_sequences(start: Remedy) -> Remedy | None:
    """Halve the sequence length until the recipe fits."""
    tokens = start.recipe.data.max_seq_tokens // 2
    while tokens >= SHORTEST_SEQUENCE:
        shorter = _with_max_seq_tokens(start, tokens)
        if shorter is None or shorter.fits():
            return shorter
        tokens //= 2
    return None


def _with_max_seq_tokens(start: Remedy, tokens: int) -> Remedy | None:
    recipe = start.recipe
    if isinstance(recipe, RFTRecipe) and recipe.rollout.max_completion_tokens >= tokens:
        return None  # no room would be left for the prompt
    data = recipe.data.model_copy(update={"max_seq_tokens": tokens})
    return start.with_recipe(f"`data.max_seq_tokens: {tokens}`", recipe.model_copy(update={"data": data}))
