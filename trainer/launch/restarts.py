"""Restart attempts until the run ends."""

from __future__ import annotations

from typing import Final

from trainer.errors import EXIT_USER
from trainer.launch.supervisor import StopSignals, Supervisor
from trainer.planning.plan import Plan
from trainer.run.console import tell
from trainer.run.directory import RunDir
from trainer.run.state import Outcome

MAX_BACKOFF_S: Final = 60.0


def supervise(plan: Plan, run: RunDir, stop: StopSignals) -> Outcome:
    """Start attempts until the run has ended, was stopped from outside, or makes no progress.

    A preemption or a crash is followed by another attempt, up to `recovery.max_restarts` times in a row without a new
    checkpoint. An error that the user must fix is not retried.

    Args:
        plan: of the run.
        run: its directory; the caller holds its supervisor lock.
        stop: signals that ask this process to stop.
    """
    settings = plan.recipe.recovery
    in_a_row, newest_checkpoint = 0, run.newest_checkpoint_step()
    while True:
        outcome = Supervisor(plan, run, stop).attempt()
        checkpoint = run.newest_checkpoint_step()
        in_a_row = 0 if checkpoint > newest_checkpoint else in_a_row
        newest_checkpoint = max(checkpoint, newest_checkpoint)
        if not _may_restart(outcome, stop) or in_a_row >= settings.max_restarts:
            return outcome
        wait_s = min(MAX_BACKOFF_S, settings.restart_backoff_s * 2**in_a_row)
        in_a_row += 1
        tell(
            f"{outcome}\n"
            f"restart {in_a_row} of at most {settings.max_restarts} without a new checkpoint, in {wait_s:g} s"
        )
        if stop.wait(wait_s):
            return outcome


def _may_restart(outcome: Outcome, stop: StopSignals) -> bool:
    """Whether another attempt may end differently, and nobody asked us to stop."""
    if stop.was_asked or outcome.state in {"finished", "cancelled"} or outcome.exit_code == EXIT_USER:
        return False
    return outcome.state == "preempted" or outcome.is_transient
