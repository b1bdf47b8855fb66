"""Held-out rewards: mean, bootstrap interval, pass@k."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, final

from trainer.config.recipe import DataSettings, RFTRecipe
from trainer.errors import RewardError
from trainer.files import make_directory, write_atomically
from trainer.rewards.runner import ALL_ABSTAINED
from trainer.run.intervals import bootstrap_interval
from trainer.run.journal import json_line
from trainer.training.group_sampler import GroupRequest, Groups, Prompt
from trainer.training.prompt_record import journal_prompt
from trainer.training.rollouts import split_chunks
from trainer.types import Conversation, FinishReason, Rollout

CHUNK_PROMPTS: Final = 16
ROUNDING: Final = 1e-9
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
    failure: str | None = None
    """Traceback of the reward that failed, or that every reward abstained."""
    conversation: Conversation | None = None
    """Of an answer with several turns."""

    @classmethod
    def of_rollout(cls, rollout: Rollout) -> HeldOutAnswer:
        """What evaluation keeps of a scored rollout."""
        rewards, reason = rollout.rewards, rollout.finish_reason
        return cls(
            rollout.text, rollout.reward, rewards, reason, rollout.num_drawn, rollout.failure, rollout.conversation
        )

    def record(self) -> dict[str, Any]:
        """The answer as it is on disk; messages only with a conversation."""
        fields = {**self.__dict__}
        conversation = fields.pop("conversation")
        if conversation is not None:
            fields |= {"messages": conversation.messages[conversation.num_prompt :], "stop": conversation.stop}
        return fields

    @property
    def has_abstained(self) -> bool:
        """Whether every reward abstained; such an answer is left out, as in training."""
        return self.failure == ALL_ABSTAINED

    @property
    def has_failed(self) -> bool:
        """Whether a reward failed on the answer."""
        return self.reward is None and not self.has_abstained

    @property
    def earned(self) -> float:
        """The reward, 0 if it failed: leaving failures out would favour a policy that breaks the reward."""
        return self.reward if self.reward is not None else 0.0


@final
@dataclass(frozen=True)
class PassRule:
    """When an answer passes, for pass@k."""

    at_least: float
    reward: str | None = None
    """Name of one reward; None is the weighted sum."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Where rows choose their rewards and the recipe has no rule: what each reward adds to `at_least`, which is 0."""

    @classmethod
    def of(cls, recipe: RFTRecipe) -> PassRule:
        """The recipe's rule; by default the highest sum that rewards of at most 1 can reach.

        With weights 1.0, 0.5 and -0.2 that is 1.5.
        """
        rule = recipe.rollout.success
        if rule is not None:
            return cls(rule.at_least, rule.reward)
        weights = {spec.name: spec.weight for spec in recipe.rewards if spec.weight > 0}
        if recipe.reward_column is not None:
            return cls(0.0, weights=weights)
        return cls(math.fsum(weights.values()))

    def judges(self, answer: HeldOutAnswer) -> bool:
        """Whether the rule is about this answer: not where its row did not choose the rule's reward."""
        name = (self.reward or "").partition("/")[0]
        return self.reward is None or not answer.rewards or name in answer.rewards

    def passes(self, answer: HeldOutAnswer) -> bool:
        """Whether an answer passes; rounding of a weighted sum does not matter."""
        value = answer.reward if self.reward is None else answer.rewards.get(self.reward)
        highest = math.fsum(weight for name, weight in self.weights.items() if name in answer.rewards)
        return value is not None and value >= self.at_least + highest - ROUNDING


@final
@dataclass(frozen=True)
class EvaluationSettings:
    """How held-out prompts are answered, judged and recorded."""

    num_samples: int
    """Answers per prompt."""
    rule: PassRule
    max_failed_frac: float
    """Largest fraction of answers on which a reward may fail."""
    data: DataSettings
    """How rows are read, to record the prompts."""

    @classmethod
    def of(cls, recipe: RFTRecipe) -> EvaluationSettings:
        """The recipe's settings."""
        limit = recipe.reward_limits.max_failed_frac
        return cls(recipe.rollout.eval_samples, PassRule.of(recipe), limit, recipe.data)


