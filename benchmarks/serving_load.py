"""Load `trainer serve` with wrk for minutes: no error, and memory that does not grow.

    python benchmarks/serving_load.py --model models/SmolLM2-135M-Instruct [--adapter RUN] [--minutes 10] [--clients 16]

Needs wrk (Debian: `apt-get install wrk`). Each client sends one chat after another over a connection that it keeps;
prompts differ, half of the answers are streams. Resident memory of gateway and engine is sampled. Prints one JSON
document; ends with 1 where an answer is no 200, a connection fails, or the memory of the last quarter is above that of
the second by more than 8 MiB and 2%. (The first quarter fills caches.)
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from serving import serve
from serving_leaks import processes

SAMPLES = 80
GROWTH_MIB, GROWTH_SHARE = 8.0, 0.02
SCRIPT = """
local number = 0
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
function request()
  number = number + 1
  local stream = number %% 2 == 0 and "true" or "false"
  local words = string.rep("tea ", number %% 24 + 1)
  return wrk.format(nil, nil, nil, string.format(
    '{"model": %s, "messages": [{"role": "user", "content": "%%s %%d"}], "max_tokens": %%d, "stream": %%s}',
    words, number, number %% 12 + 1, stream))
end
function done(summary, latency, requests)
  local e = summary.errors
  io.write(string.format('RESULT {"requests": %%d, "connect": %%d, "read": %%d, "write": %%d, "status": %%d, ' ..
    '"timeout": %%d, "p50_ms": %%.1f, "p99_ms": %%.1f}\\n', summary.requests, e.connect, e.read, e.write, e.status,
    e.timeout, latency:percentile(50) / 1000, latency:percentile(99) / 1000))
end
"""
FAILURES = ("connect", "read", "write", "status", "timeout")


def load(url: str, model: str, seconds: int, clients: int, sample: Any) -> dict[str, Any]:
    """Run wrk; `sample` is called while it runs.

    Args:
        url: of the server.
        model: that is asked for.
        seconds: how long.
        clients: connections.
        sample: takes one sample of memory.
    """
    with tempfile.TemporaryDirectory() as directory:
        script = Path(directory) / "chat.lua"
        script.write_text(SCRIPT % json.dumps(model), encoding="utf-8")
        words = ["wrk", "--threads", "1", "--connections", str(clients), "--duration", f"{seconds}s"]
        words += ["--timeout", "300s", "--script", str(script), f"{url}/v1/chat/completions"]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        while process.poll() is None:
            sample()
            time.sleep(max(0.5, seconds / SAMPLES))
        assert process.stdout is not None
        said = process.stdout.read()
    found = re.search(r"^RESULT (.*)$", said, re.MULTILINE)
    if found is None:
        sys.exit(f"wrk ended with {process.returncode}: {said}")
    return dict(json.loads(found.group(1)))


def growth(samples: list[float]) -> dict[str, Any]:
    """Median memory of the quarters, and whether it grows after the first."""
    size = max(1, len(samples) // 4)
    quarters = [statistics.median(samples[first : first + size]) for first in range(0, 4 * size, size)]
    more = quarters[3] - quarters[1]
    is_flat = more <= max(GROWTH_MIB, GROWTH_SHARE * quarters[1])
    return {"quarters_mib": [round(value, 1) for value in quarters], "growth_mib": round(more, 1), "is_flat": is_flat}


def main() -> int:
    """Serve, load, judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter", default=None)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=16)
    arguments = parser.parse_args()
    if shutil.which("wrk") is None:
        sys.exit("wrk is not installed: apt-get install wrk")
    process, side = serve(arguments, "--kv-cache-tokens", "16384")
    watched = processes(side)
    memory: dict[str, list[float]] = {name: [] for name in watched}

    def sample() -> None:
        for name, each in watched.items():
            memory[name].append(each.memory_info().rss / 2**20)

    try:
        model = side.adapters[0] if side.adapters else side.base
        result = load(side.url, model, round(60 * arguments.minutes), arguments.clients, sample)
    finally:
        process.terminate()
        process.wait()
    flat = {name: growth(samples) for name, samples in memory.items()}
    is_clean = not any(result[name] for name in FAILURES) and all(each["is_flat"] for each in flat.values())
    head = {"date": time.strftime("%Y-%m-%d"), "load": os.getloadavg()[0], "minutes": arguments.minutes}
    print(json.dumps({**head, "clients": arguments.clients, **result, "memory": flat, "is_clean": is_clean}, indent=1))
    return 0 if is_clean and result["requests"] else 1


if __name__ == "__main__":
    sys.exit(main())
