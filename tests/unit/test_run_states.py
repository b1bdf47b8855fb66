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


CAUSED: Final = transitions()


@pytest.mark.parametrize("state", RunState)
def test_table_lists_exactly_the_transitions_that_events_cause(state):
    assert TABLE[state].next == {after for before, after in CAUSED if before is state}


@pytest.mark.parametrize(
    ("before", "event", "after"),
    [
        (Facts(), "submit", RunState.LAUNCHED),
        (Facts(is_launched=True), "sbatch", RunState.QUEUED),
        (Facts(queue="waiting"), "allocated", RunState.STARTING),
        (Facts(queue="active"), "requeued", RunState.QUEUED),
        (Facts(queue="active", has_begun=True), "taken away", RunState.PREEMPTED),
        (Facts(is_supervised=True), "worker takes the lock", RunState.SILENT),
        (Facts(is_locked=True), "heartbeat", RunState.RUNNING),
        (Facts(is_locked=True, is_alive=True), "no heartbeat for 30 s", RunState.SILENT),
        (Facts(is_locked=True, is_supervised=True, has_begun=True), "worker ends as failed", RunState.STARTING),
        (Facts(is_locked=True, has_begun=True), "worker ends as failed", RunState.FAILED),
        (Facts(is_locked=True, has_begun=True), "worker ends as finished", RunState.FINISHED),
        (Facts(is_locked=True, has_begun=True, is_cancelled=True), "worker ends as preempted", RunState.CANCELLED),
        (Facts(is_locked=True, has_begun=True), "worker dies", RunState.INTERRUPTED),
        (Facts(outcome="cancelled"), "train", RunState.STARTING),
    ],
)
def test_state_after_an_event(before, event, after):
    assert state_of(dict(events(before))[event]) is after


def test_every_state_can_be_reached():
    assert {after for _, after in CAUSED} | {RunState.NEW} == set(RunState)


def test_nothing_follows_the_last_step_of_the_plan():
    assert not TABLE[RunState.FINISHED].next


def test_only_a_live_run_can_be_cancelled():
    cancellable = {state for state in RunState if state.may_become(RunState.CANCELLED)}
    assert cancellable == {state for state in RunState if state.is_live}


def test_ends_in_outcome_json_are_states_and_are_printed_as_they_are():
    assert [RunState(end).shown for end in ENDS] == list(ENDS)


def test_public_words():
    """Scripts compare with these."""
    assert {row.job for row in TABLE.values()} == set(get_args(JobState))
    assert {row.shown for row in TABLE.values()} == {
        "pending", "starting", "running", "running, no heartbeat", "interrupted", *ENDS,
    }  # fmt: skip


def test_outcome_is_printed_without_saying_its_state_twice():
    assert str(Outcome("preempted", 3, "stopped after step 3 of 10", 75)) == "preempted: stopped after step 3 of 10"
    assert str(Outcome("finished", 9, "finished 9 steps", 0)) == "finished 9 steps"
