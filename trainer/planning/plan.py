"""The plan: recipe and shape, resolved and frozen. From here on nobody reads the YAML again."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any, Final, final

from trainer.config.document import Document, dotted, leaves
from trainer.config.length import count_rows, mean_row_tokens, num_steps
from trainer.config.load import LoadedRecipe, all_shapes, config_dirs, find_shape
from trainer.config.presets import resolve_algorithm
from trainer.config.recipe import (
    BUILTIN_TEMPLATES,
    AlgorithmSettings,
    DataSettings,
    DataSource,
    Recipe,
    RolloutSettings,
)
from trainer.config.section import Section
from trainer.config.shape import TrainingShape
from trainer.config.source_files import source_files
from trainer.errors import ShapeError
from trainer.files import file_sha256
from trainer.planning.memory import MemoryEstimate, estimate_memory
from trainer.planning.model_facts import ModelFacts, find_model_facts, flops_per_token
from trainer.planning.remedies import remedy_lines

PLAN_FORMAT: Final = 1
LATER_DATA_FIELDS: Final = (
    "ignore",
    "eval_frac",
    "train_on",
    "allow_special_tokens",
    "chat_template_kwargs",
    "template_date",
)
SHAPE_VALUES: Final = ("device", "nodes", "gpus", "micro_batch_tokens", "sharding")
"""What the shape decides of a plan."""


@final
class Plan(Section):
    """Everything a worker needs to know, and where each value came from."""

    format: int = PLAN_FORMAT
    recipe: Recipe
    """With presets filled in."""
    recipe_dir: str
    """Where `file.py:function` rewards are looked up."""
    shape: TrainingShape
    steps: int
    """Length of the run."""
    num_rows: int | None
    """Training rows; None for hub data sets, which are counted when they are loaded."""
    identity: dict[str, Any]
    """What changes the result."""
    identity_hash: str
    origins: dict[str, str]
    """Dotted field name -> default, shape, preset, --set or file:line."""
    warnings: list[str]

    @property
    def steps_per_epoch(self) -> float | None:
        """Steps of one pass over the rows; None where the rows are not counted yet."""
        return self.num_rows / self.recipe.rows_per_step if self.num_rows else None

    def dump(self) -> str:
        """As the text of plan.json."""
        return json.dumps(self.model_dump(), indent=2, ensure_ascii=False) + "\n"


def make_plan(loaded: LoadedRecipe, shape_name: str | None = None) -> Plan:
    """Resolve a recipe on a shape.

    Args:
        loaded: the recipe.
        shape_name: overrides the recipe's `shape`.

    Raises:
        ShapeError: no shape fits, or the named one does not.
    """
    given, document = loaded.recipe, loaded.document
    recipe = _with_preset(given)
    name = shape_name or recipe.shape
    shape = choose_shape(recipe, name, "--shape" if shape_name else document.where(("shape",)))
    origins = _origins(recipe, given, document)
    if name == "auto":
        origins["shape"] = "auto: the smallest that fits"
    elif shape_name is not None:
        origins["shape"] = "--shape"
    origins |= {f"shape.{field}": f"shape {shape.name}" for field in SHAPE_VALUES}
    warnings = list(loaded.warnings)
    if model_facts(recipe) is None:
        warnings.append(
            f"{recipe.model.path}: its sizes are not known here, so nobody checked that it fits {shape.name}"
        )
    num_rows = count_rows(recipe.data.train)
    steps = num_steps(recipe, num_rows)
    assert steps is not None, "a recipe that loads says how long it runs"
    identity = make_identity(recipe)
    return Plan(
        recipe=recipe.model_copy(update={"shape": shape.name}),
        recipe_dir=str(Path(document.file).resolve().parent),
        shape=shape,
        steps=steps,
        num_rows=num_rows,
        identity=identity,
        identity_hash=hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
        origins=origins,
        warnings=warnings,
    )


def _with_preset(recipe: Recipe) -> Recipe:
    """The recipe with every number of its algorithm."""
    if recipe.method != "rft":
        return recipe
    algorithm = resolve_algorithm(recipe.algorithm or AlgorithmSettings())
    return recipe.model_copy(update={"algorithm": algorithm, "rollout": recipe.rollout or RolloutSettings()})


def _origins(recipe: Recipe, given: Recipe, document: Document) -> dict[str, str]:
    """Where each value of the resolved recipe is from."""
    origins = {}
    for path, value in leaves(recipe.model_dump()):
        origin = document.origin_of(path)
        if origin is None and path[-1] == "path" and value is not None:
            origin = document.origin_of(path[:-1])  # `data.train: file` is short for `{path: file}`
        origins[dotted(path)] = origin or "default"
    if recipe.algorithm is not None:
        wrote = (given.algorithm or AlgorithmSettings()).model_dump()
        for name, value in recipe.algorithm.model_dump().items():
            if value != wrote[name]:
                origins[f"algorithm.{name}"] = f"preset {recipe.algorithm.name}"
    return origins


def choose_shape(recipe: Recipe, name: str, where: str = "shape") -> TrainingShape:
    """The named shape if it fits, or with `auto` the smallest that does.

    Args:
        recipe: the recipe.
        name: of the shape, its file, or `auto`.
        where: how messages begin.

    Raises:
        ShapeError: none fits, or the named one does not.
    """
    facts = model_facts(recipe)
    if name != "auto":
        try:
            shape = find_shape(name)
        except ShapeError as error:
            raise ShapeError(f"{where}: {str(error).removeprefix('shape ')}") from None
        problem = misfit(recipe, shape, facts)
        if problem is not None:
            ways = "\n".join(remedy_lines(recipe, shape))
            raise ShapeError(
                f"{where}: {shape.name} does not fit: {problem}\n{ways}\nSee also `trainer shapes RECIPE`."
            )
        return shape
    if facts is None:
        raise ShapeError(
            f"{where}: the sizes of {recipe.model.path} are not known here, so `auto` cannot choose.\n"
            "Name a shape (`trainer shapes` lists them), or give `model.path` as a directory with config.json."
        )
    problems = []
    for shape in all_shapes():
        problem = misfit(recipe, shape, facts)
        if problem is None:
            return shape
        problems.append(f"  {shape.name}: {problem}")
    raise ShapeError(
        f"{where}: no training shape fits {facts.params / 1e9:.3g} B parameters at "
        f"{recipe.data.max_seq_tokens:,} tokens:\n" + "\n".join(problems) + f"\n{_remedy(recipe)}"
    )


def _remedy(recipe: Recipe) -> str:
    remedies = ["lower `data.max_seq_tokens`"]
    if not recipe.model.gradient_checkpointing:
        remedies.append("set `model.gradient_checkpointing: true`")
    if recipe.lora is None:
        remedies.append("train with `lora`")
    text = ", ".join([*remedies, "or add a shape to configs/shapes/."])
    return text[0].upper() + text[1:]


def misfit(recipe: Recipe, shape: TrainingShape, facts: ModelFacts | None) -> str | None:
    """Why the recipe does not fit the shape, or None."""
    kind = "LoRA" if recipe.lora is not None else "full-parameter training"
    limit = shape.limits.lora if recipe.lora is not None else shape.limits.full
    if limit is None:
        return f"does not hold {kind}"
    if shape.sharding == "full" and shape.num_ranks > 1 and recipe.rollout and recipe.rollout.sampler == "local":
        return "shards the base model, and sampling in process would gather it for every token: `rollout.sampler: vllm`"
    if recipe.data.max_seq_tokens > limit.max_seq_tokens:
        return f"holds sequences up to {limit.max_seq_tokens:,} tokens ({limit.basis})"
    if facts is None:
        return None
    if facts.params > limit.max_params_b * 1e9:
        return f"holds models up to {limit.max_params_b:g} B parameters for {kind} ({limit.basis})"
    memory = estimate_memory(recipe, shape, facts)
    if not memory.fits:
        return f"needs about {memory.total_gib:.1f} GiB per device and has {memory.available_gib:g}"
    return None


def model_facts(recipe: Recipe) -> ModelFacts | None:
    """Sizes of the recipe's model, where they can be known without a hub."""
    return find_model_facts(recipe.model.path, config_dirs("models"))


