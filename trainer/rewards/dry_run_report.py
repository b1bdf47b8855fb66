"""What `trainer check --rewards` reports of each reward, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, final

from trainer.errors import RewardError
from trainer.rewards.call_result import CallResult
from trainer.types import Row

GOLD_FIELDS: Final = ("answer", "completion", "solution")
NOT_TRIED: Final = CallResult(failure="not tried: the time of the check had run out")
NO_ANSWER: Final = "no answer within"
"""Begins the failure of a reward that ran out of time."""


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
class GoldCount:
    """How gold answers compare with garbage."""

    num_rows: int
    """Rows on which both were scored."""
    num_above: int
    below: tuple[Row, ...]
    """Rows on which the best gold answer scored less than garbage."""
    form: str | None
    """Format of the first gold answer that scored more than garbage."""

    @classmethod
    def of(cls, scored: Iterable[tuple[Trial, float | None]]) -> GoldCount:
        """Count rows; texts without a value are left out."""
        by_row: dict[int, list[tuple[Trial, float]]] = {}
        for trial, value in scored:
            if value is not None:
                by_row.setdefault(id(trial.row), []).append((trial, value))
        num_above = num_rows = 0
        below: list[Row] = []
        form = None
        for pairs in by_row.values():
            gold = [(value, trial.label) for trial, value in pairs if trial.is_gold]
            garbage = [value for trial, value in pairs if trial.is_compared]
            if gold and garbage:
                best, label = max(gold, key=lambda pair: pair[0])  # the first one on a tie, which is plain
                num_rows += 1
                num_above += best > max(garbage)
                below += [pairs[0][0].row] if best < max(garbage) else []
                form = label if form is None and best > max(garbage) else form
        return cls(num_rows, num_above, tuple(below), form)


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
    """Label and last line of the first failures."""
    num_tried: int = 0
    """Texts."""
    num_failed: int = 0
    num_left_out: int = 0
    """Texts for which no time was left."""

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
        if self.num_failed > len(self.failures):
            lines.append(f"                       and {self.num_failed - len(self.failures)} more")
        if self.num_left_out:
            lines.append(f"  NOT TRIED            {self.num_left_out} texts: the time of the check had run out")
        return lines


@final
@dataclass(frozen=True)
class ProbeReport:
    """The results of all rewards."""

    rewards: tuple[RewardProbe, ...]
    unused: tuple[str, ...] = ()
    """Rewards that no row chooses."""
    problems: tuple[str, ...] = ()
    """Why the rewards are refused though each of them works."""

    def lines(self) -> list[str]:
        """The report as text."""
        unused = [f"reward {name}: NO ROW names it in its reward_column" for name in self.unused]
        return [line for reward in self.rewards for line in reward.lines()] + unused


def judge_reward(
    name: str, pairs: Sequence[tuple[Trial, CallResult]], *, is_deterministic: bool, num_left_out: int = 0
) -> RewardProbe:
    """Summarize one reward; refuse one that gives no training signal.

    Args:
        name: of the reward.
        pairs: texts that were tried, and what the reward gave them.
        is_deterministic: whether a second pass gave the same.
        num_left_out: texts for which no time was left.

    Raises:
        RewardError: the reward scores no text, or gives every text the same.
    """
    values = [result.value for _, result in pairs if result.value is not None]
    failed = [(trial, result.failure) for trial, result in pairs if result.failure is not None]
    if not values:
        why = f"{_counted(failed)}. The first failure:\n{failed[0][1]}" if failed else "it always abstained"
        raise RewardError(f"reward {name}: scored none of {len(pairs)} texts; {why}")
    if min(values) == max(values) and failed:
        raise RewardError(
            f"reward {name}: of {len(pairs)} texts {_counted(failed)}; the others get {values[0]:g}. The first "
            f"failure, on {failed[0][0].label}:\n{failed[0][1]}"
        )
    if min(values) == max(values):
        raise RewardError(
            f"reward {name}: gives {values[0]:g} to everything: gold answers, garbage, the empty string, 100 kB. "
            "It gives no training signal.\nCorrect the reward; or, if it accepts only a format that was not tried, "
            "name a row field that contains a whole completion which deserves the highest reward."
        )
    gold = GoldCount.of((trial, result.value) for trial, result in pairs)
    slowest, slowest_result = max(pairs, key=lambda pair: pair[1].seconds)
    return RewardProbe(
        name=name,
        lowest=min(values),
        highest=max(values),
        num_rows=len({id(trial.row) for trial, _ in pairs}),
        num_gold=gold.num_rows,
        num_gold_above=gold.num_above,
        num_gold_below=len(gold.below),
        gold_format=gold.form,
        is_deterministic=is_deterministic,
        slowest_s=slowest_result.seconds,
        slowest_label=slowest.label,
        num_abstained=sum(result.value is None and result.failure is None for _, result in pairs),
        num_tried=len(pairs),
        num_failed=len(failed),
        num_left_out=num_left_out,
        failures=tuple(f"{trial.label}: {_gist(failure)} ({trial.row})" for trial, failure in failed[:5]),
    )


def _counted(failed: Sequence[tuple[Trial, str]]) -> str:
    """How many texts ran out of time, and on how many the reward failed otherwise."""
    num_late = sum(NO_ANSWER in failure for _, failure in failed)
    parts = [f"{num_late} ran out of time (reward_limits.timeout_s)"] if num_late else []
    parts += [f"{len(failed) - num_late} failed with an error"] if num_late < len(failed) else []
    return " and ".join(parts)


def _gist(failure: str) -> str:
    """The most informative line of a failure: the last of an exception, or how the process ended."""
    lines = failure.splitlines()
    return lines[1] if len(lines) > 1 and not lines[1].startswith("Traceback") else lines[-1]
