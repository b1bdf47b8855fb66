"""Choose the shape of a run: the named one, or with `auto` the smallest that fits on this machine."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, final

from trainer.config.load import all_shapes, find_shape
from trainer.config.recipe import Recipe
from trainer.config.shape import TrainingShape
from trainer.errors import ShapeError
from trainer.planning.fit import misfit
from trainer.planning.machine import Machine, this_machine
from trainer.planning.machine_shapes import machine_shapes
from trainer.planning.memory import estimate_memory
from trainer.planning.model_facts import ModelFacts
from trainer.planning.remedies import (
    Remedy,
    checkpointed,
    find_remedies,
    find_remedies_on_any_shape,
    quantized,
    remedy_lines,
)

CHECKPOINTING: Final = "model.gradient_checkpointing"


@final
@dataclass(frozen=True)
class Choice:
    """The shape of a run, and what `auto` decided beyond it."""

    shape: TrainingShape
    recipe: Recipe
    """The recipe; with `auto`, gradient checkpointing may be switched on."""
    origins: Mapping[str, str] = field(default_factory=dict)
    """Origin of each value that `auto` decided, by dotted name."""
    notes: tuple[str, ...] = ()
    """What the user should know of it."""


def choose_shape(
    recipe: Recipe, facts: ModelFacts | None, name: str, source: str, *, may_checkpoint: bool = True
) -> Choice:
    """Return the named shape if the recipe fits it, or with `auto` the smallest shape that it fits.

    On a machine with GPUs, `auto` chooses among their shapes and never the CPU. Elsewhere it chooses the CPU or, where
    the recipe does not fit, the smallest shape that has a file. For each number of devices it first tries the recipe as
    it is, then with gradient checkpointing.

    Args:
        recipe: The recipe.
        facts: Sizes of the model; None if unknown.
        name: Name or file of the shape, or `auto`.
        source: Where the name was given, for messages.
        may_checkpoint: Whether `auto` may switch gradient checkpointing on; not if the user switched it off.

    Raises:
        ShapeError: The recipe does not fit; the message names changes that would make it fit.
    """
    if name == "auto":
        return _smallest(recipe, facts, source, may_checkpoint=may_checkpoint)
    return Choice(_named(recipe, facts, name, source), recipe)


def _named(recipe: Recipe, facts: ModelFacts | None, name: str, source: str) -> TrainingShape:
    try:
        shape = find_shape(name)
    except ShapeError as error:
        own = {shape.name: shape for shape in machine_shapes(this_machine().devices)}
        if name not in own:
            raise ShapeError(f"{source}: {str(error).removeprefix('shape ')}") from None
        shape = own[name]
    problem = misfit(recipe, shape, facts)
    if problem is None:
        return shape
    remedies = "\n".join(remedy_lines(find_remedies(recipe, shape, facts, reachable_shapes())))
    raise ShapeError(f"{source}: {shape.name} does not fit: {problem}\n{remedies}\nSee also `trainer shapes RECIPE`.")


def reachable_shapes() -> list[TrainingShape]:
    """Return the shapes to advise: those of this machine's GPUs, then those that have a file."""
    own = machine_shapes(this_machine().devices)
    names = {shape.name for shape in own}
    return own + [shape for shape in all_shapes() if shape.name not in names]


def _smallest(recipe: Recipe, facts: ModelFacts | None, source: str, *, may_checkpoint: bool) -> Choice:
    if facts is None:
        raise ShapeError(
            f"{source}: the sizes of {recipe.model.path} are unknown, so `auto` cannot choose a shape.\n"
            "Name a shape (`trainer shapes` lists them), or give `model.path` as a directory with config.json."
        )
    machine = this_machine()
    if machine.problem is not None:
        raise ShapeError(
            f"{source}: `auto` cannot choose a shape: {machine.problem}\n"
            "Or name a shape: `--shape cpu` trains on the CPU. See also `trainer doctor`."
        )
    shapes = machine_shapes(machine.devices) or all_shapes()
    for start in _trials(recipe, facts, shapes, may_checkpoint=may_checkpoint):
        if start.fits():
            return _choice(start, recipe, machine, shapes)
    problems = [f"  {shape.name}: {misfit(recipe, shape, facts)}" for shape in shapes]
    remedies = find_remedies_on_any_shape(recipe, facts, shapes)
    if machine.devices:
        remedies += _elsewhere(recipe, facts)
    lines = [
        f"{source}: no training shape{' of this machine' if machine.devices else ''} fits "
        f"{facts.params / 1e9:.3g} B parameters at {recipe.data.max_seq_tokens:,} tokens:",
        *problems,
        *remedy_lines(remedies),
    ]
    raise ShapeError("\n".join(lines))


