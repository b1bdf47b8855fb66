"""A configuration of Axolotl, LLaMA-Factory or TRL as a recipe, and what of it could not be translated. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import yaml

from trainer.config.document import read_document
from trainer.config.foreign_names import FIELDS, NO_PREFERENCES, NOT_NEEDED, PREFERENCE_METHODS, TOOLS
from trainer.config.recipe import DataSettings, OptimizerSettings, RecipeBase
from trainer.errors import UserError
from trainer.starter.foreign_values import BATCH_PARTS, HANDLED, SPECIAL
from trainer.starter.translation import Translation, Value

SAVE_INTERVAL: Final = 20
DEFAULTS: Final = {
    "optimizer.learning_rate": OptimizerSettings.model_fields["learning_rate"].default,
    "optimizer.schedule": OptimizerSettings.model_fields["schedule"].default,
    "data.max_seq_tokens": DataSettings.model_fields["max_seq_tokens"].default,
    "rows_per_step": RecipeBase.model_fields["rows_per_step"].default,
}
"""What a recipe takes where it says nothing."""


def translate(file: Path, tool: str | None = None, *, gpus: int = 1) -> Translation:
    """Translate a configuration.

    Args:
        file: YAML of another tool.
        tool: `axolotl`, `llamafactory` or `trl`; by its fields when None.
        gpus: devices that it was written for; the global batch counts them.

    Raises:
        RecipeError: the file is not YAML, or a mapping.
        UserError: it is of no tool that is known, or trains preferences.
    """
    given = flat(read_document(file).data)
    tool = tool or recognised(given, file)
    told = Translation(tool)
    _method(told, given)
    names = {name: each.ours for each in FIELDS for name in each.names(tool)}
    for name, value in given.items():
        if value is None or value == "":
            continue
        special = SPECIAL.get(name)
        if special is not None and name in names:
            try:
                special(told, name, value, given)
            except (TypeError, ValueError, AttributeError, KeyError) as error:
                told.leave(name, value, f"cannot be read as {tool} writes it ({error})")
        elif name in names:
            told.put(name, names[name], value)
        elif name in NOT_NEEDED:
            told.not_needed.append(f"{name}: {NOT_NEEDED[name]}")
        elif name not in HANDLED:
            told.leave(name, value, "has no equal here")
    _batch(told, given, gpus)
    _complete(told, given, file)
    return told


def flat(data: Mapping[str, Value]) -> dict[str, Value]:
    """The fields, those of Axolotl's section `trl` with its name: `trl.num_generations`."""
    fields: dict[str, Value] = {}
    for name, value in data.items():
        if name == "trl" and isinstance(value, Mapping):
            fields |= {f"trl.{inner}": each for inner, each in value.items()}
        else:
            fields[name] = value
    return fields


def recognised(given: Mapping[str, Value], file: Path) -> str:
    """The tool that has the most of these names.

    Raises:
        UserError: none has, or two have as many.
    """
    counts = {tool: len(given.keys() & {name for each in FIELDS for name in each.names(tool)}) for tool in TOOLS}
    most = max(counts.values())
    found = [tool for tool in TOOLS if counts[tool] == most]
    if most == 0 or len(found) > 1:
        raise UserError(f"{file}: cannot tell which tool it is for; say it with --from {', '.join(TOOLS)}")
    return found[0]


def _method(told: Translation, given: Mapping[str, Value]) -> None:
    """`sft` or `rft`; preferences are refused."""
    name = str(given.get("rl") or given.get("stage") or "sft").lower()
    if name in PREFERENCE_METHODS or name.startswith(("dpo", "kto")):
        raise UserError(f"{name}: {NO_PREFERENCES}")
    is_rft = name == "grpo" or "reward_funcs" in given or "trl.reward_funcs" in given
    told.recipe["method"] = "rft" if is_rft else "sft"
    if name == "pt":
        told.put("stage", "data.format", "text")
    elif name not in {"sft", "grpo"}:
        told.leave("rl" if "rl" in given else "stage", name, "unknown method; sft was taken")


