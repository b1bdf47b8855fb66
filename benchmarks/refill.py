"""Tokens that are drawn until a held-out reward is reached: `rollout.refill` against plain GRPO, on sums, per seed.

A small part of the quickstart's rows, so that there are several epochs and the memory of `refill` is used.

    .venv/bin/python benchmarks/refill.py [--seeds 0 1 2] [--steps 16]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
OUT: Final = ROOT / "benchmarks" / "results" / "refill.json"
TARGETS: Final = (0.4, 0.6, 0.8)
NUM_TRAIN: Final = 48
NUM_HELD_OUT: Final = 44


def recipe(name: str, seed: int, steps: int, *, refill: bool) -> dict[str, Any]:
    """The recipe of one training."""
    return {
        "name": name,
        "method": "rft",
        "seed": seed,
        "model": {"path": str(ROOT / "models" / "SmolLM2-135M-Instruct")},
        "lora": {"rank": 16, "alpha": 32},
        "data": {"train": "train.jsonl", "eval": "held_out.jsonl", "max_seq_tokens": 128},
        "rows_per_step": 4,
        "steps": steps,
        "optimizer": {"learning_rate": 3e-4, "schedule": "constant"},
        "algorithm": {"name": "grpo", "kl_coef": 0.0, "normalizer": "token"},
        "rollout": {"group_size": 8, "max_completion_tokens": 24, "eval_samples": 2, "refill": refill},
        "rewards": [{"use": "last_number"}],
        "eval_interval": 2,
        "shape": "cpu",
    }


def train(home: Path, name: str, seed: int, steps: int, *, refill: bool) -> list[dict[str, Any]]:
    """The records of metrics.jsonl of one training."""
    (home / f"{name}.yaml").write_text(json.dumps(recipe(name, seed, steps, refill=refill)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "trainer.worker", f"{name}.yaml"]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return [json.loads(line) for line in (home / "runs" / name / "metrics.jsonl").read_text().splitlines()]


def curve(records: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """Tokens drawn so far and held-out reward, at each evaluation."""
    tokens, points = 0, []
    for record in records:
        tokens += int(record.get("rollout/sampled_tokens", 0))
        if "eval/reward" in record:
            points.append((tokens, record["eval/reward"]))
    return points


def tokens_to(points: list[tuple[int, float]], target: float) -> int | None:
    """Tokens drawn until the first evaluation at or above a reward; None if there is none."""
    return next((tokens for tokens, reward in points if reward >= target), None)


def main() -> None:
    """Train and print one line per seed and kind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=16)
    arguments = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory(prefix="refill-") as directory:
        home = Path(directory)
        for source, target, count in (("train", "train", NUM_TRAIN), ("heldout", "held_out", NUM_HELD_OUT)):
            rows = (ROOT / "datasets" / f"sums_{source}.jsonl").read_text().splitlines()
            (home / f"{target}.jsonl").write_text("\n".join(rows[:: len(rows) // count][:count]) + "\n")
        for seed in arguments.seeds:
            for refill in (False, True):
                name = f"{'refill' if refill else 'plain'}-{seed}"
                records = train(home, name, seed, arguments.steps, refill=refill)
                points = curve(records)
                reached = {str(target): tokens_to(points, target) for target in TARGETS}
                flat = [record["rollout/flat_group_frac"] for record in records[1:]]
                share = [record.get("rollout/gradient_token_frac") for record in records[1:]]
                results.append(
                    {
                        "seed": seed,
                        "refill": refill,
                        "curve": points,
                        "tokens_to": reached,
                        "flat": flat,
                        "share": share,
                    }
                )
                shown = ", ".join(f"{target} {tokens or 'not reached'}" for target, tokens in reached.items())
                print(f"{name}: tokens to a held-out reward of {shown}; in all {points[-1]}", flush=True)
    OUT.write_text(json.dumps({"steps": arguments.steps, "load": os.getloadavg()[0], "runs": results}) + "\n")


if __name__ == "__main__":
    main()
