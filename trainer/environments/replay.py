"""An environment that is played again where its process was killed from outside: by an operator, the kernel, a fault.

Only for environments that the recipe calls deterministic. A new process gets the same calls; it must answer them as the
first one did, and then goes on. An environment that raises, hangs or ends itself is not played again: it would do so
once more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, TypeAlias, final

from trainer.environments.remote import EnvironmentDiedError, KilledError, RemoteEnvironment
from trainer.environments.zygote_process import ZygoteDiedError
from trainer.types import Row

MAX_KILLS: Final = 3
"""Of one call; one that is killed each time has a cause of its own, such as the machine's memory."""
Call: TypeAlias = Callable[[RemoteEnvironment], Any]


@final
class ReplayedEnvironment:
    """The environment of one rollout, over as many processes as it needs; one call at a time."""

    def __init__(self, fork: Callable[[], RemoteEnvironment], say: Callable[[str], None]) -> None:
        """Start the first process.

        Args:
            fork: starts a process.
            say: takes a sentence about every replay.
        """
        self._fork, self._say = fork, say
        self._remote: RemoteEnvironment | None = fork()
        self._answered: list[tuple[Call, Any]] = []

    def reset(self, row: Row, messages: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
        """The first messages and the tools' schemas; see `RemoteEnvironment`."""
        reply: dict[str, Any] = self._call(lambda remote: remote.reset(row, messages, seed))
        return reply

    def step(self, turn: Mapping[str, Any]) -> dict[str, Any]:
        """What the policy gets back for a turn; see `RemoteEnvironment`."""
        reply: dict[str, Any] = self._call(lambda remote: remote.step(turn))
        return reply

    def compare(self, rollouts: Sequence[Mapping[str, Any]]) -> list[float | None]:
        """The environment's `group_rewards`; see `RemoteEnvironment`."""
        values: list[float | None] = self._call(lambda remote: remote.compare(rollouts))
        return values

    def close(self) -> None:
        """Let the environment close itself, then end its process; idempotent."""
        with suppress(ZygoteDiedError):  # then it has ended with it
            if self._remote is not None:
                self._remote.close()

    def _call(self, call: Call) -> Any:
        for tries in range(1, MAX_KILLS + 1):
            try:
                if self._remote is None:
                    self._remote = self._played_again()
                reply = call(self._remote)
            except (KilledError, ZygoteDiedError) as error:
                if tries == MAX_KILLS:
                    raise EnvironmentDiedError(f"killed {MAX_KILLS} times; the last time: {error}") from None
                self.close()
                self._remote = None
                self._say(
                    f"an environment was killed and is played again from its start ({str(error).splitlines()[0]})"
                )
                continue
            self._answered.append((call, reply))
            return reply
        raise AssertionError("unreachable")

    def _played_again(self) -> RemoteEnvironment:
        """A process that has answered all calls so far.

        Raises:
            EnvironmentDiedError: it answered one differently.
        """
        remote = self._fork()
        for number, (call, before) in enumerate(self._answered):
            if call(remote) != before:
                remote.close()
                raise EnvironmentDiedError(
                    f"its process was killed, and call {number + 1} had another answer when it was played again; "
                    "take all randomness from the seed, or do not state `rollout.deterministic: true`"
                )
        return remote
