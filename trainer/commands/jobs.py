"""`trainer submit`, `jobs`, `cancel` and `reconnect`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from trainer.commands.status import describe_run
from trainer.config.load import load_recipe
from trainer.errors import LaunchError, TrainerError
from trainer.jobs.job import Job, jobs, reconnect_and_wait, submit_plan
from trainer.jobs.slurm_script import SlurmOptions, batch_script
from trainer.jobs.start import stop_job
from trainer.jobs.state import read_record
from trainer.planning.plan import make_plan
from trainer.run.directory import RunDir
from trainer.run.find import find_run


def submit(arguments: argparse.Namespace) -> int:
    """Start a run and leave; prints the job id, or only the batch script."""
    plan = make_plan(load_recipe(Path(arguments.recipe), arguments.set), arguments.shape)
    for warning in plan.warnings:
        sys.stderr.write(f"warning: {warning}\n")
    options = SlurmOptions(arguments.partition, arguments.time, _extra(arguments.slurm))
    if arguments.launcher != "slurm" and (arguments.print or options != SlurmOptions()):
        raise LaunchError("--print, --partition, --time and --slurm go with --launcher slurm")
    if arguments.print:
        run = RunDir(Path("runs") / (arguments.name or plan.recipe.name))
        sys.stdout.write(batch_script(run, plan, options, Path.cwd()))
        return 0
    job = submit_plan(plan, arguments.launcher, name=arguments.name, slurm=options)
    state = job.state()
    sys.stderr.write(f"{state.lower()}; `trainer status {job.id} --follow` shows it\n")
    sys.stdout.write(f"{job.id}\n")
    return 0


def _extra(given: list[str]) -> dict[str, str]:
    """Options of sbatch as typed.

    >>> _extra(["account=research", "exclusive"])
    {'account': 'research', 'exclusive': ''}
    """
    parts = (assignment.removeprefix("--").partition("=") for assignment in given)
    return {name: value for name, _, value in parts}


def list_jobs(arguments: argparse.Namespace) -> int:
    """Every submitted run of this directory."""
    table = [_about(job) for job in jobs()]
    if arguments.json:
        sys.stdout.write(json.dumps(table) + "\n")
        return 0
    width = max((len(str(each["job"])) for each in table), default=0)
    for each in table:
        where = f"Slurm job {each['slurm_id']}" if each["slurm_id"] else each["launcher"]
        steps = f"step {each['step']} of {each['steps']}"
        sys.stdout.write(f"{each['job']:<{width}}  {each['state']:<9}  {steps}  {where}\n")
    return 0


def _about(job: Job) -> dict[str, object]:
    run = RunDir(job.run_dir)
    record = read_record(run)
    assert record is not None, "jobs() lists what was submitted"
    try:
        state = str(job.state())
    except (TrainerError, OSError) as error:
        state = f"unknown: {error}"
    about = describe_run(run)
    return {
        "job": job.id,
        "state": state,
        "step": about["step"],
        "steps": about["steps"],
        "launcher": record.launcher,
        "slurm_id": record.slurm_id,
    }


def cancel(arguments: argparse.Namespace) -> int:
    """Let a run save and end; nobody starts it again but the user."""
    run = find_run(arguments.job)
    stop_job(run)
    sys.stderr.write(f"{run.root}: cancelled; it saves after this step. `trainer reconnect {run.root}` goes on\n")
    return 0


def reconnect(arguments: argparse.Namespace) -> int:
    """Join a run, or resume it and wait for its first step; prints the job id."""
    job = reconnect_and_wait(arguments.job, poll_interval_s=1.0, timeout_s=arguments.timeout)
    sys.stderr.write(f"{job.state().lower()}\n")
    sys.stdout.write(f"{job.id}\n")
    return 0
