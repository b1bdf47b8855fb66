"""Tests rewards before training: `trainer check --rewards`.

Each reward scores the gold answers of some rows, and garbage: words, another row's answer, the empty string, 100 kB
and `5^5^5^5`, which no reward should evaluate. Gold answers are also formatted as models write them, since a reward may
accept only a box, a tag or a code block.
"""

from __future__ import annotations

import difflib
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

from trainer.errors import RewardError
from trainer.rewards.call_result import CallResult
from trainer.rewards.choice import RewardChoice
from trainer.rewards.dry_run_report import GOLD_FIELDS, NOT_TRIED, GoldCount, ProbeReport, Trial, judge_reward
from trainer.rewards.judges.open import Judging
from trainer.rewards.judges.protocol import Surroundings
from trainer.rewards.row_checks import refuse_unscorable_rows
from trainer.rewards.runner import RewardRunner, Spec, weigh
from trainer.types import Row, has_field, read_field

FORMATS: Final = {
    "plain": "{}",
    "boxed": "The answer is $\\boxed{{{}}}$.",
    "think": "<think>\nLet me see.\n</think>\n{}",
    "tags": "<think>\nLet me see.\n</think>\n<answer>{}</answer>",
    "hashes": "Let me see.\n#### {}",
    "code": "```python\n{}\n```",
}
WORDS: Final = "lorem ipsum dolor sit amet, consectetur adipiscing elit"
STRESS: Final = {
    "the empty string": "",
    "100 kB": "1 is not 2. " * 8334,
    "5^5^5^5": "The answer is $5^{5^{5^5}}$ = 5^5^5^5",
}
NUM_FIELD_ROWS: Final = 4
"""Rows on which rewards run to find out which fields they read."""
NUM_HELD_OUT_ROWS: Final = 2
"""Held-out rows that are used for trials."""
STARTUP_S: Final = 35.0
"""Limit of the imports of a reward: the check ends within a minute whatever a reward does."""
BUDGET_S: Final = 40.0
MIN_BUDGET_S: Final = 10.0
MAX_FAILED: Final = 0.5
"""Share of the texts on which a reward may fail: among them are some that models rarely write."""


@final
@dataclass(frozen=True)
class ProbeSettings:
    """How rewards are tried."""

    base_dir: Path
    """The recipe's directory."""
    gold_field: str | None = None
    """Row field with an answer, or a whole completion, that should get the highest reward; by default `answer`,
    `completion`, `solution` or the last message of the assistant."""
    num_rows: int = 8
    """Rows that are used for trials, with rows that choose rewards so many for each."""
    timeout_s: float = 10.0
    """Wall-clock limit of a call."""
    memory_limit_gib: float = 2.0
    """Address space of a worker in addition to that of its imports."""
    column: str | None = None
    """Field of the rows that names the rewards which judge it; None for all."""
    num_workers: int = 1
    budget_s: float = BUDGET_S
    """Seconds after which no further text is tried."""
    say: Callable[[str], None] = lambda _: None
    """Prints what judges have to say."""


