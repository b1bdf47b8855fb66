"""Which weights of a run are exported, and the policy that has them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

import torch

from trainer.checkpoints.manifest import verified_manifest
from trainer.data.chat import load_tokenizer
from trainer.errors import CheckpointError, ModelError
from trainer.model.adapters import RUN_ADAPTER
from trainer.model.policy import Policy, load_policy
from trainer.planning.plan import Plan
from trainer.run.best import best_value
from trainer.run.directory import RunDir
from trainer.training.masters import read_masters

CPU: Final = torch.device("cpu")


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


def load_trained(plan: Plan, weights: Weights) -> Policy:
    """The run's policy with these weights in float32 on the CPU, as training computes it.

    Raises:
        ModelError: the base model or the weights cannot be loaded.
        CheckpointError: the checkpoint cannot be read.
    """
    recipe = plan.recipe
    plain = {"compute_dtype": "float32", "quantization": None, "gradient_checkpointing": False}
    model = recipe.model.model_copy(update=plain)
    if recipe.lora is None and not weights.is_checkpoint:
        return load_policy(model.model_copy(update={"path": str(weights.directory)}), None, recipe.seed, CPU)
    lora = None if recipe.lora is None else recipe.lora.model_copy(update={"warm_start": None})
    policy = load_policy(model, lora, recipe.seed, CPU)
    policy.eval()
    parameters = policy.trained_parameters()
    with torch.no_grad():
        if weights.is_checkpoint:
            read_masters(weights.directory, {name: value.data for name, value in parameters.items()})
        elif policy.adapters is not None:
            saved = policy.adapters.load_tensors(RUN_ADAPTER, weights.directory)
            for name, parameter in parameters.items():
                parameter.copy_(saved[name])
    return policy


def write_weights(plan: Plan, weights: Weights, policy: Policy, directory: Path) -> None:
    """Write an adapter as PEFT reads it, or a whole model as transformers does, with its tokenizer.

    Args:
        plan: the plan of the run.
        weights: what is exported; files are copied, a checkpoint is converted.
        policy: has these weights. A model from a checkpoint is rounded to the recipe's dtype in place.
        directory: an existing, empty directory.
    """
    if not weights.is_checkpoint:
        shutil.copytree(weights.directory, directory, dirs_exist_ok=True)
        return
    masters = {name: value.detach().clone() for name, value in policy.trained_parameters().items()}
    if plan.recipe.lora is None:
        policy.to(getattr(torch, plan.recipe.model.compute_dtype))
    policy.save(directory, masters)
    load_tokenizer(plan.recipe.model).save_pretrained(str(directory))