def plan_memory(plan: Plan) -> MemoryEstimate | None:
    """Memory of the plan, where the model's sizes are known."""
    facts = model_facts(plan.recipe)
    return estimate_memory(plan.recipe, plan.shape, facts) if facts else None


def sequences_per_step(recipe: Recipe) -> int:
    """Sequences that a step learns from: rows, or every completion of every prompt."""
    return recipe.rows_per_step * (recipe.rollout.group_size if recipe.rollout is not None else 1)


def step_tokens(plan: Plan) -> float | None:
    """Tokens that a step learns from; rft counts every completion at its full length, so it is at most that."""
    own = mean_row_tokens(plan.recipe)
    if own is None:
        return None
    if plan.recipe.rollout is not None:
        own = min(own + plan.recipe.rollout.max_completion_tokens, plan.recipe.data.max_seq_tokens)
    return own * sequences_per_step(plan.recipe)


def accumulation(plan: Plan) -> int | None:
    """Micro-batches per device of a step, if they are filled."""
    tokens = step_tokens(plan)
    return (
        None if tokens is None else max(1, math.ceil(tokens / (plan.shape.micro_batch_tokens * plan.shape.num_ranks)))
    )


def plan_device_hours(plan: Plan) -> float | None:
    """Device-hours of learning (sampling not counted), where the shape's rate and the rows are known; rough."""
    facts, rate, tokens = model_facts(plan.recipe), plan.shape.rate, step_tokens(plan)
    if facts is None or rate is None or tokens is None:
        return None
    flops = plan.steps * tokens * flops_per_token(facts, is_lora=plan.recipe.lora is not None)
    return flops / (rate.tflops * 1e12) / 3600


