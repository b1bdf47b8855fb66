"""Draws groups of completions and scores them, for training and evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, final

from trainer.distributed.preemption import StopFlag
from trainer.distributed.world import World
from trainer.rewards.runner import RewardRunner, Scored, Scoring
from trainer.sampling.sampler import Sampler, SampleRequest, SamplingParams
from trainer.types import Group, Rollout, Row


@final
@dataclass(frozen=True)
class Prompt:
    """A row, and its tokens up to the generation prompt's end."""

    row: Row
    token_ids: tuple[int, ...]
    prefilled: str = ""
    """Thinking that the prompt opens for the answer; rewards see it before the completion's text."""


@final
@dataclass(frozen=True)
class GroupRequest:
    """A prompt, and which of its samples to draw.

    The second group of a row within one step, in groups of 8, is `GroupRequest(prompt, num_samples=8, first_sample=8)`.
    """

    prompt: Prompt
    num_samples: int
    first_sample: int = 0
    """Index of the first sample in the noise stream of the row."""


class Pending(Protocol):
    """Groups whose rollouts are being scored."""

    def result(self) -> list[Group]:
        """Wait for the rewards; returns the groups with them."""


class Groups(Protocol):
    """Draws and scores groups: of single completions, or of conversations."""

    @property
    def params(self) -> SamplingParams:
        """Of training; callers select the noise stream with `at_step` or `for_evaluation`."""

    @property
    def world(self) -> World:
        """The ranks that share the work."""

    @property
    def stop(self) -> StopFlag:
        """Set when the run is to stop."""

    def submit(self, requests: Sequence[GroupRequest], params: SamplingParams) -> Pending:
        """Draw groups and start to score them; the caller may draw more in the meantime.

        Args:
            requests: one per group.
            params: how to sample them.
        """


@final
@dataclass(frozen=True)
class PendingGroups:
    """Sampled groups whose rollouts are being scored."""

    sampled: tuple[Group, ...]
    """Without rewards."""
    scoring: Scoring

    def result(self) -> list[Group]:
        """Wait for the rewards; returns the groups with them."""
        return scored_groups(self.sampled, self.scoring.result())


@final
@dataclass(frozen=True)
class GroupSampler:
    """The sampler and the rewards of a run, with the ranks that share the work."""

    sampler: Sampler
    rewards: RewardRunner
    params: SamplingParams
    """Of training; callers select the noise stream with `at_step` or `for_evaluation`."""
    world: World
    stop: StopFlag

    def submit(self, requests: Sequence[GroupRequest], params: SamplingParams) -> PendingGroups:
        """Sample groups and start to score them; the caller may sample more in the meantime.

        Args:
            requests: one per group.
            params: how to sample them.
        """
        sample_requests = [
            SampleRequest(each.prompt.token_ids, each.prompt.row.index, each.num_samples, each.first_sample)
            for each in requests
        ]
        sampled = tuple(
            Group(
                request.prompt.row,
                tuple(Rollout.of_completion(request.prompt.token_ids, completion) for completion in completions),
            )
            for request, completions in zip(requests, self.sampler.sample(sample_requests, params), strict=True)
        )
        items = [
            (request.prompt.prefilled + rollout.text, group.row)
            for request, group in zip(requests, sampled, strict=True)
            for rollout in group.rollouts
        ]
        return PendingGroups(sampled, self.rewards.submit(items, [len(group.rollouts) for group in sampled]))


def scored_groups(groups: Sequence[Group], scores: Iterable[Scored]) -> list[Group]:
    """The groups with a score for each of their rollouts, in order."""
    of_rollouts = iter(scores)
    return [
        replace(group, rollouts=tuple(with_score(rollout, next(of_rollouts)) for rollout in group.rollouts))
        for group in groups
    ]


def with_score(rollout: Rollout, scored: Scored) -> Rollout:
    """The rollout with its rewards."""
    return replace(rollout, reward=scored.reward, rewards=dict(scored.rewards), failure=scored.failure)
