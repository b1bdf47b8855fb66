"""Deliberate errors and the exit code of each.

Anything raised from here is for people: it is printed without a traceback and says where, what and how to mend it.
A defect of ours stays an ordinary exception and keeps its traceback.
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
    """A recipe or a training shape that cannot be used; every mistake on a line of its own."""

    def __init__(self, mistakes: list[str]) -> None:
        """Keep the mistakes, one line each, already carrying file and line."""
        super().__init__("\n".join(mistakes))
        self.mistakes = mistakes


@final
class DataError(UserError):
    """Rows that cannot be trained on; names the file and the line."""


@final
class ShapeError(UserError):
    """No training shape fits, or the named one does not."""


@final
class ModelError(UserError):
    """A model directory, tokenizer, chat template or adapter that cannot be used."""


@final
class RewardError(UserError):
    """A reward that cannot be imported, does not keep its contract, or fails too often."""


@final
class LaunchError(UserError):
    """The launcher and the shape contradict each other, or a run directory is taken."""


@final
class RunConflictError(UserError):
    """A run directory of this name holds another run."""


@final
class CheckpointError(TrainerError):
    """A checkpoint that cannot be written, or none that can be read."""


class MirrorError(TrainerError):
    """Storage that cannot be read or written now; the run itself is intact."""


@final
class MirrorAccessError(MirrorError):
    """Storage that refuses: credentials, or their rights."""

    exit_code: ClassVar[int] = EXIT_USER


@final
class NumericalError(TrainerError):
    """Numbers that must not be trained on: not finite, or packing that leaks."""


@final
class RolledBackError(TrainerError):
    """Rows that broke the numbers are left out now; the same process goes on from the newest checkpoint."""


@final
class QueueError(TrainerError):
    """The batch system could not be asked, or refused; asking again may help."""


@final
class JobTimeoutError(TrainerError):
    """A job did not get in time to where it was awaited; it goes on as it was."""


@final
class PreemptedError(TrainerError):
    """The machine asked for itself back; the state is saved where the message says."""

    exit_code: ClassVar[int] = EXIT_PREEMPTED