def _batch(told: Translation, given: Mapping[str, Value], gpus: int) -> None:
    """The global batch from its factors; of GRPO in prompts."""
    factors = [int(given[name]) for name in BATCH_PARTS if isinstance(given.get(name), int)]
    for name in BATCH_PARTS:
        if given.get(name) is not None and not isinstance(given[name], int):
            told.leave(name, given[name], "no number; write the global batch as rows_per_step")
    for name in BATCH_PARTS:
        told.recipe.pop(name, None)
    told.done = [line for line in told.done if not line.startswith(BATCH_PARTS)]
    if not factors:
        return
    batch = gpus
    for factor in factors:
        batch *= factor
    if told.recipe["method"] == "rft":
        group = told.recipe.get("rollout", {}).get("group_size", 8)
        batch = max(1, batch // group)
    names = " x ".join(name for name in BATCH_PARTS if name in given)
    told.put(f"{names} x {gpus} GPU", "rows_per_step", batch)
    if gpus == 1:
        told.left.append("rows_per_step: counted for 1 GPU; with more give --gpus N")


def _complete(told: Translation, given: Mapping[str, Value], file: Path) -> None:
    """What a recipe needs and the other tool has as a default."""
    recipe = told.recipe
    recipe.setdefault("name", re.sub(r"[^A-Za-z0-9_.-]+", "-", file.stem).strip("-._") or "imported")
    if "lora" not in recipe and not any(given.get(name) for name in ("adapter", "use_peft")):
        is_default = told.tool == "llamafactory" and given.get("finetuning_type", "lora") == "lora"
        recipe["lora"] = {} if is_default else None
    elif isinstance(recipe.get("lora"), dict) and given.get("finetuning_type") == "full":
        recipe["lora"] = None
    if "steps" not in recipe and "epochs" not in recipe:
        recipe["epochs"] = 1 if told.tool == "axolotl" else 3
        told.left.append(f"epochs: {recipe['epochs']}, the default of {told.tool}")
    _name_defaults(told)
    if not recipe.get("dcp_save_interval"):
        recipe["dcp_save_interval"] = SAVE_INTERVAL
    is_hub = str(recipe.get("model", {}).get("path", "")).count("/") == 1
    if is_hub and "revision" not in recipe["model"] and not Path(recipe["model"]["path"]).exists():
        recipe["model"]["revision"] = "main"
        told.left.append("model.revision: main; write a commit to pin the model")
    if recipe.get("eval_interval") and not {"eval", "eval_frac"} & recipe.get("data", {}).keys():
        del recipe["eval_interval"]
        told.left.append("eval_interval: left out, since there are no held-out rows (data.eval_frac)")


def _name_defaults(told: Translation) -> None:
    """Fields that decide the result and that the configuration leaves to its tool, whose default may be another one."""
    for ours, default in DEFAULTS.items():
        section, _, name = ours.rpartition(".")
        inside = told.recipe.get(section, {}) if section else told.recipe
        if name not in inside:
            told.left.append(f"{ours}: {default}, the default here; the configuration does not say it")


def as_recipe(told: Translation, file: Path) -> str:
    """The recipe as YAML, with what is left to decide as comments."""
    order = ["name", "method", "seed", "model", "lora", "data", "rows_per_step", "steps", "epochs", "optimizer"]
    names = [name for name in order if name in told.recipe] + [name for name in told.recipe if name not in order]
    recipe = {name: told.recipe[name] for name in names}
    if recipe.get("lora") == {}:
        recipe["lora"] = {
            "rank": 16 if told.tool != "llamafactory" else 8,
            "alpha": 32 if told.tool != "llamafactory" else 16,
        }
    lines = [f"# Translated from {file} ({told.tool}) by `trainer import-config`."]
    lines += [f"# decide: {' '.join(line.split())}" for line in told.left]
    return "\n".join(lines) + "\n" + yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=120)
