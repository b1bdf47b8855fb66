"""Loads the policy and creates its learner."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch

from trainer.checkpoints.manifest import MANIFEST
from trainer.config.recipe import LoraSettings, Recipe
from trainer.config.unsupported import CONTEXT_RFT
from trainer.distributed.preemption import StopFlag
from trainer.distributed.world import World
from trainer.errors import ModelError
from trainer.model.packing_check import verify_packing, verify_slices
from trainer.model.policy import load_policy, warm_start
from trainer.planning.batching import rotary_problem
from trainer.planning.memory import compute_bytes_of
from trainer.planning.plan import Plan, RFTPlan, model_facts
from trainer.training.learner import Learner
from trainer.training.masters import read_masters


def open_learner(plan: Plan, world: World, stop: StopFlag) -> Learner:
    """Load, shard and verify the policy as the run begins; create its learner.

    Args:
        plan: model, adapter and optimizer.
        world: the ranks.
        stop: asked before each micro-batch whether to abandon the step.

    Raises:
        ModelError: the model cannot be loaded or trained.
        NumericalError: a sequence alone is computed otherwise than by the model's own forward pass, or several ranks
            together compute a pack otherwise than one.
    """
    if world.context is not None and isinstance(plan, RFTPlan):
        raise ModelError(f"the shape {CONTEXT_RFT}")
    recipe = plan.recipe
    is_sharded = world.mesh is not None
    lora, checkpoint = recipe.lora, _warm_checkpoint(recipe.lora)
    if lora is not None and checkpoint is not None:
        lora = lora.model_copy(update={"warm_start": None})
    with world.in_turn() if is_sharded and is_converted(recipe) else nullcontext():
        device = torch.device("cpu") if is_sharded else world.device
        policy = load_policy(recipe.model, lora, recipe.seed, device, run_on=world.device)
        if world.mesh is not None:
            policy.shard(world.mesh, world.device)
    rotary = rotary_problem(policy.config, recipe.data.max_seq_tokens)
    if isinstance(plan, RFTPlan) and rotary is not None:
        raise ModelError(f"data.max_seq_tokens: {rotary}")
    verify_packing(policy, world.device, recipe.data.max_seq_tokens)
    if world.context is not None:
        policy.run_on_slices()
        verify_slices(policy, world, world.context)
    # All ranks take part in each pass of a sharded model or of a split pack: a single rank cannot abandon a step.
    is_urgent = _never if world.runs_in_step else stop.is_urgent
    learner = Learner(policy, world, is_urgent, optimizer=recipe.optimizer.name)
    warm_start(lora, policy, learner.masters)
    if checkpoint is not None:
        read_masters(checkpoint, learner.masters)
    learner.refresh()
    return learner


def is_converted(recipe: Recipe) -> bool:
    """Whether loading writes a converted copy of the whole base into host memory, so that ranks must take turns.

    Files in the compute dtype are mapped: a sharded rank then reads the pages of its own part only, and all ranks of a
    machine share them (measured in benchmarks/sharded_loading.py).
    """
    facts = model_facts(recipe)
    return facts is None or recipe.model.quantization is not None or facts.stored_bytes != compute_bytes_of(recipe)


def _warm_checkpoint(lora: LoraSettings | None) -> Path | None:
    """The checkpoint to begin from; None where the recipe names none, or a directory with an adapter."""
    if lora is None or lora.warm_start is None:
        return None
    directory = Path(lora.warm_start)
    return directory if (directory / MANIFEST).is_file() else None


def _never() -> bool:
    return False
