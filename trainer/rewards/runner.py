"""Scores completions in worker processes that may hang, crash or run out of memory.

A call that raises, times out, exits or returns no finite number fails for its own completion only: the worker is
replaced, and every other completion is scored. A failure is never a score of 0. Results are in the order of the items,
for any number of workers.
"""

from __future__ import annotations

import queue
import tempfile
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol, TypeAlias, final

from trainer.errors import RewardError
from trainer.rewards.call_result import CallResult
from trainer.rewards.process import WorkerFailedError, WorkerProcess
from trainer.types import Row

Item: TypeAlias = tuple[str, Row]
"""The text of a completion, and its row."""

ALL_ABSTAINED: Final = "every reward abstained"


class Spec(Protocol):
    """The fields of a recipe's reward that the runner reads."""

    @property
    def use(self) -> str:
        """Built-in name, `module:function` or `file.py:function`."""

    @property
    def weight(self) -> float:
        """Factor in the weighted sum."""

    @property
    def args(self) -> dict[str, Any]:
        """Keyword arguments of the function."""

    @property
    def name(self) -> str:
        """Name in the metrics."""


@final
@dataclass(frozen=True)
class Scored:
    """The rewards of one completion."""

    reward: float | None
    """Weighted sum of the rewards that did not abstain; None if one failed or all abstained."""
    rewards: Mapping[str, float | None] = field(default_factory=dict)
    """Each reward by name, and each part of a `Score` as name/part; None where it abstained or failed."""
    failure: str | None = None
    """Traceback of the first reward that failed, or how its process ended."""


@final
class Scoring:
    """Completions whose rewards are being computed."""

    def __init__(self, specs: Sequence[Spec], pending: Sequence[Sequence[Future[list[CallResult]]]]) -> None:
        """Keep the futures of each reward; their results, concatenated, are those of all items."""
        self._specs = specs
        self._pending = pending

    def call_results(self) -> list[list[CallResult]]:
        """Wait; returns for each item the result of every reward."""
        columns = [[result for future in futures for result in future.result()] for futures in self._pending]
        return [list(of_item) for of_item in zip(*columns, strict=True)]

    def result(self) -> list[Scored]:
        """Wait; returns the rewards of each item, in the order of the items."""
        return [weigh(self._specs, of_item) for of_item in self.call_results()]


