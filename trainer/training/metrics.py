"""Writes metrics.jsonl, the record of a run's steps."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Mapping
from typing import final

import torch

from trainer.files import sync, write_atomically
from trainer.planning.plan import Plan
from trainer.run.directory import RunDir
from trainer.run.metrics_reader import Record
from trainer.run.sinks import Sinks, wanted_sinks
from trainer.run.tracker import Tracker, tracker_mode
from trainer.training.metrics_repair import find_damage, quarantine, rebuilt_records

Values = dict[str, float]
"""Metrics by name, such as {"train/loss": 1.25, "perf/step_s": 0.8}."""


@final
class MetricsLog:
    """One JSON object per step, fsynced; after a resume no step appears twice and none is missing."""

    def __init__(
        self,
        run: RunDir,
        attempt: int,
        plan: Plan,
        *,
        is_main: bool,
        show: Callable[[Mapping[str, object]], None],
        say: Callable[[str], None],
    ) -> None:
        """Prepare; `rewind` opens the log.

        Args:
            run: whose metrics.jsonl is written.
            attempt: number of this process start; only the newest attempt may write.
            plan: says whether records are sent to W&B.
            is_main: only the main rank writes.
            show: called with every record, for the console.
            say: prints a message to the user.
        """
        self.run, self.attempt, self.is_main, self.show, self.say = run, attempt, is_main, show, say
        self._plan = plan
        self._tracker: Tracker | None = None
        self._sinks: Sinks | None = None

    def rewind(self, step: int) -> None:
        """Drop the records after `step`, from which the run continues.

        Opens the W&B run here and not earlier, because fetching a checkpoint from the mirror may bring its id.

        Raises:
            TrainerError: another attempt has taken over.
        """
        if not self.is_main:
            return
        kept = sorted(self._repaired(step), key=lambda record: record["step"])
        text = "".join(json.dumps(record) + "\n" for record in kept)
        self.run.refuse_stale(self.attempt)
        write_atomically(self.run.metrics_file, text)
        logging = self._plan.recipe.logging
        if self._sinks is None:
            self._sinks = Sinks(self.run, wanted_sinks(logging), logging, self.say)
        self._sinks.rebuild(kept)
        mode = tracker_mode(logging.wandb)
        if self._tracker is None and mode is not None:
            self._tracker = Tracker(self.run, self._plan, mode, self.say)
            self._tracker.catch_up(kept)

    def _repaired(self, step: int) -> list[Record]:
        """The records up to a step. Those that are damaged or gone are rebuilt as far as possible."""
        records = [record for record in self.run.read_metrics() if record["step"] <= step]
        damage = find_damage(self.run, step)
        if damage is None:
            return records
        copy = quarantine(self.run)
        kept_as = f"; the file is kept as {copy}" if copy is not None else ""
        lost = "Journal and checkpoints give back a part; other values of these steps are lost"
        self.say(
            f"warning: {self.run.metrics_file}: {damage}{kept_as}. "
            f"{lost if damage.steps else f'No step up to {max(step, 0)} is lost'}"
        )
        return records + rebuilt_records(self.run, damage.steps, round(time.time(), 3))

    def write(self, step: int, values: Mapping[str, object]) -> None:
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
            sync(file.fileno(), self.run.metrics_file)
        self.show(record)
        if self._tracker is not None:
            self._tracker.send(step, values)
        if self._sinks is not None:
            self._sinks.add(record)

    def close(self, exit_code: int) -> None:
        """End the W&B run with the exit code of the attempt, and the other copies."""
        if self._sinks is not None:
            self._sinks.close(exit_code)
        if self._tracker is not None:
            self._tracker.close(exit_code)


def peak_gib(device: torch.device) -> float:
    """Peak memory of this process: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
