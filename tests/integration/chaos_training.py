"""Kills client, executor and server of a training at random, and compares the losses with an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil
import torch
from raw_training import step_data

from trainer.api.service import open_service

ROOT: Final = Path(__file__).parents[2]
TINKER: Final = Path(os.environ.get("TUNESMITH_TINKER_PYTHON") or ROOT / ".venv-tinker" / "bin" / "python")
VICTIMS: Final = ("client", "executor", "server")
PERIOD: Final = 3
"""Steps after which the data repeat."""


@dataclass
class Report:
    """What came of it."""

    kills: Counter[str]
    steps: int
    unequal: list[tuple[int, float, float]]
    """Step, loss and undisturbed loss, of each line that differs."""
    num_lines: int
    """Losses that the client wrote, those of repeated steps too."""


class Chaos:
    """One training, its server and its client."""

    def __init__(self, model: Path, work: Path, steps: int, seed: int) -> None:
        """Prepare; `run` does it."""
        self.model, self.work, self.steps = model, work, steps
        self.random = random.Random(seed)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        rows = [
            [
                {"tokens": list(each.tokens), "inputs": {key: value.tolist() for key, value in each.inputs.items()}}
                for each in step_data(step)
            ]
            for step in range(PERIOD)
        ]
        (work / "data.json").write_text(json.dumps(rows))
        self.server: subprocess.Popen[bytes] | None = None
        self.client: subprocess.Popen[bytes] | None = None

    def start_server(self) -> None:
        command = [
            *(sys.executable, "-m", "trainer", "serve", str(self.model), "--served-name", "model", "--training"),
            *("--training-dir", str(self.work / "training"), "--training-dtype", "float32"),
            *("--port", str(self.port), "--kv-cache-tokens", "4096", "--training-checkpoint-s", "0.5"),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
        with (self.work / "server.log").open("ab") as log:
            self.server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=environment)

    def start_client(self) -> None:
        script = Path(__file__).with_name("chaos_training_client.py")
        command = [str(TINKER), str(script), f"http://127.0.0.1:{self.port}", "model", str(self.steps), str(self.work)]
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        with (self.work / "client.log").open("ab") as log:
            self.client = subprocess.Popen(command, stdout=log, stderr=log, env=clean)

    def losses(self) -> list[dict[str, Any]]:
        file = self.work / "losses.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []

    def kill(self, victim: str) -> bool:
        """Kill; False: there is none now."""
        assert self.server is not None
        assert self.client is not None
        if victim == "client":
            self.client.kill()
            self.client.wait()
            self.start_client()
        elif victim == "server":
            os.killpg(self.server.pid, signal.SIGKILL)
            self.server.wait()
            self.start_server()
        else:
            with suppress(psutil.NoSuchProcess):
                for child in psutil.Process(self.server.pid).children():
                    if "trainer.api" in child.cmdline():
                        child.kill()
                        return True
            return False
        return True

    def run(self, num_kills: int, patience_s: float) -> Report:
        """Train to the end, killing on the way."""
        kills: Counter[str] = Counter()
        self.start_server()
        self.start_client()
        try:
            seen, deadline = 0, time.monotonic() + patience_s
            while not (self.losses() and self.losses()[-1]["step"] == self.steps):
                assert time.monotonic() < deadline, f"no progress: {(self.work / 'client.log').read_text()[-2000:]}"
                assert self.client is not None
                if self.client.poll() not in (None, 0):  # it gave up; a user starts it again
                    self.start_client()
                if len(self.losses()) > seen and sum(kills.values()) < num_kills:
                    time.sleep(self.random.uniform(0, 0.6))
                    victim = VICTIMS[sum(kills.values()) % 3] if num_kills <= 3 else self.random.choice(VICTIMS)
                    if self.kill(victim):
                        kills[victim] += 1
                        seen, deadline = len(self.losses()), time.monotonic() + patience_s
                        print(f"kill {sum(kills.values())}: {victim} after {seen} lines", flush=True)
                time.sleep(0.05)
            assert self.client is not None
            self.client.wait(60)
        finally:
            for process in (self.client, self.server):
                if process is not None and process.poll() is None:
                    process.terminate()
                    process.wait(60)
        lines = [line for line in self.losses() if line["step"] < self.steps]
        expected = undisturbed(self.model, self.steps)
        unequal = [(each["step"], each["loss"], expected[each["step"]]) for each in lines
                   if each["loss"] != expected[each["step"]] or each["updates"] != each["step"] + 1]  # fmt: skip
        assert {each["step"] for each in lines} == set(range(self.steps))
        return Report(kills, self.steps, unequal, len(lines))


def undisturbed(model: Path, steps: int) -> list[float]:
    """Losses of the same training in process, with as many threads as the server: sums depend on it."""
    torch.set_num_threads(1)
    own = open_service(model, compute_dtype="float32").create(rank=4, seed=1)
    losses = []
    for step in range(steps):
        losses.append(own.forward_backward(step_data(step % PERIOD), "cross_entropy").metrics["loss:sum"])
        own.optim_step(1e-2, epsilon=1e-8)
    return losses
