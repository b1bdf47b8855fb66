"""The plan: recipe and shape, resolved and frozen. After this, the recipe file is not read again."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias, final

from pydantic import Field

from trainer.config.document import Document, dotted, leaves
from trainer.config.length import mean_row_tokens, num_steps, rows_for_epochs
from trainer.config.load import LoadedRecipe, config_dirs
from trainer.config.presets import ResolvedAlgorithm
from trainer.config.recipe import RFT_FIELDS, Recipe, RFTRecipe, SFTRecipe
from trainer.config.section import Section
from trainer.config.semantics import is_hub_name
from trainer.config.shape import TrainingShape
from trainer.config.unsupported import ATTENTION_DROPOUT, CONTEXT_SEPARATE, FULL_EXPERTS, LOGIT_SCALE, SCALE_LEFT_OUT
from trainer.errors import ModelError, ShapeError
from trainer.planning.algorithm import algorithm_values, resolve_algorithm
from trainer.planning.batching import rotary_problem, why_separate
from trainer.planning.choose_shape import choose_shape
from trainer.planning.hub import COMMIT, hub_model
from trainer.planning.identity import identity_hash, make_identity, reward_digests
from trainer.planning.memory import MemoryEstimate, estimate_memory
from trainer.planning.model_facts import ModelFacts, find_model_config, find_model_facts, flops_per_token

COHERE_LOGIT_SCALE: Final = 0.0625
"""Where config.json has none: the default of transformers."""
PLAN_FORMAT: Final = 2
PATH_FIELDS: Final = ("path", "chat_template", "warm_start")
"""Names of recipe fields that can hold a path from the working directory."""
SHAPE_VALUES: Final = ("device", "nodes", "gpus", "micro_batch_tokens", "sharding", "context_parallel")
"""Values of a plan that the shape decides."""


class PlanBase(Section):
    """What the plans of both methods have in common: all that a worker needs, and the origin of each value."""

    format: int = PLAN_FORMAT
    recipe: Recipe
    """As the user wrote it, with `shape` resolved."""
    recipe_dir: str
    """Directory of the recipe; `file.py:function` rewards are relative to it."""
    working_dir: str = ""
    """Absolute directory in which the plan was made; relative paths of the recipe start there. Empty in old plans."""
    shape: TrainingShape
    steps: int
    """Length of the run."""
    num_rows: int | None
    """Number of training rows; None for hub data sets, which are counted when they are loaded."""
    row_tokens: float | None = None
    """Estimated mean tokens of a training row; None if the rows cannot be read yet."""
    facts: ModelFacts | None = None
    """Sizes of the model; None if unknown, or if the plan was written in format 1."""
    memory: MemoryEstimate | None = None
    """Predicted memory of one device; None if the sizes of the model are unknown."""
    identity: dict[str, object]
    """Everything that changes the result."""
    identity_hash: str
    reward_digests: dict[str, str] = Field(default_factory=dict)
    """Digest of each reward file. Changed reward code continues the same run; the change is recorded."""
    separate_reason: str | None = None
    """Why sequences are trained one by one, as far as config.json tells; None: they are packed, or it is not known."""
    origins: dict[str, str]
    """Dotted field name -> default, shape, preset, --set or file:line."""
    warnings: list[str]

    @property
    def steps_per_epoch(self) -> float | None:
        """Steps of one pass over the rows; None where the rows are not counted yet."""
        return self.num_rows / self.recipe.rows_per_step if self.num_rows else None

    def dump(self) -> str:
        """Return the text of plan.json."""
        return json.dumps(self.model_dump(), indent=2, ensure_ascii=False) + "\n"


@final
class SFTPlan(PlanBase):
    """The plan of a supervised fine-tuning."""

    recipe: SFTRecipe


@final
class RFTPlan(PlanBase):
    """The plan of a reinforcement fine-tuning."""

    recipe: RFTRecipe
    algorithm: ResolvedAlgorithm
    """The recipe's algorithm with all defaults filled in. Training reads this, not `recipe.algorithm`."""


