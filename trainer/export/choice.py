"""Which weights of a run are meant: the last, the best or those of a checkpoint. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import final

from trainer.checkpoints.manifest import verified_manifest
from trainer.errors import CheckpointError, ModelError
from trainer.planning.plan import Plan
from trainer.run.best import best_value
from trainer.run.directory import RunDir


@final
@dataclass(frozen=True)
class Weights:
    """The weights to export, for example `Weights(runs/tiny/checkpoints/step-000020, 20, "checkpoint")`."""

    directory: Path
    """An adapter or model directory, or a checkpoint."""
    step: int
    kind: str
    """`last`, `best` or `checkpoint`."""

    def __str__(self) -> str:
        name = {"last": "last weights", "best": "best weights", "checkpoint": "checkpoint"}[self.kind]
        return f"{name}, step {self.step}"

    @property
    def is_checkpoint(self) -> bool:
        """Whether it holds the training state rather than files that PEFT or transformers read."""
        return self.kind == "checkpoint"


def choose_weights(run: RunDir, plan: Plan, *, best: bool = False, checkpoint: int | None = None) -> Weights:
    """The weights that the user asked for; of a run that is not finished, those of its newest valid checkpoint.

    Args:
        run: the run.
        plan: its plan.
        best: the weights of the best held-out value.
        checkpoint: step of a checkpoint; None for the last weights.

    Raises:
        ModelError: there are none, or not those; names what there is.
    """
    is_lora = plan.recipe.lora is not None
    if checkpoint is not None:
        return _of_checkpoint(run, plan, checkpoint)
    if best:
        directory, value = run.weights(is_lora=is_lora, best=True), best_value(run.comparable_metrics())
        if not directory.is_dir() or value is None:
            raise ModelError(f"{run.root}: has no best weights: it has not evaluated yet. Leave out --best.")
        return Weights(directory, value.step, "best")
    directory, outcome = run.weights(is_lora=is_lora), run.read_outcome()
    if run.is_finished(plan.steps) and directory.is_dir() and outcome is not None:
        return Weights(directory, outcome.step, "last")
    problems = []
    for step in reversed(run.checkpoint_steps()):
        try:
            return _of_checkpoint(run, plan, step)
        except CheckpointError as error:
            problems.append(str(error))
    reason = "; ".join(problems) or f"no checkpoint yet; see `trainer status {run.root}`"
    raise ModelError(f"{run.root}: has no weights yet: {reason}")


def _of_checkpoint(run: RunDir, plan: Plan, step: int) -> Weights:
    directory, steps = run.checkpoint(step), run.checkpoint_steps()
    if step not in steps:
        known = ", ".join(map(str, steps)) or "none"
        raise ModelError(
            f"{run.root}: has no checkpoint of step {step}; there are: {known}. "
            "`keep_last` and `keep_every` of the recipe decide which checkpoints are kept."
        )
    verified_manifest(directory, plan.identity_hash)
    return Weights(directory, step, "checkpoint")
