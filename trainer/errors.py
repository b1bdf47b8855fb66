"""Errors for people, and the exit code of each.

An error from here is printed without a traceback; its message says where, what is wrong, and the remedy. A bug of ours
stays an ordinary exception and keeps its traceback.

    TrainerError                 1   root of all errors below
      UserError                  2   the user must change something
        RecipeError              2     recipe or training shape
        DataError                2     rows
        ShapeError               2     no shape fits, or the named one does not
        ModelError               2     model, tokenizer, chat template, adapter
        RewardError              2     a reward
        LaunchError              2     launcher and shape disagree, or the run is running already
        RunConflictError         2     the run directory holds another run
      CheckpointError            1   checkpoint not written or not readable
      MirrorError                1   storage not readable or not writable
        MirrorAccessError        2     storage refuses access
      NumericalError             1   non-finite values, or leakage between packed sequences
      RolledBackError            1   internal: continue from the newest checkpoint without the offending rows
      QueueError                 1   the batch system did not answer
      JobTimeoutError            1   a job was not there in time; it continues
      PreemptedError            75   the machine is taken away; run the same command again

Exit code 0: finished.
"""

from __future__ import annotations

from typing import ClassVar, Final, final

EXIT_FINISHED: Final = 0
EXIT_FAILED: Final = 1
EXIT_USER: Final = 2
EXIT_PREEMPTED: Final = 75
"""EX_TEMPFAIL of sysexits.h: run the same command again."""


class TrainerError(Exception):
    """Root of every error that this package raises on purpose."""

    exit_code: ClassVar[int] = EXIT_FAILED


class UserError(TrainerError):
    """The user must change something: recipe, data, shape, model or machine."""

    exit_code: ClassVar[int] = EXIT_USER


@final
class RecipeError(UserError):
    """A recipe or a training shape is invalid; every mistake is on a line of its own."""

    def __init__(self, mistakes: list[str]) -> None:
        """Keep the mistakes, one line each, with file and line."""
        super().__init__("\n".join(mistakes))
        self.mistakes = mistakes


@final
class DataError(UserError):
    """Rows that cannot be trained on; names file and line."""


@final
class ShapeError(UserError):
    """No training shape fits, or the named one does not."""


@final
class ModelError(UserError):
    """A model directory, tokenizer, chat template or adapter that cannot be used."""


@final
class RewardError(UserError):
    """A reward that cannot be imported, violates its contract, or fails too often."""


@final
class LaunchError(UserError):
    """Launcher and shape disagree, or the run directory cannot be used now."""


@final
class RunConflictError(UserError):
    """The run directory of this name holds another run."""


@final
class CheckpointError(TrainerError):
    """A checkpoint that cannot be written, or none that can be read."""


class MirrorError(TrainerError):
    """Storage that cannot be read or written now; the run itself is intact."""


@final
class MirrorAccessError(MirrorError):
    """Storage that refuses access: missing credentials or rights."""

    exit_code: ClassVar[int] = EXIT_USER


@final
class NumericalError(TrainerError):
    """Non-finite values, or leakage between packed sequences."""


@final
class RolledBackError(TrainerError):
    """Offending rows are left out from now on; the same process continues from the newest checkpoint."""


@final
class QueueError(TrainerError):
    """The batch system did not answer, or refused; a retry may succeed."""


@final
class JobTimeoutError(TrainerError):
    """A job did not reach the awaited state in time; it continues."""


@final
class PreemptedError(TrainerError):
    """The machine is being taken away; the message says which state is saved."""

    exit_code: ClassVar[int] = EXIT_PREEMPTED
