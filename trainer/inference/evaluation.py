"""`trainer eval`: a model's held-out values, compared row by row with those of another model."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, final

from trainer.config.model_arguments import add_eval_arguments
from trainer.config.recipe import DataSettings, DataSource
from trainer.config.rft_sections import RewardLimits, RewardSpec
from trainer.data.sources import read_rows
from trainer.errors import LaunchError, UserError
from trainer.files import write_atomically
from trainer.inference.chat_model import ChatModel, Draw, prompt_row
from trainer.inference.command_line import run_command
from trainer.inference.held_out import (
    AnsweredRow,
    RewardedRows,
    RowLoss,
    answer_values,
    held_out_losses,
    mean_loss,
    refuse_other_tokens,
    row_values,
)
from trainer.inference.source import BASE, ModelSource, find_source, other_source
from trainer.planning.plan import Plan, RFTPlan
from trainer.run.find import find_run
from trainer.run.intervals import PairedDifference, bootstrap_interval, paired_difference
from trainer.run.journal import json_line
from trainer.run.place import plan_from_here
from trainer.sampling.sampler import SamplingParams
from trainer.training.evaluate import SEED_OFFSET, PassRule
from trainer.training.rollouts import sampling_params
from trainer.types import Row

NONE: Final = "none"
SEED: Final = 0
"""Of the bootstrap."""


@final
@dataclass(frozen=True)
class Task:
    """What is measured: rows, rewards, and how answers are drawn."""

    rows: Sequence[Row]
    data: DataSettings
    rewards: Sequence[RewardSpec]
    base_dir: Path
    limits: RewardLimits
    has_loss: bool
    num_samples: int
    plan: Plan | None
    """Whose sampling settings are used; None draws the likeliest tokens."""
    max_tokens: int | None = None
    temperature: float | None = None

    @property
    def pass_rule(self) -> PassRule | None:
        """When an answer passes, for pass@k; None without rewards of an rft run or with one answer per row."""
        if not isinstance(self.plan, RFTPlan) or self.rewards != self.plan.recipe.rewards or self.num_samples < 2:
            return None
        return PassRule.of(self.plan.recipe)

    @property
    def reward_column(self) -> str | None:
        """Field of the rows that chooses rewards; None where the command names other rewards than the run's."""
        if not isinstance(self.plan, RFTPlan) or self.rewards != self.plan.recipe.rewards:
            return None
        return self.plan.recipe.reward_column

    def params(self, model: ChatModel) -> SamplingParams:
        """How answers are drawn: as the run's own evaluations are, unless the command says otherwise."""
        if isinstance(self.plan, RFTPlan):
            recipe = self.plan.recipe
            params = sampling_params(recipe, recipe.rollout, model.encoder.stop_ids).for_evaluation(SEED_OFFSET)
        else:
            params = Draw().params(model.encoder.stop_ids)
        if self.max_tokens is not None:
            params = replace(params, max_completion_tokens=self.max_tokens)
        if self.temperature is not None:
            is_greedy = self.temperature == 0
            params = replace(params, temperature=1.0 if is_greedy else self.temperature, is_greedy=is_greedy)
        return params


@final
@dataclass(frozen=True)
class Measured:
    """What one model got."""

    label: str
    losses: list[RowLoss] = field(default_factory=list)
    answered: list[AnsweredRow] = field(default_factory=list)

    def by_row(self) -> dict[str, dict[int, float]]:
        """Each value of each row, by name: `{"loss": {0: 1.25, 1: 0.5}, "reward": ...}`."""
        columns: dict[str, dict[int, float]] = {}
        for rows in (row_values(self.losses), answer_values(self.answered)):
            for index, values in rows.items():
                for name, value in values.items():
                    columns.setdefault(name, {})[index] = value
        return columns


@final
@dataclass(frozen=True)
class Interval:
    """A mean over rows, with its 95% bootstrap interval."""

    value: float
    low: float
    high: float


@final
@dataclass(frozen=True)
class EvalReport:
    """What `trainer eval --json` prints."""

    model: str
    against: str | None
    rows: int
    samples: int
    values: dict[str, Interval]
    """Of the model, over its rows."""
    against_values: dict[str, Interval]
    paired: dict[str, PairedDifference]
    """The model minus the other one, row by row."""
    token_loss: tuple[float, float | None] | None
    """The mean over all trained tokens, as `eval/loss` in metrics.jsonl."""
    failed: tuple[int, int | None]
    """Answers on which a reward failed; they count as 0."""


