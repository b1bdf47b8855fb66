"""What the training API costs: a step over HTTP against one in process; two clients at once against one by one.

    python benchmarks/training_api.py --model models/SmolLM2-135M-Instruct [--tokens 64] [--steps 20]

Prints medians of wall time, which need an idle machine, and CPU time of server and client together, which does not.
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

from raw_training import RawClient, RawModel, step_data

from trainer.api.service import open_service


@contextmanager
def server(model: str, directory: Path) -> Iterator[tuple[str, psutil.Process]]:
    """A real server; yields its address and its process."""
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
        yield url, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


def cpu_s(server: psutil.Process) -> float:
    """CPU seconds of this process, the gateway and the executor."""
    executors = [child for child in server.children() if "trainer.api" in child.cmdline()]
    own = [psutil.Process(), server, *executors]
    return sum(sum(process.cpu_times()[:2]) for process in own)


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

    with tempfile.TemporaryDirectory() as directory, server(arguments.model, Path(directory)) as (url, gateway):
        clients = [RawClient(url).open() for _ in range(2)]
        acts = [over_http(client, client.create(rank=8, seed=1)) for client in clients]
        timed(in_process, 2)
        timed(acts[0], 2)
        timed(acts[1], 2)
        inside, outside, after, at_once = [], [], [], []
        cpu: dict[str, float] = {"inside": 0.0, "outside": 0.0, "after": 0.0, "at_once": 0.0}

        def both(*, together: bool) -> float:
            threads = [threading.Thread(target=timed, args=(act, arguments.steps)) for act in acts]
            begin = time.perf_counter()
            for thread in threads:
                thread.start()
                if not together:
                    thread.join()
            for thread in threads:
                thread.join()
            return time.perf_counter() - begin

        for _ in range(arguments.rounds):
            for name, act in (
                ("inside", lambda: inside.extend(timed(in_process, arguments.steps))),
                ("outside", lambda: outside.extend(timed(acts[0], arguments.steps))),
                ("after", lambda: after.append(both(together=False))),
                ("at_once", lambda: at_once.append(both(together=True))),
            ):
                begin = cpu_s(gateway)
                act()
                cpu[name] += cpu_s(gateway) - begin
        stats = httpx.get(f"{url}/metrics").text
    numbers = {line.split()[0]: line.split()[1] for line in stats.splitlines() if line.startswith("trainer_training_")}
    result = {
        "tokens": arguments.tokens,
        "in_process_ms": round(1e3 * statistics.median(inside), 1),
        "over_http_ms": round(1e3 * statistics.median(outside), 1),
        "overhead_ms": round(1e3 * (statistics.median(outside) - statistics.median(inside)), 1),
        "overhead_of_best_ms": round(1e3 * (min(outside) - min(inside)), 1),
        "two_clients_throughput": round(statistics.median(a / b for a, b in zip(after, at_once, strict=True)), 2),
        "cpu_overhead_ms": round(1e3 * (cpu["outside"] - cpu["inside"]) / len(outside), 1),
        "two_clients_cpu_ratio": round(cpu["after"] / cpu["at_once"], 2),
        "load": psutil.getloadavg()[0],
        **numbers,
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
