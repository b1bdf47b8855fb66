"""Measure `trainer serve`: tokens per CPU-second, latency, reloads under load, lost clients, prefixes, the gateway.

    python benchmarks/serving.py --model models/SmolLM2-135M-Instruct --adapter runs/sft_quickstart [--rounds 3]
        [--against URL --against-pid PID --against-adapter NAME --against-base NAME]
        [--only throughput,chunks,prefix,reloads,leave]

Both servers get the same requests in turn, in one run; CPU time is that of each server's process tree. `--against` is
any server of OpenAI's API on this machine, such as vLLM's or `transformers serve`. Prints one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil

BIN = Path(sys.executable).parent
SENTENCE = (
    "Please read this order and write it as JSON: customer {number} wants {count} boxes of green tea and a bag of "
    "coffee delivered to Oslo on the second of May, pays by card, and asks for a call before the delivery arrives. "
)


@dataclass
class Side:
    """A server, and the names under which it serves."""

    label: str
    url: str
    pid: int
    base: str
    adapters: tuple[str, ...]
    ignores_eos: bool = True
    """Whether it can be asked to go on behind the end of an answer; `transformers serve` refuses the field."""

    def client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=600)

    def cpu_s(self) -> float:
        """CPU time of the process tree."""
        root = psutil.Process(self.pid)
        times = [each.cpu_times() for each in (root, *root.children(recursive=True))]
        return sum(each.user + each.system for each in times)

    def gateway_cpu_s(self) -> float:
        times = psutil.Process(self.pid).cpu_times()
        return times.user + times.system


def prompt(number: int) -> list[Any]:
    """A chat of about 90 tokens; no two begin equally."""
    return [{"role": "user", "content": f"{number}. " + SENTENCE.format(number=number, count=number % 7 + 2)}]


async def ask(side: Side, model: str, number: int, tokens: int, messages: Any = None) -> tuple[float, int, int]:
    """Seconds to the first token, tokens and chunks of one streamed answer."""
    begin, first, chunks, used = time.perf_counter(), 0.0, 0, 0
    async with side.client() as client:
        stream = await client.chat.completions.create(
            model=model,
            messages=messages or prompt(number),
            max_tokens=tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True} if side.ignores_eos else None,
        )
        async for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                first = first or time.perf_counter() - begin
                chunks += 1
            if chunk.usage is not None:
                used = chunk.usage.completion_tokens
    return first, used, chunks


async def clients(side: Side, models: tuple[str, ...], count: int, requests: int, seed: int) -> dict[str, float]:
    """`count` clients at once, each with some requests one after the other."""
    before = side.cpu_s()

    async def one(index: int) -> list[tuple[float, int, int]]:
        return [await ask(side, models[index % len(models)], seed + index * 1000 + k, 32) for k in range(requests)]

    results = [each for part in await asyncio.gather(*map(one, range(count))) for each in part]
    tokens = sum(used for _, used, _ in results)
    return {
        "tokens_per_cpu_s": tokens / (side.cpu_s() - before),
        "first_token_p50_s": statistics.median(first for first, _, _ in results),
    }


def throughput(sides: list[Side], rounds: int) -> dict[str, Any]:
    """Base and adapters, 1 and 8 clients, sides in turn; medians."""
    found: dict[str, Any] = {}
    for name, count, pick in (
        ("base, 1 client", 1, lambda side: (side.base,)),
        ("base, 8 clients", 8, lambda side: (side.base,)),
        ("adapter, 1 client", 1, lambda side: side.adapters[:1]),
        ("adapter, 8 clients", 8, lambda side: side.adapters[:1]),
        ("base and two adapters, 8 clients", 8, lambda side: (side.base, *side.adapters[:2]) if side.adapters else ()),
    ):
        able = [side for side in sides if pick(side)]  # a side without adapters is measured on its base alone
        values: dict[str, list[dict[str, float]]] = {side.label: [] for side in able}
        for round_ in range(rounds + 1):
            for side in able:
                seed = random.randrange(10**9)
                value = asyncio.run(clients(side, pick(side), count, 1 if count > 1 else 2, seed))
                if round_:  # the first warms up
                    values[side.label].append(value)
        found[name] = {
            label: {key: round(statistics.median(each[key] for each in part), 3) for key in part[0]}
            for label, part in values.items()
        }
        print(name, found[name], file=sys.stderr, flush=True)
    return found


def chunks(side: Side) -> dict[str, float]:
    """CPU time of the gateway for each streamed chunk, 8 clients."""
    before = side.gateway_cpu_s()

    async def run() -> int:
        results = await asyncio.gather(*(ask(side, side.base, 10**6 + k, 128) for k in range(8)))
        return sum(count for _, _, count in results)

    count = asyncio.run(run())
    return {"gateway_cpu_ms_per_chunk": 1000 * (side.gateway_cpu_s() - before) / count}


def prefix(side: Side, rounds: int) -> dict[str, float]:
    """Time to the first token behind 1,000 tokens that are new, and behind the same again."""
    cold, warm = [], []
    for _ in range(rounds):
        text = " ".join(str(random.randrange(10**4)) for _ in range(210))
        for into, tail in ((cold, "a"), (warm, "b")):
            messages = [{"role": "user", "content": f"{text} {tail}"}]
            into.append(asyncio.run(ask(side, side.base, 0, 2, messages))[0])
    return {
        "cold_s": statistics.median(cold),
        "warm_s": statistics.median(warm),
        "ratio": statistics.median(warm) / statistics.median(cold),
    }


def reloads(side: Side, paths: list[str], count: int) -> dict[str, Any]:
    """Replace an adapter again and again while 4 clients ask for it."""

    async def run() -> dict[str, Any]:
        done, lost, is_over = 0, 0, False

        async def load(index: int) -> None:
            async with httpx.AsyncClient(timeout=300) as client:
                body = {"lora_name": "hot", "lora_path": paths[index % len(paths)]}
                response = await client.post(f"{side.url}/v1/load_lora_adapter", json=body)
                response.raise_for_status()

        async def ask_on(seed: int) -> None:
            nonlocal done, lost
            number = 0
            while not is_over:
                try:
                    await ask(side, "hot", seed + number, 8)
                    done += 1
                except (openai.OpenAIError, httpx.HTTPError):
                    lost += 1
                number += 1

        await load(0)
        tasks = [asyncio.create_task(ask_on(k * 10**5)) for k in range(4)]
        for index in range(count):
            await load(index)
        is_over = True
        await asyncio.gather(*tasks)
        return {"reloads": count, "answered": done, "lost": lost}

    return asyncio.run(run())


def leave(side: Side, count: int) -> dict[str, Any]:
    """Clients that disconnect at random moments; then what is still in use."""

    async def one(number: int, gate: asyncio.Semaphore) -> None:
        async with gate:
            task = asyncio.create_task(ask(side, side.base, number, 64))
            await asyncio.sleep(random.random() * 0.5)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def run() -> None:
        gate = asyncio.Semaphore(32)
        await asyncio.gather(*(one(number, gate) for number in range(count)))

    asyncio.run(run())
    time.sleep(3)
    text = httpx.get(f"{side.url}/metrics").text
    gauges = dict(line.split() for line in text.splitlines() if line.startswith("trainer_engine_"))
    return {"clients": count, "live": gauges["trainer_engine_live"], "pages_used": gauges["trainer_engine_pages_used"]}


def serve(arguments: argparse.Namespace, *more: str) -> tuple[subprocess.Popen[bytes], Side]:
    """Start our server."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [str(BIN / "trainer"), "serve", arguments.model, "--port", str(port), *more]
    names = ("one", "two") if arguments.adapter else ()
    for name in names:
        words += ["--adapter", f"{name}={arguments.adapter}"]
    process = subprocess.Popen(words, env={**os.environ, "OMP_NUM_THREADS": "1"})
    url = f"http://127.0.0.1:{port}"
    while True:
        if process.poll() is not None:
            sys.exit(f"the server ended with {process.returncode}")
        try:
            if httpx.get(f"{url}/ready").status_code == 200:
                break
        except httpx.TransportError:
            time.sleep(0.2)
    base = next(each["id"] for each in httpx.get(f"{url}/v1/models").json()["data"] if each["parent"] is None)
    return process, Side("tunesmith", url, process.pid, base, names)


