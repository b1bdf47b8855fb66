"""Run by every rank under torchrun: a sharded learner beside a whole one on the same groups; prints what they made.

torchrun --nproc_per_node 2 sharded_ranks.py MODEL_DIR lora|full SHARDS [checkpointing|compiled|compiled-checkpointing|
    compiled-selective]

The whole learner's layers are never compiled.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from compiled import as_on_gpu, graphs_of
from groups import four_groups, make_learner, make_plan, minibatches, perturb, run_step

from trainer.distributed.leaving import exit_with
from trainer.distributed.sharding import is_sharded
from trainer.distributed.world import World, join_world, leave_world
from trainer.model.packing_check import verify_packing
from trainer.model.policy import Reference, load_policy
from trainer.planning.plan import RFTPlan
from trainer.training.learner import Learner
from trainer.training.policy_update import learn
from trainer.training.rollouts import StepRollouts

STEPS = 3
SHARES = {
    2: (((0, 1, 2), (3,)), ((0, 1, 2, 3), ()), ((0, 2), (1, 3))),
    4: (((0, 1), (2,), (), (3,)), ((), (), (0, 1, 2, 3), ()), ((3,), (0,), (1,), (2,))),
}
"""Groups of each rank in each step, by number of ranks: unequal, none at all, and again other."""


def sharded_learner(model_dir: Path, plan: RFTPlan, world: World, backend: Any, options: str) -> Learner:
    is_selective, is_checkpointed = "selective" in options, "checkpointing" in options
    changes = {"path": str(model_dir), "gradient_checkpointing": is_checkpointed or is_selective}
    settings = plan.recipe.model.model_copy(update=changes)
    policy = load_policy(settings, plan.recipe.lora, 0, world.device)
    perturb(policy)
    if "compiled" in options:
        policy.compile_layers(backend, is_selective=is_selective)
    assert world.mesh is not None
    policy.shard(world.mesh, world.device)
    verify_packing(policy, world.device)
    return Learner(policy, world)


def main(model_dir: Path, kind: str, num_shards: int, options: str) -> int:
    plan = make_plan(is_full=kind == "full", minibatches_per_step=2, kl_coef=0.1, micro_batch_tokens=24)
    world = join_world("cpu", int(os.environ["WORLD_SIZE"]), num_shards=num_shards)
    whole = make_learner(model_dir, plan)
    graphs, backend = graphs_of()
    sharded = sharded_learner(model_dir, plan, world, backend, options)
    reference: Literal["initial", "base"] = "base" if "compiled" in options else "initial"
    references = [Reference(learner.policy, reference, is_fresh=False) for learner in (whole, sharded)]
    groups, metrics = four_groups(), []
    for step in range(STEPS):
        mine = SHARES[world.size][step][world.rank]
        drawn = StepRollouts(tuple(groups[place] for place in mine), mine, tuple(groups), num_replayed=0)
        ours = learn(sharded, minibatches(drawn, plan, world.device), references[1], plan, step).metrics
        theirs = run_step(whole, plan, groups, reference=references[0])
        metrics.append({name: (ours[name], theirs[name]) for name in theirs})
    masters, wanted = sharded.whole_masters(), whole.masters
    base = sharded.policy.causal_lm.get_output_embeddings().weight
    named = dict(sharded.policy.named_parameters())
    layer = next(value for name, value in named.items() if "layers.0" in name and "lora" not in name)
    adapters = [value for name, value in named.items() if "lora_" in name]
    if world.is_main:
        distances = {name: float((masters[name] - wanted[name]).abs().max()) for name in wanted}
        about = {
            "metrics": metrics,
            "distance": max(distances.values()),
            "num_masters": len(distances),
            "is_layer_sharded": is_sharded(layer),
            "is_head_sharded": is_sharded(base),
            "num_sharded_adapters": sum(is_sharded(adapter) for adapter in adapters),
            "held": sum(part.numel() for part in sharded.masters.values()),
            "whole": sum(part.numel() for part in wanted.values()),
        }
        if sharded.policy.compiled is not None:
            about["num_graphs"], about["problem"] = len(graphs), sharded.policy.compiled.problem
            about["breaks"] = sum(torch._dynamo.utils.counters["graph_break"].values())
            about["groups"] = [len(group.weights) for group in sharded.policy.compiled.groups]
        sys.stdout.write(json.dumps(about) + "\n")
    leave_world(world)
    return 0


if __name__ == "__main__":
    torch.manual_seed(0)
    chosen = "".join(sys.argv[4:])
    with as_on_gpu() if "compiled" in chosen else nullcontext():
        exit_with(lambda: main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), chosen))
