"""The Slurm batch script of a run, as text."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import indent
from typing import Final, final

from trainer.config.shape import TrainingShape
from trainer.errors import LaunchError
from trainer.planning.plan import Plan
from trainer.run.directory import RunDir
from trainer.run.protocol import LAUNCHER, SHUTDOWN_TIMEOUT

MARGIN_S: Final = 30
"""Slurm signals the script this long plus the grace period before the time limit."""
SIGNALS: Final = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
"""Signals that torchrun forwards; SIGUSR1 would otherwise kill it and orphan its workers."""


@final
@dataclass(frozen=True)
class SlurmOptions:
    """Options of `sbatch` that do not follow from recipe and shape."""

    partition: str | None = None
    """Partition; the cluster's default when None."""
    time_limit: str | None = None
    """As Slurm writes it: minutes, or `days-hours:minutes:seconds`."""
    extra: Mapping[str, str] = field(default_factory=dict)
    """Any other long option of sbatch, for example `{"account": "research", "exclusive": ""}`."""

    def refuse_unusable(self) -> None:
        """Stop at options with which a run cannot work.

        Raises:
            LaunchError: there is one.
        """
        if {"array", "a"} & self.extra.keys():
            raise LaunchError("--slurm array: every task of the array would be the same run. Submit several recipes.")

    def job_name(self, run: RunDir) -> str:
        """Slurm's name of the job."""
        return self.extra.get("job-name", run.name)


def batch_script(run: RunDir, plan: Plan, options: SlurmOptions, directory: Path, python: str = sys.executable) -> str:
    """The script for `sbatch`: it runs the run, forwards signals, and requests a requeue after a preemption.

    Args:
        run: the run directory; relative to `directory`, or absolute.
        plan: of the run.
        options: of `sbatch`.
        directory: absolute working directory; relative paths of the recipe start there.
        python: the interpreter, the same on every node.

    Raises:
        LaunchError: an option cannot be used.
    """
    options.refuse_unusable()
    sections = [
        "#!/bin/bash",
        *_directives(run, plan, options),
        "# Written by `trainer submit`. A requeued job runs it again and resumes from the newest checkpoint.",
        f"cd {shlex.quote(str(directory))} || exit 1",
        _PROLOGUE.format(
            cancelled=shlex.quote(str(run.cancel_file)),
            outcome=shlex.quote(str(run.outcome_file)),
            progress=f"{shlex.quote(str(run.checkpoints))} {shlex.quote(str(run.rollouts))}",
        ),
        _command(run, plan, shlex.quote(python)),
        _EPILOGUE,
    ]
    return "\n".join(sections)


