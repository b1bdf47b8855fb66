"""One attempt at a run: what both loops share around their steps."""

from __future__ import annotations

import math
import os
import platform
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Final, final

import torch
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from trainer.checkpoint import Checkpoints, TrainState
from trainer.config.plan import Plan
from trainer.data.chat import load_tokenizer
from trainer.distributed import World
from trainer.errors import CheckpointError, LaunchError, PreemptedError
from trainer.learner import Learner
from trainer.metrics import MetricsLog, peak_gib
from trainer.preemption import StopFlag
from trainer.progress import Console
from trainer.run import HEARTBEAT_S, LAUNCHER, SUPERVISOR, SUPERVISOR_PID, RunDir, replaced_directory

Values = dict[str, float]
WATCH_S: Final = 1.0
"""How often the worker looks for its supervisor."""


@final
class Session:
    """Plan, run directory, ranks, log, checkpoints and the stop flag of this attempt."""

    def __init__(self, plan: Plan, run: RunDir, world: World, attempt: int, stop: StopFlag) -> None:
        """Open everything; `train` of a loop gets it."""
        self.plan, self.run, self.world, self.attempt, self.stop = plan, run, world, attempt, stop
        self.console = Console(plan.steps) if world.is_main else None
        self.log = MetricsLog(run, attempt, plan, is_main=world.is_main, show=self._show)
        self.checkpoints = Checkpoints(run, plan.recipe, plan.identity_hash, world, attempt)
        self.phase = "starting"
        self.step = 0
        self.saved_step: int | None = None
        self._save_s: float | None = None
        self._beating = threading.Lock()

    def say(self, text: str) -> None:
        """Tell a person, on the main rank."""
        if self.console is not None:
            self.console.say(text)

    def _show(self, record: dict[str, Any]) -> None:
        if self.console is not None:
            self.console.show(record)

    def resume(self, learner: Learner) -> TrainState:
        """The state to go on from: the newest valid checkpoint, or the beginning.

        Raises:
            PreemptedError: a rank was asked to stop meanwhile.
            LaunchError: the run has gone further than the plan does.
        """
        state = self.checkpoints.load_newest(learner.state_tensors())
        if state is None:
            state = TrainState()
        else:
            if state.step > self.plan.steps:
                raise LaunchError(
                    f"{self.run.root} is at step {state.step} already; "
                    f"set `steps` to that or more (got {self.plan.steps})"
                )
            self.saved_step = state.step
            learner.updates = int(state.counters.get("updates", 0))
            learner.refresh()
            self.say(f"resumed {self.run.root} at step {state.step} of {self.plan.steps}")
        self.log.rewind(state.step if self.saved_step is not None else -1)
        self.step = state.step
        self.phase = "training"
        if self.stop.agreed(self.world) and state.step < self.plan.steps:
            raise PreemptedError(f"stopped at step {state.step} of {self.plan.steps}, before another; nothing is lost")
        return state

    def after_step(self, state: TrainState, learner: Learner, values: Values, evaluate: Callable[[], Values]) -> None:
        """What is due after a step: evaluation, the log, a checkpoint, a stop; in this order.

        Raises:
            PreemptedError: a rank was asked to stop; the state is saved.
        """
        recipe = self.plan.recipe
        self.step = state.step
        state.counters["updates"] = learner.updates
        last = state.step == self.plan.steps
        if recipe.data.eval is not None and (last or (recipe.eval_interval and state.step % recipe.eval_interval == 0)):
            values |= self.evaluated(learner, evaluate)
        if self._save_s is not None:
            values |= {"perf/save_s": self._save_s}
            self._save_s = None
        self.log.write(state.step, values | {"train/updates": learner.updates})
        must_stop = self.stop.agreed(self.world)
        if must_stop or (recipe.dcp_save_interval and (last or state.step % recipe.dcp_save_interval == 0)):
            self.save(state, learner, must=must_stop)
        self._beat()
        if must_stop and not last:
            raise PreemptedError(f"stopped after step {state.step} of {self.plan.steps}; the state is saved")

    def evaluated(self, learner: Learner, evaluate: Callable[[], Values]) -> Values:
        """Held-out values, and the best weights so far kept."""
        self.phase = "evaluating"
        values = evaluate()
        if self.world.is_main and self._is_best(values):
            self.save_weights(learner, best=True)
        self.phase = "training"
        return values

    def save(self, state: TrainState, learner: Learner, *, must: bool) -> None:
        """Checkpoint; a failure is a warning while older checkpoints and later attempts remain."""
        if self.saved_step == state.step:
            return
        self.phase = "saving"
        best = self.best() if self.world.is_main else None
        try:
            self._save_s = self.checkpoints.save(state, learner.state_tensors(), keep=best[0] if best else None)
        except CheckpointError as error:
            if must:
                raise
            self.say(f"warning: {error}; going on, the next save tries again")
        else:
            self.saved_step = state.step
        self.phase = "training"

    def save_weights(
        self, learner: Learner, *, best: bool = False, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> Path:
        """Write adapter/ or model/ (or the -best one) whole or not at all.

        Args:
            learner: has the weights.
            best: whether they are the best so far, not the last.
            tokenizer: put beside them; the model's own when left out.

        Raises:
            CheckpointError: it could not be written; what stood there before is intact.
        """
        target = self.run.weights(is_lora=self.plan.recipe.lora is not None, best=best)
        try:
            with replaced_directory(target) as directory:
                learner.policy.save(directory, learner.masters)
                (tokenizer or self._tokenizer).save_pretrained(str(directory))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{target}: not written: {error}") from None
        return target

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.plan.recipe.model)

    def _is_best(self, values: Values) -> bool:
        """Decided from metrics.jsonl, so that a resumed run decides alike; ties: the earlier."""
        for name, sign in (("eval/reward", -1.0), ("eval/loss", 1.0)):
            if name in values:
                before = [sign * record[name] for record in self.run.read_metrics() if name in record]
                return not before or sign * values[name] < min(before)
        return False

    def best(self) -> tuple[int, str, float] | None:
        """Step, name and value of the best held-out result."""
        for name, sign in (("eval/reward", -1.0), ("eval/loss", 1.0)):
            found = [(sign * record[name], record["step"]) for record in self.run.read_metrics() if name in record]
            if found:
                value, step = min(found)
                return step, name, sign * value
        return None

    def performance(self, *, tokens: float, step_s: float) -> Values:
        """The perf/ values of a step that every method has."""
        peak = max(self.world.max_of([peak_gib(self.world.device)]))
        return {"perf/tokens_per_s": tokens / step_s, "perf/step_s": step_s, "perf/peak_gib": peak}

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Write the heartbeat within the block."""
        if not self.world.is_main:
            yield
            return
        ended = threading.Event()

        has_supervisor = os.environ.get(LAUNCHER) == SUPERVISOR

        def beat() -> None:
            last = time.monotonic()
            while not ended.wait(WATCH_S):
                if has_supervisor and self.stop.reason is None and not self.run.is_supervised():
                    self.say("the supervisor is gone: saving after this step")
                    self.stop.request("supervisor gone")
                if time.monotonic() - last >= HEARTBEAT_S:
                    self._beat()
                    last = time.monotonic()

        self._beat()
        thread = threading.Thread(target=beat, daemon=True, name="heartbeat")
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _beat(self) -> None:
        if self.world.is_main:
            with self._beating, suppress(OSError):  # no sign of life is no reason to die
                self.run.write_heartbeat(self.attempt, self.step, self.phase)


def about_attempt(plan: Plan, world: World) -> dict[str, Any]:
    """What attempts.jsonl says of a process start."""
    import accelerate
    import peft
    import transformers

    import trainer

    versions = {module.__name__: module.__version__ for module in (trainer, torch, transformers, peft, accelerate)}
    return {
        "time": math.floor(time.time()),
        "shape": plan.shape.name,
        "ranks": world.size,
        "threads": torch.get_num_threads(),
        "launcher": os.environ.get(LAUNCHER, "accelerate" if "ACCELERATE_MIXED_PRECISION" in os.environ else "python"),
        "supervisor_pid": int(os.environ.get(SUPERVISOR_PID, "0")) or None,
        "host": socket.gethostname(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": versions,
        "git_commit": _git_commit(),
        "steps": plan.steps,
        "argv": sys.argv[1:],
    }


def _git_commit() -> str | None:
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
