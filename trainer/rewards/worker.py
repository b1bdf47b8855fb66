"""The process in which rewards run: `python -m trainer.rewards.worker`.

Standard input and output carry messages (length-prefixed JSON). Rewards get the null device and standard error instead,
so that a print cannot corrupt a reply. The parent enforces the time limit, the kernel the memory limit.
"""

from __future__ import annotations

import faulthandler
import inspect
import math
import os
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, SupportsFloat, final

from trainer.errors import RewardError
from trainer.rewards.call_result import CallResult, encode, read_message
from trainer.rewards.contract import TIME_LIMIT, LoadedReward, Score, UnscoredBatchError, load_reward
from trainer.types import Row, has_field

MAX_FAILURE_CHARACTERS: Final = 8000
CONVERSATION, CONVERSATIONS = "conversation", "conversations"
"""Field with the messages of a rollout with several turns; that of all rollouts of a group."""


def main() -> None:
    """Load the rewards of the first message, then answer calls until the pipe is closed."""
    # A scheduler sends SIGTERM to every process of a job. The trainer decides when to stop; a call that ended here
    # would count as a failed reward. A handler, since programs that a reward starts would inherit an ignored signal.
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    inbox = os.fdopen(os.dup(0), "rb")
    outbox = os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)
    faulthandler.register(
        signal.SIGUSR1
    )  # the parent asks for the stack of a call that hangs before it kills the process
    parent = os.getppid()

    def send(message: Mapping[str, Any]) -> None:
        outbox.write(encode(message))
        outbox.flush()

    setup = read_message(inbox)
    if setup is None:
        return
    os.environ[TIME_LIMIT] = str(setup["timeout_s"])
    threading.Thread(target=_watch_parent, args=(parent, setup["directory"]), daemon=True).start()
    try:
        rewards = [load_reward(spec["use"], spec["args"], Path(setup["base_dir"])) for spec in setup["rewards"]]
    except RewardError as error:
        send({"error": str(error)})
        return
    _limit_memory(setup["memory_limit_bytes"])
    send({"forms": [reward.form for reward in rewards]})
    while (call := read_message(inbox)) is not None:
        # A busy loop in C code blocks the thread that watches the parent; this timer then kills an orphan.
        signal.setitimer(signal.ITIMER_PROF, 4 * call["timeout_s"] + 60)
        send(answer(rewards[call["reward"]], call["items"]))
        signal.setitimer(signal.ITIMER_PROF, 0)


