"""The Python that has vLLM, for heavy tests: TUNESMITH_VLLM_PYTHON, or .venv-vllm/bin/python (docs/vllm.md)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import psutil
import pytest

ROOT: Final = Path(__file__).parents[2]
MODEL: Final = ROOT / "models" / "SmolLM2-135M-Instruct"
PYTHON: Final = Path(os.environ.get("TUNESMITH_VLLM_PYTHON") or ROOT / ".venv-vllm" / "bin" / "python")
MARKS: Final = [
    pytest.mark.slow,
    pytest.mark.heavy,
    pytest.mark.model,
    pytest.mark.skipif(
        not PYTHON.is_file(), reason=f"no Python with vLLM: {PYTHON} is missing (TUNESMITH_VLLM_PYTHON)"
    ),
    pytest.mark.skipif(not (MODEL / "config.json").is_file(), reason="no embedded model; run scripts/prepare_model"),
]


def processes_of_vllm(pid: int) -> list[psutil.Process]:
    """The guardian of a vLLM below a process, and everything below it."""
    found: list[psutil.Process] = []
    for child in psutil.Process(pid).children(recursive=True):
        if any("guardian.py" in word for word in child.cmdline()):
            found += [child, *child.children(recursive=True)]
    return found


def is_gone(process: psutil.Process) -> bool:
    """Whether a process has ended."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def server_process(processes: list[psutil.Process]) -> psutil.Process:
    """vLLM's API server among them."""
    return next(each for each in processes if "vllm.entrypoints.openai.api_server" in each.cmdline())


def engine_core(processes: list[psutil.Process]) -> psutil.Process:
    """vLLM's engine among them."""
    return next(each for each in processes if "EngineCor" in each.name())
