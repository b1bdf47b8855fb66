"""The identity of a run: everything that changes its result, hashed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from trainer.config.presets import ResolvedAlgorithm
from trainer.config.recipe import BUILTIN_TEMPLATES, DataSettings, DataSource, Recipe, RFTRecipe
from trainer.config.reward_place import WHERE_ONLY, source_of_reward
from trainer.config.rft_sections import RewardSpec, RolloutSettings, VerifiersEnvironment
from trainer.config.source_files import source_files
from trainer.files import file_sha256
from trainer.planning.algorithm import algorithm_values

ROLLOUT_EXEMPT = frozenset(
    {
        "vllm_url",
        "vllm",
        "server_url",
        "keep_steps",
        "eval_samples",
        "success",
        "max_sampler_kl",
        "environment_limits",
        "deterministic",
    }
)
"""Fields of `rollout` that do not change what is trained."""
LATER_ROLLOUT_FIELDS: Final = (
    "environment",
    "tools",
    "max_turns",
    "max_tokens",
    "max_time_s",
    "tool_errors",
    "staleness",
)
"""The same for `rollout`."""
LATER_DATA_FIELDS: Final = (
    "ignore",
    "eval_frac",
    "train_on",
    "allow_special_tokens",
    "chat_template_kwargs",
    "template_date",
)
"""Fields of `data` that the first version did not have; at their defaults they do not enter the hash."""


def make_identity(recipe: Recipe, algorithm: ResolvedAlgorithm | None) -> dict[str, object]:
    """Return what changes the result: two plans with equal identities belong to the same run.

    Args:
        recipe: The recipe.
        algorithm: The resolved algorithm; None for sft.
    """
    fields = recipe.model_dump(include={"method", "seed", "lora", "rows_per_step", "optimizer"})
    if fields["optimizer"]["name"] == "adamw":
        del fields["optimizer"]["name"]  # the first version did not have it
    fields |= {"algorithm": None, "rollout": None, "rewards": []}  # sft has them too: their absence is hashed
    if isinstance(recipe, RFTRecipe) and algorithm is not None:
        fields["algorithm"] = algorithm_values(algorithm)
        fields["rollout"] = recipe.rollout.model_dump(exclude=set(ROLLOUT_EXEMPT))
        unset = RolloutSettings().model_dump(include=set(LATER_ROLLOUT_FIELDS))
        for name, value in unset.items():
            if fields["rollout"][name] == value:
                del fields["rollout"][name]
        fields["rewards"] = [_reward_identity(reward) for reward in recipe.rewards]
        if recipe.reward_column is not None:
            fields["reward_column"] = recipe.reward_column
    fields["data"] = recipe.data.model_dump(exclude={"train", "eval", "eval_rows"})
    for name in LATER_DATA_FIELDS:
        if fields["data"][name] == DataSettings.model_fields[name].get_default(call_default_factory=True):
            del fields["data"][name]
    digests = input_digests(recipe)
    fields["data"]["digest"] = digests["data.digest"]
    fields["model"] = recipe.model.model_dump(include={"revision", "trust_remote_code", "compute_dtype"})
    fields["model"]["digest"] = digests["model.digest"]
    if recipe.model.quantization is not None:
        fields["model"]["quantization"] = recipe.model.quantization
    for section, name in (("model", "chat_template"), ("lora", "warm_start")):
        if f"{section}.{name}" in digests:
            fields[section][name] = digests[f"{section}.{name}"]
    return fields


def _reward_identity(reward: RewardSpec) -> dict[str, object]:
    """What of a reward changes the result; not where an llm_judge is and how patiently it is asked."""
    fields = reward.model_dump()
    if not reward.every_row:
        del fields["every_row"]  # the first version did not have it
    if reward.use == "llm_judge":
        fields["args"] = {name: value for name, value in reward.args.items() if name not in WHERE_ONLY}
    return fields


def input_digests(recipe: Recipe) -> dict[str, str]:
    """Return the digest of each file or directory that is part of the identity, by its place there.

    For example {"data.digest": "sha256:9f86...", "model.digest": "sha256:d081..."}.
    """
    digests = {"data.digest": source_digest(recipe.data.train), "model.digest": model_digest(recipe.model.path)}
    template = recipe.model.chat_template
    if template is not None:
        digests["model.chat_template"] = template if template in BUILTIN_TEMPLATES else _file_digest(Path(template))
    if recipe.lora is not None and recipe.lora.warm_start is not None:
        digests["lora.warm_start"] = model_digest(recipe.lora.warm_start)
    return digests


def held_out_digest(recipe: Recipe) -> str | None:
    """Return the digest of the held-out rows that are evaluated; None where the recipe has none."""
    if recipe.data.eval is None:
        return None
    limit = recipe.data.eval_rows
    return source_digest(recipe.data.eval) + (f", first {limit}" if limit is not None else "")


def reward_digests(recipe: Recipe, recipe_dir: Path) -> dict[str, str]:
    """Return the digest of the source file of each reward that is not built in, and of judges' rubric files.

    For example {"mine.py": "sha256:9f86..."}.

    Args:
        recipe: Names the rewards.
        recipe_dir: Its directory; `file.py:function` rewards are relative to it.
    """
    if not isinstance(recipe, RFTRecipe):
        return {}
    uses = [reward.use for reward in recipe.reward_functions]
    rubrics = [
        str(reward.args["rubric_file"])
        for reward in recipe.reward_functions
        if reward.use == "llm_judge" and "rubric_file" in reward.args
    ]
    digests = {rubric: _file_digest(recipe_dir / rubric) for rubric in rubrics}
    return digests | _source_digests(uses, recipe_dir) | environment_digests(recipe, recipe_dir)


def environment_digests(recipe: RFTRecipe, recipe_dir: Path) -> dict[str, str]:
    """Return the digest of each source file of the environment and the tools; of a server, of what its command names.

    Args:
        recipe: Names them.
        recipe_dir: Its directory.
    """
    rollout = recipe.rollout
    environment = rollout.environment
    uses = [*([environment] if isinstance(environment, str) else []), *rollout.functions]
    digests = _source_digests(uses, recipe_dir)
    if isinstance(environment, VerifiersEnvironment):
        taskset = recipe_dir / f"{environment.verifiers.replace('-', '_')}.py"
        if taskset.is_file():  # otherwise a package of another interpreter; its tasks' hashes are in the rows
            digests[taskset.name] = _file_digest(taskset)
    for word in (word for server in rollout.servers for word in server.command):
        if (recipe_dir / word).is_file():
            digests[word] = _file_digest(recipe_dir / word)
    return digests


def _source_digests(uses: Sequence[str], recipe_dir: Path) -> dict[str, str]:
    digests = {}
    for use in uses:
        source = source_of_reward(use, recipe_dir)
        if source is not None:
            shown = str(source.relative_to(recipe_dir) if source.is_relative_to(recipe_dir) else source)
            digests[shown] = _file_digest(source)
    return digests


def identity_hash(identity: dict[str, object]) -> str:
    """Return the hash of an identity; it does not depend on the order of fields."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def source_digest(source: DataSource) -> str:
    """Return the digest of the files' bytes; for a hub data set its name, configuration, split and revision."""
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
    """Return the digest of a model or adapter directory.

    JSON files are hashed whole. Of each weights file, which can be very large, the size and three samples of 1 MiB
    are hashed: head, middle and tail. That distinguishes different weights in milliseconds.
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
    return f"sha256:{file_sha256(path)}" if path.is_file() else f"missing:{path}"