def main() -> None:
    """Run the parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--reloads", type=int, default=100)
    parser.add_argument("--leavers", type=int, default=1000)
    parser.add_argument("--against")
    parser.add_argument("--against-pid", type=int)
    parser.add_argument("--against-base")
    parser.add_argument("--against-ends", action="store_true", help="it does not know ignore_eos")
    parser.add_argument("--against-adapter", action="append", default=[])
    parser.add_argument("--only", default="throughput,chunks,prefix,reloads,leave")
    arguments = parser.parse_args()
    process, ours = serve(arguments)
    sides = [ours]
    if arguments.against:
        other = tuple(arguments.against_adapter)
        ends = not arguments.against_ends
        sides.append(Side("other", arguments.against, arguments.against_pid, arguments.against_base, other, ends))
    parts: dict[str, Any] = {
        "throughput": lambda: throughput(sides, arguments.rounds),
        "chunks": lambda: chunks(ours),
        "prefix": lambda: prefix(ours, arguments.rounds),
        "reloads": lambda: reloads(ours, [arguments.adapter], arguments.reloads),
        "leave": lambda: leave(ours, arguments.leavers),
    }
    found: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "load": os.getloadavg()[0]}
    try:
        for name in arguments.only.split(","):
            found[name] = parts[name]()
            print(json.dumps({name: found[name]}), file=sys.stderr, flush=True)
    finally:
        process.terminate()
        process.wait()
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
