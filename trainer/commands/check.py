"""`trainer check` and `trainer shapes`: what a recipe will do, before it does it."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.config.document import dotted, leaves
from trainer.config.length import mean_row_tokens
from trainer.config.load import all_shapes, load_recipe
from trainer.config.shape import ShapeLimit, TrainingShape
from trainer.launch.local import shown_command
from trainer.planning.plan import (
    SHAPE_VALUES,
    Plan,
    accumulation,
    make_plan,
    misfit,
    model_facts,
    plan_device_hours,
    plan_memory,
    sequences_per_step,
    step_tokens,
)

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
PORT = 29500


def check(arguments: argparse.Namespace) -> int:
    """Validate, resolve and estimate; or show rows or try rewards in a second process."""
    plan = make_plan(load_recipe(Path(arguments.recipe), arguments.set), arguments.shape)
    for warning in plan.warnings:
        sys.stderr.write(f"warning: {warning}\n")
    sys.stderr.flush()
    if arguments.data or arguments.rewards:
        return _preview(arguments)
    if arguments.memory:
        return _measure_memory(arguments)
    about = describe_plan(plan, arguments.recipe, _overrides(arguments))
    if arguments.json:
        sys.stdout.write(json.dumps(about, ensure_ascii=False) + "\n")
    else:
        is_colored = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        sys.stdout.write("\n".join(plan_lines(about, is_colored=is_colored)) + "\n")
    return 0


def shapes(arguments: argparse.Namespace) -> int:
    """List the shapes; with a recipe, whether each holds it."""
    recipe = load_recipe(Path(arguments.recipe)).recipe if arguments.recipe else None
    facts = model_facts(recipe) if recipe is not None else None
    table = [
        ("shape", "devices", "GiB each", "LoRA up to", "full-parameter up to", *(("this recipe",) if recipe else ()))
    ]
    for shape in all_shapes():
        row = [shape.name, _devices(shape), f"{shape.gpu_memory_gib:g}"]
        row += [_limit_text(shape.limits.lora), _limit_text(shape.limits.full)]
        if recipe is not None:
            fits = "fits" if facts is not None else "may fit: the model's sizes are not known here"
            row.append(misfit(recipe, shape, facts) or fits)
        table.append(tuple(row))
    sys.stdout.write("\n".join(_columns(table)) + "\n")
    return 0


def _preview(arguments: argparse.Namespace) -> int:
    """Start what may import torch, tokenizers and rewards in a process of its own."""
    argv = [sys.executable, "-m", "trainer.checks.data_and_rewards", arguments.recipe, *_overrides(arguments)]
    argv += ["--data", "--html", arguments.html] if arguments.data else []
    argv += [part for line in arguments.row for part in ("--row", str(line))]
    argv += ["--find", arguments.find] if arguments.find is not None else []
    argv += ["--rewards"] if arguments.rewards else []
    argv += ["--json"] if arguments.json else []
    return subprocess.run(argv, check=False).returncode


def _measure_memory(arguments: argparse.Namespace) -> int:
    """Run a step without contents in a process that may import torch."""
    argv = [sys.executable, "-m", "trainer.checks.memory_dry_run", arguments.recipe, *_overrides(arguments)]
    return subprocess.run([*argv, *(["--json"] if arguments.json else [])], check=False).returncode


def _overrides(arguments: argparse.Namespace) -> list[str]:
    given = [part for assignment in arguments.set for part in ("--set", assignment)]
    return given + (["--shape", arguments.shape] if arguments.shape else [])


def describe_plan(plan: Plan, recipe_file: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Everything that `check` says, as one JSON document."""
    recipe, shape, memory, tokens = plan.recipe, plan.shape, plan_memory(plan), step_tokens(plan)
    limit = shape.limits.lora if recipe.lora is not None else shape.limits.full
    assert limit is not None, "a shape without such a limit does not fit"
    facts = model_facts(recipe)
    return {
        "recipe": recipe_file,
        "name": recipe.name,
        "method": recipe.method,
        "training": "lora" if recipe.lora is not None else "full",
        "model": {"path": recipe.model.path, "params": facts.params if facts else None},
        "identity": plan.identity_hash,
        "shape": {
            "name": shape.name,
            "devices": _devices(shape),
            "chosen_by": plan.origins["shape"],
            "limits": limit.model_dump(),
        },
        "batch": {
            "num_rows": plan.num_rows,
            "rows_per_step": recipe.rows_per_step,
            "sequences_per_step": sequences_per_step(recipe),
            "row_tokens": mean_row_tokens(recipe),
            "step_tokens": tokens,
            "micro_batch_tokens": shape.micro_batch_tokens,
            "num_ranks": shape.num_ranks,
            "accumulation": accumulation(plan),
            "steps_per_epoch": plan.steps_per_epoch,
            "steps": plan.steps,
            "epochs": plan.steps / plan.steps_per_epoch if plan.steps_per_epoch else None,
        },
        "memory": None
        if memory is None
        else {
            "basis": "estimated",
            "parts_gib": dict(memory.parts),
            "total_gib": memory.total_gib,
            "available_gib": memory.available_gib,
        },
        "device_hours": plan_device_hours(plan),
        "rate_basis": shape.rate.basis if shape.rate else None,
        "commands": _commands(shape, recipe_file, overrides),
        "values": _values(plan),
        "warnings": plan.warnings,
    }


