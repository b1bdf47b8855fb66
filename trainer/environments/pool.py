"""Environments as the trainer sees them: a forked process per rollout, each call under a time limit.

Whatever an environment does, its own rollout fails and nothing else: an exception, a hang, a crash, too much memory.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TypeAlias, TypeVar, final

from trainer.environments.mcp_tools import McpSettings
from trainer.environments.remote import EnvironmentDiedError, RemoteEnvironment
from trainer.environments.replay import ReplayedEnvironment
from trainer.environments.zygote_process import ZygoteDiedError, ZygoteProcess

__all__ = ["EnvironmentDiedError", "EnvironmentPool", "EnvironmentSettings", "OpenEnvironment"]

T = TypeVar("T")
OpenEnvironment: TypeAlias = RemoteEnvironment | ReplayedEnvironment
MAX_RESTARTS: Final = 20
"""Of the zygote of one pool; beyond that something ends it each time."""


@final
@dataclass(frozen=True)
class EnvironmentSettings:
    """What the zygote loads, and the limits of its children."""

    environment: str | Mapping[str, Any] | None
    """`module:Class` or `file.py:Class`; of a taskset of verifiers its id as `verifiers`, `config` and `max_turns`."""
    tools: tuple[str, ...]
    errors: Mapping[str, str]
    """What a faulty tool call of each status leads to."""
    base_dir: Path
    timeout_s: float = 10.0
    """Wall-clock limit of one `reset` or `step`."""
    memory_limit_gib: float = 2.0
    num_workers: int = 8
    """Environments that compute at the same time."""
    servers: tuple[McpSettings, ...] = ()
    """Servers of further tools, started for each rollout."""
    python: str | None = None
    """Interpreter of the environment; None is the trainer's own."""
    deterministic: bool = False
    """Environments whose process was killed from outside are played again."""


@final
class EnvironmentPool:
    """The zygote and the environments it forked; a context manager."""

    def __init__(self, settings: EnvironmentSettings, say: Callable[[str], None] = lambda _text: None) -> None:
        """Keep the settings; entering the context starts the zygote.

        Args:
            settings: what is loaded, and limits.
            say: takes a sentence about every environment that is played again.
        """
        self._settings, self._say = settings, say
        self._lock = threading.Lock()
        self._restarts = 0
        self.schemas: list[dict[str, Any]] = []
        """Of the recipe's tools, those of servers included."""
        self.compares_groups = False
        """Whether the environment has `group_rewards`."""

    def __enter__(self) -> EnvironmentPool:
        """Start the zygote and import the environment.

        Raises:
            RewardError: environment or tools cannot be loaded.
        """
        self._directory = tempfile.TemporaryDirectory(prefix="environments-", ignore_cleanup_errors=True)
        self._threads = ThreadPoolExecutor(self._settings.num_workers, thread_name_prefix="environment")
        try:
            self._zygote = self._start()
        except BaseException:
            self._threads.shutdown()
            self._directory.cleanup()
            raise
        self.schemas, self.compares_groups = self._zygote.ready["schemas"], self._zygote.ready["compares"]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def zygote_pid(self) -> int:
        """Process id of the zygote; it changes where one is started again."""
        return self._zygote.pid

    def close(self) -> None:
        """End the zygote, which kills every environment."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._zygote.close()
        self._directory.cleanup()

    def open(self) -> OpenEnvironment:
        """Fork a process for one rollout.

        Raises:
            ZygoteDiedError: the zygote itself has died, and environments are not played again.
        """
        if self._settings.deterministic:
            return ReplayedEnvironment(self._fork_again, self._say)
        return self._zygote.fork()

    def map(self, function: Callable[[T], Any], items: Sequence[T]) -> list[Any]:
        """Call a function for each item, at most `num_workers` at a time; the results are in the order of the items."""
        return list(self._threads.map(function, items))

    def _start(self) -> ZygoteProcess:
        settings = self._settings
        setup = {
            "environment": dict(named) if isinstance(named := settings.environment, Mapping) else named,
            "tools": list(settings.tools),
            "errors": dict(settings.errors),
            "servers": [asdict(each) for each in settings.servers],
            "base_dir": str(settings.base_dir),
            "memory_limit_bytes": int(settings.memory_limit_gib * 2**30),
        }
        return ZygoteProcess(setup, Path(self._directory.name), settings.timeout_s, settings.python)

    def _fork_again(self) -> RemoteEnvironment:
        """Fork, from a new zygote where the old one has died."""
        while True:
            zygote = self._zygote
            try:
                return zygote.fork()
            except ZygoteDiedError as error:
                with self._lock:
                    if self._zygote is not zygote:
                        continue  # another thread has started it again
                    if self._restarts == MAX_RESTARTS:
                        raise
                    self._restarts += 1
                    self._say(f"{str(error).splitlines()[0]}; it is started again")
                    zygote.abandon()
                    self._zygote = self._start()
