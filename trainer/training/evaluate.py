"""Held-out rewards: mean, its bootstrap interval, pass@k."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

from trainer.distributed.world import World
from trainer.files import make_directory, write_atomically
from trainer.rewards.runner import RewardRunner
from trainer.sampling.sampler import Sampler, SampleRequest, SamplingParams
from trainer.training.rollouts import Prompt, split_chunks

RESAMPLES: Final = 1000
CONFIDENCE: Final = 0.95
CHUNK_PROMPTS: Final = 16
SEED_OFFSET: Final = 1_000_003
"""Held-out noise is another stream than training noise, and the same at every evaluation."""


@final
@dataclass(frozen=True)
class HeldOutAnswer:
    """One answer to a held-out prompt."""

    text: str
    reward: float | None
    """None when a reward failed."""
    rewards: Mapping[str, float | None]
    finish_reason: str
    num_tokens: int

    @property
    def earned(self) -> float:
        """A failed reward earns nothing here: leaving it out would flatter a policy that breaks the scorer."""
        return self.reward if self.reward is not None else 0.0


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
        moved: Callable[[], None] = lambda: None,
    ) -> None:
        """Fix prompts and noise; `params` are those of training, `moved` is called after each chunk."""
        self.moved = moved
        self.prompts, self.sampler, self.rewards = prompts, sampler, rewards
        self.params, self.num_samples, self.world = params.for_evaluation(SEED_OFFSET), num_samples, world

    def __call__(self, record_to: Path | None = None) -> dict[str, float]:
        """The eval/ values of the policy as it was last published; every rank calls it.

        Args:
            record_to: a file for the answers themselves, one JSON object a prompt; written by the main rank.
        """
        by_row: dict[int, list[HeldOutAnswer]] = {}
        for part in self.world.gather(self._mine()):
            by_row |= part
        rows = [by_row[index] for index in sorted(by_row)]
        if record_to is not None and self.world.is_main:
            make_directory(record_to.parent)
            write_atomically(record_to, "".join(self._record(index, by_row[index]) for index in sorted(by_row)))
        answers = [answer for row in rows for answer in row]
        rewards = [[answer.earned for answer in row] for row in rows]
        low, high = bootstrap_interval([sum(row) / len(row) for row in rewards], self.params.seed)
        names = sorted({name for answer in answers for name in answer.rewards if "/" not in name})
        parts = {f"eval/reward/{name}": [answer.rewards.get(name) or 0.0 for answer in answers] for name in names}
        return {
            "eval/reward": math.fsum(sum(row) for row in rewards) / len(answers),
            "eval/reward_low": low,
            "eval/reward_high": high,
            **{f"eval/pass_at_{k}": pass_at_k(rewards, k) for k in sorted({1, self.num_samples})},
            **{name: math.fsum(values) / len(values) for name, values in parts.items()},
            "eval/completion_tokens": sum(answer.num_tokens for answer in answers) / len(answers),
            "eval/truncated_frac": sum(answer.finish_reason == "length" for answer in answers) / len(answers),
            "eval/failed": float(sum(answer.reward is None for answer in answers)),
        }

    def _mine(self) -> dict[int, list[HeldOutAnswer]]:
        """Answers of the prompts that belong to this rank, by the position of the prompt."""
        found: dict[int, list[HeldOutAnswer]] = {}
        chunks = list(split_chunks(range(len(self.prompts)), CHUNK_PROMPTS, self.world.size))
        for chunk in chunks[self.world.rank :: self.world.size]:
            prompts = [self.prompts[index] for index in chunk]
            requests = [SampleRequest(prompt.token_ids, prompt.row.index, self.num_samples) for prompt in prompts]
            drawn = self.sampler.sample(requests, self.params)
            texts = [[self.sampler.text_of(completion) for completion in group] for group in drawn]
            items = [(text, prompt.row) for prompt, group in zip(prompts, texts, strict=True) for text in group]
            scores = iter(self.rewards.score(items))
            self.moved()
            for index, completions, group in zip(chunk, drawn, texts, strict=True):
                found[index] = [
                    HeldOutAnswer(
                        text, scored.reward, dict(scored.rewards), completion.finish_reason, len(completion.token_ids)
                    )
                    for text, completion, scored in zip(group, completions, scores, strict=False)
                ]
        return found

    def _record(self, index: int, answers: Sequence[HeldOutAnswer]) -> str:
        about = {"row": self.prompts[index].row.index, "where": str(self.prompts[index].row)}
        return json.dumps({**about, "answers": [answer.__dict__ for answer in answers]}, ensure_ascii=False) + "\n"


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
