"""metrics.jsonl, the truth about a run, and its mirror in Weights & Biases."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any, final

import torch

from trainer.files import write_atomically
from trainer.planning.plan import Plan
from trainer.run.directory import RunDir


@final
class MetricsLog:
    """One JSON object a step, fsynced; after a resume no step appears twice and none is missing."""

    def __init__(
        self, run: RunDir, attempt: int, plan: Plan, *, is_main: bool, show: Callable[[dict[str, Any]], None]
    ) -> None:
        """Open the log.

        Args:
            run: where metrics.jsonl lies.
            attempt: number of this process start, the fence against older ones.
            plan: for the mirror.
            is_main: only the main rank writes.
            show: called with every record, for the console.
        """
        self.run, self.attempt, self.is_main, self.show = run, attempt, is_main, show
        self._plan = plan
        self._mirror: _Mirror | None = None

    def rewind(self, step: int) -> None:
        """Drop records after `step`: the run goes on from there. Opens W&B, whose id a fetch may have brought.

        Raises:
            TrainerError: another attempt has taken over.
        """
        if not self.is_main:
            return
        if self._mirror is None and self._plan.recipe.logging.wandb != "off":
            self._mirror = _Mirror(self.run, self._plan)
        kept = [record for record in self.run.read_metrics() if record["step"] <= step]
        text = "".join(json.dumps(record) + "\n" for record in kept)
        self.run.refuse_stale(self.attempt)
        write_atomically(self.run.metrics_file, text)

    def write(self, step: int, values: Mapping[str, float | int | str]) -> None:
        """Append one record.

        Raises:
            TrainerError: another attempt has taken over.
        """
        if not self.is_main:
            return
        self.run.refuse_stale(self.attempt)
        record = {"step": step, "time": round(time.time(), 3), **values}
        with self.run.metrics_file.open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.show(record)
        if self._mirror is not None:
            self._mirror.send(record)

    def close(self, exit_code: int) -> None:
        """Finish the mirror."""
        if self._mirror is not None:
            self._mirror.close(exit_code)


def peak_gib(device: torch.device) -> float:
    """Peak memory of this process: the device's, or the resident set on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@final
class _Mirror:
    """Weights & Biases under one id; whatever goes wrong here is said once and never stops the run."""

    def __init__(self, run: RunDir, plan: Plan) -> None:
        self.run = run
        try:
            state = json.loads(run.tracker_file.read_text())
        except (FileNotFoundError, ValueError):
            state = {"id": uuid.uuid4().hex[:12], "step": -1}
        self.state: dict[str, Any] = state
        self.tracker: Any = None
        try:
            import wandb

            self.tracker = wandb.init(
                project=plan.recipe.logging.wandb_project,
                name=run.name,
                id=state["id"],
                resume="allow",
                dir=str(run.root),
                mode="online" if plan.recipe.logging.wandb == "online" else "offline",
                config=plan.model_dump(),
                settings=wandb.Settings(silent=True, init_timeout=30),
            )
            self._save()
        except Exception as error:
            self._lost(error)

    def send(self, record: Mapping[str, Any]) -> None:
        if self.tracker is None or record["step"] <= self.state["step"]:
            return
        try:
            values = {name: value for name, value in record.items() if name not in {"step", "time"}}
            self.tracker.log(values, step=record["step"])
            self.state["step"] = record["step"]
            self._save()
        except Exception as error:
            self._lost(error)

    def close(self, exit_code: int) -> None:
        if self.tracker is not None:
            try:
                self.tracker.finish(exit_code=exit_code)
            except Exception as error:
                self._lost(error)

    def _save(self) -> None:
        write_atomically(self.run.tracker_file, json.dumps(self.state), durable=False)

    def _lost(self, error: Exception) -> None:
        self.tracker = None
        sys.stderr.write(f"wandb: lost ({type(error).__name__}: {error}); metrics.jsonl has everything\n")
