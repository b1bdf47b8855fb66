"""What `rollout.staleness: 1` saves: step time against 0, alternating in one run of this script.

Beside the learner works a reward that sleeps (local sampler, tiny model), or with --vllm PYTHON a vLLM that draws
(SmolLM2-135M).

    .venv/bin/python benchmarks/staleness.py [--rounds 3] [--vllm .venv-vllm/bin/python]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests")]
MODEL: Final = ROOT / "models" / "SmolLM2-135M-Instruct"
STEPS: Final = 6
REWARD: Final = """\
import time
def slow(completion, row):
    time.sleep({sleep_s})
    return 0.01 * len(completion) + sum(letter.isdigit() for letter in completion)
"""


def recipe(name: str, staleness: int, vllm: str | None) -> dict[str, Any]:
    """The recipe of one training."""
    rollout: dict[str, Any] = {"group_size": 4, "max_completion_tokens": 24, "chunk_prompts": 4, "staleness": staleness}
    if vllm is not None:
        rollout |= {"sampler": "vllm", "vllm": {"python": vllm}}
    return {
        "name": name,
        "method": "rft",
        "model": {"path": str(MODEL)} if vllm is not None else {"path": "tiny", "compute_dtype": "float32"},
        "lora": {"rank": 8},
        "data": {"train": "train.jsonl", "max_seq_tokens": 256},
        "rows_per_step": 4,
        "steps": STEPS,
        "algorithm": {"mismatch_cap": 2.0, "epochs_per_batch": 8},
        "rollout": rollout,
        "rewards": [{"use": "reward.py:slow"}],
        "optimizer": {"learning_rate": 1e-4},
        "shape": "cpu",
    }


def step_s(home: Path, name: str, staleness: int, vllm: str | None) -> float:
    """Median time of the steps but the first, which a run ahead begins without anything drawn."""
    (home / f"{name}.yaml").write_text(json.dumps(recipe(name, staleness, vllm)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "trainer.worker", f"{name}.yaml"]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    lines = (home / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return statistics.median(json.loads(line)["perf/step_s"] for line in lines[1:-1])


def main() -> None:
    """Measure and print one line per round, then the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sleep-s", type=float, default=0.1, help="of the reward, for each of 16 completions")
    parser.add_argument("--vllm", metavar="PYTHON", help="draw on a vLLM that the run starts")
    arguments = parser.parse_args()
    found: dict[int, list[float]] = {0: [], 1: []}
    with tempfile.TemporaryDirectory(prefix="staleness-") as directory:
        home = Path(directory)
        if arguments.vllm is None:
            from tiny import tiny_model_dir

            tiny_model_dir(home / "tiny")
        rows = [{"prompt": f"What is {number} + 4? Explain.", "answer": str(number + 4)} for number in range(40)]
        (home / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        sleep_s = 0.0 if arguments.vllm else arguments.sleep_s
        (home / "reward.py").write_text(REWARD.format(sleep_s=sleep_s))
        for number in range(arguments.rounds):
            for staleness in (0, 1) if number % 2 == 0 else (1, 0):
                found[staleness].append(step_s(home, f"k{staleness}-{number}", staleness, arguments.vllm))
            print(f"round {number + 1}: k=0 {found[0][-1]:.2f} s, k=1 {found[1][-1]:.2f} s a step", flush=True)
    medians = {staleness: statistics.median(values) for staleness, values in found.items()}
    load = os.getloadavg()[0]
    print(
        f"k=0 {medians[0]:.2f} s, k=1 {medians[1]:.2f} s: {medians[0] / medians[1]:.2f} times faster; load {load:.1f}"
    )


if __name__ == "__main__":
    main()
