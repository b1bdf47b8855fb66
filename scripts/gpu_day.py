"""On a machine with a GPU: its tests, the benchmark, and predicted against measured step times. See scripts/gpu_day."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
TESTS_S: Final = 600
BENCHMARK_S: Final = 600


@dataclass(frozen=True)
class Part:
    """One command; its output goes to OUT/<name>.log, and OUT/<name>.done says that it need not run again."""

    name: str
    argv: Sequence[str]
    limit_s: float


def main() -> int:
    """Run the parts that have not been run; 1 if one of them failed."""
    parser = argparse.ArgumentParser(prog="scripts/gpu_day", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu_day"), help="directory of logs and results")
    parser.add_argument(
        "--rehearse", action="store_true", help="on a CPU, tiny sizes: that nothing fails for a silly reason"
    )
    arguments = parser.parse_args()
    out: Path = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    codes = [run(part, out) for part in parts(out, is_rehearsal=arguments.rehearse)]
    if (out / "gpu.json").exists():
        lines = compared(json.loads((out / "gpu.json").read_text()))
        (out / "predicted.md").write_text("\n".join(lines) + "\n")
        sys.stdout.write("\n".join(lines) + "\n")
    return int(any(codes))


def parts(out: Path, *, is_rehearsal: bool) -> list[Part]:
    """The commands in order of their use: what the machine is, whether results are right, how fast it is."""
    size = ["--device", "cpu", "--tiny"] if is_rehearsal else ["--quick"]
    pytest = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider"]
    if not is_rehearsal:
        pytest += ["-n", "4", "--dist", "worksteal"]
    return [
        Part("doctor", [sys.executable, "-m", "trainer.commands.cli", "doctor"], 120),
        Part("tests", pytest, TESTS_S),
        Part("benchmark", [sys.executable, "benchmarks/gpu.py", *size, "--out", str(out)], BENCHMARK_S),
    ]


def run(part: Part, out: Path) -> int:
    """Exit code of a part; 0 without running it where an earlier call finished it, 124 after its time limit."""
    done, log = out / f"{part.name}.done", out / f"{part.name}.log"
    if done.exists():
        sys.stdout.write(f"{part.name}: done before\n")
        return 0
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    start = time.monotonic()
    with log.open("w") as file:
        try:
            code = subprocess.run(
                part.argv, stdout=file, stderr=file, cwd=ROOT, env=environment, timeout=part.limit_s, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code = 124
    sys.stdout.write(f"{part.name}: exit {code} after {time.monotonic() - start:.0f} s; {log}\n")
    sys.stdout.flush()
    if code == 0:
        done.touch()
    return code


def compared(result: dict[str, Any]) -> list[str]:
    """Table of predicted and measured memory and step times of a result of benchmarks/gpu.py."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from gpu_cases import row_lengths
    from random_models import model_facts

    from trainer.config.load import known_devices
    from trainer.config.recipe import LoraSettings
    from trainer.model.flash_choice import problem_of_package
    from trainer.planning.roofline import step_cost

    name = str(result["conditions"].get("gpu", result["conditions"]["processor"]))
    memory = float(result["conditions"].get("gpu_memory_gib", 0))
    device = next((each for each in known_devices().values() if each.is_named(name, memory)), None)
    scale, lines = result["scale"], [f"{name}", "", "| case | measured ms | predicted ms | peak GiB | predicted GiB |"]
    lines.append("|---|---:|---:|---:|---:|")
    for case in result["cases"]:
        if "did_not_run" in case:
            lines.append(f"| {case['name']} | {case['did_not_run']} | | | |")
            continue
        predicted = "-"
        if device is not None and case["name"].startswith("SFT"):
            lengths = row_lengths(scale["pack_tokens"], scale["rows"], 0)
            scored = sum(length - max(1, length // 4) for length in lengths)
            rank = LoraSettings().rank if "LoRA" in case["name"] else None
            cost = step_cost(
                model_facts(scale["model"]),
                device,
                lengths,
                scored,
                rank=rank,
                is_compiled=True,
                uses_flash=device.flash_attention and problem_of_package() is None,
            )
            predicted = " to ".join(f"{1e3 * seconds:.0f}" for seconds in cost.step_s)
        gib = ["-" if case[key] is None else f"{case[key]:.1f}" for key in ("peak_gib", "predicted_gib")]
        lines.append(f"| {case['name']} | {1e3 * case['seconds_per_step']:.0f} | {predicted} | {gib[0]} | {gib[1]} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
