"""Loads the policy and creates its learner."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from trainer.distributed.preemption import StopFlag
from trainer.distributed.world import World
from trainer.model.packing_check import verify_packing
from trainer.model.policy import load_policy, warm_start
from trainer.planning.plan import Plan
from trainer.training.learner import Learner


def open_learner(plan: Plan, world: World, stop: StopFlag) -> Learner:
    """Load, shard and verify the policy as the run begins; create its learner.

    Args:
        plan: model, adapter and optimizer.
        world: the ranks.
        stop: asked before each micro-batch whether to abandon the step.

    Raises:
        ModelError: the model cannot be loaded or trained.
        NumericalError: information leaks between packed sequences.
    """
    recipe = plan.recipe
    is_sharded = world.mesh is not None
    with world.in_turn() if is_sharded else nullcontext():
        policy = load_policy(
            recipe.model, recipe.lora, recipe.seed, torch.device("cpu") if is_sharded else world.device
        )
        if world.mesh is not None:
            policy.shard(world.mesh, world.device)
    verify_packing(policy, world.device)
    # All ranks take part in each pass of a sharded model, so a single rank cannot abandon a step.
    learner = Learner(policy, world, _never if is_sharded else stop.is_urgent)
    warm_start(recipe.lora, policy, learner.masters)
    learner.refresh()
    return learner


def _never() -> bool:
    return False