def measure(source: ModelSource, task: Task) -> Measured:
    """Load a model and measure it.

    Args:
        source: of the model.
        task: rows and rewards.
    """
    model = ChatModel(source)
    losses = held_out_losses(model, task.rows, task.data) if task.has_loss else []
    answered: list[AnsweredRow] = []
    if task.rewards:
        prompts = [prompt_row(row, source) for row in task.rows]
        rewarded = RewardedRows(prompts, task.rewards, task.base_dir, task.limits, task.pass_rule, task.reward_column)
        answered = rewarded.answered_by(model, task.params(model), task.num_samples)
    return Measured(source.label, losses, answered)


def report(task: Task, first: Measured, second: Measured | None) -> EvalReport:
    """Compare what two models got.

    Args:
        task: that both were given.
        first: the model.
        second: the one that it is compared with, if any.

    Raises:
        ModelError: losses of different tokens would be compared.
    """
    if second is not None:
        refuse_other_tokens(first.losses, second.losses)
    ours, theirs = first.by_row(), second.by_row() if second is not None else {}
    loss = (mean_loss(first.losses), mean_loss(second.losses) if second is not None else None) if first.losses else None
    return EvalReport(
        model=first.label,
        against=second.label if second is not None else None,
        rows=len(task.rows),
        samples=task.num_samples if task.rewards else 0,
        values={name: _interval(values) for name, values in ours.items()},
        against_values={name: _interval(values) for name, values in theirs.items()},
        paired={name: _paired(theirs[name], ours[name]) for name in ours if theirs.get(name, {}).keys() & ours[name]},
        token_loss=loss,
        failed=(_num_failed(first), _num_failed(second) if second is not None else None),
    )


def _interval(values: Mapping[int, float]) -> Interval:
    of_rows = list(values.values())
    return Interval(math.fsum(of_rows) / len(of_rows), *bootstrap_interval(of_rows, SEED))


def _paired(before: Mapping[int, float], after: Mapping[int, float]) -> PairedDifference:
    rows = sorted(before.keys() & after.keys())
    return paired_difference([before[row] for row in rows], [after[row] for row in rows], SEED)


def _num_failed(measured: Measured) -> int:
    return sum(row.num_failed for row in measured.answered)


def report_lines(about: EvalReport) -> list[str]:
    """The report as text."""
    against = f" against {about.against}" if about.against is not None else ""
    answers = f", {about.samples} answers each" if about.samples else ""
    lines = [f"{about.model}{against}: {about.rows} rows{answers}; mean over rows, 95% bootstrap interval"]
    header = ["", about.model, *([about.against, "difference, row by row"] if about.against is not None else [])]
    table = [header, *(_row(about, name) for name in about.values)]
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    lines += ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
    if about.token_loss is not None:
        ours, theirs = about.token_loss
        lines.append(f"loss over all tokens: {ours:.4f}" + (f", {theirs:.4f}" if theirs is not None else ""))
    if any(about.failed):
        counts = " and ".join(str(number) for number in about.failed if number is not None)
        lines.append(f"a reward failed on {counts} answers, which count as 0")
    return lines


def _row(about: EvalReport, name: str) -> list[str]:
    cells = [name, _cell(about.values[name])]
    if about.against is None:
        return cells
    other, paired = about.against_values.get(name), about.paired.get(name)
    difference = f"{paired.difference:+.4f} ({paired.low:+.4f} to {paired.high:+.4f})" if paired is not None else ""
    return [*cells, _cell(other) if other is not None else "", difference]


def _cell(value: Interval) -> str:
    return f"{value.value:.4f} ({value.low:.4f} to {value.high:.4f})"


def main(argv: list[str] | None = None) -> int:
    """Evaluate a model."""
    parser = argparse.ArgumentParser(prog="trainer eval", description=__doc__)
    add_eval_arguments(parser)
    return run_command(parser, argv, _evaluate)