@final
class RewardEvaluation:
    """Answers each held-out prompt several times and averages the rewards."""

    def __init__(self, prompts: Sequence[Prompt], sampler: Groups, settings: EvaluationSettings) -> None:
        """Fix the prompts and the noise.

        Args:
            prompts: held-out prompts.
            sampler: of training, whose parameters are used with other noise.
            settings: answers per prompt, and how they are judged and recorded.
        """
        self.prompts, self.sampler, self.settings = prompts, sampler, settings
        self.num_samples, self.data = settings.num_samples, settings.data
        self.params, self.world = sampler.params.for_evaluation(SEED_OFFSET), sampler.world

    def __call__(self, record_to: Path | None = None) -> dict[str, float]:
        """The eval/ metrics of the last published policy; every rank calls it.

        Args:
            record_to: file for the answers, one JSON object per prompt; the main rank writes it.

        Raises:
            RewardError: too many rewards failed; the answers are in the file.
        """
        answers = self.answers()
        if record_to is not None and self.world.is_main:
            make_directory(record_to.parent)
            write_atomically(record_to, self.records(answers))
        self._refuse_failures([answer for of_prompt in answers for answer in of_prompt], record_to)
        return self.metrics(answers)

    def answers(self) -> list[list[HeldOutAnswer]]:
        """The answers to each prompt, in the order of the prompts; every rank calls it."""
        by_prompt: dict[int, list[HeldOutAnswer]] = {}
        for part in self.world.gather(self._answers_of_rank()):
            by_prompt |= part
        return [by_prompt[index] for index in sorted(by_prompt)]

    def _refuse_failures(self, answers: Sequence[HeldOutAnswer], record_to: Path | None) -> None:
        failures = [answer.failure or "" for answer in answers if answer.has_failed]
        limit = self.settings.max_failed_frac
        if len(failures) > limit * len(answers):
            place = f"; they are in {record_to}" if record_to is not None else ""
            raise RewardError(
                f"a reward failed on {len(failures)} of {len(answers)} held-out answers, more than "
                f"reward_limits.max_failed_frac ({limit:g}){place}. The first:\n{failures[0]}"
            )

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
        scored = [[answer for answer in of_prompt if not answer.has_abstained] for of_prompt in by_prompt]
        scored = [of_prompt for of_prompt in scored if of_prompt]
        answers = [answer for of_prompt in by_prompt for answer in of_prompt]
        if not scored:
            raise RewardError("every reward abstained on every held-out answer, so there is nothing to compare")
        rewards = [[answer.earned for answer in of_prompt] for of_prompt in scored]
        low, high = bootstrap_interval([sum(of_prompt) / len(of_prompt) for of_prompt in rewards], self.params.seed)
        rule = self.settings.rule
        passed = [[rule.passes(answer) for answer in of_prompt if rule.judges(answer)] for of_prompt in scored]
        passed = [of_prompt for of_prompt in passed if of_prompt]
        counts = sorted({1, self.num_samples}) if passed else []
        num_scored = sum(map(len, scored))
        return {
            "eval/reward": math.fsum(sum(of_prompt) for of_prompt in rewards) / num_scored,
            "eval/reward_low": low,
            "eval/reward_high": high,
            **{f"eval/pass_at_{k}": pass_at_k(passed, k) for k in counts},
            **_mean_parts(answers),
            "eval/completion_tokens": sum(answer.num_tokens for answer in answers) / len(answers),
            "eval/truncated_frac": sum(answer.finish_reason == "length" for answer in answers) / len(answers),
            "eval/failed": float(sum(answer.has_failed for answer in answers)),
        }

    def records(self, by_prompt: Sequence[Sequence[HeldOutAnswer]]) -> str:
        """The answers as JSON, one prompt a line."""
        pairs = zip(self.prompts, by_prompt, strict=True)
        return "".join(
            json_line(
                journal_prompt(prompt.row, self.data, answers[0].conversation).record()
                | {"answers": [answer.record() for answer in answers]}
            )
            for prompt, answers in pairs
        )


def _mean_parts(answers: Sequence[HeldOutAnswer]) -> dict[str, float]:
    """Mean of each reward over the answers that it judged and did not abstain on; 0 where it failed."""
    names = sorted({name for answer in answers for name in answer.rewards if "/" not in name})
    parts = {}
    for name in names:
        values = [
            answer.rewards.get(name) or 0.0
            for answer in answers
            if answer.rewards.get(name) is not None
            or (answer.has_failed and (name in answer.rewards or not answer.rewards))
        ]
        parts[f"eval/reward/{name}"] = math.fsum(values) / max(1, len(values))
    return parts


def pass_at_k(passed: Sequence[Sequence[bool]], k: int) -> float:
    """Unbiased probability that one of k answers passes (arXiv:2107.03374): mean of 1 - C(n - c, k) / C(n, k).

    >>> pass_at_k([[True, False], [False, False]], 1), pass_at_k([[True, False], [False, False]], 2)
    (0.25, 0.5)

    Args:
        passed: of each prompt's n answers, which of them pass: c of n.
        k: number of answers considered; of a prompt with fewer answers, all of them.
    """
    chances = []
    for row in passed:
        size = min(k, len(row))
        chances.append(1.0 - math.comb(len(row) - sum(row), size) / math.comb(len(row), size))
    return math.fsum(chances) / len(chances)
