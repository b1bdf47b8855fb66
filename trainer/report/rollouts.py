"""The rollouts that a page has: of all steps where they are few, else of some, evenly spaced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar, final

from trainer.report.groups import ShownGroup, step_groups, steps_with_rollouts
from trainer.report.text import shortened, shortened_messages
from trainer.run.directory import RunDir

MAX_ROLLOUTS: Final = 2000
"""Of one run in a page."""
MIN_STEPS: Final = 8
"""Steps that are shown at least, with fewer prompts each."""
T = TypeVar("T")


@final
@dataclass(frozen=True)
class PageGroup:
    """The completions of one prompt at one step."""

    step: int
    refused: bool
    """Whether the step was not trained on, because too many rewards failed."""
    where: str
    messages: list[dict[str, Any]] | None
    fields: dict[str, Any]
    rollouts: list[dict[str, Any]]
    """Each with text, messages (several turns), stop, reward, rewards, advantage, tokens, finish_reason, failure."""


@final
@dataclass(frozen=True)
class PageRollouts:
    """The rollouts of a run in a page."""

    groups: list[PageGroup]
    num_steps: int
    """Steps that have rollouts."""
    shown_steps: int
    left_out: str
    """What the page does not have, as a sentence; empty where it has everything."""


class RolloutReader:
    """Reads the rollouts of a run for the page; a live page reads each step once."""

    def __init__(self, run: RunDir, group_size: int, rows_per_step: int) -> None:
        """Nothing is read yet.

        Args:
            run: an rft run.
            group_size: completions of each prompt.
            rows_per_step: prompts of each step.
        """
        self._run = run
        self._group_size, self._rows_per_step = group_size, rows_per_step
        self._read: dict[tuple[int, bool, int], list[ShownGroup]] = {}

    def read(self) -> PageRollouts:
        """The rollouts of the steps that the page shows, ascending; refused ones before those drawn again."""
        steps = sorted(
            (step, not refused) for refused in (True, False) for step in steps_with_rollouts(self._run, refused=refused)
        )
        per_step = self._group_size * self._rows_per_step
        chosen = spread_evenly(steps, max(MIN_STEPS, MAX_ROLLOUTS // per_step))
        per_shown_step = MAX_ROLLOUTS // max(1, len(chosen)) // self._group_size
        groups: list[PageGroup] = []
        num_prompts = 0
        for step, was_kept in chosen:
            of_step = self._groups(step, refused=not was_kept)
            shown = spread_evenly(of_step, max(1, per_shown_step))
            num_prompts = max(num_prompts, len(of_step) - len(shown))
            groups += [_page_group(step, group, refused=not was_kept) for group in shown]
        return PageRollouts(groups, len(steps), len(chosen), self._left_out(len(chosen), len(steps), num_prompts))

    def _groups(self, step: int, *, refused: bool) -> list[ShownGroup]:
        """Of one step, kept until it has more chunks."""
        key = (step, refused, len(self._run.journal_chunks(step - 1, refused=refused)))
        if key not in self._read:
            self._read[key] = step_groups(self._run, step, refused=refused)
        return self._read[key]

    def _left_out(self, num_shown: int, num_steps: int, num_prompts: int) -> str:
        parts = [f"{num_shown:,} of {num_steps:,} steps, evenly spaced"] if num_shown < num_steps else []
        parts += [f"up to {num_prompts:,} prompts of a step are left out"] if num_prompts else []
        if not parts:
            return ""
        return f"{'; '.join(parts)}. All of a step: trainer rollouts {self._run.root} --step N"


def spread_evenly(items: Sequence[T], number: int) -> list[T]:
    """At most `number` items, evenly spaced, the first and the last among them.

    >>> spread_evenly(range(10), 4), spread_evenly(range(3), 8), spread_evenly(range(5), 1)
    ([0, 3, 6, 9], [0, 1, 2], [4])
    """
    if len(items) <= number:
        return list(items)
    if number == 1:
        return [items[-1]]
    return [items[round(index * (len(items) - 1) / (number - 1))] for index in range(number)]


def _page_group(step: int, group: ShownGroup, *, refused: bool) -> PageGroup:
    return PageGroup(
        step=step,
        refused=refused,
        where=group.where,
        messages=shortened_messages(group.messages),
        fields=group.fields,
        rollouts=[
            {
                "text": shortened(rollout.text),
                "messages": shortened_messages(rollout.messages),
                "stop": rollout.stop,
                "reward": rollout.reward,
                "rewards": dict(rollout.rewards),
                "advantage": rollout.advantage,
                "tokens": rollout.tokens,
                "cut": rollout.finish_reason == "length",
                "failure": shortened(rollout.failure) if rollout.failure else None,
            }
            for rollout in group.rollouts
        ],
    )
