"""A client that leaves ends its request, also before the first token."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.types import Receive

from trainer.serve.api_errors import ApiError
from trainer.serve.responses import unless_left


def receiving(*messages: dict[str, Any]) -> Receive:
    waiting = list(messages)

    async def receive() -> dict[str, Any]:
        if waiting:
            return waiting.pop(0)
        await asyncio.sleep(60)
        raise AssertionError("the test is over")

    return receive


async def endless(ended: list[str]) -> None:
    try:
        await asyncio.sleep(60)
    finally:
        ended.append("cancelled")


def test_work_of_a_client_that_left_is_cancelled():
    ended: list[str] = []
    asyncio.run(unless_left(endless(ended), receiving({"type": "http.disconnect"})))
    assert ended == ["cancelled"]


def test_work_of_a_client_that_waits_is_finished_and_its_errors_are_raised():
    done: list[str] = []

    async def answer() -> None:
        await asyncio.sleep(0.01)
        done.append("text")

    asyncio.run(unless_left(answer(), receiving()))
    assert done == ["text"]

    async def fail() -> None:
        raise ApiError(429, "full")

    with pytest.raises(ApiError, match="full"):
        asyncio.run(unless_left(fail(), receiving()))


def test_work_is_cancelled_with_the_request():
    ended: list[str] = []

    async def request() -> None:
        task = asyncio.ensure_future(unless_left(endless(ended), receiving()))
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(request())
    assert ended == ["cancelled"]
