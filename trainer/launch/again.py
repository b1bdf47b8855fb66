"""Whether a batch job starts a run again: `python -m trainer.launch.again RUN [IN_A_ROW CHECKPOINT WAIT_S]`.

The script of a job of several nodes (jobs/slurm_script.py) calls it before its first step, and after each step that
ended without being asked to. The output, "1 8 2" for one restart in a row since the checkpoint of step 8, 2 s from now,
is passed on to the next call. Exit code 1: the run must not be started again, and its outcome stays.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from trainer.errors import EXIT_FAILED, EXIT_FINISHED, TrainerError
from trainer.launch.restarts import Restarts
from trainer.run.directory import RunDir
from trainer.run.place import settle
from trainer.run.state import Outcome

DIED: Final = "ranks ended without an outcome; see the job's log"


def main(argv: Sequence[str]) -> int:
    """Print the count of restarts for the next call; returns the exit code.

    Args:
        argv: the run directory, and the words that the last call has printed.
    """
    run, plan = settle(RunDir(Path(argv[0])))
    settings = plan.recipe.recovery
    if len(argv) == 1:
        return _print(Restarts(0, run.newest_checkpoint_step()), 0.0)
    restarts = Restarts(int(argv[1]), int(argv[2]))
    outcome = run.read_outcome() or _record_death(run)
    following = restarts.after(outcome, run.newest_checkpoint_step(), settings)
    if following is None:
        return EXIT_FAILED
    following.announce(outcome, settings)
    return _print(following, following.wait_s(settings))


def _print(restarts: Restarts, wait_s: float) -> int:
    sys.stdout.write(f"{restarts.in_a_row} {restarts.newest_checkpoint} {wait_s:g}\n")
    return EXIT_FINISHED


def _record_death(run: RunDir) -> Outcome:
    """The outcome of ranks that wrote none, recorded in their place."""
    outcome = Outcome("failed", run.newest_logged_step(), DIED, EXIT_FAILED, is_transient=True)
    with suppress(OSError, TrainerError), run.locked():  # unless a rank still runs
        attempts = run.read_attempts()
        if attempts and "ended" not in attempts[-1]:
            run.end_attempt(run.newest_attempt(), outcome)
        else:  # they ended before they took a number
            run.write_outcome(outcome)
    return outcome


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
