"""Writes the model card: what was trained, on which rows, with which result, and how to use it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import yaml

from trainer.config.recipe import DataSource, RFTRecipe
from trainer.export.choice import Weights
from trainer.planning.identity import source_digest
from trainer.planning.plan import Plan
from trainer.run.best import best_value
from trainer.run.directory import RunDir

CARD: Final = "README.md"
VLLM_RANKS: Final = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM takes for --max-lora-rank."""
PRIVATE: Final[dict[str, Any]] = {"checkpoint": True, "logging": True, "rollout": {"vllm_url", "vllm", "server_url"}}
"""Fields of the recipe that the card leaves out: addresses of storage and servers."""
SHOWN: Final = ("eval/", "train/loss", "train/reward", "rollout/reward", "train/ref_kld")
"""Beginnings of the names of metrics that the card shows."""


@final
@dataclass(frozen=True)
class Exported:
    """What the card describes."""

    weights: Weights
    verifications: tuple[str, ...]
    """What the export says of each comparison."""
    is_adapter: bool
    gguf_name: str | None = None
    """Of the GGUF file, where one was written."""
    has_modelfile: bool = False
    intended_use: str | None = None
    """In the user's words."""


def model_card(run: RunDir, plan: Plan, exported: Exported) -> str:
    """The text of README.md.

    Args:
        run: the run.
        plan: its plan.
        exported: what was written.
    """
    parts = [
        _header(plan, exported),
        f"# {run.name}",
        _summary(plan, exported),
        "## Intended use",
        exported.intended_use or _default_use(plan),
        "## How to use it",
        _use(run, plan, exported),
        "## Data",
        "\n".join(_data(plan)),
        "## Results",
        *_results(run, plan, exported),
        "## Recipe",
        _recipe(plan),
    ]
    return "\n\n".join(parts) + "\n"


def _header(plan: Plan, exported: Exported) -> str:
    recipe = plan.recipe
    values: dict[str, Any] = {
        "library_name": "gguf" if exported.gguf_name else "peft" if exported.is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["tunesmith", recipe.method, *(["lora"] if recipe.lora is not None else [])],
    }
    if not Path(recipe.model.path).exists():  # the hub refuses a base that is no name of a model
        values["base_model"] = recipe.model.path
    names = sorted({source.hub for source in _sources(recipe.data.train) if source.hub is not None})
    return "---\n" + yaml.safe_dump(values | ({"datasets": names} if names else {}), sort_keys=False) + "---"


def _summary(plan: Plan, exported: Exported) -> str:
    recipe = plan.recipe
    method = "Supervised fine-tuning" if recipe.method == "sft" else "Reinforcement fine-tuning"
    trained = "all parameters" if recipe.lora is None else f"LoRA adapters of rank {recipe.lora.rank}"
    form = "an adapter, to be used with its base model" if exported.is_adapter else "a whole model"
    revision = f" at `{recipe.model.revision}`" if recipe.model.revision else ""
    return (
        f"{method} of `{recipe.model.path}`{revision}, {trained}; "
        f"{exported.weights}, of {plan.steps} steps. This is {form}."
    )


def _default_use(plan: Plan) -> str:
    recipe = plan.recipe
    kind = "plain text" if recipe.data.format == "text" else "chats"
    rewarded = " that earn the rewards of the recipe" if recipe.method == "rft" else ""
    return (
        f"Answers{rewarded} to {kind} of the kind of its training rows. Measured on the held-out rows below only; for "
        "other uses, languages and lengths nothing was measured. The licence and the limits of the base model and of "
        "the rows apply."
    )


def _use(run: RunDir, plan: Plan, exported: Exported) -> str:
    base, lora = plan.recipe.model.path, plan.recipe.lora
    if exported.gguf_name is not None and exported.is_adapter:
        lines = [f"llama-server -m BASE.gguf --lora {exported.gguf_name}   # BASE.gguf: {base}, converted to GGUF"]
    elif exported.gguf_name is not None:
        ollama = [f"ollama create {run.name} -f Modelfile"] if exported.has_modelfile else []
        lines = [f"llama-server -m {exported.gguf_name}", *ollama]
    elif exported.is_adapter and lora is not None:
        rank = next((rank for rank in VLLM_RANKS if rank >= lora.rank), lora.rank)
        lines = [f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {run.name}=."]
    else:
        lines = [f"vllm serve . --served-model-name {run.name}"]
    text = "In this directory:\n\n```sh\n" + "\n".join(lines) + "\n```"
    if exported.gguf_name is not None:
        return text
    field = "lora.warm_start" if exported.is_adapter else "model.path"
    return f"{text}\n\nTo train it further with tunesmith, name the directory as `{field}` of a recipe."


def _data(plan: Plan) -> Iterator[str]:
    data = plan.recipe.data
    trained_digest = plan.identity["data"]
    digest = trained_digest["digest"] if isinstance(trained_digest, dict) else None
    rows = f", {plan.num_rows} rows" if plan.num_rows is not None else ""
    yield f"- Trained on {_named(data.train)}{rows}; digest `{digest}`"
    if data.eval is None:
        yield "- No held-out rows"
    else:
        yield f"- Held out: {_named(data.eval)}; digest at export `{source_digest(data.eval)}`"


def _results(run: RunDir, plan: Plan, exported: Exported) -> Iterator[str]:
    records = [record for record in run.read_metrics() if record["step"] <= exported.weights.step]
    best = best_value(record for record in run.comparable_metrics() if record["step"] <= exported.weights.step)
    if best is not None:
        yield f"Best held-out value up to here: `{best.name}` {best.value:.4f} at step {best.step}."
    table = list(_table(records))
    if table:
        yield "| metric | first | last |\n|---|---:|---:|\n" + "\n".join(table)
    yield "\n".join(f"- {text}" for text in exported.verifications)


def _table(records: list[dict[str, Any]]) -> Iterator[str]:
    names = sorted({name for record in records for name in record if name.startswith(SHOWN)})
    for name in names:
        values = [(record["step"], record[name]) for record in records if isinstance(record.get(name), int | float)]
        if values:
            first, last = (f"{value:.4g} (step {step})" for step, value in (values[0], values[-1]))
            yield f"| `{name}` | {first} | {last} |"


def _recipe(plan: Plan) -> str:
    values = json.loads(plan.recipe.model_dump_json(exclude_defaults=True, exclude=PRIVATE))
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    rewards = ""
    if isinstance(plan.recipe, RFTRecipe):
        rewards = "\n\nRewards of the kind `file.py:function` are code that is not part of this card."
    return f"Identity `{plan.identity_hash}`.\n\n```yaml\n{text}```{rewards}"


def _sources(source: DataSource) -> list[DataSource]:
    return [each for part in source.sources for each in _sources(part)] if source.sources else [source]


def _named(source: DataSource) -> str:
    return ", ".join(f"`{each.path or each.hub}`" for each in _sources(source))
