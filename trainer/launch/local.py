"""The launch command of a shape on this machine, as argv."""

from __future__ import annotations

import sys
from pathlib import Path

from trainer.config.load import config_dirs
from trainer.config.shape import TrainingShape
from trainer.errors import LaunchError
from trainer.planning.plan import Plan


def accelerate_config(shape: TrainingShape) -> Path:
    """The accelerate configuration file that the shape names.

    Raises:
        LaunchError: the file does not exist.
    """
    for directory in config_dirs("accelerate"):
        file = directory / f"{shape.accelerate}.yaml"
        if file.is_file():
            return file
    raise LaunchError(f"shape {shape.name}: configs/accelerate/{shape.accelerate}.yaml does not exist")


def launch_argv(shape: TrainingShape, target: Path, python: str = sys.executable) -> list[str]:
    """`accelerate launch` for one node; on several nodes run it on each, with --machine_rank.

    Args:
        shape: ranks and nodes.
        target: a run directory or a recipe.
        python: the interpreter.
    """
    argv = [python, "-m", "accelerate.commands.launch", "--config_file", str(accelerate_config(shape))]
    argv += ["--num_processes", str(shape.num_ranks), "--num_machines", str(shape.nodes)]
    if shape.device == "cpu" and shape.num_ranks > 1:
        argv += ["--multi_gpu"]  # with `use_cpu` alone accelerate starts one process, whatever --num_processes
    return [*argv, "-m", "trainer.worker", str(target)]


def shown_command(shape: TrainingShape, target: str) -> str:
    """The launch command as a person would type it."""
    argv = launch_argv(shape, Path(target), "python")
    config = Path(argv[4])
    shown = config.relative_to(Path.cwd()) if config.is_relative_to(Path.cwd()) else config
    return " ".join(["accelerate", "launch", "--config_file", str(shown), *argv[5:]])


def refuse_many_machines(plan: Plan) -> None:
    """Refuse shapes of several machines: a supervisor starts processes on its own machine only.

    Raises:
        LaunchError: the shape has several machines.
    """
    if plan.shape.nodes > 1:
        raise LaunchError(
            f"shape {plan.shape.name} has {plan.shape.nodes} machines, and `trainer train` starts processes on one. "
            "Run the torchrun line of `trainer check` on each machine, or use `trainer submit --launcher slurm`."
        )