def _directives(run: RunDir, plan: Plan, options: SlurmOptions) -> list[str]:
    shape = plan.shape
    lead_s = math.ceil(plan.recipe.recovery.grace_period_s) + MARGIN_S
    given = {
        "job-name": run.name,
        "nodes": str(shape.nodes),
        "ntasks-per-node": "1",
        **({"gpus-per-node": str(shape.gpus // shape.nodes)} if shape.device == "cuda" else {}),
        "output": str(run.of_job("logs/slurm-%j.log")),
        "open-mode": "append",
        "requeue": "",
        "signal": f"B:USR1@{lead_s}",
        **({"partition": options.partition} if options.partition else {}),
        **({"time": options.time_limit} if options.time_limit else {}),
        **options.extra,
    }
    return [f"#SBATCH --{name}" + (f"={value}" if value else "") for name, value in given.items()]


def _command(run: RunDir, plan: Plan, python: str) -> str:
    """The job step: the supervisor on one node; torchrun on each of several, started again after a crash."""
    target = shlex.quote(str(run.root))
    srun = "srun --ntasks-per-node=1 --kill-on-bad-exit=1"
    if plan.shape.nodes == 1:
        return f"{srun} {python} -m trainer train {target} --resubmitted &\n{_WAIT}"
    grace_s = math.ceil(plan.recipe.recovery.grace_period_s)
    launch = " \\\n  ".join(_torchrun(plan.shape, python, grace_s))
    step = indent(f"{srun} {launch} \\\n  -m trainer.worker {target} &\n{_WAIT}".rstrip("\n"), "  ")
    again = f"{python} -m trainer.launch.again {target}"
    return f"{_RENDEZVOUS}export {SHUTDOWN_TIMEOUT}={grace_s}\n" + _STEPS.format(again=again, step=step)


def _torchrun(shape: TrainingShape, python: str, grace_s: int) -> list[str]:
    return [
        f"{python} -m torch.distributed.run --nnodes {shape.nodes} --nproc-per-node {shape.ranks_per_node}",
        '--rdzv-backend c10d --rdzv-endpoint "$address:$((10000 + SLURM_JOB_ID % 20000))"',
        '--rdzv-id "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}.$number"',
        f"--signals-to-handle {SIGNALS} --shutdown-timeout {grace_s}",
    ]


_PROLOGUE: Final = """\
cancelled={cancelled} outcome={outcome} asked= step= number=0 gave_up=

forward() {{   # to the job step, once it exists
  asked=$1
  echo "asked to stop by SIG$1" >&2
  while kill -0 "$step" 2>/dev/null && ! scancel --signal=TERM "$SLURM_JOB_ID.$number" 2>/dev/null; do sleep 1; done
}}
trap 'forward USR1' USR1   # near the time limit; or at a preemption, where Slurm is configured to signal it
trap 'forward TERM' TERM   # requeue or scancel

progress() {{ ls -R {progress} 2>/dev/null | cksum; }}
job_field() {{ scontrol --oneliner show job "$SLURM_JOB_ID" | sed -n "s/.* $1=\\([^ ]*\\).*/\\1/p"; }}

if [ -e "$cancelled" ]; then
  echo "cancelled; \\`trainer reconnect\\` resumes it" >&2
  exit 1
fi
grep -qs '"state": "finished"' "$outcome" || rm -f "$outcome"   # an outcome that exists later was written by this start
before=$(progress)
[ -z "${{SLURM_CPUS_PER_TASK:-}}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK   # srun does not inherit it
"""

_RENDEZVOUS: Final = f"""\
export {LAUNCHER}=slurm TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 PYTHONUNBUFFERED=1
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol --oneliner show node "$first" | sed -n 's/.* NodeAddr=\\([^ ]*\\).*/\\1/p')
"""

_WAIT: Final = """\
step=$!
[ -z "$asked" ] || forward "$asked"   # a signal that came before the job step existed
while wait "$step"; code=$?; kill -0 "$step" 2>/dev/null; do :; done   # a signal interrupts wait
"""

_STEPS: Final = """\
was_told() {{ [ -n "$asked" ] || [ -e "$cancelled" ] || [ "$(job_field PreemptTime)" != None ]; }}
restarts=$({again}) || exit 1
while :; do
{step}
  [ "$code" -ne 0 ] && ! was_told || break
  # A rank or a launcher died: another step of this job goes on from the newest checkpoint, if `again` allows it.
  restarts=$({again} $restarts) || {{ gave_up=1; break; }}
  [ -n "$asked" ] || {{ sleep "${{restarts##* }}" & wait $!; }}   # a signal ends the wait
  [ -e "$cancelled" ] || rm -f "$outcome"
  ! was_told || break
  number=$((number + 1))
done
"""

_EPILOGUE: Final = """\
ended=$(sed -n 's/.*"state": "\\([a-z]*\\)".*/\\1/p' "$outcome" 2>/dev/null)
preempted_at=$(job_field PreemptTime)
[ "$preempted_at" = None ] && preempted_at=
was_stopped() {
  [ -z "$gave_up" ] || return 1   # the same crash again and again
  [ "$ended" = preempted ] || { [ -z "$ended" ] && [ -n "$asked$preempted_at" ]; }
}
# Slurm requeues only jobs that still run when the grace time ends. A cancelled run is not requeued.
if was_stopped && [ ! -e "$cancelled" ] && [ "$(job_field JobState)" = RUNNING ]; then
  if [ "$asked" = USR1 ] && [ -z "$preempted_at" ] && [ "$(progress)" = "$before" ]; then
    echo "nothing was saved within the time limit: not requeued; submit with a longer --time" >&2
  else
    echo "preempted: requesting a requeue" >&2
    scontrol requeue "$SLURM_JOB_ID"
  fi
fi
exit "$code"
"""