def answer(reward: LoadedReward, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Score the items of one call; `split` is set if a failed batch must be bisected."""
    rows = [Row(TrackedFields(item["fields"]), item["file"], item["line"], item["index"]) for item in items]
    start = time.perf_counter()
    if reward.is_group:
        return {"results": [result.to_json() for result in _score_group(reward, items, rows)], "split": False}
    if not reward.is_batch:
        results = [_score(reward, item["completion"], row) for item, row in zip(items, rows, strict=True)]
        return {"results": [result.to_json() for result in results], "split": False}
    try:
        values = _call_batch(reward, items, rows)
        results = [_result(value, start, reward.required) for value in values]
        must_split = False
    except BaseException as error:
        results = [_failure(error, row, start, reward.required) for row in rows]
        must_split = len(items) > 1 and not isinstance(error, UnscoredBatchError)
    return {"results": [result.to_json() for result in results], "split": must_split}


@final
class TrackedFields(dict[str, Any]):
    """The fields of a row, with a record of which were read."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        """Start with an empty record."""
        super().__init__(fields)
        self.names_read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.names_read.add(key)
        return super().__getitem__(key)


def _score(reward: LoadedReward, completion: str, row: Row) -> CallResult:
    start = time.perf_counter()
    try:
        value = reward.function(completion, row, **reward.args)
        if inspect.isawaitable(value):
            value = _awaited(value)
    except BaseException as error:  # SystemExit too: a reward must not end its worker
        return _failure(error, row, start)
    assert isinstance(row.fields, TrackedFields)
    return _result(value, start, tuple(sorted(row.fields.names_read)))


def _score_group(reward: LoadedReward, items: Sequence[Mapping[str, Any]], rows: Sequence[Row]) -> list[CallResult]:
    """Score the completions of one prompt; if the call fails, it fails for all of them."""
    start = time.perf_counter()
    row = rows[0]
    assert isinstance(row.fields, TrackedFields)
    if CONVERSATION in row:
        row.fields[CONVERSATIONS] = [each[CONVERSATION] for each in rows]
    try:
        values = reward.function([item["completion"] for item in items], row, **reward.args)
        values = list(_awaited(values) if inspect.isawaitable(values) else values)
        if len(values) != len(items):
            raise ValueError(f"the reward returned {len(values)} values for a group of {len(items)} completions")
    except BaseException as error:
        return [_failure(error, row, start) for _ in items]
    names = tuple(sorted(row.fields.names_read - {CONVERSATION}))
    return [_result(value, start, names) for value in values]


def _call_batch(reward: LoadedReward, items: Sequence[Mapping[str, Any]], rows: Sequence[Row]) -> list[Any]:
    """Call a reward of TRL's form: lists of prompts and completions, and each row field as a column."""
    texts = [item["completion"] for item in items]
    completions = [
        [{"role": "assistant", "content": text}] if isinstance(item["prompt"], list) else text
        for text, item in zip(texts, items, strict=True)
    ]
    for name in reward.required:
        if not any(name in row for row in rows):
            raise KeyError(name)
    reserved = ("prompt", "prompts", "completion", "completions")
    names = dict.fromkeys(name for row in rows for name in row if name not in reserved)
    columns = {name: [row.get(name) for row in rows] for name in names if reward.takes(name)}
    if reward.takes("prompts"):
        columns["prompts"] = [item["prompt"] for item in items]
    values = reward.function(completions=completions, **columns, **reward.args)
    values = list(_awaited(values) if inspect.isawaitable(values) else values)
    if len(values) != len(items):
        raise ValueError(f"the reward returned {len(values)} values for {len(items)} completions")
    return values


def _awaited(value: Awaitable[Any]) -> Any:
    import asyncio  # slow to import, and few rewards are coroutines

    async def wait() -> Any:
        return await value

    return asyncio.run(wait())


def _result(value: object, start: float, fields: tuple[str, ...]) -> CallResult:
    """Check what a reward returned against the contract."""
    seconds = time.perf_counter() - start
    parts = value.parts if isinstance(value, Score) else {}
    number = value.value if isinstance(value, Score) else value
    if number is None:
        return CallResult(fields=fields, seconds=seconds)
    try:
        if not isinstance(number, SupportsFloat):
            raise TypeError("not a number")
        reward = float(number)
        logged = {str(name): float(part) for name, part in parts.items()}
    except Exception as error:
        failure = f"the reward returned {_shown(value)} ({type(error).__name__}: {error})"
        return CallResult(failure=f"{failure}; return a float, a Score or None", fields=fields, seconds=seconds)
    if not all(math.isfinite(each) for each in (reward, *logged.values())):
        return CallResult(failure=f"the reward returned {_shown(value)}, not finite", fields=fields, seconds=seconds)
    return CallResult(reward, logged, fields=fields, seconds=seconds)


def _shown(value: object) -> str:
    try:
        return f"{type(value).__name__} {repr(value)[:200]}"
    except Exception:
        return type(value).__name__


def _failure(error: BaseException, row: Row, start: float, required: Sequence[str] = ()) -> CallResult:
    seconds = time.perf_counter() - start
    assert isinstance(row.fields, TrackedFields)
    fields = row.fields.names_read.union(required)
    key = error.args[0] if isinstance(error, KeyError) and error.args else None
    missing = key if isinstance(key, str) and key in fields and not has_field(row, key) else None
    trace = error.__traceback__.tb_next if error.__traceback__ else None  # without the worker's own frame
    text = "".join(traceback.format_exception(type(error), error, trace))
    return CallResult(
        failure=text[-MAX_FAILURE_CHARACTERS:],
        missing=missing,
        fields=tuple(sorted(fields)),
        seconds=seconds,
    )


def _limit_memory(limit_bytes: int) -> None:
    """Limit the address space, in addition to that of the imports."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limit = pages * resource.getpagesize() + limit_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    except (OSError, ValueError) as error:  # not Linux, or a lower limit is already set
        sys.stderr.write(f"no memory limit for rewards: {error}\n")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _watch_parent(parent: int, directory: str) -> None:
    """Kill this process and its children once the parent has exited, even while a reward hangs.

    Also removes the directory, which the parent would have removed.
    """
    while os.getppid() == parent:
        time.sleep(0.5)
    shutil.rmtree(directory, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
