"""Speed and memory on one GPU: SFT (LoRA, full), RFT updates and sampling; compared with TRL's SFTTrainer.

    python benchmarks/gpu.py [--quick] [--out benchmarks/results]
    python benchmarks/gpu.py --device cpu --tiny --out DIR        a smoke test; its numbers are meaningless

Models have real dimensions and random weights, so nothing is downloaded. MFU is model FLOPs over the bf16 matrix peak
measured in the same process (flops.py: 4 N per token for LoRA, 6 N for full parameters; N excludes embeddings; head
on scored tokens; attention counted, recomputation not). Rounds of both sides alternate; numbers are medians of rounds.
TRL runs padded and packed, with SDPA and bf16 weights and optimizer state (ours also keeps float32 masters); the
ratio is to the faster one. A case that does not run is reported with its reason.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import statistics
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import common
import torch
from gpu_cases import FULL, QUICK, TINY, Case, Rft, Sampling, Scale, Sft, TrlSft
from machine import conditions, now

GIB = 2**30
WARM_UP_STEPS = 2


def main() -> None:
    """Measure every case, and write gpu.json and gpu.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, steps and sampled tokens")
    parser.add_argument("--tiny", action="store_true", help="a model of two layers, to see that it runs")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--no-trl", action="store_true", help="leave TRL out")
    parser.add_argument("--out", default="benchmarks/results", help="directory of gpu.json and gpu.md")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; `--device cpu --tiny` is the smoke test")
    common.quiet()
    device = torch.device("cuda", 0) if arguments.device == "cuda" else torch.device("cpu")
    scale = TINY if arguments.tiny else QUICK if arguments.quick else FULL
    env = conditions(device, peak_seconds=0.05 if arguments.tiny else 3.0)
    print(f"bf16 matrix peak: {env['bf16_peak_gflops'] / 1e3:.1f} TFLOP/s", flush=True)
    peak = env["bf16_peak_gflops"] * 1e9
    why_no_trl = _why_no_trl(is_off=arguments.no_trl)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cases: list[tuple[Callable[[], Case], dict[str, Callable[[Case], TrlSft]]]] = [
            (lambda: Sft(scale, device, is_lora=True), _peers(scale, device, folder, is_lora=True)),
            (lambda: Sft(scale, device, is_lora=False), _peers(scale, device, folder, is_lora=False)),
            (lambda: Rft(scale, device, folder), {}),
            (lambda: Sampling(scale, device), {}),
        ]
        found = [measure(make, peers if why_no_trl is None else {}, scale, device, peak) for make, peers in cases]
    result = {
        "conditions": env, "scale": vars(scale), "is_smoke_test": arguments.tiny, "trl_left_out": why_no_trl,
        "cases": found,
    }  # fmt: skip
    common.write_result(Path(arguments.out) / "gpu", result, report(result))