def _elsewhere(recipe: Recipe, facts: ModelFacts) -> Iterator[Remedy]:
    """Yield the CPU, if the recipe fits there, and the smallest GPU shape that it fits."""
    trials = [trial for trial in _trials(recipe, facts, all_shapes(), may_checkpoint=True) if trial.fits()]
    on_cpu = [trial for trial in trials if trial.shape.gpus == 0]
    on_gpu = [trial for trial in trials if trial.shape.gpus > 0]
    for trial in on_cpu[:1] + on_gpu[:1]:
        device = "on the CPU" if trial.shape.gpus == 0 else "on another machine"
        yield trial.with_shape(f"`--shape {trial.shape.name}`, {device}", trial.shape)


def _trials(
    recipe: Recipe, facts: ModelFacts, shapes: Sequence[TrainingShape], *, may_checkpoint: bool
) -> Iterator[Remedy]:
    """Yield what `auto` tries: for each number of devices the recipe as it is, then with gradient checkpointing."""
    for _, group in itertools.groupby(shapes, key=lambda shape: shape.gpus):
        plain = [Remedy((), recipe, shape, facts) for shape in group]
        yield from plain
        if may_checkpoint:
            yield from (changed for start in plain if (changed := checkpointed(start)) is not None)


def _choice(start: Remedy, recipe: Recipe, machine: Machine, shapes: Sequence[TrainingShape]) -> Choice:
    """Return what was chosen, with what the user should know of it."""
    shape, notes = start.shape, []
    where = " of this machine" if machine.devices else ""
    origins = {"shape": f"auto: the smallest{where} that fits"}
    if start.changes:
        origins[CHECKPOINTING] = "auto"
        notes.append(f"gradient checkpointing is switched on, {_why_checkpointed(start, recipe)}")
    if shape.gpus > 0 and not machine.devices:
        hidden = " that CUDA_VISIBLE_DEVICES shows" if machine.hidden else ""
        notes.append(
            f"this machine has no GPU{hidden}: the shape {shape.name} ({shape.gpus} x {shape.device_name}) is for "
            "another machine. Train there, or use `trainer submit`."
        )
    smaller = [other for other in shapes if 0 < other.gpus < shape.gpus]
    cheaper = next((each for other in smaller if (each := _quantized_on(start, other)) is not None), None)
    if cheaper is not None:
        notes.append(f"fewer devices would do, with another model: {cheaper} (docs/memory.md)")
    return Choice(shape, start.recipe, origins, tuple(notes))


def _quantized_on(start: Remedy, shape: TrainingShape) -> Remedy | None:
    """Return the quantized recipe on the shape, if it fits there."""
    changed = quantized(Remedy((), start.recipe, shape, start.facts))
    return changed.with_shape(f"`--shape {shape.name}`", shape) if changed is not None and changed.fits() else None


def _why_checkpointed(start: Remedy, recipe: Recipe) -> str:
    assert start.facts is not None, "`auto` refuses models of unknown size"
    with_it = estimate_memory(start.recipe, start.shape, start.facts)
    without = estimate_memory(recipe, start.shape, start.facts)
    return (
        f"since {start.shape.name} has {without.available_gib:g} GiB per device: {without.total_gib:.1f} GiB without, "
        f"{with_it.total_gib:.1f} GiB with it. A step takes about one third longer."
    )
