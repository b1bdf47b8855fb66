"""Describes a process start for attempts.jsonl: shape, host, versions."""

from __future__ import annotations

import math
import os
import platform
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

import torch

from trainer.distributed.idle_threads import IdleThreads
from trainer.distributed.world import World
from trainer.planning.identity import reward_digests
from trainer.planning.plan import Plan
from trainer.run.directory import RunDir
from trainer.run.protocol import LAUNCHER, SUPERVISOR_PID

GIT_TIMEOUT_S: Final = 5


def describe_attempt(plan: Plan, run: RunDir, world: World, idle: IdleThreads) -> dict[str, object]:
    """The record of this process start, without its number.

    Args:
        plan: what is trained.
        run: has the records of earlier attempts.
        world: the ranks.
        idle: what idle threads of this process do.
    """
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
        "idle_threads": str(idle),
        "launcher": os.environ.get(LAUNCHER, "accelerate" if "ACCELERATE_MIXED_PRECISION" in os.environ else "python"),
        "supervisor_pid": int(os.environ.get(SUPERVISOR_PID, "0")) or None,
        **_slurm_step(),
        "host": socket.gethostname(),
        "machine": platform.machine(),
        "processor": _processor_name(world.device),
        "python": platform.python_version(),
        "versions": versions,
        "git_commit": _git_commit(),
        "steps": plan.steps,
        "predicted_gib": plan.memory.total_gib if plan.memory is not None else None,
        "argv": sys.argv[1:],
        **_reward_code(plan, run),
    }


def _slurm_step() -> dict[str, str]:
    """Job and step of Slurm: {"slurm_step": "81.1"} is the second start in job 81. Empty elsewhere."""
    job, step = (os.environ.get(name) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return {} if job is None or step is None else {"slurm_step": f"{job}.{step}"}


def _reward_code(plan: Plan, run: RunDir) -> dict[str, object]:
    """Digests of the reward files, and which of them changed since the attempt before.

    For example {"reward_digests": {"mine.py": "sha256:9f86..."}, "changed_rewards": ["mine.py"]}.
    """
    digests = reward_digests(plan.recipe, Path(plan.recipe_dir))
    recorded = [attempt["reward_digests"] for attempt in run.read_attempts() if "reward_digests" in attempt]
    before = recorded[-1] if recorded else plan.reward_digests
    changed = [file for file, digest in digests.items() if before.get(file, digest) != digest]
    return {"reward_digests": digests, "changed_rewards": changed} if digests else {}


def _processor_name(device: torch.device) -> str:
    """Model name of the GPU or CPU."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _git_commit() -> str | None:
    """Commit of the working directory's repository; None outside of one."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, timeout=GIT_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
