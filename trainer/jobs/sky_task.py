"""The SkyPilot task of a run, as YAML for `sky jobs launch`.

Exit code 75 (preempted) makes SkyPilot provision a machine again and run the same command, which resumes from the
mirror; any other exit code ends the job, since `trainer train` restarts crashes itself. A spot machine that is taken
away is recovered by SkyPilot without an exit code. (docs.skypilot.co, managed jobs)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import yaml

from trainer.config.recipe import BUILTIN_TEMPLATES, DataSource, Recipe
from trainer.config.source_files import source_files
from trainer.errors import EXIT_PREEMPTED, LaunchError
from trainer.jobs.remote import RemoteRun, refuse_unknown

OPTIONS: Final = ("setup", "accelerators", "infra", "use_spot", "image_id", "disk_size", "cpus", "memory")
"""Keys of `--sky`; all but `setup` go into the task's resources."""
ACCELERATORS: Final = {
    "RTX-3090-24G": "RTX3090", "RTX-4090-24G": "RTX4090", "RTX-A6000-48G": "RTXA6000", "L40S-48G": "L40S",
    "A100-40G": "A100", "A100-80G": "A100-80GB", "H100-80G": "H100", "H200-141G": "H200", "B200-180G": "B200",
}  # fmt: skip
"""SkyPilot's names of our devices (`sky show-gpus`)."""
WORKDIR: Final = "~/sky_workdir"
"""Where SkyPilot puts the project, and where the command runs."""


def sky_task(remote: RemoteRun, options: Mapping[str, str]) -> str:
    """The text of a task.

    Args:
        remote: what is run.
        options: of `--sky`.

    Raises:
        LaunchError: the run would be lost with its machine, needs several, or an option is missing or unknown.
    """
    plan = remote.plan
    refuse_unknown(options, OPTIONS, "--sky")
    if plan.shape.nodes > 1:
        raise LaunchError(
            f"shape {plan.shape.name} has {plan.shape.nodes} machines, whose ranks save into one run directory; "
            "SkyPilot's machines share none. Use a shape of one machine, or --launcher slurm or k8s."
        )
    remote.refuse_loss("Set it to a bucket: every machine of the job resumes from there.")
    if "setup" not in options:
        raise LaunchError(
            "--sky setup=COMMAND is missing: what installs this package on a bare machine, for example "
            "--sky setup='pip install git+https://...@COMMIT'"
        )
    document = {
        "name": remote.run.name,
        "workdir": ".",
        "file_mounts": dict(_mounts(plan.recipe)),
        "resources": _resources(remote, options),
        "setup": options["setup"],
        "run": remote.command(),
    }
    return yaml.safe_dump({name: value for name, value in document.items() if value}, sort_keys=False)


def _resources(remote: RemoteRun, options: Mapping[str, str]) -> dict[str, object]:
    shape = remote.plan.shape
    found: dict[str, object] = {"use_spot": True}
    if shape.gpus == 0:
        found["memory"] = f"{shape.gpu_memory_gib:g}+"
    elif shape.device_name in ACCELERATORS:
        found["accelerators"] = f"{ACCELERATORS[shape.device_name]}:{shape.gpus}"
    elif "accelerators" not in options:
        raise LaunchError(
            f"{shape.device_name}: SkyPilot's name is not known; add --sky accelerators=NAME:{shape.gpus}"
        )
    given = {name: yaml.safe_load(value) for name, value in options.items() if name != "setup"}
    recovery = {"max_restarts_on_errors": 0, "recover_on_exit_codes": [EXIT_PREEMPTED]}
    return found | given | {"job_recovery": recovery}


def _mounts(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Where each input goes: the project is copied without what git ignores, and models and rows often are ignored."""
    for path in _inputs(recipe):
        yield (
            (str(path) if path.is_absolute() else f"{WORKDIR}/{path}"),
            (str(path) if path.is_absolute() else f"./{path}"),
        )


def _inputs(recipe: Recipe) -> Iterator[Path]:
    lora, template = recipe.lora, recipe.model.chat_template
    named = [recipe.model.path, template if template not in BUILTIN_TEMPLATES else None]
    named += [lora.warm_start if lora is not None else None]
    yield from (Path(path) for path in named if path is not None and Path(path).exists())
    for source in (recipe.data.train, recipe.data.eval):
        yield from _files(source) if source is not None else ()


def _files(source: DataSource) -> Iterator[Path]:
    for each in source.sources or [source]:
        yield from source_files(each)