def measure(
    make: Callable[[], Case],
    peers: Mapping[str, Callable[[Case], TrlSft]],
    scale: Scale,
    device: torch.device,
    peak: float,
) -> dict[str, Any]:
    """Rates, MFU and memory of a case, and the rates of its peers.

    Args:
        make: builds the case.
        peers: by name what builds them, from the case.
        scale: steps and rounds.
        device: where it runs.
        peak: FLOP/s that MFU is of.
    """
    _free(device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    case: Case | None = None
    failed: dict[str, str] = {}
    try:
        case = make()
        for _ in range(WARM_UP_STEPS):
            case.step()
        peak_gib = (torch.cuda.max_memory_allocated(device) - before) / GIB if device.type == "cuda" else None
        theirs = _built(peers, case, failed)
        rates = _alternate(case, theirs, scale, device)
    except Exception as error:
        name = case.name if case is not None else "a case that could not be built"
        print(f"{name}: {_reason(error)}", flush=True)
        return {"name": name, "did_not_run": _reason(error)}
    medians = {name: statistics.median(values) for name, values in rates.items()}
    rate = medians.pop(case.name)
    best = max(medians, key=lambda name: medians[name]) if medians else None
    flops = rate / case.tokens * case.flops
    return {
        "name": case.name, "tokens_per_step": case.tokens, "tokens_per_s": rate, "seconds_per_step": case.tokens / rate,
        "tflop_per_step": case.flops / 1e12, "tflops": flops / 1e12, "mfu": flops / peak,
        "peak_gib": peak_gib, "predicted_gib": case.predicted_gib,
        "trl_tokens_per_s": medians, "trl_did_not_run": failed, "best_of_trl": best,
        "ratio": rate / medians[best] if best is not None else None, "all": rates,
    }  # fmt: skip


def _alternate(case: Case, theirs: list[TrlSft], scale: Scale, device: torch.device) -> dict[str, list[float]]:
    """Tokens per second of each round, by name."""
    rates: dict[str, list[float]] = {case.name: []}
    for number in range(scale.rounds):
        runners: list[Case | TrlSft] = [case, *theirs] if number % 2 == 0 else [*theirs, case]
        for runner in runners:
            if isinstance(runner, TrlSft):
                seconds = runner.run()
            else:
                begin = now(device)
                for _ in range(case.steps):
                    runner.step()
                seconds = now(device) - begin
            rates.setdefault(runner.name, []).append(case.steps * case.tokens / seconds)
            print(f"{case.name}: {runner.name}: {rates[runner.name][-1]:,.0f} tokens/s", flush=True)
    return rates


def _built(peers: Mapping[str, Callable[[Case], TrlSft]], case: Case, failed: dict[str, str]) -> list[TrlSft]:
    """TRL runners that work here, warmed up; `failed` gets the reasons of the others."""
    theirs = []
    for name, make in peers.items():
        try:
            peer = make(case)
            peer.run()
            theirs.append(peer)
        except Exception as error:
            failed[name] = _reason(error)
            print(f"{case.name}: {name}: {failed[name]}", flush=True)
    return theirs


def _peers(scale: Scale, device: torch.device, folder: Path, *, is_lora: bool) -> dict[str, Callable[[Case], TrlSft]]:
    def maker(kind: str) -> Callable[[Case], TrlSft]:
        def make(case: Case) -> TrlSft:
            assert isinstance(case, Sft)
            return TrlSft(kind, case, scale, device, folder, is_lora=is_lora)

        return make

    return {f"TRL {kind}": maker(kind) for kind in ("padded", "packed")}


def _why_no_trl(*, is_off: bool) -> str | None:
    if is_off:
        return "left out by --no-trl"
    return None if importlib.util.find_spec("trl") is not None else "TRL is not installed here"


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def report(result: Mapping[str, Any]) -> list[str]:
    """The result as Markdown lines."""
    env = result["conditions"]
    where = env["processor"]
    if "gpu" in env:
        where = f"{env['gpu']} ({env['gpu_memory_gib']} GiB), driver {env['driver']}, CUDA {env['cuda']}"
    lines = [
        f"{where}. torch {env['torch']}, transformers {env['transformers']}, peft {env['peft']},",
        f"TRL {env['trl']}, Python {env['python']}; commit {env['commit']}; {env['date']}.",
        f"bf16 matrix peak, measured: {env['bf16_peak_gflops'] / 1e3:.1f} TFLOP/s.",
        "Random weights. MFU counts model FLOPs, recomputation never. Medians over rounds; memory as torch's allocator",
        "counts it, predicted without process and fragmentation.\n",
    ]
    if result["is_smoke_test"]:
        lines.append("**A smoke test: these numbers mean nothing.**\n")
    lines.append("| case | tokens/s | s/step | TFLOP/s | MFU | peak GiB | predicted GiB | best of TRL | ratio |")
    lines.append("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    notes = [] if result["trl_left_out"] is None else [f"\nTRL: {result['trl_left_out']}."]
    for case in result["cases"]:
        if "did_not_run" in case:
            notes.append(f"\n{case['name']} did not run: {case['did_not_run']}")
            continue
        best = case["best_of_trl"]
        theirs = f"{case['trl_tokens_per_s'][best]:,.0f} ({best})" if best is not None else "-"
        ratio = f"{case['ratio']:.2f}x" if best is not None else "-"
        lines.append(
            f"| {case['name']} | {case['tokens_per_s']:,.0f} | {case['seconds_per_step']:.3f} | {case['tflops']:.1f} "
            f"| {case['mfu']:.1%} | {_gib(case['peak_gib'])} | {_gib(case['predicted_gib'])} | {theirs} | {ratio} |"
        )
        notes += [f"\n{case['name']}: {name} did not run: {why}" for name, why in case["trl_did_not_run"].items()]
    return lines + notes


def _gib(size: float | None) -> str:
    return "-" if size is None else f"{size:.1f}"


if __name__ == "__main__":
    main()
