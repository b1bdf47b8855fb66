"""`trainer verify-resume`: run a recipe undisturbed and again with kills, and compare the two."""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from trainer.commands.certificate import GPU_TOLERANCE, certificate_lines, compare_runs
from trainer.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_PREEMPTED, LaunchError
from trainer.files import write_atomically
from trainer.launch.processes import kill_with_descendants
from trainer.planning.plan import Plan, RFTPlan
from trainer.run.directory import RunDir
from trainer.run.find import RUNS, open_run
from trainer.run.plan_recipe import plan_recipe

POLL_S: Final = 0.002
"""Short, since saving a small model takes milliseconds."""


def verify_resume(arguments: argparse.Namespace) -> int:
    """Run the recipe, run it again with kills, compare, print the certificate."""
    overrides = [*arguments.set, "logging.wandb=off", "checkpoint.mirror=null"]
    if arguments.steps is not None:
        overrides += [f"steps={arguments.steps}", "epochs=null"]
    plan = plan_recipe(Path(arguments.recipe), overrides, arguments.shape)
    if isinstance(plan, RFTPlan) and plan.recipe.rollout.has_turns and not plan.recipe.rollout.deterministic:
        raise LaunchError(
            f"{arguments.recipe}: a killed rollout is played again, which gives equal results only if environment and "
            "tools answer the same turns in the same way. If they do, set `rollout.deterministic: true`."
        )
    if not 0 <= arguments.kills < plan.steps:
        raise LaunchError(
            f"--kills {arguments.kills}: the run has {plan.steps} steps. Set it to less: at most one kill a step"
        )
    home = RUNS / f"{plan.recipe.name}.verify-{time.strftime('%Y%m%d-%H%M%S')}"
    certificate = {
        "recipe": arguments.recipe,
        "identity_hash": plan.identity_hash,
        "seed": arguments.seed,
        "signal": arguments.signal,
        **_run_and_compare(plan, home, arguments),
    }
    file = home / "certificate.json"
    write_atomically(file, json.dumps(certificate, indent=1) + "\n")
    if arguments.json:
        sys.stdout.write(json.dumps(certificate) + "\n")
    else:
        sys.stdout.write("\n".join([*certificate_lines(certificate), f"written to {file}"]) + "\n")
    return EXIT_FINISHED if certificate["equal"] else EXIT_FAILED


def _run_and_compare(plan: Plan, home: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Make both runs below `home`; returns kills, durations and the comparison."""
    whole, interrupted = (open_run(plan, name, home) for name in ("whole", "interrupted"))
    start = time.monotonic()
    _say(f"{whole.root}: {plan.steps} steps, undisturbed")
    _run_to_end(whole)
    middle = time.monotonic()
    signal_number = signal.Signals[f"SIG{arguments.signal}"]
    attempted = [
        _kill_once(interrupted, at_step, kind, signal_number)
        for at_step, kind in planned_kills(plan, arguments.kills, arguments.seed)
    ]
    kills = [kill for kill in attempted if kill is not None]
    _run_to_end(interrupted)
    end = time.monotonic()
    comparison = compare_runs(whole, interrupted, tolerance=0.0 if plan.shape.device == "cpu" else GPU_TOLERANCE)
    if len(kills) < arguments.kills:
        comparison["equal"] = False
        comparison["problems"].append(
            f"only {len(kills)} of {arguments.kills} kills happened before the run ended: increase --steps"
        )
    seconds = {"whole": round(middle - start, 1), "interrupted": round(end - middle, 1)}
    return {"kills": kills, "seconds": seconds, **comparison}


def planned_kills(plan: Plan, number: int, seed: int) -> Iterator[tuple[int, str]]:
    """The earliest step of each kill, ascending, and what the run should be doing at that moment.

    Args:
        plan: of both runs.
        number: of kills, less than the plan's steps.
        seed: of the choice.
    """
    moments = random.Random(f"kills:{seed}")
    steps = sorted(moments.sample(range(plan.steps), number))
    kinds = ["saving"] if plan.recipe.dcp_save_interval else []
    kinds += ["sampling"] if plan.recipe.method == "rft" else []
    kinds += ["training"]
    for index, step in enumerate(steps):
        yield step, kinds[index % len(kinds)]


def _kill_once(run: RunDir, at_step: int, kind: str, signal_number: signal.Signals) -> dict[str, Any] | None:
    """Start the run and kill it; None where it ended before the moment came."""
    is_now = _moment(run, at_step, kind)
    process = _start(run)
    while not is_now():
        if process.poll() is not None:
            if process.returncode != EXIT_FINISHED:
                raise LaunchError(f"{run.root}: failed by itself, exit code {process.returncode}. {_see(run)}")
            return None
        time.sleep(POLL_S)
    step = run.newest_logged_step()
    kept = max(0, run.newest_checkpoint_step())
    if signal_number == signal.SIGKILL:
        kill_with_descendants(process.pid)
    else:
        process.send_signal(signal_number)
    code = process.wait()
    if signal_number != signal.SIGKILL:
        if code not in (EXIT_PREEMPTED, EXIT_FINISHED):
            raise LaunchError(f"{run.root}: did not stop cleanly when asked, exit code {code}. {_see(run)}")
        step, kept = run.newest_logged_step(), max(0, run.newest_checkpoint_step())
    run.wait_unlocked()
    _say(f"{run.root}: {signal_number.name} at step {step} while {kind}")
    return {"at_step": step, "phase": kind, "newest_checkpoint": kept, "steps_repeated": step - kept}


def _moment(run: RunDir, at_step: int, kind: str) -> Callable[[], bool]:
    """A condition: whether the moment for a kill has come."""
    part_of_step = random.Random(f"{run.root.name}:{at_step}").random()
    reached: list[float] = []

    def is_now() -> bool:
        record = run.newest_record() or {"step": 0}
        step = record["step"]
        if step < at_step:
            return False
        if kind == "saving":
            return bool(run.unfinished_checkpoints())
        if kind == "sampling":
            return bool(run.journal_chunks(step))  # one chunk is written, the next is being sampled
        reached.append(time.monotonic())
        return reached[-1] - reached[0] > part_of_step * record.get("perf/step_s", 0.0)

    return is_now


def _run_to_end(run: RunDir) -> None:
    if run.is_finished(run.read_plan().steps):
        return
    code = _start(run).wait()
    if code != EXIT_FINISHED:
        raise LaunchError(f"{run.root}: failed with exit code {code}; nothing to compare. {_see(run)}")


def _start(run: RunDir) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-m", "trainer", "train", str(run.root)]
    return subprocess.Popen(argv, stdout=subprocess.DEVNULL)


def _see(run: RunDir) -> str:
    return f"See: trainer status {run.root}"


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
