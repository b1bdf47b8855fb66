"""Before and after: the first and the last recorded answers to the same held-out prompts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Final, final

from trainer.report.text import shortened, shortened_messages
from trainer.rewards.runner import ALL_ABSTAINED
from trainer.run.directory import RunDir
from trainer.run.evaluations import EvaluatedPrompt, read_evaluation
from trainer.run.intervals import PairedDifference, paired_difference

MAX_PROMPTS: Final = 100
"""Prompts whose answers are shown; the difference is over all."""


@final
@dataclass(frozen=True)
class Answer:
    """One answer to a held-out prompt."""

    text: str
    reward: float | None
    cut: bool
    """Whether it ended at the token limit."""
    failure: str | None


@final
@dataclass(frozen=True)
class Sample:
    """A held-out prompt and its answers at two steps."""

    where: str
    messages: list[dict[str, Any]] | None
    fields: dict[str, Any]
    before: list[Answer]
    after: list[Answer]


@final
@dataclass(frozen=True)
class BeforeAfter:
    """Two evaluations compared."""

    first_step: int
    last_step: int
    num_prompts: int
    """Prompts that both answered."""
    difference: PairedDifference | None
    """Of the mean reward of each prompt; None where no prompt was judged at both steps."""
    samples: list[Sample]


def mean_rewards(prompts: Iterable[EvaluatedPrompt]) -> dict[tuple[str, int], float]:
    """Mean reward of each prompt; a failed reward earns 0, as in eval/reward, and abstentions are left out."""
    means = {}
    for prompt in prompts:
        judged = [answer for answer in prompt.answers if answer.get("failure") != ALL_ABSTAINED]
        if judged:
            means[prompt.key] = fmean(answer["reward"] or 0.0 for answer in judged)
    return means


def before_after(run: RunDir) -> BeforeAfter | None:
    """Compare the first recorded evaluation with the last; None where there are not two."""
    steps = run.comparable_evaluation_steps()
    if len(steps) < 2:
        return None
    first, last = read_evaluation(run, steps[0]), {each.key: each for each in read_evaluation(run, steps[-1])}
    pairs = [(prompt, last[prompt.key]) for prompt in first if prompt.key in last]
    samples = [_sample(before, after) for before, after in pairs[:MAX_PROMPTS]]
    return BeforeAfter(steps[0], steps[-1], len(pairs), _difference(first, list(last.values())), samples)


def _difference(first: Sequence[EvaluatedPrompt], last: Sequence[EvaluatedPrompt]) -> PairedDifference | None:
    before, after = mean_rewards(first), mean_rewards(last)
    keys = [key for key in before if key in after]
    if not keys:
        return None
    return paired_difference([before[key] for key in keys], [after[key] for key in keys], seed=0)


def _sample(before: EvaluatedPrompt, after: EvaluatedPrompt) -> Sample:
    return Sample(
        where=before.where,
        messages=shortened_messages(before.messages),
        fields=dict(before.fields),
        before=[_answer(answer) for answer in before.answers],
        after=[_answer(answer) for answer in after.answers],
    )


def _answer(record: Mapping[str, Any]) -> Answer:
    failure = record.get("failure")
    return Answer(
        text=shortened(record["text"]),
        reward=record["reward"],
        cut=record.get("finish_reason") == "length",
        failure=shortened(failure) if failure else None,
    )
