"""Held-out rewards: mean, its bootstrap interval, pass@k."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Final, final

from trainer.config.recipe import AlgorithmSettings
from trainer.distributed import World
from trainer.rewards.runner import RewardRunner
from trainer.sampling.rollouts import Prompt, make_rollout, split_chunks
from trainer.sampling.sampler import Sampler, SampleRequest, SamplingParams

RESAMPLES: Final = 1000
CONFIDENCE: Final = 0.95
CHUNK_PROMPTS: Final = 16
SEED_OFFSET: Final = 1_000_003
"""Held-out noise is another stream than training noise, and the same at every evaluation."""


@final
class RewardEvaluation:
    """Answers held-out prompts k times each and scores the answers."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        sampler: Sampler,
        rewards: RewardRunner,
        params: SamplingParams,
        num_samples: int,
        world: World,
    ) -> None:
        """Fix prompts and noise; `params` are those of training."""
        self.prompts, self.sampler, self.rewards = prompts, sampler, rewards
        self.params, self.num_samples, self.world = params.for_evaluation(SEED_OFFSET), num_samples, world

    def __call__(self) -> dict[str, float]:
        """The eval/ values of the policy as it was last published; every rank calls it."""
        mine: dict[int, list[float]] = {}
        tokens = truncated = failed = 0.0
        chunks = list(split_chunks(range(len(self.prompts)), CHUNK_PROMPTS, self.world.size))
        for chunk in chunks[self.world.rank :: self.world.size]:
            prompts = [self.prompts[index] for index in chunk]
            requests = [SampleRequest(prompt.token_ids, prompt.row.index, self.num_samples) for prompt in prompts]
            answers = self.sampler.sample(requests, self.params)
            items = [
                (self.sampler.text_of(completion), prompt.row)
                for prompt, completions in zip(prompts, answers, strict=True)
                for completion in completions
            ]
            scores = iter(self.rewards.score(items))
            for index, prompt, completions in zip(chunk, prompts, answers, strict=True):
                rollouts = [
                    make_rollout(prompt, completion, "", next(scores), AlgorithmSettings())
                    for completion in completions
                ]
                # A failed reward earns nothing here: leaving it out would flatter a policy that breaks the scorer.
                mine[index] = [rollout.reward if rollout.reward is not None else 0.0 for rollout in rollouts]
                failed += sum(rollout.reward is None for rollout in rollouts)
                tokens += sum(len(completion.token_ids) for completion in completions)
                truncated += sum(completion.finish_reason == "length" for completion in completions)
        rewards: dict[int, list[float]] = {}
        for part in self.world.gather(mine):
            rewards |= part
        tokens, truncated, failed = self.world.sum_of([tokens, truncated, failed])
        by_row = [rewards[index] for index in sorted(rewards)]
        count = len(by_row) * self.num_samples
        low, high = bootstrap_interval([sum(row) / len(row) for row in by_row], self.params.seed)
        return {
            "eval/reward": math.fsum(sum(row) for row in by_row) / count,
            "eval/reward_low": low,
            "eval/reward_high": high,
            **{f"eval/pass_at_{k}": pass_at_k(by_row, k) for k in sorted({1, self.num_samples})},
            "eval/completion_tokens": tokens / count,
            "eval/truncated_frac": truncated / count,
            "eval/failed": failed,
        }


def pass_at_k(rewards: Sequence[Sequence[float]], k: int, threshold: float = 0.5) -> float:
    """Chance that one of k answers passes, unbiased (arXiv:2107.03374): mean of 1 - C(n - c, k) / C(n, k).

    >>> pass_at_k([[1.0, 0.0], [0.0, 0.0]], 1), pass_at_k([[1.0, 0.0], [0.0, 0.0]], 2)
    (0.25, 0.5)

    Args:
        rewards: of each row's n answers.
        k: answers drawn, at most n.
        threshold: an answer passes when its reward is above.
    """
    chances = []
    for row in rewards:
        passed = sum(reward > threshold for reward in row)
        chances.append(1.0 - math.comb(len(row) - passed, k) / math.comb(len(row), k))
    return math.fsum(chances) / len(chances)


def bootstrap_interval(values: Sequence[float], seed: int) -> tuple[float, float]:
    """Percentile interval of the mean, rows resampled; a function of values and seed."""
    generator = random.Random(f"bootstrap:{seed}")
    means = sorted(math.fsum(generator.choices(values, k=len(values))) / len(values) for _ in range(RESAMPLES))
    tail = int((1 - CONFIDENCE) / 2 * RESAMPLES)
    return means[tail], means[-1 - tail]
