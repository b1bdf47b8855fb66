"""The rollouts of a step as people read them: by prompt, with gold, rewards and advantages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from trainer.run.conversation_record import drawn_tokens
from trainer.run.directory import RunDir
from trainer.run.journal import RecordedGroup, read_step


@final
@dataclass(frozen=True)
class ShownRollout:
    """One completion, as `trainer rollouts --json` prints it."""

    text: str
    reward: float | None
    rewards: Mapping[str, float | None]
    """Each reward by name, and each part of a reward as name/part."""
    advantage: float | None
    finish_reason: str
    failure: str | None
    tokens: int
    messages: list[dict[str, Any]] | None = None
    """Of a rollout with several turns: what followed the prompt."""
    turns: list[dict[str, Any]] | None = None
    stop: str | None = None
    """Why a rollout with several turns ended."""


@final
@dataclass(frozen=True)
class ShownGroup:
    """The completions of one prompt, by falling reward."""

    row: int
    where: str
    prompt: str
    """Its last turn; empty where the journal has none."""
    messages: list[dict[str, Any]] | None
    """The whole prompt; None where the journal has none."""
    fields: dict[str, Any]
    """Other fields of the row, such as the gold answer."""
    spread: float
    """Difference of the highest and the lowest reward."""
    rollouts: list[ShownRollout]


def steps_with_rollouts(run: RunDir, *, refused: bool) -> list[int]:
    """Steps that have rollouts, ascending; those of journal step k are trained on in step k + 1."""
    return [step + 1 for step in run.journal_steps(refused=refused)]


def step_groups(run: RunDir, step: int, *, refused: bool) -> list[ShownGroup]:
    """Groups by falling spread of rewards, each with its rollouts by falling reward.

    Args:
        run: the run directory.
        step: the step trained on them, from 1.
        refused: the rollouts that were set aside.
    """
    groups = [_shown(group) for group in read_step(run, step - 1, refused=refused)]
    return sorted(groups, key=lambda group: (-group.spread, group.row))


def _shown(group: RecordedGroup) -> ShownGroup:
    records = sorted(
        group.rollouts, key=lambda record: -(record["reward"] if record["reward"] is not None else float("-inf"))
    )
    scored = [record["reward"] for record in records if record["reward"] is not None]
    messages = group.prompt["prompt"] if group.prompt is not None else None
    names = ("text", "reward", "rewards", "advantage", "finish_reason", "failure")
    return ShownGroup(
        row=records[0]["row"],
        where=records[0]["where"],
        prompt=str(messages[-1]["content"]) if messages else "",
        messages=messages,
        fields=group.prompt["fields"] if group.prompt is not None else {},
        spread=max(scored) - min(scored) if scored else 0.0,
        rollouts=[
            ShownRollout(**{name: record[name] for name in names}, tokens=drawn_tokens(record), **_turns(record))
            for record in records
        ],
    )


def _turns(record: Mapping[str, Any]) -> dict[str, Any]:
    """The turns after the prompt, where the journal has a conversation."""
    conversation = record.get("conversation")
    if conversation is None:
        return {}
    messages = conversation["messages"][conversation["num_prompt"] :]
    return {"messages": messages, "turns": conversation["turns"], "stop": conversation["stop"]}
