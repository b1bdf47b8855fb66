"""Attempt after attempt until the run ends; the only module that decides to start one again."""

from __future__ import annotations

import sys
from typing import Final

from trainer.errors import EXIT_USER
from trainer.launch.supervisor import StopSignals, Supervisor
from trainer.planning.plan import Plan
from trainer.run.directory import Outcome, RunDir

MAX_BACKOFF_S: Final = 60.0


def supervise(plan: Plan, run: RunDir, stop: StopSignals) -> Outcome:
    """Start attempts until the run has ended, was stopped from outside, or goes no further.

    A preemption or a crash is followed by another attempt; after `recovery.max_restarts` in a row without a new
    checkpoint the last outcome stands. What the user must mend is never tried again.

    Args:
        plan: of the run.
        run: whose supervisor the caller is.
        stop: what asks this process to stop.
    """
    settings = plan.recipe.recovery
    in_a_row, reached = 0, run.newest_checkpoint_step()
    while True:
        outcome = Supervisor(plan, run, stop).attempt()
        now_at = run.newest_checkpoint_step()
        in_a_row = 0 if now_at > reached else in_a_row
        reached = max(now_at, reached)
        if not _may_restart(outcome, stop) or in_a_row >= settings.max_restarts:
            return outcome
        wait_s = min(MAX_BACKOFF_S, settings.restart_backoff_s * 2**in_a_row)
        in_a_row += 1
        sys.stderr.write(
            f"{outcome.state}: {outcome.message}\n"
            f"restart {in_a_row} of at most {settings.max_restarts} without a new checkpoint, in {wait_s:g} s\n"
        )
        if stop.wait(wait_s):
            return outcome


def _may_restart(outcome: Outcome, stop: StopSignals) -> bool:
    """Whether another attempt could end otherwise, and nobody asked us to stop."""
    if stop.was_asked or outcome.state in {"finished", "cancelled"} or outcome.exit_code == EXIT_USER:
        return False
    return outcome.state == "preempted" or outcome.is_transient
