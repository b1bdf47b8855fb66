"""`trainer check` and `trainer shapes`: what a recipe will do, before it runs."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.commands.check_report import describe_devices, describe_limit, describe_plan, report_lines
from trainer.commands.cost_report import cost_lines
from trainer.commands.first_look import find_problems, server_problems
from trainer.commands.tables import table_lines
from trainer.config.arguments import override_argv
from trainer.config.devices import COUNTS, shape_text
from trainer.config.load import all_shapes, find_shape, known_devices, known_shapes, load_recipe
from trainer.config.recipe import Recipe
from trainer.config.shape import TrainingShape
from trainer.errors import EXIT_USER
from trainer.planning.fit import misfit
from trainer.planning.model_facts import ModelFacts
from trainer.planning.plan import model_facts
from trainer.run.plan_recipe import plan_recipe


def check(arguments: argparse.Namespace) -> int:
    """Validate, resolve and estimate; `--data`, `--rewards` and `--memory` run in a second process."""
    plan = plan_recipe(Path(arguments.recipe), arguments.set, arguments.shape)
    for warning in plan.warnings:
        sys.stderr.write(f"warning: {warning}\n")
    sys.stderr.flush()
    if arguments.data or arguments.rewards:
        return _check_data_and_rewards(arguments)
    if arguments.memory:
        return _measure_memory(arguments)
    if arguments.cost:
        sys.stdout.write("\n".join(cost_lines(plan, width=_terminal_width())) + "\n")
        return 0
    problems = find_problems(plan.recipe, Path(plan.recipe_dir)) + server_problems(plan.recipe, plan.shape)
    for problem in problems:
        sys.stderr.write(f"{problem}\n")
    report = describe_plan(plan, arguments.recipe, override_argv(arguments))
    if arguments.json:
        sys.stdout.write(json.dumps(dataclasses.asdict(report), ensure_ascii=False) + "\n")
    else:
        is_colored = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        lines = report_lines(
            report, width=_terminal_width(), is_colored=is_colored, with_values=arguments.values, problems=problems
        )
        sys.stdout.write("\n".join(lines) + "\n")
    return EXIT_USER if problems else 0


def shapes(arguments: argparse.Namespace) -> int:
    """List the shapes; with a recipe, whether it fits each. `--print NAME` prints one as YAML."""
    if arguments.print is not None:
        sys.stdout.write(shape_text(find_shape(arguments.print)))
        return 0
    recipe = load_recipe(Path(arguments.recipe)).recipe if arguments.recipe else None
    facts = model_facts(recipe) if recipe is not None else None
    header = ["shape", "devices", "GiB each", "LoRA up to", "full-parameter up to"]
    table = [[*header, "this recipe"] if recipe is not None else header]
    files = all_shapes()
    for shape in files:
        row = [shape.name, describe_devices(shape), f"{shape.gpu_memory_gib:g}"]
        row += [describe_limit(shape.limits.lora), describe_limit(shape.limits.full)]
        if recipe is not None:
            fits = "fits" if facts is not None else "may fit: the sizes of the model are unknown"
            row.append(misfit(recipe, shape, facts) or fits)
        table.append(row)
    lines = table_lines(table, width=_terminal_width())
    sys.stdout.write("\n".join([*lines, "", *_catalog_lines(recipe, facts, files)]) + "\n")
    return 0


def _catalog_lines(recipe: Recipe | None, facts: ModelFacts | None, shapes: Sequence[TrainingShape]) -> list[str]:
    """Return one line per known GPU, from which shapes are made by rule; `shapes` are those that have a file."""
    header = ["GPU", "devices", "GiB each", "bf16 TFLOP/s", "memory GB/s", "NVLink GB/s"]
    table = [[*header, "this recipe"] if recipe is not None and facts is not None else header]
    for name, device in known_devices().items():
        numbers = (device.memory_gib, device.bf16_tflops, device.bandwidth_gbps, device.nvlink_gbps)
        row = [name, device.device_name, *(f"{number:g}" if number else "none" for number in numbers)]
        if recipe is not None and facts is not None:
            made = known_shapes(name, device, shapes)
            fitting = next((shape.name for shape in made if misfit(recipe, shape, facts) is None), None)
            row.append("does not fit" if fitting is None else f"fits {fitting}")
        table.append(row)
    counts = f"{', '.join(str(count) for count in COUNTS[:-1])} or {COUNTS[-1]}"
    return [
        f"also {counts} of these GPUs in one machine, for example rtx4090x2 (sharded) or rtx4090x2_dp (each with the "
        "whole model); `trainer shapes --print NAME` shows one:",
        *table_lines(table, width=_terminal_width()),
    ]


def _terminal_width() -> int | None:
    """Return the columns of the terminal; None if stdout is not one, so that lines are never folded there."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _check_data_and_rewards(arguments: argparse.Namespace) -> int:
    """Check rows or rewards in a process that may import torch, tokenizers and rewards."""
    argv = [sys.executable, "-m", "trainer.checks.data_and_rewards", arguments.recipe, *override_argv(arguments)]
    argv += ["--data", "--html", arguments.html] if arguments.data else []
    argv += [part for line in arguments.row for part in ("--row", str(line))]
    argv += ["--find", arguments.find] if arguments.find is not None else []
    argv += ["--rewards"] if arguments.rewards else []
    argv += ["--json"] if arguments.json else []
    return subprocess.run(argv, check=False).returncode


def _measure_memory(arguments: argparse.Namespace) -> int:
    """Dry-run a step in a process that may import torch."""
    argv = [sys.executable, "-m", "trainer.checks.memory_dry_run", arguments.recipe, *override_argv(arguments)]
    return subprocess.run([*argv, *(["--json"] if arguments.json else [])], check=False).returncode
