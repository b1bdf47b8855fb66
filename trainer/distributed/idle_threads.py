"""How long idle OpenMP threads spin before they sleep; the worker, and only it, decides this before torch is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

SHARED: Final = 500
"""Spin count on a machine that others use: 230 tokens/s beside three busy processes, as without spinning (227)."""
OWN: Final = 2_000
"""Spin count on a quiet machine: 450 tokens/s on two cores where sleeping at once gives 370. A count of 200,000 gives
484, and 35 as soon as other processes need the cores (docs/log.md), which nobody can know at the start."""
QUIET_LOAD: Final = 0.5
"""Load per core, over the last minute, below which the machine counts as quiet."""
CHOSEN_BY_USER: Final = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
"""Not KMP_BLOCKTIME: accelerate sets it, and only Intel's library reads it."""
CGROUP: Final = Path("/sys/fs/cgroup/cpu.max")


@final
@dataclass(frozen=True)
class IdleThreads:
    """What idle threads do, and why: spin 2000, "a quiet machine"."""

    spin: int | None
    """Iterations before a thread sleeps; None if the environment decides."""
    reason: str

    def apply(self, environment: MutableMapping[str, str]) -> None:
        """Set the variable that GNU's OpenMP library reads when it is loaded."""
        if self.spin is not None:
            environment["GOMP_SPINCOUNT"] = str(self.spin)

    def __str__(self) -> str:
        return self.reason if self.spin is None else f"spin {self.spin:,}: {self.reason}"


def choose_idle_threads(
    asked: int | None, environment: Mapping[str, str], *, cores: int, quota: float | None, load: float
) -> IdleThreads:
    """Choose between sleeping at once, which costs time at every parallel region, and spinning, which costs others.

    Args:
        asked: `idle_spin` of the shape.
        environment: variables of this process; torchrun sets LOCAL_WORLD_SIZE and OMP_NUM_THREADS.
        cores: that this process may use.
        quota: cores by the cgroup's quota; None without one.
        load: average over the last minute.
    """
    if asked is not None:
        return IdleThreads(asked, "the shape's idle_spin")
    for name in CHOSEN_BY_USER:
        if name in environment:
            return IdleThreads(None, f"{name}={environment[name]}")
    ranks = _number(environment, "LOCAL_WORLD_SIZE", 1)
    if ranks * _number(environment, "OMP_NUM_THREADS", cores) > cores:
        return IdleThreads(0, "more threads than cores")
    if quota is not None and quota < cores:
        return IdleThreads(SHARED, f"the cgroup allows {quota:g} of {cores} cores")
    if load > QUIET_LOAD * cores:
        return IdleThreads(SHARED, f"load {load:.1f} on {cores} cores")
    return IdleThreads(OWN, "a quiet machine")


def idle_threads_here(asked: int | None) -> IdleThreads:
    """Choose for this process.

    Args:
        asked: `idle_spin` of the shape.
    """
    return choose_idle_threads(
        asked, os.environ, cores=len(os.sched_getaffinity(0)), quota=cpu_quota(), load=os.getloadavg()[0]
    )


def cpu_quota(file: Path = CGROUP) -> float | None:
    """Cores that the control group may use on average; None without a limit or without version 2 of control groups.

    Args:
        file: holds the quota and the period in microseconds, "150000 100000", or "max 100000".
    """
    try:
        quota, period = file.read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    """The number that a variable holds; of a list for nested regions ("4,2") the first."""
    try:
        return int(environment[name].partition(",")[0])
    except (KeyError, ValueError):
        return default