def make_identity(recipe: Recipe) -> dict[str, Any]:
    """What changes the result: two plans of equal identity are the same run."""
    fields = recipe.model_dump(
        include={"method", "seed", "lora", "rows_per_step", "optimizer", "algorithm", "rollout", "rewards"}
    )
    fields["data"] = recipe.data.model_dump(exclude={"train", "eval", "eval_rows"})
    for name in LATER_DATA_FIELDS:  # at their defaults they leave the identity as it was before they existed
        if fields["data"][name] == DataSettings.model_fields[name].get_default(call_default_factory=True):
            del fields["data"][name]
    fields["data"]["digest"] = source_digest(recipe.data.train)
    fields["model"] = recipe.model.model_dump(include={"revision", "trust_remote_code", "compute_dtype"})
    fields["model"]["digest"] = model_digest(recipe.model.path)
    if recipe.model.quantization is not None:
        fields["model"]["quantization"] = recipe.model.quantization
    template = recipe.model.chat_template
    if template is not None:
        is_builtin = template in BUILTIN_TEMPLATES
        fields["model"]["chat_template"] = template if is_builtin else _file_digest(Path(template))
    if recipe.lora is not None and recipe.lora.warm_start is not None:
        fields["lora"]["warm_start"] = model_digest(recipe.lora.warm_start)
    if fields["rollout"] is not None:
        for name in ("vllm_url", "eval_samples", "max_sampler_kl"):
            fields["rollout"].pop(name)
    return fields


def source_digest(source: DataSource) -> str:
    """Of the files' bytes; of the name, configuration, split and revision for a hub data set."""
    if source.sources:
        return " + ".join(f"{each.repeat:g} x {source_digest(each)}" for each in source.sources)
    files = [file for path in source_files(source) for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    if len(files) == 1:
        return _file_digest(files[0])
    if files:
        digest = hashlib.sha256()
        for file in files:
            if file.is_file():
                digest.update(f"{file.name}:{_file_digest(file)};".encode())
        return f"sha256:{digest.hexdigest()}"
    return f"hub:{source.hub}:{source.config}:{source.split}:{source.revision}"


def model_digest(path: str) -> str:
    """Of a model or adapter directory: JSON files whole, weights by size, head, middle and tail.

    Weights may be hundreds of GB; three samples of a megabyte tell different weights apart in milliseconds.
    """
    directory = Path(path)
    if not directory.is_dir():
        return f"hub:{path}"
    digest = hashlib.sha256()
    for file in sorted(directory.iterdir()):
        if file.suffix == ".safetensors":
            size = file.stat().st_size
            digest.update(f"{file.name}:{size}".encode())
            with file.open("rb") as handle:
                for offset in sorted({0, size // 2, max(0, size - 2**20)}):
                    handle.seek(offset)
                    digest.update(handle.read(2**20))
        elif file.suffix in {".json", ".jinja"}:
            digest.update(file.name.encode() + file.read_bytes())
    return f"sha256:{digest.hexdigest()}"


def _file_digest(path: Path) -> str:
    return f"sha256:{file_sha256(path)}"
