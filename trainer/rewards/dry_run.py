"""Try rewards before training does: `trainer check --rewards`.

Each reward sees the gold answers of some rows, and garbage: words, another row's answer, nothing, 100 kB, and
`5^5^5^5`, which no reward may compute. Gold answers are also dressed as models write them, since a reward may look for
a box, a tag or a block of code only.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from trainer.errors import RewardError
from trainer.rewards.outcome import Outcome
from trainer.rewards.runner import RewardRunner, Spec
from trainer.types import Row

GOLD_FIELDS: Final = ("answer", "completion", "solution")
DRESSINGS: Final = {
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
NUM_ROWS_ASKED: Final = 4
"""Rows on which is seen what fields a reward reads."""


@final
@dataclass(frozen=True)
class Trial:
    """One text given to the rewards for one row."""

    row: Row
    label: str
    text: str
    is_gold: bool = False
    is_compared: bool = False
    """Whether it is garbage that the gold answer should beat."""


@final
@dataclass(frozen=True)
class RewardProbe:
    """What one reward did with all trials."""

    name: str
    lowest: float
    highest: float
    num_rows: int
    num_gold: int
    """Rows with a gold answer that was scored, beside garbage that was."""
    num_gold_above: int
    num_gold_below: int
    dressing: str | None
    """How the first gold answer that beat its garbage was written."""
    is_deterministic: bool
    slowest_s: float
    slowest_label: str
    num_abstained: int
    failures: tuple[str, ...]
    """Label and last line of each failure."""

    def lines(self) -> list[str]:
        """Return the probe as text for people."""
        lines = [f"reward {self.name}: from {self.lowest:g} to {self.highest:g} on {self.num_rows} rows"]
        if self.num_gold == 0:
            lines.append(f"  gold above garbage   unknown: no row has a gold answer ({', '.join(GOLD_FIELDS)})")
        else:
            written = f", written as {self.dressing}" if self.dressing else ""
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
    """What all rewards did."""

    rewards: tuple[RewardProbe, ...]

    def lines(self) -> list[str]:
        """Return the report as text for people."""
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
    """Run the rewards on trial texts and judge what they return.

    Args:
        specs: the rewards of a recipe.
        rows: all rows; each is searched for missing fields, the first ones are tried.
        base_dir: the recipe's directory.
        gold_field: the row's field with an answer, or a whole completion, that deserves the highest reward; by default
            `answer`, `completion`, `solution` or the last message of the assistant.
        num_rows: rows to try.
        timeout_s: wall-clock limit of a call.
        memory_limit_gib: address space of the worker on top of its imports.

    Raises:
        RewardError: a reward cannot be loaded, needs a field that a row lacks, never scores anything, or gives the same
            to everything.
    """
    trials = _trials(rows, num_rows, gold_field)
    settings: dict[str, Any] = {"base_dir": base_dir, "timeout_s": timeout_s, "memory_limit_gib": memory_limit_gib}
    with RewardRunner(specs, **settings) as runner:
        _refuse_missing_fields(runner, specs, rows, gold_field)
        first = _outcomes(runner, trials)
        again = [trial for trial, outcomes in zip(trials, first, strict=True) if _all_scored(outcomes)]
        second = _outcomes(runner, again)
    repeated = {id(trial): outcomes for trial, outcomes in zip(again, second, strict=True)}
    reports = []
    for index, spec in enumerate(specs):
        pairs = [(trial, outcomes[index]) for trial, outcomes in zip(trials, first, strict=True)]
        is_deterministic = all(
            repeated[id(trial)][index].value == outcome.value for trial, outcome in pairs if id(trial) in repeated
        )
        reports.append(_judge(spec.name, pairs, is_deterministic))
    return ProbeReport(tuple(reports))


def check_rows(specs: Sequence[Spec], rows: Sequence[Row], base_dir: Path, *, timeout_s: float = 10.0) -> None:
    """Refuse rows that lack a field which a reward reads.

    Which fields those are is seen by running the rewards on the first rows; that a field's absence is a failure, by
    running them on a row without it.

    Raises:
        RewardError: names each reward, field, and the file and line of the first row without it.
    """
    with RewardRunner(specs, base_dir=base_dir, timeout_s=timeout_s) as runner:
        _refuse_missing_fields(runner, specs, rows, None)


def _outcomes(runner: RewardRunner, trials: Sequence[Trial]) -> list[list[Outcome]]:
    """Score each trial in a submission of its own, so that a batch reward is timed on one text too."""
    pending = [runner.submit([(trial.text, trial.row)]) for trial in trials]
    return [outcomes for scoring in pending for outcomes in scoring.outcomes()]


def _refuse_missing_fields(
    runner: RewardRunner, specs: Sequence[Spec], rows: Sequence[Row], gold_field: str | None
) -> None:
    asked = runner.submit(_simple_items(rows[:NUM_ROWS_ASKED], gold_field)).outcomes()
    mistakes = []
    for index, spec in enumerate(specs):
        for name in sorted({name for outcomes in asked for name in outcomes[index].fields}):
            lacking = [row for row in rows if name not in row]
            if not lacking:
                continue
            tried = runner.submit(_simple_items(lacking[:1], gold_field)).outcomes()
            if not any(outcomes[index].missing == name for outcomes in tried):
                continue  # the reward can do without
            near = difflib.get_close_matches(name, list(lacking[0]), n=1)
            meant = f"; did you mean `{near[0]}`?" if near else ""
            more = f" ({len(lacking) - 1} more rows)" if len(lacking) > 1 else ""
            mistakes.append(f"{lacking[0]}: no field `{name}`, which reward {spec.name} reads{meant}{more}")
    if mistakes:
        raise RewardError("\n".join(mistakes))


def _simple_items(rows: Sequence[Row], gold_field: str | None) -> list[tuple[str, Row]]:
    return [(text, row) for row in rows for text in (_gold(row, gold_field) or "1", WORDS)]


def _trials(rows: Sequence[Row], num_rows: int, gold_field: str | None) -> list[Trial]:
    if not rows:
        raise RewardError("rewards: no rows to try them on")
    trials = []
    tried = rows[:num_rows]
    for position, row in enumerate(tried):
        gold, other = _gold(row, gold_field), _gold(tried[position - 1], gold_field)
        if gold is not None:
            trials += [Trial(row, label, form.format(gold), is_gold=True) for label, form in DRESSINGS.items()]
        if other is not None and other != gold:
            trials.append(Trial(row, "another row's answer", other, is_compared=True))
        trials.append(Trial(row, "words", WORDS, is_compared=True))
    trials += [Trial(tried[0], label, text, is_compared=not text) for label, text in STRESS.items()]
    return trials


def _gold(row: Row, field: str | None) -> str | None:
    """Return the row's answer as text, or None."""
    if field is not None and field not in row:
        raise RewardError(f"{row}: no field `{field}`, which was to hold the gold answer")
    for name in (field,) if field else GOLD_FIELDS:
        if name in row:
            return row[name] if isinstance(row[name], str) else json.dumps(row[name])
    messages = row.get("messages", ())
    if messages and messages[-1].get("role") == "assistant":
        return str(messages[-1].get("content", ""))
    return None


