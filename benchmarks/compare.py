"""Compare SFT, RFT and sampling with TRL and `generate`; measure memory and start-up time.

    python benchmarks/compare.py [--threads 1] [--rounds 3] [--only start,memory,sft,rft,rft_long,sampling]

Each part is a separate process with a fixed number of threads; within it, both sides alternate. Writes
benchmarks/results/compare.json and compare.md, and keeps earlier results of parts that are not measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
RECIPE = "recipes/sft_quickstart.yaml"
BIN = Path(sys.executable).parent


def main() -> None:
    """Run the parts and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="start,memory,sft,rft,rft_long,sampling")
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": str(arguments.threads), "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    rounds = str(arguments.rounds)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "start": lambda: _start(arguments.rounds),
        "memory": _memory,
        "sft": lambda: _script("sft_vs_trl.py", "--rounds", rounds, "--steps", "2"),
        "rft": lambda: _script("rft_vs_trl.py", "--rounds", rounds, "--steps", "1"),
        "rft_long": lambda: _script(
            "rft_vs_trl.py", "--prompts", "8", "--tokens", "128", "--rounds", "1", "--steps", "1", "--trl-rows", "16"
        ),
        "sampling": lambda: _script("sampling.py", "--rounds", rounds),
    }
    file = RESULTS / "compare.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for name in arguments.only.split(","):
        print(f"{name} ...", file=sys.stderr, flush=True)
        results[name] = {"date": time.strftime("%Y-%m-%d"), "load": os.getloadavg()[0], **parts[name]()}
        file.write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / "compare.md").write_text("\n".join(_lines(results)) + "\n")
    print((RESULTS / "compare.md").read_text())


def _script(name: str, *arguments: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result"
        subprocess.run([sys.executable, str(HERE / name), *arguments, "--out", str(out)], check=True)
        return {"table": out.with_suffix(".md").read_text(), "result": json.loads(out.with_suffix(".json").read_text())}


def _memory() -> dict[str, Any]:
    sides = {}
    for side in ("ours", "trl"):
        argv = [sys.executable, str(HERE / "peak_memory.py"), side]
        done = subprocess.run(argv, check=True, capture_output=True, text=True)
        sides[side] = json.loads(done.stdout.splitlines()[-1])
    return sides | {"ratio": sides["ours"]["peak_gib"] / sides["trl"]["peak_gib"]}


def _start(rounds: int) -> dict[str, Any]:
    trainer = str(BIN / "trainer")
    results = {
        "help_s": _seconds([trainer, "--help"], rounds),
        "check_s": _seconds([trainer, "check", RECIPE], rounds),
    }
    name = f"first_step_{int(time.time())}"
    begin = time.time()
    argv = [trainer, "train", RECIPE, "--name", name, "--set", "steps=1", "--set", "data.eval=null"]
    subprocess.run(
        [*argv, "--set", "dcp_save_interval=0", "--set", "eval_interval=0", "--set", "optimizer.warmup_steps=0"],
        check=True,
        capture_output=True,
    )
    first = json.loads((Path("runs") / name / "metrics.jsonl").read_text().splitlines()[0])
    step_s = first["perf/step_s"]
    return results | {"launch_to_first_step_s": first["time"] - begin - step_s, "first_step_s": step_s}


def _seconds(argv: list[str], rounds: int) -> float:
    times = []
    for _ in range(rounds + 1):  # the first one warms the disk cache
        begin = time.perf_counter()
        subprocess.run(argv, check=True, capture_output=True)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def _lines(results: dict[str, Any]) -> list[str]:
    lines = ["# Side by side", "", "Made by `python benchmarks/compare.py`; each part states its own conditions.", ""]
    if "start" in results:
        start = results["start"]
        lines += [
            f"## Start ({start['date']}, load {start['load']:.1f})",
            "",
            f"- `trainer --help`: {start['help_s']:.2f} s; `trainer check`: {start['check_s']:.2f} s",
            f"- from launch to the first step of the SFT quickstart: {start['launch_to_first_step_s']:.1f} s",
            "",
        ]
    if "memory" in results:
        memory = results["memory"]
        lines += [
            f"## Peak resident memory of two SFT steps ({memory['date']})",
            "",
            f"tunesmith {memory['ours']['peak_gib']:.2f} GiB, TRL {memory['trl']['peak_gib']:.2f} GiB "
            f"(imports alone {memory['ours']['libraries_gib']:.2f}): ratio {memory['ratio']:.2f}",
            "",
        ]
    for name, title in (("sft", "SFT"), ("rft", "RFT"), ("rft_long", "RFT, longer"), ("sampling", "Sampling")):
        if name in results:
            lines += [
                f"## {title} (load at the start: {results[name]['load']:.1f})",
                "",
                results[name]["table"].strip(),
                "",
            ]
    return lines


if __name__ == "__main__":
    main()
