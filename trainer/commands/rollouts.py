"""`trainer rollouts`: prompts, completions, rewards and advantages of a step."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Final

from trainer.commands.tables import table_lines
from trainer.errors import LaunchError
from trainer.planning.plan import RFTPlan
from trainer.report.groups import ShownGroup, ShownRollout, step_groups, steps_with_rollouts
from trainer.run.directory import RunDir
from trainer.run.find import find_run
from trainer.run.judge_ledger import judge_totals

WIDTH: Final = 100
"""Characters of a text that are shown without --full."""
UNRECORDED: Final = "(not recorded: the journal was written by an earlier version)"


def rollouts(arguments: argparse.Namespace) -> int:
    """Print the rollouts of a step."""
    run = find_run(arguments.target)
    step, is_refused = _chosen_step(run, arguments.step, refused_only=arguments.refused)
    groups = step_groups(run, step, refused=is_refused)
    if arguments.json:
        about = {"run": str(run.root), "step": step, "refused": is_refused, "groups": [asdict(each) for each in groups]}
        sys.stdout.write(json.dumps(about) + "\n")
        return 0
    note = ", refused: too many had no reward, so the step was not trained on them" if is_refused else ""
    lines = [f"{run.root}, step {step}: {len(groups)} prompts{note}"]
    totals = judge_totals(run)
    lines += [str(totals)] if totals is not None else []
    if not is_refused and step in steps_with_rollouts(run, refused=True):
        lines.append("an earlier attempt's rollouts of this step were refused: --refused shows them")
    for group in groups[: arguments.groups]:
        lines += ["", *group_lines(group, is_full=arguments.full)]
    if len(groups) > arguments.groups:
        lines += ["", f"{len(groups) - arguments.groups} more prompts: --groups {len(groups)}"]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _chosen_step(run: RunDir, wanted: int | None, *, refused_only: bool) -> tuple[int, bool]:
    """The step to show, and whether its refused rollouts are.

    Raises:
        LaunchError: there are none; says for which steps there are.
    """
    kept, refused = (
        [] if refused_only else steps_with_rollouts(run, refused=False),
        steps_with_rollouts(run, refused=True),
    )
    steps = sorted({*kept, *refused})
    if not steps:
        if refused_only:
            raise LaunchError(f"{run.root}: no rollouts were refused")
        raise LaunchError(f"{run.root}: has no rollouts. Only rft runs have them, after their first chunk")
    step = wanted if wanted is not None else steps[-1]
    if step not in steps:
        what = "refused rollouts" if refused_only else "rollouts"
        older = " (older ones are removed: rollout.keep_steps)" if _removes_steps(run) and step < steps[0] else ""
        raise LaunchError(f"{run.root}: no {what} of step {step}; there are {steps[0]} to {steps[-1]}{older}")
    return step, step not in kept


def _removes_steps(run: RunDir) -> bool:
    plan = run.read_plan()
    return isinstance(plan, RFTPlan) and plan.recipe.rollout.keep_steps is not None


def conversation_lines(rollout: ShownRollout, limit: int | None) -> list[str]:
    """The turns and observations of a rollout, the calls that were faulty, and why it ended.

    Args:
        rollout: with messages.
        limit: characters of a message that are shown; None shows all.
    """
    reward = f"{rollout.reward:.3f}" if rollout.reward is not None else "failed"
    advantage = f", advantage {rollout.advantage:+.2f}" if rollout.advantage is not None else ""
    lines = [f"  reward {reward}{advantage}, {rollout.tokens} tokens, ended: {rollout.stop}"]
    turns = iter(rollout.turns or [])
    for message in rollout.messages or []:
        text = str(message["content"])
        for call in message.get("tool_calls") or []:
            function = call["function"]
            text += f" -> {function['name']}({json.dumps(function['arguments'], ensure_ascii=False)})"
        lines.append(f"    {message['role']:9} {_plain(text, limit)}")
        if message["role"] == "assistant":
            faulty = [call for call in next(turns, {"calls": []})["calls"] if call["status"] != "ok"]
            lines += [f"              {call['status']}: {_plain(call['problem'], limit)}" for call in faulty]
    if rollout.failure:
        lines.append(f"    failure: {_plain(rollout.failure.strip().splitlines()[-1], limit)}")
    return lines


def group_lines(group: ShownGroup, *, is_full: bool) -> list[str]:
    """A prompt, its gold fields, and a table of its completions.

    Args:
        group: to show.
        is_full: whether long texts are shown whole.
    """
    limit = None if is_full else WIDTH
    lines = [group.where]
    if group.messages is None:
        lines.append(f"  prompt  {UNRECORDED}")
    for message in group.messages if is_full and group.messages else (group.messages or [])[-1:]:
        lines.append(f"  {message['role']:7} {_plain(str(message['content']), limit)}")
    if not is_full and group.messages and len(group.messages) > 1:
        lines.append(f"          after {len(group.messages) - 1} earlier messages: --full shows them")
    if group.fields:
        gold = ", ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in group.fields.items())
        lines.append(f"  gold    {_plain(gold, limit)}")
    if any(rollout.messages is not None for rollout in group.rollouts):
        return lines + [line for rollout in group.rollouts for line in conversation_lines(rollout, limit)]
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    return lines + table_lines(_table(group.rollouts, limit), indent=2, width=width)


def _table(rollouts: Sequence[ShownRollout], limit: int | None) -> list[list[str]]:
    """A header, and a row per completion; single rewards are columns where there are several, or one has parts."""
    names = list(dict.fromkeys(name for rollout in rollouts for name in rollout.rewards))
    parts = names if len(names) > 1 else []
    table = [["reward", "advantage", "tokens", *parts, "completion"]]
    for rollout in rollouts:
        reward = f"{rollout.reward:.3f}" if rollout.reward is not None else "failed"
        advantage = f"{rollout.advantage:+.2f}" if rollout.advantage is not None else ""
        values = (rollout.rewards.get(name) for name in parts)
        cut = " ... (cut at the token limit)" if rollout.finish_reason == "length" else ""
        table.append(
            [
                reward,
                advantage,
                str(rollout.tokens),
                *(f"{value:.3f}" if value is not None else "" for value in values),
                _plain(rollout.text, limit) + cut,
            ]
        )
        if rollout.failure:
            last = rollout.failure.strip().splitlines()[-1]
            table.append(["", "", "", *("" for _ in parts), f"failure: {_plain(last, limit)}"])
    return table


def _plain(text: str, limit: int | None) -> str:
    """The text on one line without control characters: a model may write terminal escapes."""
    line = " ".join(text.split())
    if limit is not None and len(line) > limit:
        line = line[:limit] + " ..."
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)