def probe(
    specs: Sequence[Spec], rows: Sequence[Row], settings: ProbeSettings, held_out: Sequence[Row] = ()
) -> ProbeReport:
    """Run the rewards on trial texts and check the results.

    Args:
        specs: the rewards of a recipe.
        rows: all rows; every row is checked for missing fields, the first ones are used for trials.
        settings: how they are tried.
        held_out: held-out rows, which are checked and tried in the same way.

    Raises:
        RewardError: a reward cannot be loaded, requires a field that a row does not have, scores no text at all, or
            gives every text the same reward.
    """
    begin = time.monotonic()
    refuse_unscorable_rows(specs, [*rows, *held_out], settings.column)
    choice = RewardChoice(settings.column, specs)
    parts = (rows, settings.num_rows), (held_out, NUM_HELD_OUT_ROWS)
    tried = [row for part, number in parts for row in _first_rows(part, choice, number)]
    trials = _trials(tried, settings.gold_field)
    runner = RewardRunner(
        specs,
        base_dir=settings.base_dir,
        timeout_s=settings.timeout_s,
        memory_limit_gib=settings.memory_limit_gib,
        num_workers=settings.num_workers,
        column=settings.column,
        judging=Judging(around=Surroundings(settings.say, may_wait=False)),
        startup_timeout_s=STARTUP_S,
    )
    with runner, _closed_after(runner, max(MIN_BUDGET_S, settings.budget_s - (time.monotonic() - begin))):
        first = _results(runner, trials)
        for part in filter(None, (rows, held_out)):
            refuse_missing_fields(runner, specs, part, settings.gold_field, first)
        again = [trial for trial, results in zip(trials, first, strict=True) if _all_scored(results)]
        second = _results(runner, again)
    repeated = {id(trial): results for trial, results in zip(again, second, strict=True)}
    reports, unused = [], []
    for index, spec in enumerate(specs):
        asked = [
            (trial, results[index])
            for trial, results in zip(trials, first, strict=True)
            if index in choice.of_row(trial.row)
        ]
        if not asked:
            unused.append(spec.name)
            continue
        pairs = [(trial, result) for trial, result in asked if result is not NOT_TRIED]
        is_deterministic = all(
            repeated[id(trial)][index].value == result.value
            for trial, result in pairs
            if id(trial) in repeated and repeated[id(trial)][index].failure is None
        )
        num_left_out = len(asked) - len(pairs)
        if not pairs:
            raise RewardError(f"reward {spec.name}: no text could be tried within {settings.budget_s:g} s")
        reports.append(judge_reward(spec.name, pairs, is_deterministic=is_deterministic, num_left_out=num_left_out))
    sums = zip(trials, [weigh(specs, results).reward for results in first], strict=True)
    failing = [
        f"reward {report.name}: failed on {report.num_failed} of {report.num_tried} texts, which would stop a run"
        for report in reports
        if report.num_failed > MAX_FAILED * report.num_tried
    ]
    return ProbeReport(tuple(reports), tuple(unused), (*failing, *_below_garbage(GoldCount.of(sums))))


def _below_garbage(gold: GoldCount) -> list[str]:
    if not gold.below:
        return []
    return [
        f"{gold.below[0]}: a gold answer gets less reward than garbage, on {len(gold.below)} of {gold.num_rows} rows. "
        "Training would unlearn what is right: correct the rewards or the sign of their weights."
    ]


@contextmanager
def _closed_after(runner: RewardRunner, seconds: float) -> Iterator[None]:
    """Close the runner if the block takes longer; calls in progress then end."""
    timer = threading.Timer(seconds, runner.close)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def _first_rows(rows: Sequence[Row], choice: RewardChoice, number: int) -> list[Row]:
    """The first rows; where rows choose their rewards, the first ones of each reward."""
    found: dict[int, int] = {}
    kept = []
    for row in rows:
        chosen = choice.of_row(row)
        if any(found.get(index, 0) < number for index in chosen):
            kept.append(row)
            for index in chosen:
                found[index] = found.get(index, 0) + 1
    return kept


def _results(runner: RewardRunner, trials: Sequence[Trial]) -> list[list[CallResult]]:
    """Score each trial in a submission of its own, so that batch rewards too are timed on one text.

    Rewards that compare completions get all texts of a row together.
    """
    compared = runner.compares_groups
    alone = frozenset(range(runner.num_rewards)) - compared
    pending = [runner.submit([(trial.text, trial.row)], only=alone) for trial in trials]
    by_row: dict[int, list[int]] = {}
    for position, trial in enumerate(trials):
        by_row.setdefault(id(trial.row), []).append(position)
    groups = [
        (positions, runner.submit([(trials[each].text, trials[each].row) for each in positions], only=compared))
        for positions in (by_row.values() if compared else ())
    ]
    table = [results for scoring in pending for results in scoring.call_results(if_closed=NOT_TRIED)]
    for positions, scoring in groups:
        for position, results in zip(positions, scoring.call_results(if_closed=NOT_TRIED), strict=True):
            for index in compared:
                table[position][index] = results[index]
    return table