def plan_lines(about: dict[str, Any], *, is_colored: bool) -> list[str]:
    """The document as text for people."""
    shape, model = about["shape"], about["model"]
    size = f", {model['params'] / 1e9:.3g} B parameters" if model["params"] else ""
    kind = "LoRA" if about["training"] == "lora" else "full-parameter training"
    limits = shape["limits"]
    lines = [
        f"{about['name']}: {about['method']}, {kind} of {model['path']}{size}",
        f"shape   {shape['name']} ({shape['devices']}), by {shape['chosen_by']}",
        f"        holds {kind} of up to {limits['max_params_b']:g} B parameters at "
        f"{limits['max_seq_tokens']:,} tokens (limits {limits['basis']})",
    ]
    lines += ["", "batch", *_columns(_batch_table(about["batch"]), indent="  ")]
    lines += ["", *_memory_lines(about["memory"])]
    lines += ["", _hours_line(about)]
    lines += ["", "launch", *_columns([*about["commands"].items()], indent="  ")]
    lines += ["", "values", *_value_lines(about["values"], is_colored=is_colored)]
    return lines


def _batch_table(batch: dict[str, Any]) -> list[tuple[str, ...]]:
    rows, sequences, tokens = batch["rows_per_step"], batch["sequences_per_step"], batch["step_tokens"]
    unit = "row" if sequences == rows else "prompt"
    about = "about" if unit == "row" else "at most"
    total = f"{about} {tokens:,.0f} tokens" if tokens else "tokens unknown before the rows are loaded"
    left = _count(rows, unit) + (f" of about {batch['row_tokens']:,.0f} tokens" if batch["row_tokens"] else "")
    if unit == "prompt":
        left = f"{left} x {sequences // rows} completions"
    table: list[tuple[str, ...]] = [("global batch", left, "=", total)]
    micro = f"micro-batches of {batch['micro_batch_tokens']:,} tokens x {_count(batch['num_ranks'], 'rank')}"
    if batch["accumulation"]:
        micro += f" x {batch['accumulation']:,} accumulated"
        table.append(("", micro, ">=", "the global batch"))
    else:
        table.append(("", f"{micro} x as many as it takes", "=", "the global batch"))
    if batch["steps_per_epoch"]:
        all_rows = f"{_count(batch['num_rows'], unit)} / {rows:,} a step"
        table.append(("epoch", all_rows, "=", f"{batch['steps_per_epoch']:,.4g} steps"))
        table.append(("run", _count(batch["steps"], "step"), "=", f"{batch['epochs']:.3g} epochs"))
    else:
        table.append(
            ("run", _count(batch["steps"], "step"), "=", "epochs unknown: the hub's rows are not counted here")
        )
    return table


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _memory_lines(memory: dict[str, Any] | None) -> list[str]:
    if memory is None:
        return ["memory per device: no estimate, the model's sizes are not known here"]
    table = [(name, f"{gib:8.2f} GiB") for name, gib in memory["parts_gib"].items()]
    table.append(("peak", f"{memory['total_gib']:8.2f} GiB of {memory['available_gib']:g} GiB"))
    return [f"memory per device ({memory['basis']})", *_columns(table, indent="  ")]


