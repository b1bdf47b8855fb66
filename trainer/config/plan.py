"""The plan: recipe and shape, resolved and frozen. From here on nobody reads the YAML again."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, final

from trainer.config.document import KeyPath
from trainer.config.load import LoadedRecipe, all_shapes, config_dirs, find_shape
from trainer.config.memory import MemoryEstimate, ModelFacts, estimate_memory, find_model_facts, flops_per_token
from trainer.config.presets import resolve_algorithm
from trainer.config.recipe import AlgorithmSettings, DataSource, Recipe, RolloutSettings
from trainer.config.section import Section
from trainer.config.shape import TrainingShape
from trainer.errors import ShapeError

PLAN_FORMAT = 1
CHARS_PER_TOKEN = 3.5
"""Rough, for the time estimate before anything is tokenized."""


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
    recipe = loaded.recipe
    origins = dict(_origins(loaded))
    if recipe.method == "rft":
        given = recipe.algorithm or AlgorithmSettings()
        algorithm = resolve_algorithm(given)
        for name, value in algorithm.model_dump().items():
            if value != getattr(given, name):
                origins[f"algorithm.{name}"] = f"preset {given.name}"
        recipe = recipe.model_copy(update={"algorithm": algorithm, "rollout": recipe.rollout or RolloutSettings()})
    shape, chosen = choose_shape(recipe, shape_name or recipe.shape)
    if shape_name is not None:
        chosen = "--shape"
    origins["shape"] = chosen or origins.get("shape", "default")
    origins |= {f"shape.{name}": f"shape {shape.name}" for name in ("micro_batch_tokens", "sharding", "gpus", "nodes")}
    num_rows = count_rows(recipe.data.train)
    identity = make_identity(recipe)
    return Plan(
        recipe=recipe.model_copy(update={"shape": shape.name}),
        recipe_dir=str(Path(loaded.document.file).resolve().parent),
        shape=shape,
        steps=_num_steps(recipe, num_rows),
        num_rows=num_rows,
        identity=identity,
        identity_hash=hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
        origins=origins,
        warnings=list(loaded.warnings),
    )


def choose_shape(recipe: Recipe, name: str) -> tuple[TrainingShape, str | None]:
    """The named shape if it fits, or with `auto` the smallest that does; and a word on how it was chosen."""
    facts = model_facts(recipe)
    if name != "auto":
        shape = find_shape(name)
        problem = misfit(recipe, shape, facts)
        if problem is not None:
            raise ShapeError(f"shape {shape.name} does not fit: {problem}\nTry `shape: auto`, or `trainer shapes`.")
        return shape, None
    problems = []
    for shape in all_shapes():
        problem = misfit(recipe, shape, facts)
        if problem is None:
            return shape, "auto: the smallest that fits"
        problems.append(f"  {shape.name}: {problem}")
    size = f"{facts.params / 1e9:.1f} B parameters at " if facts else ""
    raise ShapeError(
        f"no training shape fits {size}{recipe.data.max_seq_tokens:,} tokens:\n"
        + "\n".join(problems)
        + "\nLower `data.max_seq_tokens`, set `model.gradient_checkpointing`, or add a shape to configs/shapes/."
    )


def misfit(recipe: Recipe, shape: TrainingShape, facts: ModelFacts | None) -> str | None:
    """Why the recipe does not fit the shape, or None."""
    kind = "LoRA" if recipe.lora is not None else "full-parameter training"
    limit = shape.limits.lora if recipe.lora is not None else shape.limits.full
    if limit is None:
        return f"does not hold {kind}"
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


def plan_gpu_hours(plan: Plan) -> float | None:
    """Device-hours of the learning part, where the shape's rate and the rows are known; rough."""
    facts, rate, path = model_facts(plan.recipe), plan.shape.rate, plan.recipe.data.train.path
    if facts is None or rate is None or not plan.num_rows or path is None:
        return None
    row_tokens = min(Path(path).stat().st_size / plan.num_rows / CHARS_PER_TOKEN, plan.recipe.data.max_seq_tokens)
    tokens = plan.steps * plan.recipe.rows_per_step * row_tokens
    return tokens * flops_per_token(facts, is_lora=plan.recipe.lora is not None) / (rate.tflops * 1e12) / 3600


def count_rows(source: DataSource) -> int | None:
    """Lines of a file that are not blank; None where the rows come from a hub."""
    if source.path is None or not Path(source.path).is_file():
        return None
    with Path(source.path).open("rb") as file:
        return sum(1 for line in file if line.strip())


def make_identity(recipe: Recipe) -> dict[str, Any]:
    """What changes the result: two plans of equal identity are the same run."""
    fields = recipe.model_dump(
        include={"method", "seed", "lora", "rows_per_step", "optimizer", "algorithm", "rollout", "rewards"}
    )
    fields["data"] = recipe.data.model_dump(exclude={"train", "eval", "eval_rows"})
    fields["data"]["digest"] = source_digest(recipe.data.train)
    fields["model"] = recipe.model.model_dump(include={"revision", "trust_remote_code", "compute_dtype"})
    fields["model"]["digest"] = model_digest(recipe.model.path)
    if recipe.model.chat_template is not None:
        fields["model"]["chat_template"] = _file_digest(Path(recipe.model.chat_template))
    if recipe.lora is not None and recipe.lora.warm_start is not None:
        fields["lora"]["warm_start"] = model_digest(recipe.lora.warm_start)
    if fields["rollout"] is not None:
        fields["rollout"].pop("vllm_url")
    return fields


def source_digest(source: DataSource) -> str:
    """Of the file's bytes; of the name, configuration, split and revision for a hub data set."""
    if source.path is not None and Path(source.path).is_file():
        return _file_digest(Path(source.path))
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
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def _num_steps(recipe: Recipe, num_rows: int | None) -> int:
    if recipe.steps is not None:
        return recipe.steps
    if num_rows is None:
        raise ShapeError("`epochs` needs rows that can be counted here; with a hub data set give `steps`")
    return max(1, math.ceil((recipe.epochs or 1.0) * num_rows / recipe.rows_per_step))


def _origins(loaded: LoadedRecipe) -> Iterator[tuple[str, str]]:
    document = loaded.document
    for path, _ in _leaves(loaded.recipe.model_dump(), ()):
        name = ".".join(str(part) for part in path)
        if document.is_given(path) or document.is_given(path[:-1]) and path[-1] == "path":
            where = document.where(path)
            yield name, "--set" if where.startswith("--set") else where.removesuffix(f": {name}")
        else:
            yield name, "default"


def _leaves(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    if isinstance(value, dict) and value:
        for key, inside in value.items():
            yield from _leaves(inside, (*path, key))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for index, inside in enumerate(value):
            yield from _leaves(inside, (*path, index))
    else:
        yield path, value