def refuse_missing_fields(
    runner: RewardRunner,
    specs: Sequence[Spec],
    rows: Sequence[Row],
    gold_field: str | None = None,
    tried: Sequence[Sequence[CallResult]] | None = None,
) -> None:
    """Refuse rows that lack a field which a reward requires.

    A field is one that the reward reads on the first rows; it is required if the reward fails on a row without it.

    Args:
        runner: of these rewards, started.
        specs: the rewards of a recipe.
        rows: all rows.
        gold_field: see `ProbeSettings`.
        tried: what the rewards made of some rows; None tries them here.

    Raises:
        RewardError: names each reward, each field, and the file and line of the first row without it.
    """
    if tried is None:
        tried = _field_results(runner, rows[:NUM_FIELD_ROWS], gold_field)
    mistakes = []
    for index, spec in enumerate(specs):
        for name in sorted({name for results in tried for name in results[index].fields}):
            lacking = [row for row in rows if index in runner.choice.of_row(row) and not has_field(row, name)]
            if not lacking:
                continue
            without = _field_results(runner, lacking[:1], gold_field)
            if not any(results[index].missing == name for results in without):
                continue  # the field is optional
            near = difflib.get_close_matches(name, list(lacking[0]), n=1)
            meant = f"; did you mean `{near[0]}`?" if near else ""
            more = f" ({len(lacking) - 1} more rows)" if len(lacking) > 1 else ""
            mistakes.append(f"{lacking[0]}: no field `{name}`, which reward {spec.name} reads{meant}{more}")
    if mistakes:
        raise RewardError("\n".join(mistakes))


def _field_results(runner: RewardRunner, rows: Sequence[Row], gold_field: str | None) -> list[list[CallResult]]:
    """What the functions make of a likely and an unlikely text of each row; judges are not asked."""
    items = [(text, row) for row in rows for text in (gold_answer(row, gold_field) or "1", WORDS)]
    return runner.submit(items, [2] * len(rows), only=runner.functions).call_results(if_closed=NOT_TRIED)


def _trials(rows: Sequence[Row], gold_field: str | None) -> list[Trial]:
    if not rows:
        raise RewardError("rewards: no rows to try them on")
    trials = []
    for position, row in enumerate(rows):
        gold, other = gold_answer(row, gold_field), gold_answer(rows[position - 1], gold_field)
        if gold is not None:
            trials += [Trial(row, label, form.format(gold), is_gold=True) for label, form in FORMATS.items()]
        if other is not None and other != gold:
            trials.append(Trial(row, "another row's answer", other, is_compared=True))
        trials.append(Trial(row, "words", WORDS, is_compared=True))
    trials += [Trial(rows[0], label, text, is_compared=not text) for label, text in STRESS.items()]
    return trials


def gold_answer(row: Row, field: str | None = None) -> str | None:
    """The row's gold answer as text, or None.

    Args:
        row: of the data.
        field: that holds it; None tries the usual names.

    Raises:
        RewardError: the row lacks this field.
    """
    if field is not None and not has_field(row, field):
        raise RewardError(f"{row}: no field `{field}`, which was named as the gold answer")
    for name in (field,) if field else GOLD_FIELDS:
        if has_field(row, name):
            value = read_field(row, name)
            return value if isinstance(value, str) else json.dumps(value)
    messages = row.get("messages", ())
    if messages and messages[-1].get("role") == "assistant":
        return str(messages[-1].get("content", ""))
    return None


def _all_scored(results: Sequence[CallResult]) -> bool:
    return all(result.failure is None for result in results)
