"""A client that leaves ends its request, also before the first token."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request

from trainer.serve.app import _unless_left


def request_of(*messages: dict[str, Any]) -> Request:
    waiting = list(messages)

    async def receive() -> dict[str, Any]:
        if waiting:
            return waiting.pop(0)
        await asyncio.sleep(60)
        raise AssertionError("the test is over")

    return Request({"type": "http"}, receive)


async def endless(ended: list[str]) -> str:
    try:
        await asyncio.sleep(60)
    finally:
        ended.append("cancelled")
    return "never"


def test_work_of_a_client_that_left_is_cancelled():
    ended: list[str] = []
    assert asyncio.run(_unless_left(endless(ended), request_of({"type": "http.disconnect"}))) is None
    assert ended == ["cancelled"]


def test_work_of_a_client_that_waits_is_returned():
    async def answer() -> str:
        await asyncio.sleep(0.01)
        return "text"

    assert asyncio.run(_unless_left(answer(), request_of())) == "text"