@final
class RewardRunner:
    """Worker processes, with one thread for each; a context manager."""

    def __init__(
        self,
        specs: Sequence[Spec],
        *,
        base_dir: Path,
        num_workers: int = 1,
        timeout_s: float = 10.0,
        memory_limit_gib: float = 2.0,
    ) -> None:
        """Keep the settings; entering the context starts the workers.

        Args:
            specs: the rewards; their names must differ.
            base_dir: what `file.py:function` is relative to.
            num_workers: processes; a batch reward runs in one of them, other rewards are spread over all.
            timeout_s: wall-clock limit of a call.
            memory_limit_gib: address space of a worker in addition to that of its imports.
        """
        names = [spec.name for spec in specs]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise RewardError(f"rewards: two are called {twice[0]!r}; give one of them a `label`")
        self._specs = tuple(specs)
        self._timeout_s = timeout_s
        self._num_workers = num_workers
        self._setup = {
            "timeout_s": timeout_s,
            "rewards": [{"use": spec.use, "args": spec.args} for spec in specs],
            "base_dir": str(base_dir),
            "memory_limit_bytes": int(memory_limit_gib * 2**30),
        }
        self._idle: queue.SimpleQueue[WorkerProcess] = queue.SimpleQueue()
        self._workers: set[WorkerProcess] = set()
        self._lock = threading.Lock()
        self._is_closed = False

    def __enter__(self) -> RewardRunner:
        """Start the workers.

        Raises:
            RewardError: a reward cannot be loaded.
        """
        self._directory = tempfile.TemporaryDirectory(prefix="rewards-", ignore_cleanup_errors=True)
        self._threads = ThreadPoolExecutor(self._num_workers, thread_name_prefix="reward")
        try:
            started = [self._start() for _ in range(self._num_workers)]
            for worker in started:
                self._is_batch = worker.await_ready()
                self._idle.put(worker)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill the workers, including those in a call."""
        with self._lock:
            self._is_closed = True
            for worker in self._workers:
                worker.interrupt()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:
            worker.kill()
        self._directory.cleanup()

    def score(self, items: Sequence[Item]) -> list[Scored]:
        """Score completions and wait for the result."""
        return self.submit(items).result()

    def submit(self, items: Sequence[Item]) -> Scoring:
        """Start to score completions without waiting.

        A batch reward is called once with all items of a submission; if the call fails, once with each half of them.
        """
        wire = [_to_json(text, row) for text, row in items]
        pending = []
        for index, is_batch in enumerate(self._is_batch):
            calls = [wire] if is_batch else [[item] for item in wire]
            pending.append([self._threads.submit(self._call, index, call) for call in calls if call])
        return Scoring(self._specs, pending)

    def _call(self, index: int, items: list[dict[str, Any]]) -> list[CallResult]:
        """Make one call; a failed batch is bisected to find the completion that caused it."""
        results, must_split = self._ask(index, items)
        if not must_split:
            return results
        half = len(items) // 2
        return self._call(index, items[:half]) + self._call(index, items[half:])

    def _ask(self, index: int, items: list[dict[str, Any]]) -> tuple[list[CallResult], bool]:
        message = {"reward": index, "items": items, "timeout_s": self._timeout_s}
        worker = self._idle.get()
        try:
            if not worker.is_alive:  # killed between two calls, for instance by the kernel
                worker = self._replace(worker)
            reply = worker.ask(message, self._timeout_s)
            results = [CallResult.from_json(result) for result in reply["results"]]
            return [_located(result, item) for result, item in zip(results, items, strict=True)], reply["split"]
        except WorkerFailedError as error:
            worker = self._replace(worker)
            result = CallResult(failure=f"{error}", seconds=self._timeout_s)
            return [_located(result, item) for item in items], len(items) > 1
        finally:
            self._idle.put(worker)

    def _start(self) -> WorkerProcess:
        with self._lock:
            if self._is_closed:
                raise RewardError("the reward workers were closed during a call")
            worker = WorkerProcess(self._setup, Path(self._directory.name))
            self._workers.add(worker)
        return worker

    def _replace(self, worker: WorkerProcess) -> WorkerProcess:
        with self._lock:
            self._workers.discard(worker)
        worker.kill()
        worker = self._start()
        worker.await_ready()
        return worker


def weigh(specs: Sequence[Spec], results: Sequence[CallResult]) -> Scored:
    """The weighted sum of one item's values; an abstention is left out, a failure leaves no reward."""
    rewards: dict[str, float | None] = {}
    for spec, result in zip(specs, results, strict=True):
        rewards[spec.name] = result.value
        rewards |= {f"{spec.name}/{part}": value for part, value in result.parts.items()}
    for spec, result in zip(specs, results, strict=True):
        if result.failure is not None:
            return Scored(None, rewards, f"reward {spec.name}: {result.failure}")
    terms = [
        spec.weight * result.value for spec, result in zip(specs, results, strict=True) if result.value is not None
    ]
    return Scored(sum(terms), rewards) if terms else Scored(None, rewards, ALL_ABSTAINED)


def _located(result: CallResult, item: Mapping[str, Any]) -> CallResult:
    """Add the file and line of the row to a failure."""
    if result.failure is None:
        return result
    return replace(result, failure=f"on {item['file']}:{item['line']}\n{result.failure}")


def _to_json(text: str, row: Row) -> dict[str, Any]:
    """The wire format of an item; the prompt is a list of messages if the row has one, as in TRL's data."""
    return {
        "completion": text,
        "fields": dict(row.fields),
        "file": row.file,
        "line": row.line,
        "index": row.index,
        "prompt": row.get("messages", row.get("prompt", "")),
    }
