"""Sends the records of metrics.jsonl to Weights & Biases. No torch."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final, Literal, Protocol, final

from trainer.files import write_atomically
from trainer.planning.plan import Plan
from trainer.run.directory import RunDir

INIT_TIMEOUT_S: Final = 30
Mode = Literal["online", "offline"]


class _WandbRun(Protocol):
    """The methods of a W&B run that are used here."""

    def log(self, data: Mapping[str, object], step: int) -> None:
        """Send values of a step."""

    def finish(self, exit_code: int) -> None:
        """End the run."""


@final
@dataclass(frozen=True)
class TrackerState:
    """wandb.json: what W&B has received, for example `TrackerState("4f1c2a", 20, online_step=10, root="/p/runs/x")`."""

    id: str
    """Of the W&B run; all attempts have the same."""
    step: int = -1
    """The last step that was sent, or written for a later upload."""
    online_step: int = -1
    """The last step that was sent."""
    root: str | None = None
    """Absolute run directory, by which a copy of it is recognized."""
    problem: str | None = None
    """Why nothing more was sent; None while W&B works."""


def read_tracker(run: RunDir) -> TrackerState | None:
    """What W&B has received; None where nothing readable says so."""
    try:
        return TrackerState(**json.loads(run.tracker_file.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def tracker_mode(wanted: Literal["off", "offline", "online"]) -> Mode | None:
    """How records are sent where the recipe says `wanted`; None: not at all. WANDB_MODE has the last word."""
    variable = os.environ.get("WANDB_MODE", "").lower()
    if wanted == "off" or variable == "disabled" or os.environ.get("WANDB_DISABLED", "").lower() in {"true", "1"}:
        return None
    return "offline" if wanted == "offline" or variable in {"offline", "dryrun"} else "online"


@final
class Tracker:
    """One W&B run for all attempts; an error here is said once, recorded, and never stops the training."""

    def __init__(self, run: RunDir, plan: Plan, mode: Mode, say: Callable[[str], None]) -> None:
        """Start or resume the W&B run whose id is in the run directory.

        Args:
            run: the run directory.
            plan: the configuration that W&B shows.
            mode: whether records are sent, or written for a later upload.
            say: prints a message to the user.
        """
        self._run, self._mode, self._say = run, mode, say
        self.state = _initial_state(run)
        self._wandb_run: _WandbRun | None = None
        try:
            import wandb

            self._wandb_run = wandb.init(
                project=plan.recipe.logging.wandb_project,
                name=run.name,
                id=self.state.id,
                resume="allow",
                dir=str(run.root),
                mode=mode,
                config=plan.model_dump(),
                settings=wandb.Settings(silent=True, init_timeout=INIT_TIMEOUT_S),
            )
            self._note(None)
        except Exception as error:
            self._disable(error)

    def catch_up(self, records: Iterable[Mapping[str, object]], *, resends: bool = False) -> None:
        """Send records that W&B lacks: those of attempts that lost it, or that were offline.

        Args:
            records: of metrics.jsonl.
            resends: send all of them; W&B keeps what it has.
        """
        sent_step = self.state.online_step if self._mode == "online" else self.state.step
        for record in records:
            step = record["step"]
            if isinstance(step, int) and (resends or step > sent_step):
                self._log(step, {name: value for name, value in record.items() if name not in {"step", "time"}})
        if self._wandb_run is not None:
            self._note(None)

    def send(self, step: int, values: Mapping[str, object]) -> None:
        """Send the values of a step, unless an earlier attempt has sent this step."""
        if step > self.state.step:
            self._log(step, values)
            if self._wandb_run is not None:
                self._note(None)

    def close(self, exit_code: int) -> None:
        """End the W&B run with the exit code of the attempt."""
        if self._wandb_run is None:
            return
        try:
            self._wandb_run.finish(exit_code=exit_code)
        except Exception as error:
            self._disable(error)

    def _log(self, step: int, values: Mapping[str, object]) -> None:
        if self._wandb_run is None:
            return
        try:
            self._wandb_run.log(values, step=step)
        except Exception as error:
            self._disable(error)
            return
        is_online = self._mode == "online"
        self.state = replace(
            self.state,
            step=max(step, self.state.step),
            online_step=max(step, self.state.online_step) if is_online else self.state.online_step,
        )

    def _note(self, problem: str | None) -> None:
        """Write the state; a failure is said and changes nothing else."""
        self.state = replace(self.state, root=str(self._run.root.resolve()), problem=problem)
        try:
            write_atomically(self._run.tracker_file, json.dumps(asdict(self.state)) + "\n", durable=False)
        except OSError as error:
            self._say(f"warning: {self._run.tracker_file}: not written: {error.strerror or error}")

    def _disable(self, error: Exception) -> None:
        self._wandb_run = None
        first_line = str(error).partition("\n")[0]
        problem = f"W&B is lost after step {self.state.step} ({type(error).__name__}: {first_line})"
        self._say(f"warning: {problem}; metrics.jsonl has everything, `trainer sync {self._run.root}` sends it")
        self._note(problem)


def _initial_state(run: RunDir) -> TrackerState:
    """The recorded state; a new W&B run for a new run, and for a copy of one."""
    state = read_tracker(run)
    if state is None or _is_copy(run, state):
        return TrackerState(uuid.uuid4().hex[:12])
    return state


def _is_copy(run: RunDir, state: TrackerState) -> bool:
    if state.root is None or Path(state.root) == run.root.resolve():
        return False
    original = read_tracker(RunDir(Path(state.root)))
    return original is not None and original.id == state.id
