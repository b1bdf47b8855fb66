"""What a benchmark ran on, and the machine's measured peak: stated beside every number."""

from __future__ import annotations

import platform
import time
from pathlib import Path
from typing import Any

import torch


def conditions() -> dict[str, Any]:
    """Machine, threads, versions and the load at the time."""
    import peft
    import transformers
    import trl

    processor = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    flags = Path("/proc/cpuinfo").read_text()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor,
        "amx": "amx_bf16" in flags,
        "avx512_bf16": "avx512_bf16" in flags,
        "threads": torch.get_num_threads(),
        "load_average": [round(value, 2) for value in __import__("os").getloadavg()],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
        "peft": peft.__version__,
        "bf16_peak_gflops": round(matrix_peak() / 1e9),
    }


def matrix_peak(seconds: float = 1.0) -> float:
    """FLOP/s of a large bfloat16 matrix product, the best of several."""
    left, right = (torch.randn(2048, 2048, dtype=torch.bfloat16) for _ in range(2))
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = time.perf_counter()
        left @ right
        best = max(best, 2 * 2048**3 / (time.perf_counter() - begin))
    return best
