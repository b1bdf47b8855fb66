"""The states of a run: one enum, one table of what they are called and what may follow them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum, auto
from typing import Final, Literal, final

EndState = Literal["finished", "preempted", "cancelled", "failed"]
"""How an attempt ended, as written to outcome.json; each is the value of a RunState."""
JobState = Literal["PENDING", "RUNNING", "PREEMPTED", "FAILED", "CANCELLED", "COMPLETED"]
"""The public states of `trainer.jobs`."""
QueueState = Literal["waiting", "active", "taken away", "cancelled"]
"""What a batch system says of a submission."""


@final
@dataclass(frozen=True)
class Outcome:
    """How an attempt ended; written last."""

    state: EndState
    step: int
    message: str
    exit_code: int
    is_transient: bool = False
    """Whether another attempt may end differently: a crash, not a mistake of the user."""

    def is_finished(self, steps: int) -> bool:
        """Whether it says that at least `steps` steps are done."""
        return self.state == "finished" and self.step >= steps

    def __str__(self) -> str:
        """One sentence for people; the state is not repeated.

        >>> print(Outcome("finished", 50, "finished 50 steps of runs/tiny", 0))
        finished 50 steps of runs/tiny
        >>> print(Outcome("failed", 3, "rows.jsonl:2: not JSON", 2))
        failed: rows.jsonl:2: not JSON
        """
        return self.message if self.message.startswith(self.state) else f"{self.state}: {self.message}"


@final
class RunState(StrEnum):
    """The state of a run."""

    NEW = auto()
    """No attempt has begun."""
    QUEUED = auto()
    """Waits for a batch system."""
    LAUNCHED = auto()
    """A process that starts it lives, and does not supervise it yet, or no longer."""
    STARTING = auto()
    """Supervised; no attempt holds the lock: before the first, or between two."""
    RUNNING = auto()
    """An attempt holds the lock, and its heartbeat is fresh."""
    SILENT = auto()
    """An attempt holds the lock; its heartbeat is stale or missing."""
    INTERRUPTED = auto()
    """An attempt has begun, and ended without an outcome."""
    PREEMPTED = auto()
    FAILED = auto()
    CANCELLED = auto()
    """By the user, who alone starts it again."""
    FINISHED = auto()
    """All steps of the plan are done."""

    @property
    def shown(self) -> str:
        """The word that `trainer status` prints."""
        return TABLE[self].shown

    @property
    def job(self) -> JobState:
        """The public state of a job."""
        return TABLE[self].job

    @property
    def is_live(self) -> bool:
        """Whether the run goes on by itself."""
        return self.job in {"PENDING", "RUNNING"}

    def may_become(self, other: RunState) -> bool:
        """Whether the other state may follow this one directly."""
        return other in TABLE[self].next


@final
@dataclass(frozen=True)
class StateRow:
    """What a state is called, and what may follow it."""

    shown: str
    job: JobState
    next: frozenset[RunState]


_S = RunState
_HELD: Final = frozenset({_S.RUNNING, _S.SILENT})
_STARTED: Final = _HELD | {_S.LAUNCHED, _S.STARTING}
_ENDED: Final = frozenset({_S.INTERRUPTED, _S.PREEMPTED, _S.FAILED, _S.CANCELLED})
_FORGOTTEN: Final = frozenset({_S.NEW, _S.INTERRUPTED})
"""What remains of a run that only the batch system called preempted or cancelled, once it has forgotten the job."""

TABLE: Final[Mapping[RunState, StateRow]] = {
    # state: printed by `trainer status`, by `trainer jobs`, states that may follow under the same plan
    _S.NEW: StateRow("pending", "FAILED", frozenset({_S.LAUNCHED, _S.STARTING, _S.SILENT})),
    _S.QUEUED: StateRow("pending", "PENDING", _HELD | {_S.STARTING} | _ENDED | {_S.NEW}),
    _S.LAUNCHED: StateRow("starting", "PENDING", _HELD | {_S.QUEUED, _S.STARTING} | _ENDED | {_S.NEW}),
    _S.STARTING: StateRow("starting", "RUNNING", _HELD | {_S.QUEUED, _S.LAUNCHED} | _ENDED | {_S.NEW, _S.FINISHED}),
    _S.RUNNING: StateRow("running", "RUNNING", _STARTED - {_S.RUNNING} | {_S.QUEUED} | _ENDED | {_S.FINISHED}),
    _S.SILENT: StateRow(
        "running, no heartbeat", "RUNNING", _STARTED - {_S.SILENT} | {_S.QUEUED} | _ENDED | {_S.NEW, _S.FINISHED}
    ),
    _S.INTERRUPTED: StateRow("interrupted", "FAILED", _STARTED),
    _S.PREEMPTED: StateRow("preempted", "PREEMPTED", _STARTED | _FORGOTTEN),
    _S.FAILED: StateRow("failed", "FAILED", _STARTED),
    _S.CANCELLED: StateRow("cancelled", "CANCELLED", _STARTED | _FORGOTTEN),
    _S.FINISHED: StateRow("finished", "COMPLETED", frozenset()),
}


@final
@dataclass(frozen=True)
class Facts:
    """What a run directory and a batch system say; the state follows from it."""

    is_locked: bool = False
    """An attempt holds the run."""
    is_alive: bool = False
    """The newest attempt's heartbeat is fresh."""
    is_supervised: bool = False
    is_launched: bool = False
    """A process that `submit` started lives."""
    has_begun: bool = False
    """There is a heartbeat, fresh or not."""
    outcome: EndState | None = None
    is_complete: bool = False
    """The outcome is `finished`, at the last step of the plan."""
    is_cancelled: bool = False
    """The user cancelled it."""
    queue: QueueState | None = None


def state_of(facts: Facts) -> RunState:
    """The state that follows from the facts; living processes count more than the last outcome.

    >>> state_of(Facts(is_locked=True, is_alive=True, outcome="preempted")).job
    'RUNNING'
    >>> state_of(Facts(outcome="preempted", is_cancelled=True)).shown
    'cancelled'
    """
    if facts.is_locked:
        return _S.RUNNING if facts.is_alive else _S.SILENT
    if facts.is_supervised:
        return _S.STARTING
    if facts.is_complete:
        return _S.FINISHED
    if facts.queue in {"waiting", "active"}:
        return _S.QUEUED if facts.queue == "waiting" else _S.STARTING
    return _S.LAUNCHED if facts.is_launched else _ended(facts)


def _ended(facts: Facts) -> RunState:
    """The state of a run that no process holds or waits for."""
    if facts.is_cancelled or facts.outcome == "cancelled":
        return _S.CANCELLED
    if facts.outcome is not None:  # `finished` at fewer steps than the plan has now is not complete
        return _S.FAILED if facts.outcome == "failed" else _S.PREEMPTED
    if facts.queue is not None:
        return _S.CANCELLED if facts.queue == "cancelled" else _S.PREEMPTED
    return _S.INTERRUPTED if facts.has_begun else _S.NEW
