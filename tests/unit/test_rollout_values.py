"""What the rollouts of a step add up to, and what a rollout is made of."""

from __future__ import annotations

import pytest
import torch

from trainer.distributed.world import World
from trainer.rewards.runner import Scored
from trainer.training.group_sampler import Prompt, with_score
from trainer.training.rollouts import StepRollouts, summarize
from trainer.types import Completion, Group, Rollout, Row

WORLD = World(rank=0, size=1, device=torch.device("cpu"))


def scored_rollout(reward, tokens, reason="stop", **rewards) -> Rollout:
    return Rollout((5, 6) + (1,) * tokens, (False, False) + (True,) * tokens, (0.0,) * tokens, reason, 0, "",
                   reward, rewards)  # fmt: skip


def test_the_values_of_a_step():
    spread = Group(Row({}), (scored_rollout(1.0, 3, a=2.0), scored_rollout(0.0, 8, "length", a=0.0, b=None)))
    flat = Group(Row({}), (scored_rollout(0.5, 1, b=5.0), scored_rollout(None, 4, a=None)))
    values = summarize(StepRollouts((spread,), (0,), (spread, flat), num_replayed=3), WORLD)
    assert values == pytest.approx(
        {
            "rollout/reward": 0.5,  # of 1.0, 0.0 and 0.5
            "rollout/reward_std": (1 / 6) ** 0.5,  # the mean square of 0.5, -0.5 and 0.0
            "rollout/reward/a": 1.0,
            "rollout/reward/b": 5.0,  # where it did not abstain
            "rollout/completion_tokens": 4.0,  # (3 + 8 + 1 + 4) / 4
            "rollout/truncated_frac": 0.25,
            "rollout/flat_group_frac": 0.5,
            "rollout/failed": 1.0,
            "rollout/groups": 2.0,
            "rollout/tokens": 24.0,  # with two prompt tokens each
            "rollout/sampled_tokens": 16.0,
            "perf/replayed_chunks": 3.0,
        }
    )


def test_a_step_in_which_nothing_has_a_reward_has_finite_values():
    group = Group(Row({}), (scored_rollout(None, 3), scored_rollout(None, 5)))
    values = summarize(StepRollouts((group,), (0,), (group,), 0), WORLD)
    assert (values["rollout/failed"], values["rollout/reward"], values["rollout/flat_group_frac"]) == (2.0, 0.0, 1.0)


def test_a_rollout_is_the_prompt_and_one_trained_segment():
    prompt = Prompt(Row({}), (1, 2, 3))
    drawn = Completion((8, 9), (-0.25, -0.5), "stop", 17, "hi")
    rollout = with_score(Rollout.of_completion(prompt.token_ids, drawn), Scored(0.75, {"a": 0.75}))
    assert rollout == Rollout(
        token_ids=(1, 2, 3, 8, 9),
        loss_mask=(False, False, False, True, True),
        sampler_logprobs=(-0.25, -0.5),
        finish_reason="stop",
        policy_version=17,
        text="hi",
        reward=0.75,
        rewards={"a": 0.75},
    )
