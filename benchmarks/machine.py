"""Machine and versions of a benchmark, and the machine's measured peak."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import torch

CPU: Final = torch.device("cpu")
PEAK_ROWS: Final = {"cpu": 2048, "cuda": 8192}
"""Rows and columns of the square product that the peak is measured with."""


def conditions(device: torch.device = CPU, *, peak_seconds: float = 1.0) -> dict[str, Any]:
    """Machine, threads, versions and current load."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    models = [line.split(":", 1)[1].strip() for line in cpuinfo.splitlines() if "model name" in line]
    facts: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": _said(["git", "rev-parse", "--short", "HEAD"]),
        "processor": models[0] if models else platform.processor(),
        "amx": "amx_bf16" in cpuinfo,
        "avx512_bf16": "avx512_bf16" in cpuinfo,
        "threads": torch.get_num_threads(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "transformers", "trl", "peft")},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "driver": _said(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
            "cuda": torch.version.cuda,
        }
    return facts | {"bf16_peak_gflops": round(matrix_peak(device, peak_seconds) / 1e9)}


def matrix_peak(device: torch.device = CPU, seconds: float = 1.0) -> float:
    """FLOP/s of a large bfloat16 matrix product, the best of several."""
    rows = PEAK_ROWS[device.type]
    left, right = (torch.randn(rows, rows, dtype=torch.bfloat16, device=device) for _ in range(2))
    repeats = 1 if device.type == "cpu" else 10  # so that kernel launch time is negligible
    best, end = 0.0, time.perf_counter() + seconds
    while best == 0.0 or time.perf_counter() < end:
        begin = now(device)
        for _ in range(repeats):
            left @ right
        best = max(best, repeats * 2 * rows**3 / (now(device) - begin))
    return best


def now(device: torch.device) -> float:
    """Clock in seconds, after the device has finished its queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _said(argv: list[str]) -> str | None:
    """The first line that a command prints; None if the command does not exist."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().partition("\n")[0] or None
