"""Recovers from rows whose loss or gradient is not finite: skips updates, excludes rows, returns to a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, final

from trainer.distributed.world import World
from trainer.errors import NumericalError, RolledBackError
from trainer.run.directory import RunDir
from trainer.training.saver import Saver

SHOWN_ROWS: Final = 5


@final
class BadRows:
    """The rows that a run excludes, and the decision to exclude more.

    It is decided from metrics.jsonl and excluded.json, so that a resumed run decides alike.
    """

    def __init__(self, run: RunDir, world: World, max_bad_steps: int, say: Callable[[str], None]) -> None:
        """Prepare; `load` reads the rows that earlier attempts excluded.

        Args:
            run: the run directory.
            world: the ranks.
            max_bad_steps: number of steps with a skipped update after which rows are excluded.
            say: prints a message to the user.
        """
        self.run, self.world, self.max_bad_steps, self.say = run, world, max_bad_steps, say
        self.excluded: frozenset[str] = frozenset()
        """File and line of the rows that are not trained on, for example "rows.jsonl:17"."""

    def load(self) -> None:
        """Read which rows are excluded; every rank calls this."""
        self.excluded = self.world.from_main(self.run.read_excluded() if self.world.is_main else None)

    def recover(self, step: int, saver: Saver) -> None:
        """After too many skipped updates, exclude their rows and return to the checkpoint; the second time, stop.

        Every rank calls this after a step with a skipped update, once the step is in metrics.jsonl.

        Args:
            step: the step that was just logged.
            saver: knows the newest checkpoint.

        Raises:
            RolledBackError: the rows are excluded from the newest checkpoint on.
            NumericalError: rows were excluded before, or there is no checkpoint to return to.
        """
        skipped = self.world.from_main(self._skipped_rows() if self.world.is_main else None)
        if len(skipped) < self.max_bad_steps:
            return
        saver.collect(wait=True)
        rows = sorted(set().union(*skipped))
        shown = ", ".join(rows[:SHOWN_ROWS])
        if len(rows) > SHOWN_ROWS:
            shown += f" and {len(rows) - SHOWN_ROWS} more"
        what = f"loss or gradient was not finite at {len(skipped)} steps, their updates were skipped. Rows: {shown}"
        remedy = "Lower optimizer.learning_rate, or correct the rows."
        if self.excluded:
            raise NumericalError(f"{what}. Rows were excluded once already. {remedy}")
        if saver.saved_step is None:
            raise NumericalError(f"{what}. There is no checkpoint to return to. {remedy}")
        if self.world.is_main:
            self.run.write_excluded(rows, step)
        self.say(f"{what}. Returning to the checkpoint of step {saver.saved_step} without these rows.")
        raise RolledBackError(what)

    def _skipped_rows(self) -> list[set[str]]:
        """The rows of each step with a skipped update, except for steps that the excluded rows explain."""
        skipped = (set(record.get("train/skipped_rows", ())) for record in self.run.read_metrics())
        return [rows for rows in skipped if not rows <= self.excluded]
