"""Measure tokens per second of a learning step against recipe settings; write a table and an SVG for each.

    python benchmarks/cost_growth.py [--threads 1] [--repeats 2] [--quick]

SmolLM2-135M-Instruct, LoRA, random tokens (speed does not depend on them). The best repeat counts, because other
processes only add time; with one thread, CPU time is measured. Writes benchmarks/results/cost_growth.json, .md and
cost_growth_*.svg.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from machine import conditions

from trainer.config.recipe import LoraSettings, ModelSettings, OptimizerSettings
from trainer.data.tokens import TokenInputs, TokenSequence
from trainer.distributed.world import World
from trainer.model.batch import Batch, Tree, micro_batches, tree_batches
from trainer.model.policy import load_policy
from trainer.model.trees import grow_trees
from trainer.training.learner import Learner
from trainer.training.losses import sft_loss
from trainer.training.schedule import AdamParams

MODEL = "models/SmolLM2-135M-Instruct"
RESULTS = Path(__file__).parent / "results"
CPU = torch.device("cpu")
Point = tuple[float, float]


class Bench:
    """A learner, and the speed of its update on given packs."""

    def __init__(self, repeats: int, rank: int = 16) -> None:
        settings = ModelSettings(path=MODEL)
        policy = load_policy(settings, LoraSettings(rank=rank, alpha=2.0 * rank), 0, CPU)
        self.learner = Learner(policy, World(0, 1, CPU))
        self.repeats = repeats

    def rate(self, packs: list[Batch], tokens: int) -> float:
        """Tokens per second of an update; `tokens` counts whole sequences, including shared prompts."""
        best = float("inf")
        for _ in range(self.repeats):
            clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
            begin = clock()
            self.learner.learn(packs, sft_loss, AdamParams.of(OptimizerSettings(), 1e-6), denominator=float(tokens))
            best = min(best, clock() - begin)
        return tokens / best


def sequence(length: int, prompt: int, generator: random.Random, head: tuple[int, ...] = ()) -> TokenSequence:
    """Random tokens after a given or random prompt."""
    ids = (head or tuple(generator.randrange(3, 40_000) for _ in range(prompt)))[:prompt]
    ids += tuple(generator.randrange(3, 40_000) for _ in range(length - prompt))
    trained = (False,) * prompt + (True,) * (length - prompt)
    return TokenSequence(ids, trained, TokenInputs(weights=(1.0,) * (length - max(1, prompt))))


def plain(lengths: list[int], budget: int) -> tuple[list[Batch], int]:
    """Packs of sequences whose second half is trained."""
    generator = random.Random(0)
    rows = [sequence(length, length // 2, generator) for length in lengths]
    return [Batch.pack(group, CPU) for group in micro_batches(rows, budget)], sum(lengths)


def group(size: int, prompt: int, response: int, *, is_shared: bool = True) -> tuple[list[Batch], int]:
    """Completions of one prompt, sharing one copy of it or each with its own."""
    generator = random.Random(0)
    head = tuple(generator.randrange(3, 40_000) for _ in range(prompt))
    rows = [sequence(prompt + response, prompt, generator, head) for _ in range(size)]
    trees = grow_trees(rows, 4096) if is_shared else [Tree.of_one(row) for row in rows]
    return [Batch.pack_trees(chosen, CPU) for chosen in tree_batches(trees, 1024)], size * (prompt + response)


def curves(repeats: int, *, is_quick: bool) -> dict[str, dict[str, list[Point]]]:
    """Lines of points, by the setting that varies."""
    bench = Bench(repeats)
    few = 2 if is_quick else 99
    by_ratio = [(16, 112), (64, 64), (112, 16), (240, 16)][:few]
    measured: dict[str, dict[str, list[Point]]] = {
        "micro-batch tokens": {
            "rows of 128 tokens": [
                (budget, bench.rate(*plain([128] * (budget // 128), budget)))
                for budget in (256, 512, 1024, 2048, 4096, 8192)[:few]
            ]
        },
        "sequence length": {
            "2,048 tokens in all, or one sequence": [
                (length, bench.rate(*plain([length] * max(1, 2048 // length), max(2048, length))))
                for length in (128, 256, 512, 1024, 2048, 4096)[:few]
            ]
        },
        "group size": {
            name: [
                (size, bench.rate(*group(size, 128, 64, is_shared=is_shared))) for size in (2, 4, 8, 16, 32, 64)[:few]
            ]
            for name, is_shared in (("prompt shared", True), ("prompt repeated", False))
        },
        "prompt tokens per response token (8 completions)": {
            name: [(p / r, bench.rate(*group(8, p, r, is_shared=is_shared))) for p, r in by_ratio]
            for name, is_shared in (("prompt shared", True), ("prompt repeated", False))
        },
    }
    del bench
    measured["LoRA rank"] = {
        "1,024 tokens": [(rank, Bench(repeats, rank).rate(*plain([128] * 8, 1024))) for rank in (4, 16, 64, 128)[:few]]
    }
    return measured


def svg(title: str, lines: dict[str, list[Point]]) -> str:
    """A plot with a logarithmic horizontal axis, written as text without a plotting library."""
    from math import log2

    points = [point for line in lines.values() for point in line]
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    top = 1.1 * max(y for _, y in points)
    width, height, margin = 460, 240, 48

    def place(x: float, y: float) -> tuple[float, float]:
        across = (log2(x) - log2(left)) / max(1e-9, log2(right) - log2(left))
        return margin + across * (width - 2 * margin), height - margin - y / top * (height - 2 * margin)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"',
        ' font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{margin}" y="18">tokens/s against {title}</text>',
    ]
    for number, (name, line) in enumerate(lines.items()):
        color = ("#1f4e9c", "#c0392b", "#2e8b57")[number]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in line))
        out.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        out.append(f'<text x="{margin + 150 * number}" y="34" fill="{color}">{name}</text>')
        for x, y in line:
            across, down = place(x, y)
            out.append(f'<circle cx="{across:.1f}" cy="{down:.1f}" r="3" fill="{color}"/>')
            out.append(f'<text x="{across - 8:.1f}" y="{down - 7:.1f}" fill="{color}">{y:.0f}</text>')
    for x in sorted({x for x, _ in points}):
        out.append(f'<text x="{place(x, 0)[0] - 8:.1f}" y="{height - margin + 16}">{x:g}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", default=str(RESULTS))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    env: dict[str, Any] = conditions()
    measured = curves(arguments.repeats, is_quick=arguments.quick)
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "cost_growth.json").write_text(json.dumps({"conditions": env, "curves": measured}, indent=1) + "\n")
    machine_line = f"{env['processor']}, {env['threads']} thread(s), {env['date']}, load {env['load_average'][0]}"
    table = [f"Tokens per second of a LoRA update; {machine_line} at the start.", ""]
    for number, (title, lines) in enumerate(measured.items()):
        file = f"cost_growth_{number + 1}.svg"
        (out / file).write_text(svg(title, lines))
        table += [f"## {title}", "", f"![{title}]({file})", ""]
        for name, line in lines.items():
            table.append(f"- {name}: " + ", ".join(f"{x:g}: {y:.0f}" for x, y in line))
        table.append("")
    (out / "cost_growth.md").write_text("\n".join(table) + "\n")


if __name__ == "__main__":
    main()
