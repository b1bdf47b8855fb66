"""Restart attempts until the run ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, final

from trainer.config.recipe import RecoverySettings
from trainer.errors import EXIT_USER
from trainer.launch.supervisor import StopSignals, Supervisor
from trainer.planning.plan import Plan
from trainer.run.console import tell
from trainer.run.directory import RunDir
from trainer.run.state import Outcome

MAX_BACKOFF_S: Final = 60.0


@final
@dataclass(frozen=True)
class Restarts:
    """How often a run was started again; the rule is the same for a supervisor and for a batch script."""

    in_a_row: int
    """Restarts since the newest checkpoint."""
    newest_checkpoint: int
    """Its step; -1 where there is none."""

    def after(self, outcome: Outcome, checkpoint: int, settings: RecoverySettings) -> Restarts | None:
        """The count with another restart; None where the run must not be started again.

        A preemption or a crash is followed by another attempt, up to `max_restarts` times in a row without a new
        checkpoint. An error that the user must fix is not retried.

        Args:
            outcome: of the attempt that ended.
            checkpoint: newest checkpoint step now.
            settings: how often, and how long to wait.
        """
        in_a_row = 0 if checkpoint > self.newest_checkpoint else self.in_a_row
        if outcome.state in {"finished", "cancelled"} or outcome.exit_code == EXIT_USER:
            return None
        if not (outcome.state == "preempted" or outcome.is_transient) or in_a_row >= settings.max_restarts:
            return None
        return Restarts(in_a_row + 1, max(checkpoint, self.newest_checkpoint))

    def wait_s(self, settings: RecoverySettings) -> float:
        """Seconds before the restart: doubled with each one without progress."""
        return min(MAX_BACKOFF_S, settings.restart_backoff_s * 2 ** (self.in_a_row - 1))

    def announce(self, outcome: Outcome, settings: RecoverySettings) -> None:
        """Tell the user of the restart.

        Args:
            outcome: what it follows.
            settings: how often, and how long to wait.
        """
        tell(
            f"{outcome}\n"
            f"restart {self.in_a_row} of at most {settings.max_restarts} without a new checkpoint, "
            f"in {self.wait_s(settings):g} s"
        )


def supervise(plan: Plan, run: RunDir, stop: StopSignals) -> Outcome:
    """Start attempts until the run has ended, was stopped from outside, or makes no progress (`Restarts.after`).

    Args:
        plan: of the run.
        run: its directory; the caller holds its supervisor lock.
        stop: signals that ask this process to stop.
    """
    settings = plan.recipe.recovery
    restarts = Restarts(0, run.newest_checkpoint_step())
    while True:
        outcome = Supervisor(plan, run, stop).attempt()
        following = restarts.after(outcome, run.newest_checkpoint_step(), settings)
        if following is None or stop.was_asked:
            return outcome
        restarts = following
        restarts.announce(outcome, settings)
        if stop.wait(restarts.wait_s(settings)):
            return outcome
