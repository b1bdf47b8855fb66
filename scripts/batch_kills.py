"""Kill `trainer batch create` at random moments; in the end every custom_id must have exactly one result.

    python scripts/batch_kills.py --model DIR [--kills 20] [--requests 400] [--seed 0]

The command, its gateway and its engine are ended together by SIGKILL, a random time after the first new result, or
while they start. The same command is given again. Prints one JSON document; ends with 1 where a result is missing,
double, or was changed by a later start.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

BIN = Path(sys.executable).parent


def write_requests(file: Path, count: int) -> list[str]:
    """Requests of different lengths; every twentieth line is malformed or refused. Returns the keys of all."""
    lines, keys = [], []
    for number in range(count):
        key = f"r{number}"
        body: dict[str, Any] = {"prompt": f"number {number} is", "max_tokens": 10 + number % 90, "ignore_eos": True}
        line = {"custom_id": key, "method": "POST", "url": "/v1/completions", "body": body | {"seed": number}}
        if number % 40 == 7:
            line["body"] = {"prompt": 5}
        keys.append(f"line-{number + 1}" if number % 40 == 27 else key)
        lines.append("no json" if number % 40 == 27 else json.dumps(line))
    file.write_text("".join(line + "\n" for line in lines))
    return keys


def size(*files: Path) -> int:
    """Bytes of results."""
    return sum(file.stat().st_size for file in files if file.exists())


def start(words: list[str], log: Path) -> subprocess.Popen[bytes]:
    """The command, in a process group of its own."""
    with log.open("ab") as out:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(words, stdout=out, stderr=out, start_new_session=True, env=environment)


def killed(words: list[str], rng: random.Random, results: tuple[Path, ...], log: Path) -> str:
    """Start the command and kill it; says when, or `finished` where it was faster."""
    before, process = size(*results), start(words, log)
    moment = rng.choice(("starting", "running", "running", "running"))
    if moment == "running":
        while process.poll() is None and size(*results) == before:
            time.sleep(0.01)
    time.sleep(rng.random() * 3)
    if process.poll() is not None:
        return "finished"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return moment


def main() -> int:
    """Kill, go on, and count."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng, moments, is_kept = random.Random(arguments.seed), Counter[str](), True
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        keys = write_requests(root / "in.jsonl", arguments.requests)
        out, errors = root / "out.jsonl", root / "out.errors.jsonl"
        words = [str(BIN / "trainer"), "batch", "create", str(root / "in.jsonl"), "--model", arguments.model]
        words += ["--out", str(out), "--kv-cache-tokens", "8192", "--max-rows", "4"]
        kept: dict[Path, bytes] = {}
        for _ in range(arguments.kills):
            moment = killed(words, rng, (out, errors), root / "log")
            moments[moment] += 1
            for file in (out, errors):  # whole lines are never changed again
                data = file.read_bytes() if file.exists() else b""
                is_kept &= data.startswith(kept.get(file, b""))
                kept[file] = data[: data.rfind(b"\n") + 1]
            print(moment, {file.name: data.count(b"\n") for file, data in kept.items()}, file=sys.stderr, flush=True)
        code = start(words, root / "log").wait()
        found = Counter(json.loads(line)["custom_id"] for file in (out, errors) for line in file.open())
        log = (root / "log").read_text()[-2000:]
    report = {
        "exit_code": code,
        "kills": dict(moments),
        "requests": len(keys),
        "missing": [key for key in keys if not found[key]],
        "double": [key for key, count in found.items() if count > 1],
        "is_kept": is_kept,
    }
    print(json.dumps(report, indent=1))
    is_right = code == 0 and is_kept and set(found) == set(keys) and not report["double"]
    if not is_right:
        sys.stderr.write(log)
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