def _all_scored(outcomes: Sequence[Outcome]) -> bool:
    return all(outcome.failure is None for outcome in outcomes)


def _judge(name: str, pairs: Sequence[tuple[Trial, Outcome]], is_deterministic: bool) -> RewardProbe:
    """Sum up one reward; refuse one that can teach nothing."""
    values = [outcome.value for _, outcome in pairs if outcome.value is not None]
    failed = [(trial, outcome.failure) for trial, outcome in pairs if outcome.failure is not None]
    if not values:
        why = f"the first failure:\n{failed[0][1]}" if failed else "it always abstained"
        raise RewardError(f"reward {name}: scored none of {len(pairs)} texts; {why}")
    if min(values) == max(values):
        raise RewardError(
            f"reward {name}: gives {values[0]:g} to everything: gold answers, garbage, the empty string, 100 kB. "
            "It can teach nothing.\nMend the reward; or, if it wants a form that was not tried, "
            "name a row field that holds a whole completion worth the highest reward."
        )
    num_above = num_below = num_gold = 0
    dressing = None
    rows = {id(trial.row): trial.row for trial, _ in pairs}
    for row in rows.values():
        own = [(trial, outcome.value) for trial, outcome in pairs if trial.row is row and outcome.value is not None]
        gold = [(value, trial.label) for trial, value in own if trial.is_gold]
        garbage = [value for trial, value in own if trial.is_compared]
        if gold and garbage:
            best, label = max(gold, key=lambda pair: pair[0])  # of equals the first: plain
            num_gold += 1
            num_above += best > max(garbage)
            num_below += best < max(garbage)
            dressing = label if dressing is None and best > max(garbage) else dressing
    slowest, slowest_outcome = max(pairs, key=lambda pair: pair[1].seconds)
    return RewardProbe(
        name=name,
        lowest=min(values),
        highest=max(values),
        num_rows=len(rows),
        num_gold=num_gold,
        num_gold_above=num_above,
        num_gold_below=num_below,
        dressing=dressing,
        is_deterministic=is_deterministic,
        slowest_s=slowest_outcome.seconds,
        slowest_label=slowest.label,
        num_abstained=sum(outcome.value is None and outcome.failure is None for _, outcome in pairs),
        failures=tuple(f"{trial.label}: {_gist(failure)} ({trial.row})" for trial, failure in failed[:5]),
    )


def _gist(failure: str) -> str:
    """Return the line of a failure that says most: an exception's last, or what happened to the process."""
    lines = failure.splitlines()
    return lines[1] if len(lines) > 1 and not lines[1].startswith("Traceback") else lines[-1]