Plan: TypeAlias = SFTPlan | RFTPlan
"""A plan of either method."""


def make_plan(loaded: LoadedRecipe, shape_name: str | None = None) -> Plan:
    """Resolve a recipe on a shape.

    Args:
        loaded: The recipe.
        shape_name: Overrides the recipe's `shape`.

    Raises:
        ShapeError: No shape fits, or the named one does not, or it splits packs of a model that has none.
    """
    document = loaded.document
    recipe, revision_origin, revision_notes = _with_commit(loaded.recipe, document)
    facts = model_facts(recipe)
    _refuse_model(recipe, facts, document)
    name = shape_name or recipe.shape
    source = "--shape" if shape_name else document.where(("shape",))
    is_given = document.origin_of(("model", "gradient_checkpointing")) is not None
    choice = choose_shape(recipe, facts, name, source, may_checkpoint=not is_given)
    recipe, shape = choice.recipe, choice.shape
    separate = why_separate(model_config(recipe), recipe.data.max_seq_tokens)
    if separate is not None and shape.context_parallel > 1:
        raise ShapeError(f"{source}: {shape.name} {CONTEXT_SEPARATE.format(separate)}")
    num_rows = rows_for_epochs(recipe)
    steps = num_steps(recipe, num_rows)
    assert steps is not None, "`load_recipe` refuses recipes of unknown length"
    algorithm = resolve_algorithm(recipe.algorithm) if isinstance(recipe, RFTRecipe) else None
    origins = _origins(recipe, algorithm, document) | {
        f"shape.{field}": f"shape {shape.name}" for field in SHAPE_VALUES
    }
    if shape_name is not None:
        origins["shape"] = "--shape"
    origins |= {**revision_origin, **choice.origins}
    identity = make_identity(recipe, algorithm)
    values = {
        "recipe": recipe.model_copy(update={"shape": shape.name}),
        "recipe_dir": str(Path(document.file).resolve().parent),
        "working_dir": str(Path.cwd()),
        "shape": shape,
        "steps": steps,
        "num_rows": num_rows,
        "row_tokens": mean_row_tokens(recipe),
        "facts": facts,
        "memory": estimate_memory(recipe, shape, facts) if facts is not None else None,
        "identity": identity,
        "identity_hash": identity_hash(identity),
        "reward_digests": reward_digests(recipe, Path(document.file).resolve().parent),
        "separate_reason": separate,
        "origins": origins,
        "warnings": [*loaded.warnings, *revision_notes, *choice.notes, *_warnings(recipe, facts, shape, document)],
    }
    if algorithm is None:
        return SFTPlan.model_validate(values)
    return RFTPlan.model_validate(values | {"algorithm": algorithm})


def _with_commit(recipe: Recipe, document: Document) -> tuple[Recipe, dict[str, str], list[str]]:
    """Replace the branch or tag of a hub model by its commit; returns the recipe, the value's origin, and a warning.

    Without a network the branch stays, with a warning. The config.json of an unknown model is fetched by the way.
    """
    model = recipe.model
    if model.revision is None or not is_hub_name(model.path):
        return recipe, {}, []
    is_commit = COMMIT.fullmatch(model.revision) is not None
    if is_commit and find_model_facts(model.path, config_dirs("models"), model.revision) is not None:
        return recipe, {}, []
    try:
        on_hub = hub_model(model.path, model.revision)
    except ModelError as error:
        raise ModelError(f"{document.where(('model', 'path'))}: {error}") from None
    if is_commit:
        return recipe, {}, []
    source = document.where(("model", "revision"))
    if on_hub.commit is None:
        text = (
            f"{source}: `{model.revision}` is a branch or a tag, which can change; pin a commit (40 hexadecimal digits)"
        )
        return recipe, {}, [f"{text}. It was not resolved to one, since {on_hub.problem}."]
    pinned = recipe.model_copy(update={"model": model.model_copy(update={"revision": on_hub.commit})})
    return pinned, {"model.revision": f"commit of `{model.revision}` when the plan was made"}, []