def _evaluate(arguments: argparse.Namespace) -> int:
    source = find_source(arguments.target, best=arguments.best, checkpoint=arguments.checkpoint)
    if arguments.tasks:
        return _benchmarks(arguments, source)
    task = _task(arguments, source)
    source = replace(source, data=task.data)
    against = arguments.against or (BASE if source.plan is not None or source.adapter is not None else NONE)
    other = None if against == NONE else replace(other_source(against, source), data=task.data)
    first = measure(source, task)  # one model after the other: both need not fit into memory
    second = measure(other, task) if other is not None else None
    about = report(task, first, second)
    if arguments.out:
        _write_rows(Path(arguments.out), first, second)
    text = json.dumps(asdict(about)) if arguments.json else "\n".join(report_lines(about))
    sys.stdout.write(text + "\n")
    return 0


def _benchmarks(arguments: argparse.Namespace, source: ModelSource) -> int:
    """Tasks of lm-eval, for the model and the one of `--against`."""
    from trainer.inference.benchmarks import benchmark_lines, run_tasks

    other = other_source(arguments.against, source) if arguments.against not in (None, NONE) else None
    reports = [
        run_tasks(ChatModel(each), arguments.tasks.split(","), arguments.rows, as_chat=arguments.apply_chat_template)
        for each in (source, other)
        if each is not None
    ]
    text = json.dumps([asdict(each) for each in reports]) if arguments.json else "\n".join(benchmark_lines(reports))
    sys.stdout.write(text + "\n")
    return 0


def _task(arguments: argparse.Namespace, source: ModelSource) -> Task:
    """Rows and rewards, of the run unless the command names others.

    Raises:
        UserError: there are no rows, or nothing to measure them by.
    """
    for name, lowest in (("rows", 1), ("samples", 1), ("max_tokens", 1), ("temperature", 0)):
        value = getattr(arguments, name)
        if value is not None and value < lowest:
            raise UserError(f"--{name.replace('_', '-')} must be {lowest} or more (got {value:g})")
    plan = plan_from_here(find_run(arguments.of)) if arguments.of else source.plan
    data = plan.recipe.data if plan is not None else source.data
    held_out = DataSource(path=arguments.data) if arguments.data else data.eval if plan is not None else None
    if held_out is None:
        remedy = "name rows with --data FILE, or a run that has held-out rows with --of RUN"
        raise LaunchError(f"{arguments.target}: has no held-out rows of its own; {remedy}")
    is_rft = isinstance(plan, RFTPlan)
    rewards = [RewardSpec(use=use) for use in arguments.reward]
    base_dir = Path.cwd()
    if isinstance(plan, RFTPlan) and not rewards and plan.recipe.rollout.has_turns:
        raise UserError(
            "`trainer eval` draws single answers, and this run's rollouts have an environment or tools. Its own "
            "evaluations (eval/reward in metrics.jsonl) play them; or name a --reward for single answers."
        )
    if isinstance(plan, RFTPlan) and not rewards:
        rewards, base_dir = plan.recipe.rewards, Path(plan.recipe_dir)
    samples = plan.recipe.rollout.eval_samples if isinstance(plan, RFTPlan) else 1
    return Task(
        rows=read_rows(held_out, data, arguments.rows or data.eval_rows),
        data=data,
        rewards=rewards,
        base_dir=base_dir,
        limits=plan.recipe.reward_limits if isinstance(plan, RFTPlan) else RewardLimits(),
        has_loss=not is_rft and not (arguments.reward and plan is None),
        num_samples=arguments.samples or samples,
        plan=plan,
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
    )


def _write_rows(file: Path, *measured: Measured | None) -> None:
    """A line per row: its source, and the loss and answers of each model by its label."""
    records: dict[int, dict[str, Any]] = {}
    for role, of_model in zip(("model", "against"), measured, strict=True):
        if of_model is None:
            continue
        for each in of_model.losses:
            record = records.setdefault(each.row.index, {"row": each.row.index, "source": str(each.row)})
            record.setdefault(role, {"label": of_model.label})["loss"] = each.mean
        for row in of_model.answered:
            record = records.setdefault(row.row.index, {"row": row.row.index, "source": str(row.row)})
            answers = [asdict(answer) for answer in row.answers]
            record.setdefault(role, {"label": of_model.label})["answers"] = answers
    try:
        write_atomically(file, "".join(json_line(records[index]) for index in sorted(records)))
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}. Name another file with --out.") from None


if __name__ == "__main__":
    sys.exit(main())
