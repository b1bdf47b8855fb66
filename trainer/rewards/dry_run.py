"""Tests rewards before training: `trainer check --rewards`.

Each reward scores the gold answers of some rows, and garbage: words, another row's answer, the empty string, 100 kB
and `5^5^5^5`, which no reward should evaluate. Gold answers are also formatted as models write them, since a reward may
accept only a box, a tag or a code block.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from trainer.errors import RewardError
from trainer.rewards.call_result import CallResult
from trainer.rewards.runner import RewardRunner, Spec
from trainer.types import Row

GOLD_FIELDS: Final = ("answer", "completion", "solution")
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


@final
@dataclass(frozen=True)
class Trial:
    """One text that the rewards score for one row."""

    row: Row
    label: str
    text: str
    is_gold: bool = False
    is_compared: bool = False
    """Whether it is garbage, which should score less than the gold answer."""


@final
@dataclass(frozen=True)
class RewardProbe:
    """The results of one reward on all trials."""

    name: str
    lowest: float
    highest: float
    num_rows: int
    num_gold: int
    """Rows on which both a gold answer and garbage were scored."""
    num_gold_above: int
    num_gold_below: int
    gold_format: str | None
    """Format of the first gold answer that scored more than garbage; a key of `FORMATS`."""
    is_deterministic: bool
    slowest_s: float
    slowest_label: str
    num_abstained: int
    failures: tuple[str, ...]
    """Label and last line of each failure."""

    def lines(self) -> list[str]:
        """The results as text."""
        lines = [f"reward {self.name}: from {self.lowest:g} to {self.highest:g} on {self.num_rows} rows"]
        if self.num_gold == 0:
            lines.append(f"  gold above garbage   unknown: no row has a gold answer ({', '.join(GOLD_FIELDS)})")
        else:
            written = f", written as {self.gold_format}" if self.gold_format else ""
            lines.append(f"  gold above garbage   {self.num_gold_above} of {self.num_gold} rows{written}")
        if self.num_gold_below:
            lines.append(f"  GOLD BELOW GARBAGE   {self.num_gold_below} of {self.num_gold} rows")
        lines.append(f"  same answer twice    {'yes' if self.is_deterministic else 'NO: it is not deterministic'}")
        lines.append(f"  slowest call         {self.slowest_s:.3f} s ({self.slowest_label})")
        if self.num_abstained:
            lines.append(f"  abstained            {self.num_abstained} times")
        lines.extend(f"  failed               {failure}" for failure in self.failures)
        return lines


@final
@dataclass(frozen=True)
class ProbeReport:
    """The results of all rewards."""

    rewards: tuple[RewardProbe, ...]

    def lines(self) -> list[str]:
        """The report as text."""
        return [line for reward in self.rewards for line in reward.lines()]


def probe(
    specs: Sequence[Spec],
    rows: Sequence[Row],
    *,
    base_dir: Path,
    gold_field: str | None = None,
    num_rows: int = 8,
    timeout_s: float = 10.0,
    memory_limit_gib: float = 2.0,
) -> ProbeReport:
    """Run the rewards on trial texts and check the results.

    Args:
        specs: the rewards of a recipe.
        rows: all rows; every row is checked for missing fields, the first ones are used for trials.
        base_dir: the recipe's directory.
        gold_field: row field with an answer, or a whole completion, that should get the highest reward; by default
            `answer`, `completion`, `solution` or the last message of the assistant.
        num_rows: rows used for trials.
        timeout_s: wall-clock limit of a call.
        memory_limit_gib: address space of the worker in addition to that of its imports.

    Raises:
        RewardError: a reward cannot be loaded, requires a field that a row does not have, scores no text at all, or
            gives every text the same reward.
    """
    trials = _trials(rows, num_rows, gold_field)
    settings: dict[str, Any] = {"base_dir": base_dir, "timeout_s": timeout_s, "memory_limit_gib": memory_limit_gib}
    with RewardRunner(specs, **settings) as runner:
        refuse_missing_fields(runner, specs, rows, gold_field)
        first = _results(runner, trials)
        again = [trial for trial, results in zip(trials, first, strict=True) if _all_scored(results)]
        second = _results(runner, again)
    repeated = {id(trial): results for trial, results in zip(again, second, strict=True)}
    reports = []
    for index, spec in enumerate(specs):
        pairs = [(trial, results[index]) for trial, results in zip(trials, first, strict=True)]
        is_deterministic = all(
            repeated[id(trial)][index].value == result.value for trial, result in pairs if id(trial) in repeated
        )
        reports.append(_judge(spec.name, pairs, is_deterministic))
    return ProbeReport(tuple(reports))


def _results(runner: RewardRunner, trials: Sequence[Trial]) -> list[list[CallResult]]:
    """Score each trial in a submission of its own, so that batch rewards too are timed on one text."""
    pending = [runner.submit([(trial.text, trial.row)]) for trial in trials]
    return [results for scoring in pending for results in scoring.call_results()]


def refuse_missing_fields(
    runner: RewardRunner, specs: Sequence[Spec], rows: Sequence[Row], gold_field: str | None = None
) -> None:
    """Refuse rows that lack a field which a reward requires.

    A field is one that the reward reads on the first rows; it is required if the reward fails on a row without it.

    Args:
        runner: of these rewards, started.
        specs: the rewards of a recipe.
        rows: all rows.
        gold_field: see `probe`.

    Raises:
        RewardError: names each reward, each field, and the file and line of the first row without it.
    """
    tried = runner.submit(_simple_items(rows[:NUM_FIELD_ROWS], gold_field)).call_results()
    mistakes = []
    for index, spec in enumerate(specs):
        for name in sorted({name for results in tried for name in results[index].fields}):
            lacking = [row for row in rows if name not in row]
            if not lacking:
                continue
            without = runner.submit(_simple_items(lacking[:1], gold_field)).call_results()
            if not any(results[index].missing == name for results in without):
                continue  # the field is optional
            near = difflib.get_close_matches(name, list(lacking[0]), n=1)
            meant = f"; did you mean `{near[0]}`?" if near else ""
            more = f" ({len(lacking) - 1} more rows)" if len(lacking) > 1 else ""
            mistakes.append(f"{lacking[0]}: no field `{name}`, which reward {spec.name} reads{meant}{more}")
    if mistakes:
        raise RewardError("\n".join(mistakes))


def _simple_items(rows: Sequence[Row], gold_field: str | None) -> list[tuple[str, Row]]:
    return [(text, row) for row in rows for text in (gold_answer(row, gold_field) or "1", WORDS)]


def _trials(rows: Sequence[Row], num_rows: int, gold_field: str | None) -> list[Trial]:
    if not rows:
        raise RewardError("rewards: no rows to try them on")
    trials = []
    tried = rows[:num_rows]
    for position, row in enumerate(tried):
        gold, other = gold_answer(row, gold_field), gold_answer(tried[position - 1], gold_field)
        if gold is not None:
            trials += [Trial(row, label, form.format(gold), is_gold=True) for label, form in FORMATS.items()]
        if other is not None and other != gold:
            trials.append(Trial(row, "another row's answer", other, is_compared=True))
        trials.append(Trial(row, "words", WORDS, is_compared=True))
    trials += [Trial(tried[0], label, text, is_compared=not text) for label, text in STRESS.items()]
    return trials


def gold_answer(row: Row, field: str | None = None) -> str | None:
    """The row's gold answer as text, or None.

    Args:
        row: of the data.
        field: that holds it; None tries the usual names.

    Raises:
        RewardError: the row lacks this field.
    """
    if field is not None and field not in row:
        raise RewardError(f"{row}: no field `{field}`, which was named as the gold answer")
    for name in (field,) if field else GOLD_FIELDS:
        if name in row:
            return row[name] if isinstance(row[name], str) else json.dumps(row[name])
    messages = row.get("messages", ())
    if messages and messages[-1].get("role") == "assistant":
        return str(messages[-1].get("content", ""))
    return None


def _all_scored(results: Sequence[CallResult]) -> bool:
    return all(result.failure is None for result in results)


def _judge(name: str, pairs: Sequence[tuple[Trial, CallResult]], is_deterministic: bool) -> RewardProbe:
    """Summarize one reward; refuse one that gives no training signal."""
    values = [result.value for _, result in pairs if result.value is not None]
    failed = [(trial, result.failure) for trial, result in pairs if result.failure is not None]
    if not values:
        why = f"the first failure:\n{failed[0][1]}" if failed else "it always abstained"
        raise RewardError(f"reward {name}: scored none of {len(pairs)} texts; {why}")
    if min(values) == max(values):
        raise RewardError(
            f"reward {name}: gives {values[0]:g} to everything: gold answers, garbage, the empty string, 100 kB. "
            "It gives no training signal.\nCorrect the reward; or, if it accepts only a format that was not tried, "
            "name a row field that contains a whole completion which deserves the highest reward."
        )
    num_above = num_below = num_gold = 0
    gold_format = None
    rows = {id(trial.row): trial.row for trial, _ in pairs}
    for row in rows.values():
        scored = [(trial, result.value) for trial, result in pairs if trial.row is row and result.value is not None]
        gold = [(value, trial.label) for trial, value in scored if trial.is_gold]
        garbage = [value for trial, value in scored if trial.is_compared]
        if gold and garbage:
            best, label = max(gold, key=lambda pair: pair[0])  # the first one on a tie, which is plain
            num_gold += 1
            num_above += best > max(garbage)
            num_below += best < max(garbage)
            gold_format = label if gold_format is None and best > max(garbage) else gold_format
    slowest, slowest_result = max(pairs, key=lambda pair: pair[1].seconds)
    return RewardProbe(
        name=name,
        lowest=min(values),
        highest=max(values),
        num_rows=len(rows),
        num_gold=num_gold,
        num_gold_above=num_above,
        num_gold_below=num_below,
        gold_format=gold_format,
        is_deterministic=is_deterministic,
        slowest_s=slowest_result.seconds,
        slowest_label=slowest.label,
        num_abstained=sum(result.value is None and result.failure is None for _, result in pairs),
        failures=tuple(f"{trial.label}: {_gist(failure)} ({trial.row})" for trial, failure in failed[:5]),
    )


def _gist(failure: str) -> str:
    """The most informative line of a failure: the last of an exception, or how the process ended."""
    lines = failure.splitlines()
    return lines[1] if len(lines) > 1 and not lines[1].startswith("Traceback") else lines[-1]
