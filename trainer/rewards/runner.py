"""Scores completions: in worker processes that may hang, crash or run out of memory, or by judges behind a server.

A call that raises, times out, exits or returns no finite number fails for its own completion only: the worker is
replaced, and every other completion is scored. A failure is never a score of 0. Results are in the order of the items,
for any number of workers.
"""

from __future__ import annotations

import queue
import tempfile
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol, final

from trainer.config.reward_place import JUDGE_NAMES
from trainer.errors import RewardError
from trainer.rewards.call_result import CallResult
from trainer.rewards.choice import Named, RewardChoice
from trainer.rewards.contract import Form
from trainer.rewards.judges.open import Judging
from trainer.rewards.judges.protocol import Item, Judge, PendingResults
from trainer.rewards.process import STARTUP_TIMEOUT_S, WorkerFailedError, WorkerProcess
from trainer.types import Row

ALL_ABSTAINED: Final = "every reward abstained"
NOT_CHOSEN: Final = CallResult(is_chosen=False)


@final
class ClosedError(Exception):
    """The runner was closed while it scored."""


class Spec(Named, Protocol):
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


@final
@dataclass(frozen=True)
class Scored:
    """The rewards of one completion."""

    reward: float | None
    """Weighted sum of the rewards that did not abstain; None if one failed or all abstained."""
    rewards: Mapping[str, float | None] = field(default_factory=dict)
    """Each reward by name, and each part of a `Score` as name/part; None where it abstained or failed. A reward that
    the row did not choose is not there."""
    failure: str | None = None
    """Traceback of the first reward that failed, or how its process ended."""


@final
@dataclass(frozen=True)
class _Part:
    """What one reward was asked of the items of a submission."""

    reward: int
    positions: Sequence[int]
    """Of the items that it judges."""
    pending: Sequence[PendingResults]
    """Whose results, concatenated, are those of these items."""


