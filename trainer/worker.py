"""Runs one rank of an attempt: `accelerate launch -m trainer.worker RECIPE_OR_RUN_DIR`."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from trainer.config.arguments import add_override_arguments
from trainer.distributed.idle_threads import IdleThreads, idle_threads_here
from trainer.distributed.leaving import exit_with
from trainer.errors import (
    EXIT_FAILED,
    EXIT_FINISHED,
    CheckpointError,
    LaunchError,
    MirrorError,
    PreemptedError,
    RolledBackError,
    RunConflictError,
    TrainerError,
)
from trainer.planning.inputs import refuse_changed_inputs
from trainer.planning.plan import Plan, RFTPlan
from trainer.run.best import best_value
from trainer.run.console import tell
from trainer.run.directory import RunDir
from trainer.run.find import named_run, open_run
from trainer.run.place import settle
from trainer.run.plan_recipe import plan_recipe
from trainer.run.protocol import LAUNCHER, SHUTDOWN_TIMEOUT
from trainer.run.state import EndState, Outcome
from trainer.run.surroundings import complete_surroundings

if TYPE_CHECKING:
    from trainer.training.attempt import Attempt

TORCHRUN_GRACE_S: Final = 30.0
"""How long torchrun waits between SIGTERM and SIGKILL."""


def main(argv: list[str] | None = None) -> int:
    """Run one rank of one attempt; returns the exit code of its outcome."""
    complete_surroundings()
    arguments = _parse(argv)
    for name in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # oneDNN caches up to 1,024 kernels by default, about 1 MB for each length of a pack.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # packs differ in length: fixed segments would be fragmented
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    try:
        plan, run = _plan_and_run(arguments)
        if run.is_finished(plan.steps):
            tell(f"{run.root} is finished; give another --name to train again")
            return EXIT_FINISHED
        return _run_attempt(plan, run, _set_idle_threads(plan))
    except TrainerError as error:
        tell(str(error))
        return error.exit_code
    except OSError as error:
        if error.filename is None:
            raise
        tell(f"{error.filename}: {error.strerror}")  # for example a run directory that is read-only
        return EXIT_FAILED


def _set_idle_threads(plan: Plan) -> IdleThreads:
    """Set how long idle OpenMP threads spin; OpenMP reads it when torch is loaded."""
    if "torch" in sys.modules:  # a program that calls `main`, as tests do
        return IdleThreads(None, "torch was loaded before the worker began")
    idle = idle_threads_here(plan.shape.idle_spin)
    idle.apply(os.environ)
    return idle


def _run_attempt(plan: Plan, run: RunDir, idle: IdleThreads) -> int:
    from contextlib import ExitStack

    from trainer.distributed.preemption import StopFlag
    from trainer.distributed.world import join_world, leave_world, use_deterministic_kernels
    from trainer.model.quiet import quiet_transformers
    from trainer.training.attempt import Attempt
    from trainer.training.attempt_record import describe_attempt

    quiet_transformers()
    if plan.recipe.deterministic and plan.shape.device == "cuda":
        use_deterministic_kernels()
    try:
        world = join_world(
            plan.shape.device,
            plan.shape.num_ranks,
            num_shards=plan.shape.num_shards,
            context_size=plan.shape.context_parallel,
            hang_timeout_s=plan.recipe.recovery.hang_timeout_s,
        )
    except LaunchError as error:
        if _is_main():
            with run.locked():
                run.write_outcome(Outcome("failed", 0, str(error), error.exit_code))
        raise
    stop = StopFlag(_grace_s(plan))  # only now: until here a signal must end a rank that waits for the others
    with ExitStack() as stack:
        stack.callback(leave_world, world)
        if world.is_main:
            stack.enter_context(run.locked())
            run.outcome_file.unlink(missing_ok=True)
            if LAUNCHER not in os.environ:  # a person started it; supervisor and batch script refuse cancelled runs
                run.cancel_file.unlink(missing_ok=True)
        number = world.from_main(run.take_attempt(describe_attempt(plan, run, world, idle)) if world.is_main else None)
        attempt = Attempt(plan, run, world, number, stop)
        stack.enter_context(attempt.watchdog.watching())
        outcome = _train(attempt)
        attempt.close(outcome.exit_code)
        if world.is_main:
            _report(attempt, outcome)
        if outcome.state == "failed" and world.size > 1:
            sys.stderr.flush()
            os._exit(outcome.exit_code)  # other ranks may wait in a collective that this one will never join
        return outcome.exit_code


def _report(attempt: Attempt, outcome: Outcome) -> None:
    """Print the outcome and write outcome.json, unless a newer attempt owns that file."""
    attempt.say(outcome.message)
    try:
        if attempt.run.newest_attempt() == attempt.number:
            attempt.run.end_attempt(attempt.number, outcome)
    except OSError as error:
        attempt.say(f"{attempt.run.outcome_file}: not written: {error}")


def _grace_s(plan: Plan) -> float:
    """The grace period of the machine, or of torchrun if that is shorter."""
    grace_s = plan.recipe.recovery.grace_period_s
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return grace_s
    return min(grace_s, float(os.environ.get(SHUTDOWN_TIMEOUT, TORCHRUN_GRACE_S)))


def _train(attempt: Attempt) -> Outcome:
    """Run the training loop of the method, and once more after a return to the checkpoint."""
    from trainer.training import rft, sft

    plan, run = attempt.plan, attempt.run
    train = partial(rft.train, plan=plan) if isinstance(plan, RFTPlan) else sft.train
    try:
        _check_inputs(attempt)
        if _is_rolled_back(train, attempt):
            # Not guarded again: RolledBackError is raised only while no row is excluded, and now some are.
            train(attempt)
    except TrainerError as error:
        remedy = _remedy(attempt) if isinstance(error, CheckpointError) else ""
        is_transient = isinstance(error, CheckpointError | MirrorError) and error.exit_code == EXIT_FAILED
        return Outcome(_state_of(error, attempt), attempt.step, f"{error}{remedy}", error.exit_code, is_transient)
    except OSError as error:
        message = f"{error.filename or run.root}: {error.strerror or error}{_remedy(attempt)}"
        return Outcome("failed", attempt.step, message, EXIT_FAILED, is_transient=True)
    except Exception as error:
        traceback.print_exc()
        text = f"{type(error).__name__}: {error}"
        return Outcome("failed", attempt.step, text, EXIT_FAILED, is_transient=True)
    return Outcome("finished", attempt.plan.steps, _summary(attempt), EXIT_FINISHED)


def _check_inputs(attempt: Attempt) -> None:
    """Stop every rank where rows, model, template or adapter were replaced; warn of changed reward code.

    Raises:
        RunConflictError: they were.
    """
    plan, run = attempt.plan, attempt.run
    _, problem = attempt.world.on_main(lambda: refuse_changed_inputs(plan, str(run.root)), (RunConflictError,))
    if problem is not None:
        raise RunConflictError(problem)
    attempts = run.read_attempts() if attempt.world.is_main else []
    for file in attempts[-1].get("changed_rewards", []) if attempts else []:
        attempt.say(f"warning: {file} changed since the attempt before; recorded rewards stay, new ones come from it")


def _is_rolled_back(train: Callable[[Attempt], None], attempt: Attempt) -> bool:
    """Train; True if the run must continue from its checkpoint.

    A function of its own, so that the model of the first try is freed before the second one loads it.
    """
    try:
        train(attempt)
    except RolledBackError:
        return True
    return False


def _state_of(error: TrainerError, attempt: Attempt) -> EndState:
    if isinstance(error, PreemptedError):
        return "cancelled" if attempt.stop.was_interrupted or attempt.run.cancel_file.exists() else "preempted"
    return "failed"


def _remedy(attempt: Attempt) -> str:
    saved_step = attempt.saver.saved_step
    kept = "" if saved_step is None else f"; the checkpoint of step {saved_step} is kept"
    return f"{kept}. Fix the problem above and run the same command again."


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _summary(attempt: Attempt) -> str:
    """Message of a finished run, with its first and its best held-out value."""
    from trainer.training.no_gradient import verdict

    text = f"finished {attempt.plan.steps} steps of {attempt.run.root}"
    records = attempt.run.comparable_metrics() if attempt.world.is_main else []
    best = best_value(records)
    if best is not None:
        first = next(record for record in records if best.name in record)
        text += f"; {best.name} {first[best.name]:.4f} at step {first['step']}, "
        text += f"best {best.value:.4f} at step {best.step}"
    nothing = verdict(records)
    return f"{text}. {nothing}" if nothing is not None else text


def _plan_and_run(arguments: argparse.Namespace) -> tuple[Plan, RunDir]:
    target = Path(arguments.target)
    if target.is_dir():
        run, plan = settle(RunDir(target))
        return plan, run
    plan = plan_recipe(target, arguments.set, arguments.shape)
    if _is_main():
        run = open_run(plan, arguments.name)
        return run.read_plan(), run
    return plan, named_run(plan.recipe.name if arguments.name is None else arguments.name)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="trainer.worker", description=__doc__)
    parser.add_argument("target", help="a recipe, or a run directory that holds a plan")
    add_override_arguments(parser)
    parser.add_argument("--name", help="run name")
    return parser.parse_args(argv)


if __name__ == "__main__":
    exit_with(main)
