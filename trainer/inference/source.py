"""Which model a name on the command line means: a run, an adapter or a model directory, a hub name."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, final

from trainer.checkpoints.saved_state import find_state
from trainer.config.recipe import DataSettings, LoraSettings, ModelSettings
from trainer.config.semantics import is_hub_name
from trainer.errors import LaunchError, ModelError
from trainer.export.choice import choose_weights
from trainer.planning.plan import Plan
from trainer.run.console import tell
from trainer.run.directory import RunDir
from trainer.run.find import find_run
from trainer.run.place import plan_from_here

BASE: Final = "base"
"""The name of the model that a run began with."""
ADAPTER_CONFIG: Final = "adapter_config.json"


@final
@dataclass(frozen=True)
class ModelSource:
    """Where weights and chat template are.

    Of the run `sums`: `ModelSource("sums", model=..., data=..., adapter=Path("runs/sums/adapter"), lora=...)`; of its
    base the same without adapter.
    """

    label: str
    """What people call it: the name of the run, or the last part of the path."""
    model: ModelSettings
    data: DataSettings
    """How prompts become tokens: system message, variables of the template."""
    adapter: Path | None = None
    lora: LoraSettings | None = None
    """Of the adapter."""
    plan: Plan | None = None
    """Of the run, where it is one."""
    checkpoint: Path | None = None
    """A checkpoint whose weights are taken instead of an adapter's or a model's files."""


def find_source(target: str, *, best: bool = False, checkpoint: int | None = None) -> ModelSource:
    """What a name means.

    Args:
        target: name or directory of a run, directory of an adapter, a saved state or a model, or a hub name.
        best: of a run, the weights of the best held-out value, not the last.
        checkpoint: of a run, the weights of the checkpoint of this step.

    Raises:
        LaunchError: it is a run without weights, or nothing of the kind.
        ModelError: an adapter cannot be read.
        CheckpointError: it is a saved state of the training API that is damaged, or that is not there.
    """
    run = _run_of(target)
    if run is not None:
        return _of_run(run, best=best, checkpoint=checkpoint)
    if best or checkpoint is not None:
        raise LaunchError(f"{target}: is no run; --best and --checkpoint go with a run")
    directory = find_state(target) or Path(target)
    if (directory / ADAPTER_CONFIG).is_file():
        return _of_adapter(directory)
    if (directory / "config.json").is_file():
        model = ModelSettings(path=target, compute_dtype=_dtype_of(directory))
        return ModelSource(directory.resolve().name, model, plain_data())
    if is_hub_name(target) and not target.startswith("runs/"):
        return ModelSource(target, ModelSettings(path=target), plain_data())
    raise LaunchError(
        f"{target}: no run, no adapter ({ADAPTER_CONFIG}) and no model (config.json). The runs: trainer runs"
    )


def base_of(source: ModelSource) -> ModelSource:
    """The model that a run or an adapter began with.

    Raises:
        LaunchError: the source has no base.
    """
    if source.plan is not None:
        lora = source.plan.recipe.lora
        started = Path(lora.warm_start) if lora is not None and lora.warm_start is not None else None
        return ModelSource(BASE, source.plan.recipe.model, source.data, started, source.lora if started else None)
    if source.adapter is None:
        raise LaunchError(f"{source.label}: has no base; name a model with --against")
    return replace(source, label=BASE, adapter=None, lora=None)


def other_source(target: str, first: ModelSource) -> ModelSource:
    """What `--against` means: the word `base`, or what `find_source` finds.

    Args:
        target: as typed.
        first: the model that it is compared with.
    """
    return base_of(first) if target == BASE else find_source(target)


def _run_of(target: str) -> RunDir | None:
    try:
        return find_run(target)
    except LaunchError:
        return None


def _of_run(run: RunDir, *, best: bool, checkpoint: int | None) -> ModelSource:
    """The weights of a run; of one that has not finished, those of its newest valid checkpoint, and says so."""
    plan = plan_from_here(run)
    recipe = plan.recipe
    weights = choose_weights(run, plan, best=best, checkpoint=checkpoint)
    if weights.kind != "last":
        tell(f"{run.name}: {weights}")
    label = f"{run.name}@{weights.step}" if weights.is_checkpoint else run.name
    lora = None if recipe.lora is None else recipe.lora.model_copy(update={"warm_start": None})
    if weights.is_checkpoint:
        return ModelSource(label, recipe.model, recipe.data, None, lora, plan, weights.directory)
    if lora is None:
        model = recipe.model.model_copy(update={"path": str(weights.directory), "revision": None})
        return ModelSource(label, model, recipe.data, plan=plan)
    return ModelSource(label, recipe.model, recipe.data, weights.directory, lora, plan)


def _of_adapter(directory: Path) -> ModelSource:
    file, run = directory / ADAPTER_CONFIG, RunDir(directory.resolve().parent)
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        base = str(config["base_model_name_or_path"])
        lora = LoraSettings(
            rank=config["r"],
            alpha=config["lora_alpha"],
            target_modules=config["target_modules"],
            rslora=config.get("use_rslora", False),
            dora=config.get("use_dora", False),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file}: is no LoRA adapter that can be read: {error}") from None
    if run.is_run():  # its project may have been moved or copied since the adapter was written
        model = plan_from_here(run).recipe.model
    else:
        model = ModelSettings(path=base, compute_dtype=_dtype_of(Path(base)))
    return ModelSource(directory.resolve().name, model, plain_data(), directory, lora)


def plain_data() -> DataSettings:
    """How prompts are read where no recipe says it."""
    return DataSettings.model_validate({"train": "prompts.jsonl"})


def _dtype_of(directory: Path) -> Literal["bfloat16", "float32"]:
    """The dtype of the saved weights; float32 stays float32, and anything else becomes bfloat16."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "bfloat16"
    return "float32" if config.get("dtype", config.get("torch_dtype")) == "float32" else "bfloat16"
