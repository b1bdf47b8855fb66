"""What the training API costs: a step over HTTP against one in process, and two clients at once against one after another.

    python benchmarks/training_api.py --model models/SmolLM2-135M-Instruct [--tokens 64] [--steps 20]

Prints medians, and CPU time where a busy machine makes wall time noise. Start it on an idle machine for wall time.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "integration")]

from raw_training import RawClient, RawModel, step_data  # noqa: E402

from trainer.api.service import open_service  # noqa: E402


@contextmanager
def server(model: str, directory: Path) -> Iterator[str]:
    """A real server; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "trainer", "serve", model, "--served-name", "model", "--training"),
        *("--training-dir", str(directory), "--training-dtype", "float32", "--port", str(port)),
        *("--kv-cache-tokens", "4096"),
    ]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            assert process.poll() is None
            try:
                if httpx.get(f"{url}/ready").status_code == 200 and httpx.get(f"{url}/api/v1/healthz").is_success:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


def timed(act: Callable[[int], object], steps: int) -> list[float]:
    """Seconds of each step."""
    found = []
    for step in range(steps):
        begin = time.perf_counter()
        act(step)
        found.append(time.perf_counter() - begin)
    return found


def main() -> None:
    """Measure, and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(ROOT / "models" / "SmolLM2-135M-Instruct"))
    parser.add_argument("--tokens", type=int, default=64, help="of the data of a step")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3, help="in which both ways alternate")
    arguments = parser.parse_args()
    lengths = (arguments.tokens // 2, arguments.tokens // 2)

    def data(step: int) -> list:
        return step_data(step, 40000, lengths)

    service = open_service(arguments.model, compute_dtype="float32")
    own = service.create(rank=8, seed=1)

    def in_process(step: int) -> None:
        own.forward_backward(data(step), "cross_entropy")
        own.optim_step(1e-4)

    def over_http(client: RawClient, model: RawModel) -> Callable[[int], None]:
        def act(step: int) -> None:
            request = model.forward_backward(data(step))
            update = model.optim_step()
            client.passed(request)
            client.result(update)

        return act

    with tempfile.TemporaryDirectory() as directory, server(arguments.model, Path(directory)) as url:
        clients = [RawClient(url).open() for _ in range(2)]
        acts = [over_http(client, client.create(rank=8, seed=1)) for client in clients]
        timed(in_process, 2)
        timed(acts[0], 2)
        timed(acts[1], 2)
        inside, outside, after, at_once = [], [], [], []
        for _ in range(arguments.rounds):
            inside += timed(in_process, arguments.steps)
            outside += timed(acts[0], arguments.steps)
            begin = time.perf_counter()
            for act in acts:
                timed(act, arguments.steps)
            after.append(time.perf_counter() - begin)
            threads = [threading.Thread(target=timed, args=(act, arguments.steps)) for act in acts]
            begin = time.perf_counter()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            at_once.append(time.perf_counter() - begin)
        stats = httpx.get(f"{url}/metrics").text
    numbers = {line.split()[0]: line.split()[1] for line in stats.splitlines() if line.startswith("trainer_training_")}
    result = {
        "tokens": arguments.tokens,
        "in_process_ms": round(1e3 * statistics.median(inside), 1),
        "over_http_ms": round(1e3 * statistics.median(outside), 1),
        "overhead_ms": round(1e3 * (statistics.median(outside) - statistics.median(inside)), 1),
        "overhead_of_best_ms": round(1e3 * (min(outside) - min(inside)), 1),
        "two_clients_throughput": round(statistics.median(a / b for a, b in zip(after, at_once, strict=True)), 2),
        "load": psutil.getloadavg()[0],
        **numbers,
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
