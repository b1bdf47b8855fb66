"""`trainer diff`: what two runs were told, and what came of it."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, Final, final

from trainer.commands.tables import table_lines
from trainer.planning.plan import Plan
from trainer.report.samples import mean_rewards
from trainer.report.settings import flat_settings
from trainer.run.best import best_value
from trainer.run.console import SHOWN
from trainer.run.directory import RunDir
from trainer.run.evaluations import read_evaluation
from trainer.run.find import find_run
from trainer.run.intervals import PairedDifference, paired_difference
from trainer.run.metrics_reader import Record
from trainer.run.place import placed_plan

ABSENT: Final = "-"
HELD_OUT: Final = "eval/"
"""Begins the name of a metric of held-out rows."""
OTHER_ROWS: Final = "the runs have other held-out rows: their held-out values are not compared"
CURVES: Final = {"sft": "train/loss", "rft": "rollout/reward"}
"""The metric that is compared step by step where both runs train on the same rows."""


@final
@dataclass(frozen=True)
class SettingDifference:
    """A recipe field with two values, such as `optimizer.learning_rate`, 2e-4, 1e-4."""

    field: str
    first: Any
    second: Any


@final
@dataclass(frozen=True)
class MetricPair:
    """The last value of a metric in each run; None where a run has none."""

    metric: str
    first: float | None
    second: float | None


@final
@dataclass(frozen=True)
class CurvePair:
    """The mean of a metric over the steps that both runs made on the same rows."""

    metric: str
    num_steps: int
    first: float
    second: float


@final
@dataclass(frozen=True)
class RunDiff:
    """What `trainer diff --json` prints."""

    first: str
    second: str
    settings: list[SettingDifference]
    steps: tuple[int, int]
    """The last logged step of each run."""
    best: tuple[str | None, str | None]
    """Such as `eval/loss 0.8131 at step 40`."""
    metrics: list[MetricPair]
    curve: CurvePair | None
    """None where the runs train on other rows, or in another order."""
    held_out: PairedDifference | None
    """Of the mean reward of each held-out prompt that both runs answered last; None where there is none."""
    held_out_notes: list[str]
    """Why held-out values are not compared, or not all of them."""

    @property
    def is_held_out_equal(self) -> bool:
        """Whether held-out values of both are means over the same rows."""
        return OTHER_ROWS not in self.held_out_notes


def diff(arguments: argparse.Namespace) -> int:
    """Print how two runs differ."""
    report = diff_runs(find_run(arguments.first), find_run(arguments.second))
    if arguments.json:
        sys.stdout.write(json.dumps(asdict(report)) + "\n")
    else:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        sys.stdout.write("\n".join(diff_lines(report, width=width)) + "\n")
    return 0


def diff_runs(first: RunDir, second: RunDir) -> RunDiff:
    """Compare settings and results of two runs."""
    plans = placed_plan(first)[0], placed_plan(second)[0]
    records = first.read_metrics(), second.read_metrics()
    comparable = first.comparable_metrics(), second.comparable_metrics()
    return RunDiff(
        first=str(first.root),
        second=str(second.root),
        settings=list(_settings(*plans)),
        steps=(first.newest_logged_step(), second.newest_logged_step()),
        best=(_best(comparable[0]), _best(comparable[1])),
        metrics=_metrics(*records, *comparable),
        curve=_curve(*plans, *records) if _has_equal_rows(*plans) else None,
        held_out=_held_out(first, second),
        held_out_notes=list(_held_out_notes(first, second)),
    )


def _held_out_notes(first: RunDir, second: RunDir) -> Iterator[str]:
    """Why held-out values are not compared, or not all of them."""
    for run in (first, second):
        rows = run.read_held_out()
        if rows is not None and rows.since_step >= 0:
            yield f"{run.root}: held-out rows were replaced at step {rows.since_step}; earlier values are left out"
    if not _has_equal_held_out(first, second):
        yield OTHER_ROWS


def _has_equal_held_out(first: RunDir, second: RunDir) -> bool:
    """Whether held-out values of both runs are means over the same rows; True where an old run does not say it."""
    ours, theirs = first.read_held_out(), second.read_held_out()
    return ours is None or theirs is None or ours.digest == theirs.digest


def _settings(first: Plan, second: Plan) -> Iterator[SettingDifference]:
    ours, theirs = flat_settings(first), flat_settings(second)
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            yield SettingDifference(name, ours.get(name), theirs.get(name))


def _best(records: list[Record]) -> str | None:
    best = best_value(records)
    return f"{best.name} {best.value:.4f} at step {best.step}" if best is not None else None


def _metrics(
    first: list[Record], second: list[Record], first_comparable: list[Record], second_comparable: list[Record]
) -> list[MetricPair]:
    """Last values of held-out metrics, and of those that the console shows."""
    last = _with_held_out(first, first_comparable), _with_held_out(second, second_comparable)
    names = sorted(name for name in last[0].keys() | last[1].keys() if name.startswith(HELD_OUT))
    names += [name for name in SHOWN if name not in names and (name in last[0] or name in last[1])]
    return [MetricPair(name, last[0].get(name), last[1].get(name)) for name in names]


def _with_held_out(records: list[Record], comparable: list[Record]) -> dict[str, float]:
    """The last value of each metric; held-out ones of the present held-out rows only."""
    held_out = {name: value for name, value in _last_values(comparable).items() if name.startswith(HELD_OUT)}
    return {name: value for name, value in _last_values(records).items() if not name.startswith(HELD_OUT)} | held_out


def _last_values(records: list[Record]) -> dict[str, float]:
    values: dict[str, float] = {}
    for record in records:
        values |= {name: value for name, value in record.items() if isinstance(value, int | float)}
    return values


def _has_equal_rows(first: Plan, second: Plan) -> bool:
    """Whether step k of both runs trains on the same rows."""
    names = ("method", "seed", "rows_per_step", "data")
    return all(first.identity.get(name) == second.identity.get(name) for name in names)


def _curve(first: Plan, second: Plan, ours: list[Record], theirs: list[Record]) -> CurvePair | None:
    name = CURVES[first.recipe.method]
    mine, other = ({each["step"]: each[name] for each in records if name in each} for records in (ours, theirs))
    steps = sorted(mine.keys() & other.keys())
    if not steps:
        return None
    return CurvePair(name, len(steps), fmean(mine[step] for step in steps), fmean(other[step] for step in steps))


def _held_out(first: RunDir, second: RunDir) -> PairedDifference | None:
    may_use_place = _has_equal_held_out(first, second)
    ours, theirs = (_answered(run, may_use_place=may_use_place) for run in (first, second))
    keys = [key for key in ours if key in theirs]
    if not keys:
        return None
    return paired_difference([ours[key] for key in keys], [theirs[key] for key in keys], seed=0)


def _answered(run: RunDir, *, may_use_place: bool) -> dict[tuple[str, int], float]:
    """Mean reward of each held-out prompt at the last evaluation of the present held-out rows.

    Args:
        run: any run.
        may_use_place: earlier versions recorded file and line instead of the prompt, which may stand for the row.
    """
    steps = run.comparable_evaluation_steps()
    prompts = read_evaluation(run, steps[-1]) if steps else []
    return mean_rewards([each for each in prompts if each.messages is not None or may_use_place])


def diff_lines(report: RunDiff, *, width: int | None = None) -> list[str]:
    """The comparison as text.

    Args:
        report: of two runs.
        width: columns of the terminal; None never folds a line.
    """
    lines = ["settings:"] if report.settings else ["settings: no difference"]
    if report.settings:
        rows = [(each.field, _shown(each.first), _shown(each.second)) for each in report.settings]
        lines += table_lines([("", report.first, report.second), *rows], indent=2, width=width)
    results = [
        ("", report.first, report.second, "difference"),
        ("last step", str(report.steps[0]), str(report.steps[1]), ""),
        ("best", report.best[0] or ABSENT, report.best[1] or ABSENT, ""),
        *(
            (
                each.metric,
                _number(each.first),
                _number(each.second),
                _change(each) if _is_comparable(each, report) else "",
            )
            for each in report.metrics
        ),
    ]
    lines += ["", "results (last values):", *table_lines(results, indent=2, width=width), *report.held_out_notes]
    if report.curve is not None:
        curve = report.curve
        lines += [
            "",
            f"{curve.metric}, mean of the {curve.num_steps} steps that both made on the same rows: "
            f"{curve.first:.4f}, {curve.second:.4f} ({curve.second - curve.first:+.4f})",
        ]
    if report.held_out is not None:
        held_out = report.held_out
        lines += [
            "",
            f"held-out reward, prompt by prompt: {held_out.first:.4f}, {held_out.second:.4f}; {held_out}; "
            f"better on {held_out.num_better}, worse on {held_out.num_worse}",
        ]
    else:
        lines += ["", f"row by row: trainer eval {report.second} --against {report.first}"]
    return lines


def _shown(value: Any) -> str:
    return ABSENT if value is None else json.dumps(value, ensure_ascii=False)


def _number(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.4g}"


def _is_comparable(pair: MetricPair, report: RunDiff) -> bool:
    return report.is_held_out_equal or not pair.metric.startswith(HELD_OUT)


def _change(pair: MetricPair) -> str:
    return f"{pair.second - pair.first:+.4g}" if pair.first is not None and pair.second is not None else ""
