"""Choose the shape of a run: the named one, or with `auto` the smallest that fits."""

from __future__ import annotations

from trainer.config.load import all_shapes, find_shape
from trainer.config.recipe import Recipe
from trainer.config.shape import TrainingShape
from trainer.errors import ShapeError
from trainer.planning.fit import misfit
from trainer.planning.model_facts import ModelFacts
from trainer.planning.remedies import find_remedies, find_remedies_on_any_shape, remedy_lines


def choose_shape(recipe: Recipe, facts: ModelFacts | None, name: str, source: str) -> TrainingShape:
    """Return the named shape if the recipe fits it, or with `auto` the smallest shape that it fits.

    Args:
        recipe: The recipe.
        facts: Sizes of the model; None if unknown.
        name: Name or file of the shape, or `auto`.
        source: Where the name was given, for messages.

    Raises:
        ShapeError: The recipe does not fit; the message names changes that would make it fit.
    """
    return _smallest(recipe, facts, source) if name == "auto" else _named(recipe, facts, name, source)


def _named(recipe: Recipe, facts: ModelFacts | None, name: str, source: str) -> TrainingShape:
    try:
        shape = find_shape(name)
    except ShapeError as error:
        raise ShapeError(f"{source}: {str(error).removeprefix('shape ')}") from None
    problem = misfit(recipe, shape, facts)
    if problem is None:
        return shape
    remedies = "\n".join(remedy_lines(find_remedies(recipe, shape, facts, all_shapes())))
    raise ShapeError(f"{source}: {shape.name} does not fit: {problem}\n{remedies}\nSee also `trainer shapes RECIPE`.")


def _smallest(recipe: Recipe, facts: ModelFacts | None, source: str) -> TrainingShape:
    if facts is None:
        raise ShapeError(
            f"{source}: the sizes of {recipe.model.path} are unknown, so `auto` cannot choose a shape.\n"
            "Name a shape (`trainer shapes` lists them), or give `model.path` as a directory with config.json."
        )
    shapes = all_shapes()
    problems = []
    for shape in shapes:
        problem = misfit(recipe, shape, facts)
        if problem is None:
            return shape
        problems.append(f"  {shape.name}: {problem}")
    remedies = remedy_lines(find_remedies_on_any_shape(recipe, facts, shapes))
    lines = [
        f"{source}: no training shape fits {facts.params / 1e9:.3g} B parameters at "
        f"{recipe.data.max_seq_tokens:,} tokens:",
        *problems,
        *remedies,
    ]
    raise ShapeError("\n".join(lines))
