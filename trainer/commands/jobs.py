"""`trainer submit`, `jobs`, `cancel` and `reconnect`."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, final

from trainer.commands.status import describe_run
from trainer.commands.tables import table_lines
from trainer.errors import LaunchError, TrainerError
from trainer.jobs.job import Job, jobs, reconnect_and_wait, submit_plan
from trainer.jobs.kubernetes_job import kubernetes_job
from trainer.jobs.remote import RemoteRun
from trainer.jobs.sky_task import sky_task
from trainer.jobs.slurm_queue import Ask, QueueSnapshot
from trainer.jobs.slurm_script import SlurmOptions, batch_script
from trainer.jobs.start import stop_job
from trainer.jobs.state import Launcher, observe, project_place, read_record
from trainer.planning.plan import Plan
from trainer.run.console import tell
from trainer.run.directory import RunDir
from trainer.run.find import find_run, named_run
from trainer.run.plan_recipe import plan_recipe

REMOTE: Final = {"sky": ("task.yaml", "sky jobs launch"), "k8s": ("job.yaml", "kubectl create -f")}
"""Launchers whose document the user submits: a name for its file, and the command."""


def submit(arguments: argparse.Namespace) -> int:
    """Start a run in the background; prints the job id, or with --print only the batch script."""
    plan = plan_recipe(Path(arguments.recipe), arguments.set, arguments.shape)
    for warning in plan.warnings:
        sys.stderr.write(f"warning: {warning}\n")
    _refuse_other_options(arguments)
    if arguments.launcher in REMOTE:
        sys.stdout.write(_remote_document(arguments, plan))
        return 0
    options = SlurmOptions(arguments.partition, arguments.time, _extra(arguments.slurm))
    if arguments.launcher != "slurm" and (arguments.print or options != SlurmOptions()):
        raise LaunchError("--print, --partition, --time and --slurm go with --launcher slurm")
    if arguments.print:
        run = named_run(plan.recipe.name if arguments.name is None else arguments.name)
        sys.stdout.write(batch_script(run, plan, options, Path.cwd()))
        return 0
    job = submit_plan(plan, arguments.launcher, name=arguments.name, slurm=options, overwrites=arguments.overwrite)
    sys.stderr.write(f"{job.state().lower()}; to watch it: trainer status {job.id} --follow\n")
    sys.stdout.write(f"{job.id}\n")
    return 0


def _refuse_other_options(arguments: argparse.Namespace) -> None:
    """Stop at an option of another launcher, and where a remote launcher is to submit.

    Raises:
        LaunchError: there is one.
    """
    for name in REMOTE:
        if getattr(arguments, name) and arguments.launcher != name:
            raise LaunchError(f"--{name} goes with --launcher {name}")
    if arguments.launcher not in REMOTE:
        return
    if arguments.partition or arguments.time or arguments.slurm:
        raise LaunchError("--partition, --time and --slurm go with --launcher slurm")
    if not arguments.print:
        file, command = REMOTE[arguments.launcher]
        raise LaunchError(
            f"--launcher {arguments.launcher} submits nothing itself. Add --print > {file}, then: {command} {file}"
        )


def _remote_document(arguments: argparse.Namespace, plan: Plan) -> str:
    run = named_run(plan.recipe.name if arguments.name is None else arguments.name)
    remote = RemoteRun.of(plan, Path(arguments.recipe), run, arguments.set, Path.cwd())
    if arguments.launcher == "sky":
        return sky_task(remote, _extra(arguments.sky))
    return kubernetes_job(remote, _extra(arguments.k8s))


def _extra(given: list[str]) -> dict[str, str]:
    """Options of sbatch as typed.

    >>> _extra(["account=research", "exclusive"])
    {'account': 'research', 'exclusive': ''}
    """
    parts = (assignment.removeprefix("--").partition("=") for assignment in given)
    return {name: value for name, _, value in parts}


@final
@dataclass(frozen=True)
class JobStatus:
    """One entry of `trainer jobs --json`."""

    job: str
    state: str
    step: int
    steps: int
    launcher: Launcher
    slurm_id: str | None


def list_jobs(arguments: argparse.Namespace) -> int:
    """List every submitted run of this directory."""
    snapshot = QueueSnapshot()
    submitted = [job for job in jobs() if read_record(RunDir(job.run_dir)) is not None]
    statuses = [_status(job, snapshot.find) for job in submitted]
    if arguments.json:
        sys.stdout.write(json.dumps([asdict(status) for status in statuses]) + "\n")
        return 0
    rows = [(each.job, each.state, f"step {each.step} of {each.steps}", _launcher(each)) for each in statuses]
    if not rows:
        return 0
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    header = [("job", "state", "progress", "launcher")] if width is not None else []  # not in pipes: one line a job
    sys.stdout.write("".join(f"{line}\n" for line in table_lines([*header, *rows], width=width)))
    return 0


def _launcher(job: JobStatus) -> str:
    return f"Slurm job {job.slurm_id}" if job.slurm_id else job.launcher


def _status(job: Job, ask: Ask) -> JobStatus:
    run = RunDir(job.run_dir)
    record = read_record(run)
    try:
        state = str(observe(run, ask=ask).job)
    except (TrainerError, OSError) as error:
        state = f"unknown: {error}"
    progress = describe_run(run, ask)
    launcher: Launcher = record.launcher if record is not None else "local"
    slurm_id = record.slurm_id if record is not None else None
    return JobStatus(job.id, state, progress.step, progress.steps, launcher, slurm_id)


def cancel(arguments: argparse.Namespace) -> int:
    """Let a run save and end; only the user starts it again."""
    run = find_run(arguments.job)
    stop_job(run)
    sys.stderr.write(f"{run.root}: cancelled; it saves after this step. To resume: trainer reconnect {run.root}\n")
    return 0


def reconnect(arguments: argparse.Namespace) -> int:
    """Join a run, or resume it and wait for its first step; prints the job id."""
    run = find_run(arguments.job)
    notice = project_place(run).notice(run)
    if notice is not None:
        tell(notice)
    job = reconnect_and_wait(arguments.job, poll_interval_s=1.0, timeout_s=arguments.timeout)
    sys.stderr.write(f"{job.state().lower()}\n")
    sys.stdout.write(f"{job.id}\n")
    return 0
