"""What happened to a run and when: attempts, restarts, preemptions, skipped and refused rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, final

from trainer.run.directory import RunDir
from trainer.run.metrics_reader import Record
from trainer.run.state import EndState, Outcome

EventKind = Literal["restart", "preempted", "cancelled", "failed", "lost", "skipped", "refused", "replaced"]
SHOWN_ROWS: Final = 5


@final
@dataclass(frozen=True)
class AttemptSpan:
    """One process start, from its first step to its end."""

    number: int
    began: float
    """Seconds since the run began."""
    ended: float | None
    """None while it runs, and where nothing recorded its end."""
    from_step: int
    to_step: int
    """Last step that counts: what was made after the checkpoint that the next attempt began with was made again."""
    state: EndState | Literal["running", "lost"]
    """`lost`: it ended and could not say how, for instance by SIGKILL."""
    message: str
    where: str
    """Shape, ranks and host."""
    processor: str


@final
@dataclass(frozen=True)
class Event:
    """Something that a reader of the curves should know."""

    kind: EventKind
    step: int
    time: float | None
    """Seconds since the run began."""
    text: str


def began_at(attempts: Sequence[Mapping[str, Any]], records: Sequence[Record]) -> float:
    """When the run began, in seconds since 1970: its first attempt, or its first record."""
    moments = [each["time"] for each in [*attempts[:1], *records[:1]] if isinstance(each.get("time"), int | float)]
    return float(min(moments, default=0.0))


def attempt_spans(
    attempts: Sequence[Mapping[str, Any]], records: Sequence[Record], outcome: Outcome | None, *, is_live: bool
) -> list[AttemptSpan]:
    """The attempts of a run, the oldest first.

    Args:
        attempts: records of attempts.jsonl.
        records: of metrics.jsonl.
        outcome: of the last attempt.
        is_live: whether the last attempt goes on.
    """
    began = began_at(attempts, records)
    steps = [_last_step_before(attempt["time"], records) for attempt in attempts]
    last = records[-1]["step"] if records else 0
    spans = []
    for index, attempt in enumerate(attempts):
        is_newest = index + 1 == len(attempts)
        state, message, ended = _end(attempt, outcome if is_newest else None, is_live=is_live and is_newest)
        if ended is None and is_newest and state not in {"running", "lost"} and records:
            ended = records[-1].get("time")  # attempts of earlier versions did not record their end
        ranks = attempt.get("ranks", 1)
        spans.append(
            AttemptSpan(
                number=attempt.get("attempt", index + 1),
                began=round(attempt["time"] - began, 1),
                ended=round(ended - began, 1) if ended is not None else None,
                from_step=steps[index],
                to_step=last if is_newest else steps[index + 1],
                state=state,
                message=message,
                where=f"{attempt.get('shape', '?')}, {ranks} {'rank' if ranks == 1 else 'ranks'}, "
                f"{attempt.get('host', '?')}",
                processor=str(attempt.get("processor", "")),
            )
        )
    return spans


def _last_step_before(moment: float, records: Sequence[Record]) -> int:
    """The step that an attempt began with: records of later steps were made again, so they are younger."""
    return max((record["step"] for record in records if record.get("time", 0.0) < moment), default=0)


def _end(
    attempt: Mapping[str, Any], outcome: Outcome | None, *, is_live: bool
) -> tuple[EndState | Literal["running", "lost"], str, float | None]:
    ended = attempt.get("ended")
    if ended is not None:
        return ended["state"], ended["message"], ended["time"]
    if is_live:
        return "running", "", None
    if outcome is not None:
        return outcome.state, outcome.message, None
    return "lost", "ended without an outcome, as after SIGKILL or a power cut", None


def events(run: RunDir, spans: Sequence[AttemptSpan], records: Sequence[Record], began: float) -> list[Event]:
    """What the run went through, in the order of its steps.

    Args:
        run: any run.
        spans: its attempts.
        records: of metrics.jsonl.
        began: when it began, in seconds since 1970.
    """
    found = [*_of_attempts(spans), *_skipped(records, began), *_refused(run, began), *_replaced(run)]
    return sorted(found, key=lambda event: (event.step, event.time or 0.0))


def _of_attempts(spans: Sequence[AttemptSpan]) -> Iterator[Event]:
    for before, span in zip([None, *spans], spans, strict=False):
        if before is not None:
            text = f"attempt {span.number} continues after step {span.from_step}"
            if before.state == "lost":
                text += f"; attempt {before.number} {before.message}"
            yield Event("restart", span.from_step, span.began, text)
        if span.state in {"preempted", "cancelled", "failed"}:
            first_line = span.message.partition("\n")[0]
            yield Event(span.state, span.to_step, span.ended, f"attempt {span.number}: {first_line}")


def _skipped(records: Sequence[Record], began: float) -> Iterator[Event]:
    for record in records:
        rows = record.get("train/skipped_rows")
        if rows:
            more = f" and {len(rows) - SHOWN_ROWS} more" if len(rows) > SHOWN_ROWS else ""
            text = f"update skipped, loss or gradient not finite; rows: {', '.join(rows[:SHOWN_ROWS])}{more}"
            yield Event("skipped", record["step"], round(record.get("time", began) - began, 1), text)


def _refused(run: RunDir, began: float) -> Iterator[Event]:
    for step in run.journal_steps(refused=True):
        moment = run.journal(step, refused=True).stat().st_mtime
        text = "rollouts refused: too many had no reward, so they were not trained on"
        yield Event("refused", step + 1, round(moment - began, 1), text)


def _replaced(run: RunDir) -> Iterator[Event]:
    held_out = run.read_held_out()
    if held_out is not None and held_out.since_step >= 0:
        yield Event("replaced", held_out.since_step, None, "held-out rows were replaced: earlier values do not compare")
