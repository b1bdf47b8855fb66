"""scripts/gpu_day: parts run once, a part that hangs is ended, and predictions stand beside what was measured."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
gpu_day: Any = importlib.import_module("gpu_day")


def part(code: str, limit_s: float = 60) -> Any:
    return gpu_day.Part("part", [sys.executable, "-c", code], limit_s)


def test_a_finished_part_is_skipped_and_a_failed_one_repeated(tmp_path):
    assert gpu_day.run(part("raise SystemExit(3)"), tmp_path) == 3
    assert gpu_day.run(part("print('ran')"), tmp_path) == 0
    assert (tmp_path / "part.log").read_text() == "ran\n"
    assert gpu_day.run(part("raise SystemExit(3)"), tmp_path) == 0, "it is done"


def test_a_part_that_hangs_is_ended_and_its_log_kept(tmp_path):
    code = "import time; print('begun', flush=True); time.sleep(60)"
    assert gpu_day.run(part(code, limit_s=3), tmp_path) == 124
    assert (tmp_path / "part.log").read_text() == "begun\n"


def test_measured_beside_predicted():
    result = json.loads((ROOT / "benchmarks" / "results" / "gpu.json").read_text())
    lines = gpu_day.compared(result)
    assert lines[0] == "NVIDIA H100 80GB HBM3"
    assert any(line.startswith("| SFT LoRA Qwen2.5-1.5B | 185 | ") and " to " in line for line in lines)
