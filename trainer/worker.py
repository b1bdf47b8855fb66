"""What every rank runs: `accelerate launch -m trainer.worker RECIPE_OR_RUN_DIR`."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from trainer.config.arguments import add_override_arguments
from trainer.config.load import load_recipe
from trainer.errors import (
    EXIT_FAILED,
    EXIT_FINISHED,
    CheckpointError,
    LaunchError,
    MirrorError,
    PreemptedError,
    RolledBackError,
    TrainerError,
)
from trainer.planning.plan import Plan, RFTPlan, make_plan
from trainer.run.directory import RunDir
from trainer.run.find import named_run, open_run
from trainer.run.protocol import SHUTDOWN_TIMEOUT
from trainer.run.state import EndState, Outcome

if TYPE_CHECKING:
    from trainer.training.attempt import Session

TORCHRUN_GRACE_S: Final = 30.0
"""From its SIGTERM to its SIGKILL."""


def main(argv: list[str] | None = None) -> int:
    """Run one rank of one attempt; the exit code is the outcome's."""
    arguments = _parse(argv)
    for name in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Threads that wait without spinning: on a busy machine a spinning one takes the core it waits for (docs/log.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Packs differ in length, and oneDNN keeps a kernel of about a megabyte for each shape, 1,024 of them by default.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    try:
        plan, run = _plan_and_run(arguments)
        if run.is_finished(plan.steps):
            sys.stderr.write(f"{run.root} is finished; give another --name to train again\n")
            return EXIT_FINISHED
        return _attempt(plan, run)
    except TrainerError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code


def _attempt(plan: Plan, run: RunDir) -> int:
    from contextlib import ExitStack

    from trainer.distributed.preemption import StopFlag
    from trainer.distributed.world import join_world, leave_world
    from trainer.training.attempt import Session, about_attempt

    _quiet_libraries()
    try:
        world = join_world(plan.shape.device, plan.shape.num_ranks, is_sharded=plan.shape.sharding == "full")
    except LaunchError as error:
        if _is_main():
            with run.locked():
                run.write_outcome(Outcome("failed", 0, str(error), error.exit_code))
        raise
    stop = StopFlag(_grace_s(plan))  # not before: a signal must be able to end a rank that waits for the others
    with ExitStack() as stack:
        stack.callback(leave_world, world)
        if world.is_main:
            stack.enter_context(run.locked())
            run.outcome_file.unlink(missing_ok=True)
        number = world.from_main(run.take_attempt(about_attempt(plan, world)) if world.is_main else None)
        session = Session(plan, run, world, number, stop)
        stack.enter_context(session.watch.watching())
        outcome = _train(session)
        session.close()
        session.log.close(outcome.exit_code)
        if world.is_main:
            session.say(outcome.message)
            try:
                if run.newest_attempt() == number:  # or else it is the other attempt's to say
                    run.write_outcome(outcome)
            except OSError as error:
                session.say(f"{run.outcome_file}: not written: {error}")
        if outcome.state == "failed" and world.size > 1:
            sys.stderr.flush()
            os._exit(outcome.exit_code)  # other ranks wait in a collective that this one will never join
        return outcome.exit_code


def _grace_s(plan: Plan) -> float:
    """What the machine grants, or the launcher where that is less: torchrun kills its workers half a minute after."""
    grace_s = plan.recipe.recovery.grace_period_s
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return grace_s
    return min(grace_s, float(os.environ.get(SHUTDOWN_TIMEOUT, TORCHRUN_GRACE_S)))


def _train(session: Session) -> Outcome:
    """Run the method's loop; a second time where the first one went back to its checkpoint."""
    from trainer.training import rft, sft

    plan, run = session.plan, session.run
    train = partial(rft.train, plan=plan) if isinstance(plan, RFTPlan) else sft.train
    try:
        if not _trained(train, session):
            train(session)
    except TrainerError as error:
        kept = _kept(session.saved_step) if isinstance(error, CheckpointError) else ""
        is_transient = isinstance(error, CheckpointError | MirrorError) and error.exit_code == EXIT_FAILED
        return Outcome(_state_of(error, run), session.step, f"{error}{kept}", error.exit_code, is_transient)
    except OSError as error:
        message = f"{error.filename or run.root}: {error.strerror or error}{_kept(session.saved_step)}"
        return Outcome("failed", session.step, message, EXIT_FAILED, is_transient=True)
    except Exception as error:
        traceback.print_exc()
        text = f"{type(error).__name__}: {error}"
        return Outcome("failed", session.step, text, EXIT_FAILED, is_transient=True)
    return Outcome("finished", plan.steps, _summary(session), EXIT_FINISHED)


def _trained(train: Callable[[Session], None], session: Session) -> bool:
    """Whether it came to its end; False where it goes on from its checkpoint. Frees what the first try held."""
    try:
        train(session)
    except RolledBackError:
        return False
    return True


def _state_of(error: TrainerError, run: RunDir) -> EndState:
    if isinstance(error, PreemptedError):
        return "cancelled" if run.cancel_file.exists() else "preempted"
    return "failed"


def _kept(saved_step: int | None) -> str:
    kept = "" if saved_step is None else f"; the checkpoint of step {saved_step} is kept"
    return f"{kept}. Mend it and run the same command."


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _summary(session: Session) -> str:
    text = f"finished {session.plan.steps} steps of {session.run.root}"
    best = session.best() if session.world.is_main else None
    if best is not None:
        first = next((record for record in session.run.read_metrics() if best[1] in record), {})
        text += f"; {best[1]} {first.get(best[1], float('nan')):.4f} at step {first.get('step')}, "
        text += f"best {best[2]:.4f} at step {best[0]}"
    return text


def _plan_and_run(arguments: argparse.Namespace) -> tuple[Plan, RunDir]:
    target = Path(arguments.target)
    if target.is_dir():
        run = RunDir(target)
        return run.read_plan(), run
    plan = make_plan(load_recipe(target, arguments.set), arguments.shape)
    if _is_main():
        return plan, open_run(plan, arguments.name)
    return plan, named_run(arguments.name or plan.recipe.name)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="trainer.worker", description=__doc__)
    parser.add_argument("target", help="a recipe, or a run directory that holds a plan")
    add_override_arguments(parser)
    parser.add_argument("--name", help="run name")
    return parser.parse_args(argv)


def _quiet_libraries() -> None:
    """Progress bars of loaders are noise here, and advice for their callers is not for our users."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


if __name__ == "__main__":
    sys.exit(main())
