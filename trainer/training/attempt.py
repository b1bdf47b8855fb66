"""One attempt at a run: what both loops share around their steps."""

from __future__ import annotations

import math
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, Final, final

import torch
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from trainer.checkpoints.local import Checkpoints, TrainState
from trainer.checkpoints.mirror import Mirror
from trainer.checkpoints.uploader import Copier
from trainer.data.chat import load_tokenizer
from trainer.distributed.preemption import StopFlag
from trainer.distributed.world import World
from trainer.errors import CheckpointError, LaunchError, NumericalError, PreemptedError, RolledBackError
from trainer.files import replaced_directory
from trainer.model.packing_check import verify_packing
from trainer.model.policy import load_policy, warm_start
from trainer.planning.plan import Plan, plan_memory
from trainer.run.console import Console
from trainer.run.directory import LAUNCHER, SUPERVISOR_PID, RunDir
from trainer.training.learner import Learner
from trainer.training.metrics import MetricsLog, peak_gib
from trainer.training.watchdog import Watch

Values = dict[str, float]
CLOSE_S: Final = 60.0
"""A failed attempt waits so long for the checkpoint being written."""


@final
class Session:
    """Plan, run directory, ranks, log, checkpoints and the stop flag of this attempt."""

    def __init__(self, plan: Plan, run: RunDir, world: World, attempt: int, stop: StopFlag) -> None:
        """Open everything; `train` of a loop gets it."""
        self.plan, self.run, self.world, self.attempt, self.stop = plan, run, world, attempt, stop
        self.console = Console(plan.steps) if world.is_main else None
        self.log = MetricsLog(run, attempt, plan, is_main=world.is_main, show=self._show)
        self.copier = Copier(self._open_mirror if world.is_main and plan.recipe.checkpoint.mirror else None, self.say)
        self.checkpoints = Checkpoints(run, plan.recipe, plan.identity_hash, world, attempt, self.copier)
        self.step = 0
        self.saved_step: int | None = None
        self.excluded: frozenset[str] = frozenset()
        """File and line of the rows that are left out."""
        self._phase = "starting"
        self._predicted = plan_memory(plan)
        self._to_log: Values = {}
        self.watch = Watch(
            run,
            attempt,
            world,
            stop,
            hang_timeout_s=plan.recipe.recovery.hang_timeout_s,
            position=lambda: (self.step, self.phase),
            say=self.say,
        )

    def _open_mirror(self) -> Mirror:
        address, keep_last = self.plan.recipe.checkpoint.mirror, self.plan.recipe.keep_last
        assert address is not None
        return Mirror(address, self.run, self.plan.identity_hash, keep_last=keep_last)

    @property
    def phase(self) -> str:
        """What the run is doing, for people."""
        return self._phase

    @phase.setter
    def phase(self, phase: str) -> None:
        self._phase = phase
        self.stop.moved()

    def say(self, text: str) -> None:
        """Tell a person, on the main rank."""
        if self.console is not None:
            self.console.say(text)

    def _show(self, record: dict[str, Any]) -> None:
        if self.console is not None:
            self.console.show(record)

    def open_learner(self) -> Learner:
        """The policy as the run begins, whole or sharded, checked, and what teaches it.

        Raises:
            ModelError: the model cannot be loaded or trained.
            NumericalError: its packed neighbours leak.
        """
        recipe, world = self.plan.recipe, self.world
        with nullcontext() if world.mesh is None else world.in_turn():
            place = world.device if world.mesh is None else torch.device("cpu")
            policy = load_policy(recipe.model, recipe.lora, recipe.seed, place)
            if world.mesh is not None:
                policy.shard(world.mesh, world.device)
        verify_packing(policy, world.device)
        is_urgent = self.stop.is_urgent if world.mesh is None else _never  # sharded passes are run by all ranks or none
        learner = Learner(policy, world, is_urgent)
        warm_start(recipe.lora, policy, learner.masters)
        learner.refresh()
        return learner

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
            learner.restore(updates=int(state.counters.get("updates", 0)))
            self.say(f"resumed {self.run.root} at step {state.step} of {self.plan.steps}")
        self.excluded = self.world.from_main(self.run.read_excluded())
        self.log.rewind(state.step if self.saved_step is not None else -1)
        self.step = state.step
        self.phase = "training"
        if self.stop.agreed(self.world) and state.step < self.plan.steps:
            raise PreemptedError(f"stopped at step {state.step} of {self.plan.steps}, before another; nothing is lost")
        return state

    def after_step(
        self,
        state: TrainState,
        learner: Learner,
        values: Values,
        evaluate: Callable[[], Values],
        skipped_rows: Sequence[str],
    ) -> None:
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
        self._collect_save(wait=False)
        record: dict[str, Any] = values | self._to_log | {"train/updates": learner.updates}
        self._to_log = {}
        self.log.write(state.step, record | ({"train/skipped_rows": list(skipped_rows)} if skipped_rows else {}))
        must_stop = self.stop.agreed(self.world)
        if must_stop or (recipe.dcp_save_interval and (last or state.step % recipe.dcp_save_interval == 0)):
            self.save(state, learner, must=must_stop)
        self.watch.beat()
        if skipped_rows:
            self._answer_bad_steps(state.step)
        if must_stop and not last:
            raise PreemptedError(f"stopped after step {state.step} of {self.plan.steps}; the state is saved")

    @contextmanager
    def stoppable(self, state: TrainState, learner: Learner) -> Iterator[None]:
        """The part of a step that a stop may abandon: as long as nothing was updated, the step before it is saved."""
        try:
            yield
        except PreemptedError as error:
            if learner.updates != state.counters.get("updates", 0):
                raise PreemptedError(f"{error}; the last checkpoint and the journal are the state") from None
            self.save(state, learner, must=True)
            raise PreemptedError(f"{error}; the state of step {state.step} of {self.plan.steps} is saved") from None

    def _answer_bad_steps(self, step: int) -> None:
        """After too many skipped updates leave their rows out, once; then stop.

        Decided from metrics.jsonl, so that a resumed run decides alike.

        Raises:
            RolledBackError: the rows are left out from the newest checkpoint on.
            NumericalError: that was tried before, or there is no checkpoint to return to.
        """
        steps = self.world.from_main(self._skipped_rows() if self.world.is_main else None)
        if len(steps) < self.plan.recipe.recovery.max_bad_steps:
            return
        self._collect_save(wait=True)
        rows = sorted(set().union(*steps))
        shown = ", ".join(rows[:5]) + (f" and {len(rows) - 5} more" if len(rows) > 5 else "")
        what = f"loss or gradient was not finite at {len(steps)} steps, their updates were skipped. Rows: {shown}"
        if self.excluded or self.saved_step is None:
            why = "Rows were left out once already" if self.excluded else "There is no checkpoint to return to"
            raise NumericalError(f"{what}. {why}. Lower optimizer.learning_rate, or mend the rows.")
        if self.world.is_main:
            self.run.write_excluded(rows, step)
        self.say(f"{what}. Going back to the checkpoint of step {self.saved_step} without these rows.")
        raise RolledBackError(what)

    def _skipped_rows(self) -> list[set[str]]:
        """The rows of each step with skipped updates, less the steps that rows left out already explain."""
        skipped = (set(record.get("train/skipped_rows", ())) for record in self.run.read_metrics())
        return [rows for rows in skipped if not rows <= self.excluded]

    def evaluated(self, learner: Learner, evaluate: Callable[[], Values]) -> Values:
        """Held-out values, and the best weights so far kept."""
        self.phase = "evaluating"
        values = evaluate()
        if self.world.from_main(self._is_best(values) if self.world.is_main else None):
            self.save_weights(learner, best=True)
        self.phase = "training"
        return values

    def save(self, state: TrainState, learner: Learner, *, must: bool) -> None:
        """Begin a checkpoint; the step goes on while it is written.

        Args:
            state: step and counters.
            learner: has the tensors.
            must: wait for it, and fail with it.

        Raises:
            CheckpointError: `must`, and it could not be written.
        """
        begin = time.perf_counter()
        phase, self.phase = self.phase, "saving"
        self._collect_save(wait=True)
        if self.saved_step != state.step:
            best = self.best() if self.world.is_main else None
            self.checkpoints.begin(state, learner.state_tensors(), keep=best[0] if best else None)
            self._to_log["perf/save_s"] = time.perf_counter() - begin
            if must:
                problem = self._collect_save(wait=True)
                if problem is not None:
                    raise CheckpointError(problem)
        self.phase = phase

    def _collect_save(self, *, wait: bool) -> str | None:
        """Take note of how the save that was begun has ended; returns what went wrong."""
        saved = self.checkpoints.collect(wait=wait)
        if saved is None:
            return None
        self.stop.note_save(saved.seconds)
        if saved.problem is None:
            self.saved_step = saved.step
            return None
        self._to_log["perf/failed_saves"] = self._to_log.get("perf/failed_saves", 0.0) + 1.0
        self.say(f"warning: {saved.problem}; going on, the next save tries again")
        return saved.problem

    def finish(self, learner: Learner) -> None:
        """Write the trained weights, and wait for the last checkpoint and its copy."""
        self.say(f"weights: {self.save_weights(learner)}")
        self._collect_save(wait=True)
        self.copier.close(float("inf"))

    def close(self) -> None:
        """Let a save and a copy that were begun end, so that a failure elsewhere does not lose them."""
        timeout_s = min(CLOSE_S, self.stop.grace_s)
        self.checkpoints.close(timeout_s)
        self.copier.close(timeout_s)

    def save_weights(self, learner: Learner, *, best: bool = False) -> Path:
        """Write adapter/ or model/ (or the -best one) whole or not at all; every rank calls it.

        Args:
            learner: has the weights.
            best: whether they are the best so far, not the last.

        Raises:
            CheckpointError: it could not be written; what stood there before is intact.
        """
        target = self.run.weights(is_lora=self.plan.recipe.lora is not None, best=best)
        masters = learner.whole_masters()
        if not self.world.is_main:
            return target
        try:
            with replaced_directory(target) as directory:
                learner.policy.save(directory, masters)
                self._tokenizer.save_pretrained(str(directory))
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
        values = {"perf/tokens_per_s": tokens / step_s, "perf/step_s": step_s, "perf/peak_gib": peak}
        return values | ({"perf/predicted_gib": self._predicted.total_gib} if self._predicted is not None else {})


def _never() -> bool:
    return False


def about_attempt(plan: Plan, world: World) -> dict[str, Any]:
    """What attempts.jsonl says of a process start."""
    import accelerate
    import peft
    import transformers

    import trainer

    predicted = plan_memory(plan)
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
        "processor": _processor(world.device),
        "python": platform.python_version(),
        "versions": versions,
        "git_commit": _git_commit(),
        "steps": plan.steps,
        "predicted_gib": predicted.total_gib if predicted is not None else None,
        "argv": sys.argv[1:],
    }


def _processor(device: torch.device) -> str:
    """What computes, as its maker calls it."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    for line in _lines(Path("/proc/cpuinfo")):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def _git_commit() -> str | None:
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
