"""Sends the records of metrics.jsonl to Weights & Biases."""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import Mapping
from typing import Final, Protocol, final

from trainer.files import write_atomically
from trainer.planning.plan import Plan
from trainer.run.directory import RunDir

INIT_TIMEOUT_S: Final = 30


class _WandbRun(Protocol):
    """The methods of a W&B run that are used here."""

    def log(self, data: Mapping[str, object], step: int) -> None:
        """Send values of a step."""

    def finish(self, exit_code: int) -> None:
        """End the run."""


@final
class WandbSink:
    """One W&B run for all attempts; an error here is reported once and never stops the training."""

    def __init__(self, run: RunDir, plan: Plan) -> None:
        """Start or resume the W&B run whose id is in the run directory."""
        self._run = run
        self._id, self._sent_step = _read_state(run)
        self._wandb_run: _WandbRun | None = None
        try:
            import wandb

            self._wandb_run = wandb.init(
                project=plan.recipe.logging.wandb_project,
                name=run.name,
                id=self._id,
                resume="allow",
                dir=str(run.root),
                mode="online" if plan.recipe.logging.wandb == "online" else "offline",
                config=plan.model_dump(),
                settings=wandb.Settings(silent=True, init_timeout=INIT_TIMEOUT_S),
            )
            self._write_state()
        except Exception as error:
            self._disable(error)

    def send(self, step: int, values: Mapping[str, object]) -> None:
        """Send the values of a step, unless an earlier attempt has sent this step."""
        if self._wandb_run is None or step <= self._sent_step:
            return
        try:
            self._wandb_run.log(values, step=step)
            self._sent_step = step
            self._write_state()
        except Exception as error:
            self._disable(error)

    def close(self, exit_code: int) -> None:
        """End the W&B run with the exit code of the attempt."""
        if self._wandb_run is None:
            return
        try:
            self._wandb_run.finish(exit_code=exit_code)
        except Exception as error:
            self._disable(error)

    def _write_state(self) -> None:
        state = {"id": self._id, "step": self._sent_step}
        write_atomically(self._run.tracker_file, json.dumps(state), durable=False)

    def _disable(self, error: Exception) -> None:
        self._wandb_run = None
        sys.stderr.write(f"wandb: lost ({type(error).__name__}: {error}); metrics.jsonl has everything\n")


def _read_state(run: RunDir) -> tuple[str, int]:
    """Id of the W&B run and the last step that was sent; a new id for a new run."""
    try:
        state = json.loads(run.tracker_file.read_text())
        return state["id"], state["step"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return uuid.uuid4().hex[:12], -1
