"""Score completions in processes that may hang, crash or hoard.

A call that raises, times out, ends its process or returns no finite number fails for its own completion only: the
worker is replaced and everything else is scored. A failure is never a score of 0. Results come in the order of the
items, whatever the number of workers.
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
from trainer.rewards.outcome import Outcome
from trainer.rewards.process import WorkerFailedError, WorkerProcess
from trainer.types import Row

Item: TypeAlias = tuple[str, Row]
"""A completion and the row it answers."""
Prompt: TypeAlias = "str | Sequence[Mapping[str, Any]]"

ALL_ABSTAINED: Final = "every reward abstained"


class Spec(Protocol):
    """What the runner reads of a recipe's reward."""

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
    """What a completion earned."""

    reward: float | None
    """Weighted sum of the rewards that did not abstain; None when one failed or all abstained."""
    rewards: Mapping[str, float | None] = field(default_factory=dict)
    """Each reward by name, and each part of a `Score` as name/part; None where it abstained or failed."""
    failure: str | None = None
    """The traceback of the first reward that failed, or what happened instead."""


@final
class Scoring:
    """Completions that are being scored."""

    def __init__(self, specs: Sequence[Spec], pending: Sequence[Sequence[Future[list[Outcome]]]]) -> None:
        """Keep, for each reward, the futures whose outcomes in a row are those of all items."""
        self._specs = specs
        self._pending = pending

    def done(self) -> bool:
        """Whether `result` would return at once."""
        return all(future.done() for futures in self._pending for future in futures)

    def outcomes(self) -> list[list[Outcome]]:
        """Wait, and return the outcomes of each item, one for each reward."""
        columns = [[outcome for future in futures for outcome in future.result()] for futures in self._pending]
        return [list(outcomes) for outcomes in zip(*columns, strict=True)]

    def result(self) -> list[Scored]:
        """Wait, and return what each item earned, in the order of the items."""
        return [weigh(self._specs, outcomes) for outcomes in self.outcomes()]


@final
class RewardRunner:
    """Worker processes and a thread for each; a context manager."""

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
            num_workers: processes; item rewards are spread over them, a batch reward runs in one.
            timeout_s: wall-clock limit of a call.
            memory_limit_gib: address space of a worker on top of what its imports take.
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
        """End the workers, also those in the middle of a call."""
        with self._lock:
            self._is_closed = True
            for worker in self._workers:
                worker.interrupt()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:
            worker.kill()
        self._directory.cleanup()

    def score(self, items: Sequence[Item], prompts: Sequence[Prompt] | None = None) -> list[Scored]:
        """Score completions and wait for the result."""
        return self.submit(items, prompts).result()

    def submit(self, items: Sequence[Item], prompts: Sequence[Prompt] | None = None) -> Scoring:
        """Begin to score completions; the caller may go on sampling.

        A batch reward is called once with all items of a submission, and again with halves of them when it fails.

        Args:
            items: completions with their rows.
            prompts: what each completion answers, for batch rewards; the row's own prompt when left out.
        """
        texts: Sequence[Prompt | None] = [None] * len(items) if prompts is None else prompts
        wire = [_to_json(item, prompt) for item, prompt in zip(items, texts, strict=True)]
        pending = []
        for index, is_batch in enumerate(self._is_batch):
            calls = [wire] if is_batch else [[item] for item in wire]
            pending.append([self._threads.submit(self._call, index, call) for call in calls if call])
        return Scoring(self._specs, pending)

    def _call(self, index: int, items: list[dict[str, Any]]) -> list[Outcome]:
        """Make one call; when a batch fails, look for the culprit by halves."""
        outcomes, is_split = self._ask(index, items)
        if not is_split:
            return outcomes
        half = len(items) // 2
        return self._call(index, items[:half]) + self._call(index, items[half:])

    def _ask(self, index: int, items: list[dict[str, Any]]) -> tuple[list[Outcome], bool]:
        message = {"reward": index, "items": items, "timeout_s": self._timeout_s}
        worker = self._idle.get()
        try:
            if not worker.is_alive:  # the kernel took it between two calls
                worker = self._replace(worker)
            reply = worker.ask(message, self._timeout_s)
            outcomes = [Outcome.from_json(outcome) for outcome in reply["outcomes"]]
            return [_located(outcome, item) for outcome, item in zip(outcomes, items, strict=True)], reply["split"]
        except WorkerFailedError as error:
            worker = self._replace(worker)
            outcome = Outcome(failure=f"{error}", seconds=self._timeout_s)
            return [_located(outcome, item) for item in items], len(items) > 1
        finally:
            self._idle.put(worker)

    def _start(self) -> WorkerProcess:
        with self._lock:
            if self._is_closed:
                raise RewardError("the rewards were stopped in the middle of a call")
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


def weigh(specs: Sequence[Spec], outcomes: Sequence[Outcome]) -> Scored:
    """Sum the values with their weights; a failure leaves no reward, an abstention only itself out."""
    rewards: dict[str, float | None] = {}
    for spec, outcome in zip(specs, outcomes, strict=True):
        rewards[spec.name] = outcome.value
        rewards |= {f"{spec.name}/{part}": value for part, value in outcome.parts.items()}
    for spec, outcome in zip(specs, outcomes, strict=True):
        if outcome.failure is not None:
            return Scored(None, rewards, f"reward {spec.name}: {outcome.failure}")
    terms = [
        spec.weight * outcome.value for spec, outcome in zip(specs, outcomes, strict=True) if outcome.value is not None
    ]
    return Scored(sum(terms), rewards) if terms else Scored(None, rewards, ALL_ABSTAINED)


def _located(outcome: Outcome, item: Mapping[str, Any]) -> Outcome:
    """Say on which row a reward failed."""
    if outcome.failure is None:
        return outcome
    return replace(outcome, failure=f"on {item['file']}:{item['line']}\n{outcome.failure}")


def _to_json(item: Item, prompt: Prompt | None) -> dict[str, Any]:
    """Return the form on the pipe; the prompt is a list of messages where the row has one, as TRL's data has."""
    completion, row = item
    own = row.get("messages", row.get("prompt", ""))
    if prompt is None or (isinstance(own, list) and isinstance(prompt, str)):
        prompt = own
    return {
        "completion": completion,
        "fields": dict(row.fields),
        "file": row.file,
        "line": row.line,
        "index": row.index,
        "prompt": prompt,
    }
