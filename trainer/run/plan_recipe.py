"""From a recipe file to its plan, with runs that the recipe names replaced by their directories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from trainer.config.load import LoadedRecipe, load_recipe
from trainer.config.recipe import LoraSettings
from trainer.errors import LaunchError, RecipeError
from trainer.planning.plan import Plan, make_plan
from trainer.run.directory import RunDir
from trainer.run.find import find_run

FIELD: Final = ("lora", "warm_start")


def plan_recipe(path: Path, overrides: Sequence[str], shape: str | None = None) -> Plan:
    """Read a recipe and resolve it on a shape.

    Args:
        path: the recipe.
        overrides: `--set` assignments.
        shape: overrides the recipe's.

    Raises:
        RecipeError: the recipe has mistakes.
        ShapeError: no shape fits, or the named one does not.
    """
    return make_plan(_with_warm_start(load_recipe(path, overrides)), shape)


def _with_warm_start(loaded: LoadedRecipe) -> LoadedRecipe:
    """The recipe with a directory as `lora.warm_start`, also where it names a run."""
    lora = loaded.recipe.lora
    if lora is None or lora.warm_start is None or Path(lora.warm_start).is_dir():
        return loaded
    try:
        directory = warm_start_directory(lora.warm_start, lora)
    except LaunchError as error:
        raise RecipeError([f"{loaded.document.where(FIELD)}: {error}"]) from None
    changed = lora.model_copy(update={"warm_start": str(directory)})
    return replace(loaded, recipe=loaded.recipe.model_copy(update={"lora": changed}))


def warm_start_directory(text: str, lora: LoraSettings) -> Path:
    """The directory that `NAME`, `NAME@best` or `NAME@STEP` stands for: of an adapter, or of a checkpoint.

    Args:
        text: the value of `lora.warm_start`.
        lora: the adapter that is to begin with it.

    Raises:
        LaunchError: there is no such run or no such checkpoint, or its adapter is another one.
    """
    name, _, which = text.partition("@")
    run = find_run(name)
    plan = run.read_plan()
    if plan.recipe.lora is None:
        raise LaunchError(
            f"{name} trained every parameter and has no adapter; set model.path to {run.weights(is_lora=False)}"
        )
    for field in ("rank", "alpha", "rslora", "dora", "target_modules"):
        ours, theirs = getattr(lora, field), getattr(plan.recipe.lora, field)
        if ours != theirs:
            raise LaunchError(f"{name} was trained with {field} {theirs}; the recipe has {ours}. Make them equal.")
    return _directory(run, which)


def _directory(run: RunDir, which: str) -> Path:
    if which in {"", "best"}:
        directory = run.weights(is_lora=True, best=which == "best")
        if not directory.is_dir():
            raise LaunchError(f"{directory} does not exist: {_there_is(run)}")
        return directory
    steps = run.checkpoint_steps()
    if not which.isdigit() or int(which) not in steps:
        raise LaunchError(f"{run.name}: no checkpoint {which}: {_there_is(run)}")
    return run.checkpoint(int(which))


def _there_is(run: RunDir) -> str:
    kinds = [run.name, f"{run.name}@best"]
    directories = [run.weights(is_lora=True), run.weights(is_lora=True, best=True)]
    known = [kind for kind, directory in zip(kinds, directories, strict=True) if directory.is_dir()]
    known += [f"{run.name}@{step}" for step in run.checkpoint_steps()]
    return f"there is {', '.join(known) or 'nothing yet'}"