def _hours_line(about: dict[str, Any]) -> str:
    hours, name = about["device_hours"], about["shape"]["name"]
    if hours is not None:
        sampling = ", sampling not counted" if about["method"] == "rft" else ""
        return f"device-hours: about {hours:.3g} (rate {about['rate_basis']}{sampling})"
    if about["rate_basis"] is None:
        return f"device-hours: no rate known for this shape ({name})"
    return "device-hours: unknown, the model's sizes or the number of rows are not known here"


def _commands(shape: TrainingShape, recipe_file: str, overrides: Sequence[str]) -> dict[str, str]:
    """What to type; on several machines the launchers' lines run on each."""
    given = "".join(f" {shlex.quote(part)}" for part in overrides)
    accelerate = shown_command(shape, shlex.quote(recipe_file)) + given
    torchrun = f"torchrun --nproc_per_node {shape.ranks_per_node}"
    if shape.nodes > 1:
        place = f"--machine_rank $NODE_RANK --main_process_ip $MAIN_IP --main_process_port {PORT}"
        accelerate = accelerate.replace(" -m trainer.worker ", f" {place} -m trainer.worker ", 1)
        torchrun += f" --nnodes {shape.nodes} --node_rank $NODE_RANK --master_addr $MAIN_IP --master_port {PORT}"
    return {
        "trainer": f"trainer train {shlex.quote(recipe_file)}{given}",
        "accelerate": accelerate,
        "torchrun": f"{torchrun} -m trainer.worker {shlex.quote(recipe_file)}{given}",
        "slurm": f"trainer submit {shlex.quote(recipe_file)}{given} --launcher slurm",
    }


def _values(plan: Plan) -> dict[str, dict[str, Any]]:
    """Every resolved value by dotted name, with its origin."""
    values = {dotted(path): value for path, value in leaves(plan.recipe.model_dump())}
    values |= {f"shape.{name}": getattr(plan.shape, name) for name in SHAPE_VALUES}
    return {name: {"value": value, "origin": plan.origins[name]} for name, value in values.items()}


def _value_lines(values: dict[str, dict[str, Any]], *, is_colored: bool) -> list[str]:
    table = [(name, _shown(each["value"]), each["origin"]) for name, each in values.items()]
    lines = _columns(table, indent="  ")
    if not is_colored:
        return lines
    defaults = [each["origin"] == "default" for each in values.values()]
    return [f"{DIM}{line}{PLAIN}" if dim else line for line, dim in zip(lines, defaults, strict=True)]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def _devices(shape: TrainingShape) -> str:
    if shape.gpus == 0:
        return shape.device_name
    machines = f" on {shape.nodes} machines" if shape.nodes > 1 else ""
    return f"{shape.gpus} x {shape.device_name}{machines}"


def _limit_text(limit: ShapeLimit | None) -> str:
    if limit is None:
        return "does not fit"
    return f"{limit.max_params_b:g} B, {limit.max_seq_tokens:,} tokens ({limit.basis})"


def _columns(table: Sequence[tuple[str, ...]], indent: str = "") -> list[str]:
    """Rows as aligned lines; the last column is as long as it likes.

    >>> _columns([("a", "bb"), ("ccc", "d")])
    ['a    bb', 'ccc  d']
    """
    widths = [max(len(row[index]) for row in table) for index in range(len(table[0]) - 1)]
    padded = (zip(row, [*widths, 0], strict=True) for row in table)
    return [(indent + "  ".join(cell.ljust(width) for cell, width in row)).rstrip() for row in padded]