def _refuse_model(recipe: Recipe, facts: ModelFacts | None, document: Document) -> None:
    """Refuse what no shape supports for this model.

    Args:
        recipe: The recipe.
        facts: Sizes of the model; None if unknown, then the run refuses.
        document: For the line.

    Raises:
        ModelError: It is not supported.
    """
    if facts is not None and facts.num_experts > 1 and recipe.lora is None:
        raise ModelError(f"{document.where(('lora',))}: {FULL_EXPERTS}")
    rotary = rotary_problem(model_config(recipe), recipe.data.max_seq_tokens) if isinstance(recipe, RFTRecipe) else None
    if rotary is not None:
        raise ModelError(f"{document.where(('data', 'max_seq_tokens'))}: {rotary}")
    config = model_config(recipe)
    if config.get("model_type") in SCALE_LEFT_OUT:
        scale = (config.get("text_config") or {}).get("logit_scale", COHERE_LOGIT_SCALE)
        if scale != 1.0:
            place = document.where(("model", "path"))
            raise ModelError(f"{place}: {config['model_type']} of transformers {LOGIT_SCALE.format(scale)}")
    if facts is not None and facts.attention_dropout > 0:
        raise ModelError(f"{document.where(('model', 'path'))}: {ATTENTION_DROPOUT}")


def _warnings(recipe: Recipe, facts: ModelFacts | None, shape: TrainingShape, document: Document) -> list[str]:
    if facts is None:
        what = f"{recipe.model.path}: the sizes of the model are unknown"
        return [f"{what}, so it was not checked that it fits {shape.name}"]
    if recipe.lora is not None and recipe.lora.rank > facts.hidden:
        where = document.where(("lora", "rank"))
        return [
            f"{where}: {recipe.lora.rank} is more than the width of the model ({facts.hidden}): an adapter of full "
            "rank costs more than training every parameter (`lora: null`)"
        ]
    return []


def parse_plan(text: str | bytes) -> Plan:
    """Read the text of a plan.json, also one written in format 1.

    Raises:
        ValueError: The text is not a plan of a known format.
    """
    data = json.loads(text)
    if not isinstance(data, dict) or data.get("format") not in {1, PLAN_FORMAT}:
        raise ValueError(f"expected a plan of format {PLAN_FORMAT} or 1")
    if data["format"] == 1:
        data = _from_format_1(data)
    kind = RFTPlan if "algorithm" in data else SFTPlan
    return kind.model_validate_json(json.dumps(data))


def moved_plan(plan: Plan, before: Path, now: Path) -> Plan:
    """Return the plan for a project that is now in another directory: absolute paths inside it are adjusted.

    Args:
        plan: As it was made.
        before: Directory of the project at that time.
        now: Directory of the project.
    """
    data = json.loads(plan.dump())
    for name in ("recipe", "recipe_dir", "working_dir"):
        data[name] = _moved(data[name], str(before), str(now))
    return parse_plan(json.dumps(data))


def anchored_plan(plan: Plan, directory: Path) -> Plan:
    """Return the plan with the relative paths of its model, template, adapter and rows made absolute.

    What does not exist in the directory stays, for example the hub name of a model.

    Args:
        plan: As it was made.
        directory: Where its relative paths start.
    """
    data = json.loads(plan.dump())
    data["recipe"] = _anchored(data["recipe"], directory)
    return parse_plan(json.dumps(data))


def _anchored(value: object, directory: Path, name: str = "") -> object:
    if isinstance(value, dict):
        return {key: _anchored(each, directory, key) for key, each in value.items()}
    if isinstance(value, list):
        return [_anchored(each, directory) for each in value]
    if name not in PATH_FIELDS or not isinstance(value, str) or not value or Path(value).is_absolute():
        return value
    return str(directory / value) if any(directory.glob(value)) else value


def _moved(value: object, before: str, now: str) -> object:
    if isinstance(value, dict):
        return {key: _moved(each, before, now) for key, each in value.items()}
    if isinstance(value, list):
        return [_moved(each, before, now) for each in value]
    if isinstance(value, str) and (value == before or value.startswith(f"{before}/")):
        return now + value[len(before) :]
    return value


