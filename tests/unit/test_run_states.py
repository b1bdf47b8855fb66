"""The states of a run: every transition that events can cause, against the table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final, get_args

import pytest

from trainer.run.state import TABLE, EndState, Facts, JobState, Outcome, RunState, state_of

ENDS: Final[tuple[EndState, ...]] = get_args(EndState)


def events(facts: Facts) -> Iterator[tuple[str, Facts]]:
    """What may happen next, one change at a time, and the facts after it."""
    yield from worker_events(facts)
    yield from process_events(facts)
    yield from queue_events(facts)
    if facts.is_alive:
        yield "no heartbeat for 30 s", replace(facts, is_alive=False)
    if facts.is_complete:
        yield "steps raised", replace(facts, is_complete=False)
    if state_of(facts).may_become(RunState.CANCELLED):
        yield "cancelled by the user", replace(facts, is_cancelled=True)


def worker_events(facts: Facts) -> Iterator[tuple[str, Facts]]:
    if not facts.is_locked:
        if not facts.is_complete:  # a finished run starts no worker
            yield "worker takes the lock", replace(facts, is_locked=True, outcome=None)
        return
    yield "heartbeat", replace(facts, is_alive=True, has_begun=True)
    yield "worker dies", replace(facts, is_locked=False)
    for end in ENDS:
        ended = replace(facts, is_locked=False, outcome=end, is_complete=end == "finished")
        if facts.has_begun or end != "finished":
            yield f"worker ends as {end}", ended


def process_events(facts: Facts) -> Iterator[tuple[str, Facts]]:
    """Of the process that `submit` starts, and the supervisor."""
    state = state_of(facts)
    if facts.is_supervised:
        yield "supervisor ends", replace(facts, is_supervised=False)
        if not facts.is_locked and facts.outcome is None:
            for end in ("failed", "preempted", "cancelled"):
                yield f"supervisor says {end}", replace(facts, outcome=end)
    elif not facts.is_locked and not facts.is_complete:
        yield "train", replace(facts, is_supervised=True, outcome=None)
    if facts.is_launched:
        yield "launched process ends", replace(facts, is_launched=False)
        if not facts.is_supervised and not facts.is_locked and not facts.is_complete:
            yield "submission clears the last outcome", replace(facts, outcome=None, is_cancelled=False)
    elif not state.is_live and state is not RunState.FINISHED:
        yield "submit", replace(facts, is_launched=True)


def queue_events(facts: Facts) -> Iterator[tuple[str, Facts]]:
    if facts.is_launched and not facts.is_supervised and not facts.is_locked and not facts.is_complete:
        yield "sbatch", replace(facts, is_launched=False, outcome=None, is_cancelled=False, queue="waiting")
    if facts.queue == "waiting":
        yield "allocated", replace(facts, queue="active")
    if facts.queue == "active":
        yield "requeued", replace(facts, queue="waiting")
    if facts.queue in {"waiting", "active"}:
        yield "taken away", replace(facts, queue="taken away")
        yield "scancel", replace(facts, queue="cancelled")
    if facts.queue is not None:
        yield "forgotten", replace(facts, queue=None)


def transitions() -> dict[tuple[RunState, RunState], str]:
    """Every change of state that events cause, from a new run on, each with an event that causes it."""
    caused: dict[tuple[RunState, RunState], str] = {}
    reached, todo = {Facts()}, [Facts()]
    while todo:
        before = todo.pop()
        for name, after in events(before):
            pair = state_of(before), state_of(after)
            if pair[0] is not pair[1]:
                caused.setdefault(pair, name)
            if after not in reached:
                reached.add(after)
                todo.append(after)
    return caused


if __name__ == "__main__":
    t=transitions()
    for s in RunState:
        print(s, sorted(b.value for a,b in t if a is s), "MISSING", sorted(b.value for b in TABLE[s].next if (s,b) not in t), "EXTRA", sorted((b.value,t[s,b]) for a,b in t if a is s and b not in TABLE[s].next))
