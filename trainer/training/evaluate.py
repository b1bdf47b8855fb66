"""Held-out rewards: mean, bootstrap interval, pass@k."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

from trainer.config.recipe import DataSettings
from trainer.files import make_directory, write_atomically
from trainer.run.intervals import bootstrap_interval
from trainer.run.journal import json_line
from trainer.training.group_sampler import GroupRequest, GroupSampler, Prompt
from trainer.training.prompt_record import journal_prompt
from trainer.training.rollouts import split_chunks
from trainer.types import FinishReason, Rollout

CHUNK_PROMPTS: Final = 16
SEED_OFFSET: Final = 1_000_003
"""Offsets the noise stream from that of training; every evaluation uses the same noise."""


@final
@dataclass(frozen=True)
class HeldOutAnswer:
    """One answer to a held-out prompt, as ranks exchange it: without token ids."""

    text: str
    reward: float | None
    """None if a reward failed."""
    rewards: Mapping[str, float | None]
    finish_reason: FinishReason
    num_tokens: int

    @classmethod
    def of_rollout(cls, rollout: Rollout) -> HeldOutAnswer:
        """What evaluation keeps of a scored rollout."""
        return cls(rollout.text, rollout.reward, rollout.rewards, rollout.finish_reason, rollout.num_drawn)

    @property
    def earned(self) -> float:
        """The reward, 0 if it failed: leaving failures out would favour a policy that breaks the reward."""
        return self.reward if self.reward is not None else 0.0


@final
class RewardEvaluation:
    """Answers each held-out prompt several times and averages the rewards."""

    def __init__(self, prompts: Sequence[Prompt], sampler: GroupSampler, num_samples: int, data: DataSettings) -> None:
        """Fix the prompts and the noise.

        Args:
            prompts: held-out prompts.
            sampler: of training, whose parameters are used with other noise.
            num_samples: answers per prompt.
            data: how rows are read, to record what was asked.
        """
        self.prompts, self.sampler, self.num_samples, self.data = prompts, sampler, num_samples, data
        self.params, self.world = sampler.params.for_evaluation(SEED_OFFSET), sampler.world

    def __call__(self, record_to: Path | None = None) -> dict[str, float]:
        """The eval/ metrics of the last published policy; every rank calls it.

        Args:
            record_to: file for the answers, one JSON object per prompt; the main rank writes it.
        """
        answers = self.answers()
        if record_to is not None and self.world.is_main:
            make_directory(record_to.parent)
            write_atomically(record_to, self.records(answers))
        return self.metrics(answers)

    def answers(self) -> list[list[HeldOutAnswer]]:
        """The answers to each prompt, in the order of the prompts; every rank calls it."""
        by_prompt: dict[int, list[HeldOutAnswer]] = {}
        for part in self.world.gather(self._answers_of_rank()):
            by_prompt |= part
        return [by_prompt[index] for index in sorted(by_prompt)]

    def _answers_of_rank(self) -> dict[int, list[HeldOutAnswer]]:
        """The answers to this rank's prompts, by index of the prompt."""
        answers: dict[int, list[HeldOutAnswer]] = {}
        chunks = list(split_chunks(range(len(self.prompts)), CHUNK_PROMPTS, self.world.size))
        for chunk in chunks[self.world.rank :: self.world.size]:
            requests = [GroupRequest(self.prompts[index], self.num_samples) for index in chunk]
            groups = self.sampler.submit(requests, self.params).result()
            self.sampler.stop.moved()
            for index, group in zip(chunk, groups, strict=True):
                answers[index] = [HeldOutAnswer.of_rollout(rollout) for rollout in group.rollouts]
        return answers

    def metrics(self, by_prompt: Sequence[Sequence[HeldOutAnswer]]) -> dict[str, float]:
        """The eval/ metrics of the answers to each prompt."""
        answers = [answer for of_prompt in by_prompt for answer in of_prompt]
        rewards = [[answer.earned for answer in of_prompt] for of_prompt in by_prompt]
        low, high = bootstrap_interval([sum(of_prompt) / len(of_prompt) for of_prompt in rewards], self.params.seed)
        names = sorted({name for answer in answers for name in answer.rewards if "/" not in name})
        parts = {f"eval/reward/{name}": [answer.rewards.get(name) or 0.0 for answer in answers] for name in names}
        return {
            "eval/reward": math.fsum(sum(of_prompt) for of_prompt in rewards) / len(answers),
            "eval/reward_low": low,
            "eval/reward_high": high,
            **{f"eval/pass_at_{k}": pass_at_k(rewards, k) for k in sorted({1, self.num_samples})},
            **{name: math.fsum(values) / len(values) for name, values in parts.items()},
            "eval/completion_tokens": sum(answer.num_tokens for answer in answers) / len(answers),
            "eval/truncated_frac": sum(answer.finish_reason == "length" for answer in answers) / len(answers),
            "eval/failed": float(sum(answer.reward is None for answer in answers)),
        }

    def records(self, by_prompt: Sequence[Sequence[HeldOutAnswer]]) -> str:
        """The answers as JSON, one prompt a line."""
        pairs = zip(self.prompts, by_prompt, strict=True)
        return "".join(
            json_line(
                journal_prompt(prompt.row, self.data).record() | {"answers": [answer.__dict__ for answer in answers]}
            )
            for prompt, answers in pairs
        )


def pass_at_k(rewards: Sequence[Sequence[float]], k: int, threshold: float = 0.5) -> float:
    """Unbiased probability that one of k answers passes (arXiv:2107.03374): mean of 1 - C(n - c, k) / C(n, k).

    >>> pass_at_k([[1.0, 0.0], [0.0, 0.0]], 1), pass_at_k([[1.0, 0.0], [0.0, 0.0]], 2)
    (0.25, 0.5)

    Args:
        rewards: of each prompt's n answers, of which c pass.
        k: number of answers considered, at most n.
        threshold: an answer passes if its reward is greater.
    """
    chances = []
    for row in rewards:
        passed = sum(reward > threshold for reward in row)
        chances.append(1.0 - math.comb(len(row) - passed, k) / math.comb(len(row), k))
    return math.fsum(chances) / len(chances)
