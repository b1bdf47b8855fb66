"""Writes the model card: what was trained, on which rows, with which result, and how to use it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import yaml

from trainer.config.recipe import DataSource, RFTRecipe
from trainer.export.weights import Weights
from trainer.planning.identity import source_digest
from trainer.planning.plan import Plan
from trainer.run.best import best_value
from trainer.run.directory import RunDir

CARD: Final = "README.md"
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
    intended_use: str | None = None
    """In the user's words."""


def model_card(run: RunDir, plan: Plan, exported: Exported) -> str:
    """The text of README.md.

    Args:
        run: the run.
        plan: its plan.
        exported: what was written.
    """
    recipe = plan.recipe
    parts = [
        _header(plan, exported),
        f"# {run.name}",
        _summary(plan, exported),
        "## Intended use",
        exported.intended_use or _default_use(plan),
        "## How to use it",
        _use(run, plan, exported),
        "## Data",
        *_data(plan),
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
    base, here = plan.recipe.model.path, "PATH"
    rank = 0 if plan.recipe.lora is None else plan.recipe.lora.rank
    if exported.gguf_name is not None:
        lines = [f"llama-server -m BASE.gguf --lora {exported.gguf_name}"]
        if not exported.is_adapter:
            lines = [f"llama-server -m {exported.gguf_name}", f"ollama create {run.name} -f Modelfile  # if it is here"]
    elif exported.is_adapter:
        lines = [f"vllm serve {base} --enable-lora --max-lora-rank {max(rank, 8)} --lora-modules {run.name}={here}"]
    else:
        lines = [f"vllm serve {here}"]
    again = "as `lora.warm_start` of a recipe" if exported.is_adapter else "as `model.path` of a recipe"
    further = "" if exported.gguf_name else f"\n\nTo train it further, name this directory {again}."
    return "```sh\n" + "\n".join(lines) + "\n```\n\n`PATH` is this directory." * 1 + further


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
    best = best_value(records)
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
    text = yaml.safe_dump(json.loads(plan.recipe.model_dump_json(exclude_defaults=True)), sort_keys=False)
    rewards = ""
    if isinstance(plan.recipe, RFTRecipe):
        rewards = "\n\nRewards of the kind `file.py:function` are code that is not part of this card."
    return f"Identity `{plan.identity_hash}`.\n\n```yaml\n{text}```{rewards}"


def _sources(source: DataSource) -> list[DataSource]:
    return [each for part in source.sources for each in _sources(part)] if source.sources else [source]


def _named(source: DataSource) -> str:
    return ", ".join(f"`{each.path or each.hub}`" for each in _sources(source))
