"""What types cannot say of a recipe: contradictions, and what is odd but allowed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import final

from trainer.config.document import KeyPath
from trainer.config.recipe import DataSource, Recipe


@final
@dataclass(frozen=True)
class Finding:
    """One contradiction (an error) or oddity (a warning), at the field that the user should look at."""

    path: KeyPath
    text: str
    is_error: bool = True


def contradictions(recipe: Recipe, recipe_dir: Path) -> list[Finding]:
    """Every contradiction and warning of a recipe whose fields are each valid.

    Args:
        recipe: the recipe.
        recipe_dir: directory of the recipe file, for `file.py:function` rewards.
    """
    found = _length(recipe) + _data(recipe) + _model(recipe)
    found += _rft(recipe, recipe_dir) if recipe.method == "rft" else _sft(recipe)
    if recipe.dcp_save_interval == 0:
        found.append(Finding(("dcp_save_interval",), "is 0: a kill loses the run. Set it, for example to 20.", False))
    if recipe.eval_interval and recipe.data.eval is None:
        found.append(Finding(("eval_interval",), "needs held-out rows: set `data.eval`"))
    return found


def _length(recipe: Recipe) -> list[Finding]:
    if recipe.steps is None and recipe.epochs is None:
        return [Finding(("steps",), "missing; say how long to train with `steps` or `epochs`")]
    if recipe.steps is not None and recipe.epochs is not None:
        return [Finding(("epochs",), "contradicts `steps`; give one of them")]
    if recipe.steps is not None and recipe.optimizer.warmup_steps >= recipe.steps:
        text = f"warm-up of {recipe.optimizer.warmup_steps} steps is not shorter than the run of {recipe.steps} steps"
        return [Finding(("optimizer", "warmup_steps"), text)]
    return []


def _data(recipe: Recipe) -> list[Finding]:
    found = _source(("data", "train"), recipe.data.train)
    if recipe.data.eval is not None:
        found += _source(("data", "eval"), recipe.data.eval)
        if recipe.data.eval == recipe.data.train:
            found.append(Finding(("data", "eval"), "is the training data; held-out rows must be others"))
    return found


def _source(path: KeyPath, source: DataSource) -> list[Finding]:
    if source.path is None and source.hub is None:
        return [Finding(path, "give `path` (a JSONL file) or `hub` (a data set name)")]
    if source.path is None:
        return []
    file = Path(source.path)
    if file.is_dir():
        return [Finding(path, f"{file} is a directory; name a JSONL file in it")]
    if not file.exists() and source.hub is None:
        return [Finding(path, f"no such file: {file} (paths are relative to {Path.cwd()})")]
    if file.exists() and file.stat().st_size == 0:
        return [Finding(path, f"{file} is empty")]
    return []


def _model(recipe: Recipe) -> list[Finding]:
    found = []
    model = recipe.model
    directory = Path(model.path)
    looks_local = model.path.startswith((".", "/", "~")) or model.path.count("/") != 1 or directory.exists()
    if directory.is_dir() and not (directory / "config.json").is_file():
        found.append(Finding(("model", "path"), f"{directory} has no config.json: not a model directory"))
    elif not directory.exists() and (looks_local or model.path.startswith("models/")):
        hint = " Run scripts/prepare_model to make it." if model.path.startswith("models/") else ""
        found.append(Finding(("model", "path"), f"no such directory: {directory}.{hint}"))
    elif not directory.exists() and model.revision is None:
        text = "a hub name needs a pinned `model.revision` (a commit), because a branch moves"
        found.append(Finding(("model", "path"), text))
    if model.chat_template is not None and not Path(model.chat_template).is_file():
        found.append(Finding(("model", "chat_template"), f"no such file: {model.chat_template}"))
    if recipe.lora is not None and recipe.lora.warm_start is not None:
        config = Path(recipe.lora.warm_start) / "adapter_config.json"
        if not config.is_file():
            found.append(Finding(("lora", "warm_start"), f"{config} is missing: not an adapter directory"))
    return found


def _sft(recipe: Recipe) -> list[Finding]:
    return [
        Finding((name,), "belongs to `method: rft`; remove it or change the method")
        for name, value in (
            ("algorithm", recipe.algorithm),
            ("rollout", recipe.rollout),
            ("rewards", recipe.rewards),
        )
        if value
    ]


def _rft(recipe: Recipe, recipe_dir: Path) -> list[Finding]:
    from trainer.rewards import importable  # here, so that sft recipes do not pay for it

    found = []
    if not recipe.rewards:
        found.append(Finding(("rewards",), "missing; rft needs at least one reward, for example `- use: last_number`"))
    names = [reward.name for reward in recipe.rewards]
    for index, reward in enumerate(recipe.rewards):
        problem = importable(reward.use, recipe_dir)
        if problem is not None:
            found.append(Finding(("rewards", index, "use"), problem))
        if names.index(reward.name) != index:
            found.append(Finding(("rewards", index), f"two rewards are called {reward.name}; give one a `label`"))
    if recipe.lora is not None and recipe.lora.dropout > 0:
        found.append(Finding(("lora", "dropout"), "rft needs 0: with dropout the policy would differ from itself"))
    rollout, algorithm = recipe.rollout, recipe.algorithm
    if rollout is not None:
        truncated = rollout.top_p < 1 or rollout.top_k > 0 or rollout.min_p > 0
        if truncated and (algorithm is None or algorithm.mismatch_cap is None):
            name = "top_p" if rollout.top_p < 1 else "top_k" if rollout.top_k > 0 else "min_p"
            text = "truncated sampling biases the gradient; turn it off or set `algorithm.mismatch_cap`"
            found.append(Finding(("rollout", name), text))
        if rollout.max_completion_tokens >= recipe.data.max_seq_tokens:
            text = f"leaves no room for the prompt in data.max_seq_tokens ({recipe.data.max_seq_tokens})"
            found.append(Finding(("rollout", "max_completion_tokens"), text))
    if algorithm is not None and recipe.rows_per_step % algorithm.minibatches_per_step:
        text = f"{algorithm.minibatches_per_step} minibatches do not divide rows_per_step ({recipe.rows_per_step})"
        found.append(Finding(("algorithm", "minibatches_per_step"), text))
    if recipe.data.format == "text":
        found.append(Finding(("data", "format"), "rft prompts are chats; remove `format: text`"))
    return found
