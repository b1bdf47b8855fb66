"""Groups of scored rollouts written out, and plans and learners to train on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from plans import rft_plan
from tiny import VOCAB_SIZE

from trainer.config.recipe import RFTRecipe
from trainer.config.shape import TrainingShape
from trainer.data.tokens import TokenSequence
from trainer.distributed.world import World
from trainer.model.batch import Batch
from trainer.model.policy import Policy, Reference, load_policy, score
from trainer.planning.plan import RFTPlan
from trainer.training import policy_update
from trainer.training.learner import Learner
from trainer.training.policy_update import Minibatch, learn
from trainer.training.rollouts import StepRollouts, with_advantages
from trainer.types import FinishReason, Group, Rollout, Row

CPU = torch.device("cpu")
WORLD = World(rank=0, size=1, device=CPU)
PROMPT = (1, 40, 41, 42)
LIMIT = 20
"""max_completion_tokens"""


def make_plan(*, micro_batch_tokens: int = 4096, is_full: bool = False, **algorithm: Any) -> RFTPlan:
    """A plan as the worker gets it; `temperature` and `max_sampler_kl` are the rollout's."""
    rollout = {name: algorithm.pop(name) for name in ("temperature", "max_sampler_kl") if name in algorithm}
    recipe = RFTRecipe.model_validate(
        {
            "name": "small",
            "method": "rft",
            "model": {"path": "model", "compute_dtype": "float32"},
            "lora": None if is_full else {"rank": 4},
            "data": {"train": "rows.jsonl"},
            "steps": 10,
            "optimizer": {"learning_rate": 0.01, "schedule": "constant", "max_grad_norm": None},
            "algorithm": algorithm,
            "rollout": {"max_completion_tokens": LIMIT, "max_sampler_kl": 1e9, **rollout},
            "rewards": [{"use": "last_number"}],
        }
    )
    limit = {"max_params_b": 1.0, "max_seq_tokens": 512, "basis": "estimated"}
    shape = TrainingShape.model_validate(
        {"name": "cpu", "device": "cpu", "device_name": "CPU", "gpus": 0, "gpu_memory_gib": 4, "accelerate": "cpu",
         "micro_batch_tokens": micro_batch_tokens, "limits": {"lora": limit, "full": limit}}
    )  # fmt: skip
    return rft_plan(recipe, shape=shape)


def make_learner(model_dir: Path, plan: RFTPlan, *, perturbed: bool = True) -> Learner:
    """A learner whose adapter is not zero, as after some training, unless told otherwise."""
    policy = load_policy(plan.recipe.model.model_copy(update={"path": str(model_dir)}), plan.recipe.lora, 0, CPU)
    if perturbed:
        perturb(policy)
    return Learner(policy, WORLD)


@torch.no_grad()
def perturb(policy: Policy, seed: int = 1, size: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.trained_parameters().values():
        parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def rollout(length: int, reward: float | None, reason: FinishReason = "stop", *, seed: int = 0) -> Rollout:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    drawn = tuple(torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist())
    logprobs = tuple((-14 * torch.rand(length, generator=generator)).tolist())
    trained = (False,) * len(PROMPT) + (True,) * length
    return Rollout(PROMPT + drawn, trained, logprobs, reason, 0, "", reward)


def group(*rollouts: Rollout, index: int = 0) -> Group:
    return Group(Row({}, index=index), rollouts)


def four_groups() -> list[Group]:
    """Unequal lengths, mean rewards and signs; one failure, one flat group, one cut completion."""
    return [
        group(rollout(5, 1.0), rollout(9, 0.0), rollout(3, 0.25), rollout(7, None)),
        group(rollout(4, 0.5), rollout(6, 0.5), rollout(2, 0.5), rollout(8, 0.5), index=1),
        group(rollout(11, -2.0), rollout(1, 3.0), rollout(10, 0.0), rollout(12, 0.0, "length"), index=2),
        group(rollout(13, 0.0), rollout(15, 1.0), rollout(14, 0.0), rollout(LIMIT, 1.0, "length"), index=3),
    ]


def drawn(groups: Sequence[Group]) -> StepRollouts:
    """As one rank draws them."""
    return StepRollouts(tuple(groups), tuple(range(len(groups))), tuple(groups), num_replayed=0)


def drawn_by(policy: Policy, groups: list[Group], temperature: float = 1.0) -> list[Group]:
    """The same groups with the logprobs that a sampler with these weights records."""

    def scored(item: Rollout) -> Rollout:
        pack = Batch.pack([TokenSequence(item.token_ids, item.loss_mask)], CPU)
        logprobs = score(policy, pack, temperature).tolist()
        return replace(item, sampler_logprobs=tuple(logprobs))

    return [replace(each, rollouts=tuple(map(scored, each.rollouts))) for each in groups]


def minibatches(drawn: StepRollouts, plan: RFTPlan, device: torch.device) -> list[Minibatch]:
    """Minibatches of groups that get the plan's advantages here, as `Rollouts` computes them after scoring."""
    estimator = plan.algorithm.advantage
    groups = tuple(with_advantages(each, estimator) for each in drawn.groups)
    return policy_update.minibatches(replace(drawn, groups=groups), plan, device)


def run_step(
    learner: Learner, plan: RFTPlan, groups: Sequence[Group], *, reference: Reference | None = None
) -> dict[str, float]:
    """Make one step, by default measured against the base."""
    reference = reference or Reference(learner.policy, "base", is_fresh=False)
    return learn(learner, minibatches(drawn(groups), plan, CPU), reference, plan, 0).metrics