@final
class Scoring:
    """Completions whose rewards are being computed."""

    def __init__(self, specs: Sequence[Spec], num_items: int, parts: Sequence[_Part]) -> None:
        """Keep what is pending of each reward."""
        self._specs = specs
        self._num_items = num_items
        self._parts = parts

    def call_results(self, if_closed: CallResult | None = None) -> list[list[CallResult]]:
        """Wait; returns for each item the result of every reward.

        Args:
            if_closed: the result of what the runner was closed before.

        Raises:
            ClosedError: the runner was closed before, and no such result is given.
        """
        table = [[NOT_CHOSEN] * len(self._specs) for _ in range(self._num_items)]
        for part in self._parts:
            try:
                results = [result for pending in part.pending for result in pending.result()]
            except (CancelledError, ClosedError):
                if if_closed is None:
                    raise ClosedError from None
                results = [if_closed] * len(part.positions)
            for position, result in zip(part.positions, results, strict=True):
                table[position][part.reward] = result
        return table

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
        column: str | None = None,
        judging: Judging | None = None,
        startup_timeout_s: float = STARTUP_TIMEOUT_S,
    ) -> None:
        """Keep the settings; entering the context starts the workers.

        Args:
            specs: the rewards; their names must differ.
            base_dir: what `file.py:function` is relative to.
            num_workers: processes; a batch reward runs in one of them, other rewards are spread over all.
            timeout_s: wall-clock limit of a call.
            memory_limit_gib: address space of a worker in addition to that of its imports.
            column: field of the rows that names the rewards which judge it; None for all.
            judging: what judges have of the run.
            startup_timeout_s: limit of the imports of a worker.
        """
        names = [spec.name for spec in specs]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise RewardError(f"rewards: two are called {twice[0]!r}; give one of them a `label`")
        self._specs = tuple(specs)
        self.choice = RewardChoice(column, self._specs)
        self._judging = judging or Judging()
        self._judges: dict[int, Judge] = {}
        functions = [index for index, spec in enumerate(specs) if spec.use not in JUDGE_NAMES]
        self._function_numbers = {index: number for number, index in enumerate(functions)}
        self._forms: dict[int, Form] = {}
        self._timeout_s, self._startup_timeout_s = timeout_s, startup_timeout_s
        self._num_workers, self._base_dir = num_workers, base_dir
        self._setup = {
            "timeout_s": timeout_s,
            "rewards": [{"use": specs[index].use, "args": specs[index].args} for index in functions],
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
            started = [self._start() for _ in range(self._num_workers if self._function_numbers else 0)]
            for index, spec in enumerate(self._specs):
                if spec.use in JUDGE_NAMES:
                    self._judges[index] = self._judging.open(spec.name, spec.use, spec.args, self._base_dir)
            for worker in started:
                self._forms = dict(
                    zip(self._function_numbers, worker.await_ready(self._startup_timeout_s), strict=True)
                )
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
        for judge in self._judges.values():
            judge.close()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:
            worker.kill()
        self._directory.cleanup()

    def score(self, items: Sequence[Item], sizes: Sequence[int] | None = None) -> list[Scored]:
        """Score completions and wait for the result; see `submit`."""
        return self.submit(items, sizes).result()

    @property
    def num_rewards(self) -> int:
        """Of the recipe."""
        return len(self._specs)

    @property
    def functions(self) -> frozenset[int]:
        """Positions of the rewards that are functions, not judges."""
        return frozenset(self._function_numbers)

    @property
    def compares_groups(self) -> frozenset[int]:
        """Positions of the rewards whose value depends on the other completions of the prompt."""
        by_judges = {
            index for index, spec in enumerate(self._specs) if spec.args.get("compare", "single") != "single"
        } & self._judges.keys()
        return frozenset(by_judges | {index for index, form in self._forms.items() if form == "group"})

    def submit(
        self, items: Sequence[Item], sizes: Sequence[int] | None = None, only: frozenset[int] | None = None
    ) -> Scoring:
        """Start to score completions without waiting.

        A batch reward is called once with all items of a submission; if the call fails, once with each half of them.

        Args:
            items: completions with their rows, group by group.
            sizes: of the groups, for rewards that compare the completions of a prompt; None: one group.
            only: positions of the rewards that are asked; None for all.

        Raises:
            RewardError: a row names no reward of the recipe.
        """
        sizes = [len(items)] if sizes is None else sizes
        assert sum(sizes) == len(items)
        chosen = [self.choice.of_row(row) for _, row in items]
        parts = []
        for index in range(len(self._specs)) if only is None else sorted(only):
            groups = [group for group in _groups(sizes, [index in of_item for of_item in chosen]) if group]
            positions = [position for group in groups for position in group]
            if positions:
                parts.append(_Part(index, positions, self._ask_all(index, items, groups)))
        return Scoring(self._specs, len(items), parts)

    def _ask_all(self, index: int, items: Sequence[Item], groups: Sequence[Sequence[int]]) -> Sequence[PendingResults]:
        """Ask one reward for the items at these positions."""
        if index in self._judges:
            mine = [items[position] for group in groups for position in group]
            return self._judges[index].submit(mine, [len(group) for group in groups])
        positions = [position for group in groups for position in group]
        calls: dict[Form, Sequence[Sequence[int]]] = {
            "batch": [positions],
            "group": groups,
            "single": [[position] for position in positions],
        }
        wire = {position: _to_json(*items[position]) for position in positions}
        try:
            return [
                self._threads.submit(self._call, index, [wire[position] for position in call])
                for call in calls[self._forms[index]]
            ]
        except RuntimeError:
            if not self._is_closed:
                raise
            return [_closed_call()]

    def _call(self, index: int, items: list[dict[str, Any]]) -> list[CallResult]:
        """Make one call; a failed batch is bisected to find the completion that caused it."""
        results, must_split = self._ask(index, items)
        if not must_split:
            return results
        half = len(items) // 2
        return self._call(index, items[:half]) + self._call(index, items[half:])

    def _ask(self, index: int, items: list[dict[str, Any]]) -> tuple[list[CallResult], bool]:
        message = {"reward": self._function_numbers[index], "items": items, "timeout_s": self._timeout_s}
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
            return [_located(result, item) for item in items], len(items) > 1 and self._forms[index] == "batch"
        finally:
            self._idle.put(worker)

    def _start(self) -> WorkerProcess:
        with self._lock:
            if self._is_closed:
                raise ClosedError
            worker = WorkerProcess(self._setup, Path(self._directory.name))
            self._workers.add(worker)
        return worker

    def _replace(self, worker: WorkerProcess) -> WorkerProcess:
        with self._lock:
            self._workers.discard(worker)
        worker.kill()
        worker = self._start()
        worker.await_ready(self._startup_timeout_s)
        return worker


def weigh(specs: Sequence[Spec], results: Sequence[CallResult]) -> Scored:
    """The weighted sum of one item's values; an abstention is left out, a failure leaves no reward."""
    rewards: dict[str, float | None] = {}
    for spec, result in zip(specs, results, strict=True):
        if not result.is_chosen:
            continue
        rewards[spec.name] = result.value
        rewards |= {f"{spec.name}/{part}": value for part, value in result.parts.items()}
    for spec, result in zip(specs, results, strict=True):
        if result.failure is not None:
            return Scored(None, rewards, f"reward {spec.name}: {result.failure}")
    terms = [
        spec.weight * result.value for spec, result in zip(specs, results, strict=True) if result.value is not None
    ]
    return Scored(sum(terms), rewards) if terms else Scored(None, rewards, ALL_ABSTAINED)


def _closed_call() -> Future[list[CallResult]]:
    future: Future[list[CallResult]] = Future()
    future.cancel()
    return future


def _groups(sizes: Sequence[int], is_wanted: Sequence[bool]) -> list[list[int]]:
    """The positions of each group's items that are wanted.

    >>> _groups([2, 1], [True, True, False])
    [[0, 1], []]
    """
    groups, begin = [], 0
    for size in sizes:
        groups.append([position for position in range(begin, begin + size) if is_wanted[position]])
        begin += size
    return groups


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
