"""Compare SFT, RFT and sampling with TRL and `generate`; measure memory and start-up time.

    python benchmarks/compare.py [--threads 1,all] [--rounds 3] [--only start,memory,sft,rft,rft_long,sampling]

SFT and RFT are measured with one thread and with one for each core. With several, each side first runs a trial round
under each of three policies of idle threads, then both run under the policy that was best for each, as processes that
alternate (sides.py). RFT of longer completions takes the policies of RFT. The other parts run with one thread. Writes
benchmarks/results/compare.json and compare.md, and keeps earlier results of parts that are not measured. Run it on a
quiet machine: the load is recorded beside each part.
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sides import alternate

HERE = Path(__file__).parent
RESULTS = HERE / "results"
RECIPE = "recipes/sft_quickstart.yaml"
BIN = Path(sys.executable).parent


def main() -> None:
    """Run the parts and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", default="1,all", help="of sft and rft: numbers, or `all` cores")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="start,memory,sft,rft,rft_long,sampling")
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    rounds, cores = str(arguments.rounds), len(os.sched_getaffinity(0))
    threads = sorted({cores if each == "all" else int(each) for each in arguments.threads.split(",")})
    file = RESULTS / "compare.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "start": lambda: _start(arguments.rounds),
        "memory": _memory,
        "sft": lambda: _sides("sft_vs_trl.py", ["--steps", "2"], threads, arguments.rounds, best_rate),
        "rft": lambda: _sides("rft_vs_trl.py", ["--steps", "1"], threads, arguments.rounds, steps_per_s),
        "rft_long": lambda: _sides(
            "rft_vs_trl.py",
            ["--prompts", "8", "--tokens", "128", "--steps", "1", "--trl-rows", "16"],
            threads,
            1,
            steps_per_s,
            results.get("rft", {}).get("sides", []),
        ),
        "sampling": lambda: _script("sampling.py", "--rounds", rounds),
    }
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


def best_rate(answer: dict[str, Any]) -> float:
    """Tokens/s of an SFT round; of TRL those of its fastest setting."""
    return float(max(answer.values()))


def steps_per_s(answer: dict[str, Any]) -> float:
    """RFT steps a second of a round."""
    return len(answer["steps"]) / sum(seconds for seconds, _ in answer["steps"])


def _sides(
    script: str,
    arguments: list[str],
    threads: list[int],
    rounds: int,
    speed: Callable[[dict[str, Any]], float],
    like: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Both sides with each number of threads; `like` are results whose policies are taken."""
    policies = {each["threads"]: each["policies"] for each in like}
    return {
        "sides": [alternate(script, arguments, each, rounds, speed, policies.get(each)) for each in threads],
        "arguments": arguments,
    }


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
        if "sides" in results.get(name, {}):
            lines += [f"## {title} ({results[name]['date']}, load at the start: {results[name]['load']:.1f})", ""]
            lines += [*(sft_lines if name == "sft" else rft_lines)(results[name]), ""]
        elif name in results:
            lines += [
                f"## {title} (load at the start: {results[name]['load']:.1f})",
                "",
                results[name]["table"].strip(),
                "",
            ]
    return lines


def sft_lines(result: dict[str, Any]) -> list[str]:
    """The table of SFT: medians of tokens/s."""
    lines = [*_conditions(result["sides"]), "", "| threads | side | idle threads | tokens/s |", "|---:|---|---|---:|"]
    ratios = []
    for sides in result["sides"]:
        medians = {
            side: {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
            for side, rounds in sides["rounds"].items()
        }
        for side, rates in medians.items():
            policy = sides["policies"][side]
            lines += [f"| {sides['threads']} | {name} | {policy} | {rate:.0f} |" for name, rate in rates.items()]
        ratio = max(medians["ours"].values()) / max(medians["trl"].values())
        ratios.append(f"**{ratio:.2f}x** with {_threads(sides)}")
    return [*lines, "", f"Ratio to TRL's best setting: {', '.join(ratios)}."]


def rft_lines(result: dict[str, Any]) -> list[str]:
    """The table of RFT: medians of seconds a step, and completion tokens/s."""
    lines = [*_conditions(result["sides"]), "", f"Settings: {' '.join(result['arguments'])}.", ""]
    lines += ["| threads | side | idle threads | s/step | completion tokens/s |", "|---:|---|---|---:|---:|"]
    ratios = []
    for sides in result["sides"]:
        seconds = {}
        for side, rounds in sides["rounds"].items():
            steps = [step for each in rounds for step in each["steps"]]
            seconds[side] = statistics.median(second for second, _ in steps)
            rate = sum(tokens for _, tokens in steps) / sum(second for second, _ in steps)
            name = {"ours": "tunesmith", "trl": "TRL GRPOTrainer"}[side]
            policy = sides["policies"][side]
            lines.append(f"| {sides['threads']} | {name} | {policy} | {seconds[side]:.1f} | {rate:.0f} |")
        ratios.append(f"**{seconds['trl'] / seconds['ours']:.2f}x** with {_threads(sides)}")
    return [*lines, "", f"Ratio in seconds a step: {', '.join(ratios)}."]


def _threads(sides: dict[str, Any]) -> str:
    return "one thread" if sides["threads"] == 1 else f"{sides['threads']} threads"


def _conditions(sides: Sequence[dict[str, Any]]) -> list[str]:
    """Where it was measured, and what did not run."""
    env = sides[0]["conditions"]
    peaks = ", ".join(f"{each['conditions']['bf16_peak_gflops']} with {_threads(each)}" for each in sides)
    lines = [
        f"LoRA of rank 16 on SmolLM2-135M-Instruct; {env['processor']}, AMX {env['amx']}, torch {env['torch']}, "
        f"TRL {env['trl']}; bf16 matrix peak in GFLOP/s: {peaks}. Each side ran under the policy of idle threads that "
        "was best for it in a trial round."
    ]
    failed = {name: why for each in sides for name, why in each.get("did_not_run", {}).items()}
    return lines + [f"{name} did not run: {why}" for name, why in failed.items()]


if __name__ == "__main__":
    main()
