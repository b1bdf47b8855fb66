"""Files and batches end with their lifetime, and each end is on record before it happens."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from trainer.serve.access import KeyFile
from trainer.serve.api_errors import ApiError
from trainer.serve.batch_api import BatchStore
from trainer.serve.control import Control
from trainer.serve.gateway import Gateway


class Record:
    """Keeps entries, or refuses them as a store that is down does."""

    def __init__(self, root: Path) -> None:
        self.entries: list[tuple[str, str, bool]] = []
        self.is_down = False
        self._root = root

    async def record(self, request: Any, action: str, target: str, details: Mapping[str, Any]) -> None:
        if self.is_down:
            raise ApiError(503, "the store is down", code="store_down")
        self.entries.append((action, target, (self._root / f"{target}.json").exists()))


async def nowhere(model: str) -> tuple[Gateway, str]:
    raise ApiError(404, f"no deployment {model!r}")


def test_what_is_too_old_is_deleted_and_recorded_before(tmp_path: Path) -> None:
    record = Record(tmp_path)
    control = Control(KeyFile(), record)
    old, new = (BatchStore(nowhere, tmp_path, control, keep_s=keep_s) for keep_s in (-5, 1000))
    gone = old.add_file("in.jsonl", "batch", b"secret words", "team")["id"]
    kept = new.add_file("in.jsonl", "batch", b"other words", "team")["id"]
    batch = f"batch-{'0' * 24}"
    (tmp_path / f"{batch}.json").write_text(json.dumps({"id": batch, "owner": "team", "expires_at": 1}))
    (tmp_path / f"{batch}.output").write_text("half of an answer")
    assert asyncio.run(new.delete_expired()) == 2
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"{kept}.json", f"{kept}.jsonl"]
    # each entry was written while the file was still there
    assert sorted(record.entries) == sorted([("files.expire", gone, True), ("files.expire", batch, True)])
    assert asyncio.run(new.delete_expired()) == 0


def test_nothing_is_deleted_while_it_cannot_be_recorded(tmp_path: Path) -> None:
    record = Record(tmp_path)
    store = BatchStore(nowhere, tmp_path, Control(KeyFile(), record), keep_s=-5)
    gone = store.add_file("in.jsonl", "batch", b"secret words", "team")["id"]
    record.is_down = True
    with pytest.raises(ApiError, match="the store is down"):
        asyncio.run(store.delete_expired())
    assert (tmp_path / f"{gone}.jsonl").read_bytes() == b"secret words"
    record.is_down = False
    assert asyncio.run(store.delete_expired()) == 1


def test_a_batch_that_runs_is_not_deleted_under_its_feet(tmp_path: Path) -> None:
    record = Record(tmp_path)
    line = {"custom_id": "a", "url": "/v1/chat/completions", "body": {"model": "m", "messages": []}}
    asked = asyncio.Event()

    async def waiting(model: str) -> tuple[Gateway, str]:
        asked.set()
        await asyncio.sleep(60)
        raise AssertionError("the test is over")

    async def run() -> tuple[int, int]:
        from trainer.serve.batch_api import BatchRequest

        store = BatchStore(waiting, tmp_path, Control(KeyFile(), record), keep_s=-5)
        line["body"] = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
        file = store.add_file("in.jsonl", "batch", json.dumps(line).encode(), None)["id"]
        batch = store.create(BatchRequest(input_file_id=file, endpoint="/v1/chat/completions"), None)["id"]
        await asked.wait()
        await store.delete_expired()
        left = len(list(tmp_path.glob(f"{batch}.json")))
        store.cancel(batch, None)
        await store.stop()
        await store.delete_expired()
        return left, len(list(tmp_path.iterdir()))

    assert asyncio.run(run()) == (1, 0)