def _from_format_1(data: dict[str, object]) -> dict[str, object]:
    """Format 1 had no derived values, the algorithm resolved in the recipe, and empty rft fields in sft recipes."""
    recipe = data.get("recipe")
    if not isinstance(recipe, dict):
        raise ValueError("the plan has no recipe")
    if recipe.get("method") == "sft":
        recipe = {name: value for name, value in recipe.items() if name not in RFT_FIELDS}
        return data | {"format": PLAN_FORMAT, "recipe": recipe}
    algorithm = resolve_algorithm(RFTRecipe.model_validate_json(json.dumps(recipe)).algorithm)
    values = algorithm_values(algorithm) | {"loss": algorithm.loss}
    return data | {"format": PLAN_FORMAT, "algorithm": values}


def resolved_values(recipe: Recipe, algorithm: ResolvedAlgorithm | None) -> dict[str, object]:
    """Return the recipe as nested values, with every number of its algorithm.

    Args:
        recipe: The recipe.
        algorithm: Its resolved algorithm; None for sft.
    """
    values = recipe.model_dump()
    return values if algorithm is None else values | {"algorithm": algorithm_values(algorithm)}


def _origins(recipe: Recipe, algorithm: ResolvedAlgorithm | None, document: Document) -> dict[str, str]:
    """Return the origin of each resolved value."""
    written = dict(leaves(recipe.model_dump()))
    origins = {}
    for path, value in leaves(resolved_values(recipe, algorithm)):
        origin = document.origin_of(path)
        if origin is None and path[-1] == "path" and value is not None:
            origin = document.origin_of(path[:-1])  # `data.train: FILE` is short for `{path: FILE}`
        if algorithm is not None and path[0] == "algorithm" and value != written[path]:
            origin = f"preset {algorithm.name}"
        origins[dotted(path)] = origin or "default"
    return origins


def model_facts(recipe: Recipe) -> ModelFacts | None:
    """Return the sizes of the recipe's model; None if they cannot be known without a hub."""
    return find_model_facts(recipe.model.path, config_dirs("models"), recipe.model.revision)


def model_config(recipe: Recipe) -> Mapping[str, Any]:
    """Return the config.json of the recipe's model; empty if it cannot be known without a hub."""
    return find_model_config(recipe.model.path, config_dirs("models"), recipe.model.revision) or {}


def sequences_per_step(recipe: Recipe) -> int:
    """Return the sequences trained on per step: rows (sft), or completions of all prompts (rft)."""
    return recipe.rows_per_step * (recipe.rollout.group_size if isinstance(recipe, RFTRecipe) else 1)


def step_tokens(plan: Plan) -> float | None:
    """Return the tokens trained on per step; for rft an upper bound, with all completions at maximum length."""
    tokens = plan.row_tokens
    if tokens is None:
        return None
    if isinstance(plan, RFTPlan):
        tokens = min(tokens + plan.recipe.rollout.max_completion_tokens, plan.recipe.data.max_seq_tokens)
    return tokens * sequences_per_step(plan.recipe)


def accumulation(plan: Plan) -> int | None:
    """Return the micro-batches per device and step, assuming that all are full; None if the tokens are unknown."""
    if plan.separate_reason is not None:
        return math.ceil(sequences_per_step(plan.recipe) / plan.shape.num_ranks)
    tokens = step_tokens(plan)
    if tokens is None:
        return None
    return max(1, math.ceil(tokens / (plan.shape.micro_batch_tokens * plan.shape.num_ranks)))


def plan_device_hours(plan: Plan) -> float | None:
    """Roughly estimate the device-hours of training, without sampling; None if rate, model or rows are unknown."""
    facts, rate, tokens = plan.facts, plan.shape.rate, step_tokens(plan)
    if facts is None or rate is None or tokens is None:
        return None
    flops = plan.steps * tokens * flops_per_token(facts, is_lora=plan.recipe.lora is not None)
    return flops / (rate.tflops * 1e12) / 3600
