"""Look for leaks of `trainer serve`: clients that disconnect at random, and memory over many requests.

    python benchmarks/serving_leaks.py --model models/SmolLM2-135M-Instruct --adapter runs/sft_quickstart
        [--leavers 1000] [--requests 10000] [--seed 0]

Leavers are raw sockets that close or reset at a random moment: before the request is complete, while the prompt is
read, in the middle of a stream, or behind its end; with several choices, grammars and adapters. Afterwards the engine
must hold no sequence and no page, and the gateway no socket more than before. Then complete requests of every kind,
also refused ones; the memory of both processes is sampled. Prints one JSON document; ends with 1 where something leaks.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import struct
import sys
import time
from contextlib import suppress
from typing import Any

import httpx
import psutil
from serving import Side, serve

AT_ONCE = 32
"""Clients that are connected together."""
WORDS = ("green", "black", "white", "herbal", "small", "large", "boxes", "bags", "tins", "cups", "to", "Oslo", "Rome")
GAUGES = ("live", "running", "waiting", "pages_used")
GROWTH_MIB = 8.0
"""Growth of resident memory over the second half of the requests that is taken for noise of the allocator."""


def body(rng: random.Random, side: Side, most: int) -> dict[str, Any]:
    """A request of any kind that the server answers."""
    text = " ".join(rng.choices(WORDS, k=rng.randint(1, 24)))
    request: dict[str, Any] = {
        "model": rng.choice((side.base, *side.adapters)),
        "messages": [{"role": "user", "content": text}],
        "max_tokens": rng.randint(1, most),
        "temperature": rng.choice((0, 1.0)),
        "stream": rng.random() < 0.6,
    }
    match rng.randrange(6):
        case 0:
            request |= {"n": rng.randint(2, 3)}
        case 1:
            request |= {"logprobs": True, "top_logprobs": 3}
        case 2:
            keys = rng.sample(WORDS, 2)
            properties = {key: {"type": "string", "maxLength": rng.randint(1, 9)} for key in keys}
            schema = {"type": "object", "properties": properties, "required": keys, "additionalProperties": False}
            request["response_format"] = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        case 3:
            request |= {"stop": [" the", "\n"], "presence_penalty": 0.5}
    return request


def wrong(rng: random.Random, request: dict[str, Any]) -> dict[str, Any]:
    """The same, so that it is refused."""
    changes: list[dict[str, Any]] = [
        {"model": "nothing"},
        {"max_tokens": 10**9},
        {"unknown": 1},
        {"temperature": -1},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}},
    ]
    return request | rng.choice(changes)


async def leave(side: Side, seed: int) -> None:
    """One client that disconnects at a random moment."""
    rng = random.Random(seed)
    content = json.dumps(body(rng, side, 64)).encode()
    address = httpx.URL(side.url)
    reader, writer = await asyncio.open_connection(address.host, address.port)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n"
    message = head.encode() + b"Content-Type: application/json\r\n\r\n" + content
    if rng.random() < 0.1:
        message = message[: rng.randrange(len(message))]
    with suppress(ConnectionError):
        writer.write(message)
        await writer.drain()
        if rng.random() < 0.5:
            with suppress(TimeoutError):
                await asyncio.wait_for(reader.readexactly(rng.randint(1, 2000)), 5)
        else:
            await asyncio.sleep(rng.random() ** 3)
    if rng.random() < 0.5:  # a reset instead of an orderly end
        raw = writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()


async def many(count: int, work: Any) -> None:
    """Run `work(0)` to `work(count - 1)`, some at once."""
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(number: int) -> None:
        async with gate:
            with suppress(asyncio.IncompleteReadError):
                await work(number)

    await asyncio.gather(*(one(number) for number in range(count)))


def gauges(side: Side) -> dict[str, int]:
    """What the engine holds now."""
    text = httpx.get(f"{side.url}/metrics").text
    found = dict(line.split() for line in text.splitlines() if line.startswith("trainer_engine_"))
    return {name: int(found[f"trainer_engine_{name}"]) for name in GAUGES}


def processes(side: Side) -> dict[str, psutil.Process]:
    """Gateway and engine."""
    gateway = psutil.Process(side.pid)
    return {
        "gateway": gateway,
        "engine": next(each for each in gateway.children() if "trainer.engine" in each.cmdline()),
    }


def leavers(side: Side, count: int, seed: int) -> dict[str, Any]:
    """Clients that leave; then what is still in use, after at most 30 s."""
    asyncio.run(many(AT_ONCE, lambda number: leave(side, seed - number - 1)))  # opens what stays open
    time.sleep(2)
    before = {name: process.num_fds() for name, process in processes(side).items()}
    asyncio.run(many(count, lambda number: leave(side, seed + number)))
    deadline = time.monotonic() + 30
    while (held := gauges(side))["live"] and time.monotonic() < deadline:
        time.sleep(0.1)
    more = {f"{name}_fds": process.num_fds() - before[name] for name, process in processes(side).items()}
    return {"clients": count, **held, **more, "is_clean": not any(held.values()) and all(v <= 1 for v in more.values())}


def memory(side: Side, count: int, seed: int) -> dict[str, Any]:
    """Resident memory while requests are answered."""
    samples: list[dict[str, float]] = []
    statuses: dict[int, int] = {}

    async def answer(client: httpx.AsyncClient, number: int) -> None:
        rng = random.Random(seed + number)
        request = body(rng, side, 4)
        if rng.random() < 0.1:
            request = wrong(rng, request)
        response = await client.post(f"{side.url}/v1/chat/completions", json=request)
        statuses[response.status_code] = statuses.get(response.status_code, 0) + 1

    async def part(first: int, size: int) -> None:
        async with httpx.AsyncClient(timeout=300) as client:
            await many(size, lambda number: answer(client, first + number))

    step = max(1, count // 20)
    for first in range(0, count, step):
        asyncio.run(part(first, step))
        found = {name: process.memory_info().rss / 2**20 for name, process in processes(side).items()}
        samples.append(found)
        print(first + step, {name: round(value, 1) for name, value in found.items()}, file=sys.stderr, flush=True)
    half = samples[len(samples) // 2 :]
    growth = {name: half[-1][name] - half[0][name] for name in half[0]}
    return {
        "requests": count,
        "statuses": statuses,
        "rss_mib": {name: [round(each[name], 1) for each in samples] for name in half[0]},
        "growth_of_second_half_mib": {name: round(value, 1) for name, value in growth.items()},
        "is_clean": all(value < GROWTH_MIB for value in growth.values()) and not any(gauges(side).values()),
    }


def main() -> int:
    """Run both parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--leavers", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    process, side = serve(arguments, "--kv-cache-tokens", "16384")  # a cache of prefixes that is full early
    found: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "load": os.getloadavg()[0]}
    try:
        if arguments.leavers:
            found["leavers"] = leavers(side, arguments.leavers, arguments.seed)
            print(json.dumps(found["leavers"]), file=sys.stderr, flush=True)
        if arguments.requests:
            found["memory"] = memory(side, arguments.requests, arguments.seed)
    finally:
        process.terminate()
        process.wait()
    print(json.dumps(found, indent=1))
    return 0 if all(part["is_clean"] for part in found.values() if isinstance(part, dict)) else 1


if __name__ == "__main__":
    sys.exit(main())
