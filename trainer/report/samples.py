"""Before and after: the first and the last recorded answers to the same prompts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Final, final

from trainer.report.text import shortened, shortened_messages
from trainer.rewards.runner import ALL_ABSTAINED
from trainer.run.directory import RunDir
from trainer.run.evaluations import EvaluatedPrompt, read_answers, read_evaluation
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
    """Of the mean reward of each prompt; None where no prompt was judged at both steps, as in sft."""
    samples: list[Sample]
    part: str
    """Which rows these are: held-out or training ones."""
    is_judged: bool
    """Whether rewards judged the answers."""


def mean_rewards(prompts: Iterable[EvaluatedPrompt]) -> dict[tuple[str, int], float]:
    """Mean reward of each prompt; a failed reward earns 0, as in eval/reward, and abstentions are left out."""
    means = {}
    for prompt in prompts:
        judged = [answer for answer in prompt.answers if answer.get("failure") != ALL_ABSTAINED]
        if judged:
            means[prompt.key] = fmean(answer["reward"] or 0.0 for answer in judged)
    return means


def before_after(run: RunDir) -> BeforeAfter | None:
    """Compare the first recorded answers with the last; None where there are not two with a prompt in common."""
    is_judged = bool(run.evaluation_steps())
    steps = run.comparable_evaluation_steps() if is_judged else run.answer_steps()
    if len(steps) < 2:
        return None
    read = read_evaluation if is_judged else read_answers
    first, last = read(run, steps[0]), {each.key: each for each in read(run, steps[-1])}
    pairs = [(prompt, last[prompt.key]) for prompt in first if prompt.key in last]
    if not pairs and not is_judged:  # the rows were replaced
        return None
    difference = _difference(first, list(last.values())) if is_judged else None
    samples = [_sample(before, after) for before, after in pairs[:MAX_PROMPTS]]
    part = pairs[0][0].part if pairs else "held-out"
    return BeforeAfter(steps[0], steps[-1], len(pairs), difference, samples, part, is_judged)


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
        reward=record.get("reward"),
        cut=record.get("finish_reason") == "length",
        failure=shortened(failure) if failure else None,
    )
