"""Conversations of a scripted policy with a small game, for tests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from plans import rft_plan
from prompt_writer import STOP, ids, writer

from trainer.config.recipe import RFTRecipe
from trainer.distributed.preemption import StopFlag
from trainer.distributed.world import World
from trainer.environments.pool import EnvironmentPool
from trainer.rewards.runner import RewardRunner
from trainer.sampling.server_client import SamplerError
from trainer.training.conversations import ConversationSampler
from trainer.training.group_sampler import GroupRequest, Prompt
from trainer.training.open_groups import environment_settings
from trainer.training.rollouts import sampling_params
from trainer.types import Completion, Group, Row

WORLD = World(rank=0, size=1, device=torch.device("cpu"))
GAME = '''
import os
import time
from trainer.environments.contract import Observation, Start

class Game:
    """Plays as many turns as the row says; samples of odd seed pass first."""

    def reset(self, row, *, seed):
        self.row, self.left = row, row["turns"]
        return Start([{"role": "user", "content": "go"}])

    def step(self, turn):
        self.left -= 1
        if self.row.get("dies") == turn.number:
            os._exit(1)
        done = self.left == 0
        if done and "writes" in self.row:
            open(self.row["writes"], "w").close()
        deadline = time.monotonic() + 60
        while turn.number == 0 and not os.path.exists(self.row.get("waits", ".")) and time.monotonic() < deadline:
            time.sleep(0.01)
        if not os.path.exists(self.row.get("waits", ".")):
            os._exit(3)
        info = {"text": turn.text}
        messages = [{"role": "user", "content": "more"}]
        return Observation(messages, done=done, reward=0.25, parts={"seen": 1.0}, info=info)

class Compared(Game):
    @staticmethod
    def group_rewards(rollouts):
        return [float(index) for index, _ in enumerate(rollouts)]

def count(completion, row):
    return float(len(row["conversation"]))

def opened(completion, row):
    said = [each["content"] for each in row["conversation"] if each["role"] == "assistant"]
    return float(all(text.startswith("<think>\\n") for text in [completion, *said]))

def add(a: int, b: int) -> int:
    """Add."""
    return a + b
'''


class ScriptedSampler:
    """Says a text in each turn, the last one in all further turns, and records what it was asked."""

    def __init__(self, texts: Sequence[str], *, draws_apart: bool = False) -> None:
        self.texts, self.draws_apart = texts, draws_apart
        self.fails_at: int | None = None
        """Turn of the first row in which the engine fails."""
        self.asked: list[list[tuple[int, int, int]]] = []

    def publish(self, policy: Any, version: int) -> None:
        raise AssertionError("the loop publishes")

    def sample(self, requests: Any, params: Any) -> list[list[Completion]]:
        self.asked.append([(request.row, request.first_sample, request.turn) for request in requests])
        (turn,) = {request.turn for request in requests}
        if self.fails_at == turn and any(request.row == 0 for request in requests):
            raise SamplerError("the engine is gone")
        text = self.texts[min(turn, len(self.texts) - 1)]
        drawn = (*ids(writer(), text), STOP)
        assert all(request.num_samples == 1 for request in requests)
        return [[Completion(drawn, (-0.5,) * len(drawn), "stop", 4, text)] for _ in requests]


@contextmanager
def played(
    tmp_path: Path,
    texts: str | Sequence[str],
    template: str | None = None,
    *,
    reward: str = "count",
    max_seq_tokens: int = 256,
    draws_apart: bool = False,
    **rollout: Any,
) -> Iterator[Any]:
    """Yield the sampler and a function that plays rows, two rollouts each.

    Args:
        tmp_path: for the game's file.
        texts: what the policy says; one text is said in every turn.
        template: chat template.
        reward: function of the game's file, of weight 0.5.
        max_seq_tokens: of the recipe.
        draws_apart: whether the sampler draws each request by itself, as servers do.
        rollout: further settings.
    """
    (tmp_path / "game.py").write_text(GAME)
    settings = {"environment": f"{tmp_path}/game.py:Game", "max_completion_tokens": 16, **rollout}
    data = {"train": "r.jsonl", "max_seq_tokens": max_seq_tokens}
    fields = {"name": "a", "method": "rft", "model": {"path": "m"}, "data": data}
    rewards = [{"use": f"{tmp_path}/game.py:{reward}", "weight": 0.5}]
    plan = rft_plan(RFTRecipe.model_validate({**fields, "rewards": rewards, "rollout": settings}))
    sampler = ScriptedSampler([texts] if isinstance(texts, str) else texts, draws_apart=draws_apart)
    with (
        RewardRunner(plan.recipe.reward_functions, base_dir=tmp_path) as runner,
        EnvironmentPool(environment_settings(plan)) as pool,
    ):
        params = sampling_params(plan.recipe, plan.recipe.rollout, frozenset({STOP}))
        groups = ConversationSampler(sampler, runner, params, WORLD, StopFlag(), pool, writer(template), plan)

        def play(*rows: dict[str, Any]) -> list[Group]:
            requests = [GroupRequest(Prompt(Row(row, index=index), ()), 2) for index, row in enumerate(rows)]
            return groups.submit(requests, params).result()

        yield sampler, play
