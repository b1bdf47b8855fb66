"""Contradictions in a recipe that types cannot express, and warnings."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import replace
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from trainer.config.document import KeyPath
from trainer.config.finding import Finding
from trainer.config.length import num_steps, rows_for_epochs
from trainer.config.recipe import BUILTIN_TEMPLATES, DataSource, Recipe, RFTRecipe
from trainer.config.rft_sections import ENVIRONMENT_REWARD
from trainer.config.source_files import READ_ENDINGS, source_files
from trainer.config.turn_settings import turn_findings
from trainer.config.unsupported import (
    HEAD_ADAPTER,
    HEAD_NAME,
    OFFLOAD_KEEPS,
    SERVED_NOWHERE,
    VLLM_DORA,
    VLLM_FULL,
    VLLM_TRUNCATED,
    server_url_problem,
    truncates,
    warm_start_problem,
)

ADDRESS: Final = re.compile(r"(?P<protocol>[A-Za-z][A-Za-z0-9+.-]*)://(?P<location>.+)")
BUCKETS: Final = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "tos", "oci")
"""Object storage: addresses of these protocols begin with a bucket."""
STORAGE: Final = (*BUCKETS, "hf", "sftp", "ssh", "smb", "webdav", "webhdfs", "hdfs", "ftp", "file")
"""Protocols of fsspec that are writable and persistent. Installed packages may register more."""

TRACKERS: Final = ("tensorboard", "trackio", "mlflow")
"""Fields of `logging` that need the package, and the extra, of the same name."""
OWN_FLAGS: Final = ("--gpu-memory-utilization", "--enable-sleep-mode")
"""Arguments of vLLM that `placement: colocated` sets."""
HIGH_LEARNING_RATE: Final = 0.01
HIGH_WEIGHT_DECAY: Final = 1.0
MANY_EPOCHS: Final = 100.0
HIGH_TEMPERATURE: Final = 2.0


def contradictions(recipe: Recipe, recipe_dir: Path) -> list[Finding]:
    """Return every contradiction and warning of a recipe whose single fields are valid.

    Args:
        recipe: The recipe.
        recipe_dir: Directory of the recipe file; `file.py:function` rewards are relative to it.
    """
    num_rows = rows_for_epochs(recipe)
    findings = _length(recipe, num_rows) + _intervals(recipe, num_rows)
    findings += _data(recipe) + _model(recipe) + _mirror(recipe) + _trackers(recipe) + _unusual(recipe)
    return findings + (_rft(recipe, recipe_dir) if isinstance(recipe, RFTRecipe) else [])


def _length(recipe: Recipe, num_rows: int | None) -> list[Finding]:
    if recipe.steps is None and recipe.epochs is None:
        return [Finding(("steps",), "missing; say how long to train with `steps` or `epochs`")]
    if recipe.steps is not None and recipe.epochs is not None:
        return [Finding(("epochs",), "contradicts `steps`; give one of them")]
    source = recipe.data.train
    if recipe.epochs is not None and num_rows is None and (source.hub is not None or source_files(source)):
        rows = source.hub or source.path or "the sources"
        return [Finding(("epochs",), f"the rows of {rows} cannot be counted here; give `steps`")]
    steps = num_steps(recipe, num_rows)
    if steps is not None and recipe.optimizer.warmup_steps >= steps:
        text = f"warm-up of {recipe.optimizer.warmup_steps} steps is not shorter than the run of {steps} steps"
        return [Finding(("optimizer", "warmup_steps"), text)]
    return []


def _intervals(recipe: Recipe, num_rows: int | None) -> list[Finding]:
    findings = []
    if recipe.eval_interval and recipe.data.eval is None:
        findings.append(Finding(("eval_interval",), "needs held-out rows: set `data.eval`"))
    if recipe.dcp_save_interval == 0:
        text = "0: no checkpoints are saved, so a killed run starts over. Set it, for example to 20."
        findings.append(Finding(("dcp_save_interval",), text, is_error=False))
    if num_rows is not None and recipe.rows_per_step > num_rows > 0:
        text = f"more than the {num_rows} rows: each step contains some of them several times"
        findings.append(Finding(("rows_per_step",), text, is_error=False))
    return findings


def _trackers(recipe: Recipe) -> list[Finding]:
    """Warn where a tracker's package is missing: it never stops a run, and the run may be on another machine."""
    wanted = [name for name in TRACKERS if getattr(recipe.logging, name)]
    text = "the package is missing here, so nothing is copied; pip install 'tunesmith[{}]'"
    return [Finding(("logging", name), text.format(name), is_error=False) for name in wanted if find_spec(name) is None]


def _unusual(recipe: Recipe) -> list[Finding]:
    """Numbers that are valid and far from what anybody trains with."""
    values: list[tuple[KeyPath, float | None, float]] = [
        (("optimizer", "learning_rate"), recipe.optimizer.learning_rate, HIGH_LEARNING_RATE),
        (("optimizer", "weight_decay"), recipe.optimizer.weight_decay, HIGH_WEIGHT_DECAY),
        (("epochs",), recipe.epochs, MANY_EPOCHS),
    ]
    if isinstance(recipe, RFTRecipe):
        values.append((("rollout", "temperature"), recipe.rollout.temperature, HIGH_TEMPERATURE))
    return [
        Finding(path, f"{value:g} is unusually high; values above {limit:g} are most often a slip", is_error=False)
        for path, value, limit in values
        if value is not None and value > limit
    ]


def _mirror(recipe: Recipe) -> list[Finding]:
    """Check the syntax of the address only; the run imports fsspec and the package of the protocol."""
    address = recipe.checkpoint.mirror
    problem = _address_problem(address) if address is not None else None
    return [Finding(("checkpoint", "mirror"), problem)] if problem is not None else []


def _address_problem(address: str) -> str | None:
    parts = ADDRESS.fullmatch(address)
    if parts is None:
        return f"must be an address such as `s3://bucket/prefix` or `file:///backup` (got {address!r})"
    protocol, location = parts["protocol"], parts["location"]
    if protocol not in STORAGE and not entry_points(group="fsspec.specs", name=protocol):
        near = difflib.get_close_matches(protocol, STORAGE, n=1)
        hint = f"; did you mean `{near[0]}`?" if near else ""
        return f"unknown protocol `{protocol}`; known are {', '.join(STORAGE)}{hint}"
    if protocol in BUCKETS and location.startswith("/"):
        return f"{address} names no bucket; write `{protocol}://bucket/prefix`"
    if re.match(r"[^/@]*:[^/@]*@", location):
        return (
            "contains a password, which would be stored in run directories; set it in the environment (docs/mirror.md)"
        )
    return None


def _data(recipe: Recipe) -> list[Finding]:
    train, held_out = recipe.data.train, recipe.data.eval
    findings = _source(("data", "train"), train)
    if held_out is None:
        return findings
    if recipe.data.eval_frac is not None:
        if held_out.part != "eval":
            findings.append(Finding(("data", "eval_frac"), "holds out rows of `train`; remove it, or `data.eval`"))
        return findings
    findings += _source(("data", "eval"), held_out)
    same_file = train.path and held_out.path and Path(train.path).resolve() == Path(held_out.path).resolve()
    if held_out == train or (same_file and Path(str(train.path)).is_file()):
        findings.append(Finding(("data", "eval"), "is the training data; evaluate on other rows"))
    return findings


def _source(path: KeyPath, source: DataSource) -> list[Finding]:
    if source.sources:
        return [finding for index, each in enumerate(source.sources) for finding in _source((*path, index), each)]
    if source.path is None and source.hub is None:
        return [Finding(path, "give `path` (a JSONL file) or `hub` (a data set name)")]
    file = Path(source.path) if source.path is not None else None
    files = source_files(source)
    if files:
        empty = [each for each in files if each.is_file() and each.stat().st_size == 0]
        return [Finding(path, f"{each} is empty") for each in empty]
    if file is not None and file.is_dir():
        return [Finding(path, f"{file} is a directory without data files ({', '.join(READ_ENDINGS)})")]
    if source.hub is None:
        return [
            Finding(path, f"no such file: {file} ({_unexpanded(str(file)) or f'paths are relative to {Path.cwd()}'})")
        ]
    if source.revision is None and not Path(source.hub).is_dir():
        text = f"rows come from the hub ({source.hub}) and may change; pin `revision` to a commit"
        return [Finding(path, text, is_error=False)]
    return []


def _model(recipe: Recipe) -> list[Finding]:
    model = recipe.model
    directory = Path(model.path)
    findings = _hub_model(recipe) if is_hub_name(model.path) else _model_directory(directory)
    if model.quantization is not None and recipe.lora is None:
        findings.append(Finding(("model", "quantization"), "4-bit weights cannot be trained; set `lora`, or remove it"))
    if model.activation_offload and model.gradient_checkpointing is not True:
        findings.append(Finding(("model", "activation_offload"), OFFLOAD_KEEPS))
    if recipe.optimizer.name == "adamw_8bit" and find_spec("bitsandbytes") is None:
        text = "bitsandbytes is missing here, without which the run ends; pip install 'tunesmith[qlora]'"
        findings.append(Finding(("optimizer", "name"), text, is_error=False))
    template = model.chat_template
    if template is not None and template not in BUILTIN_TEMPLATES and not Path(template).is_file():
        text = f"no such file: {template}; built-in templates are {', '.join(BUILTIN_TEMPLATES)}"
        findings.append(Finding(("model", "chat_template"), text))
    if recipe.lora is not None and recipe.lora.warm_start is not None:
        directory = Path(recipe.lora.warm_start)
        problem = warm_start_problem(recipe.lora, directory) if directory.is_dir() else None  # else the name of a run
        if problem is not None:
            findings.append(Finding(("lora", "warm_start"), problem))
    targets = recipe.lora.target_modules if recipe.lora is not None else "all-linear"
    if isinstance(targets, list) and HEAD_NAME in {name.rpartition(".")[2] for name in targets}:
        findings.append(Finding(("lora", "target_modules"), HEAD_ADAPTER))
    return findings


def _unexpanded(text: str) -> str:
    """Why a path with `~` or `${VAR}` is not found; empty for another path."""
    if text.startswith("~"):
        return f"`~` is not your home directory in a recipe: write {Path(text).expanduser()}"
    if re.search(r"\$\{?\w", text):
        return f"variables of the shell are not replaced in a recipe: write {os.path.expandvars(text)}, or use --set"
    return ""


def is_hub_name(path: str) -> bool:
    """Whether the path is a hub name `owner/name`: one slash, and no such file or directory."""
    looks_local = path.startswith((".", "/", "~", "$", "models/")) or path.count("/") != 1
    return not looks_local and not Path(path).exists()


def _model_directory(directory: Path) -> list[Finding]:
    if (directory / "config.json").is_file():
        return []
    if directory.is_dir():
        return [Finding(("model", "path"), f"{directory} has no config.json: not a model directory")]
    remedy = ""
    if directory.parent == Path("models"):
        remedy = ". `trainer init --quickstart` makes it" if directory.name.startswith("SmolLM2") else ""
    hub = "" if "/" in str(directory) else "; a hub name is `owner/name`"
    unexpanded = _unexpanded(str(directory))
    hub = f"; {unexpanded}" if unexpanded else hub
    return [Finding(("model", "path"), f"no such directory: {directory}{hub}{remedy}")]


def _hub_model(recipe: Recipe) -> list[Finding]:
    if recipe.model.revision is not None:
        return []
    text = (
        "a hub name needs `model.revision`, a commit, or a branch such as `main`, which the plan resolves to its commit"
    )
    return [Finding(("model", "path"), text)]


def _rft(recipe: RFTRecipe, recipe_dir: Path) -> list[Finding]:
    findings = _rewards(recipe, recipe_dir) + turn_findings(recipe, recipe_dir) + _rollout(recipe) + _success(recipe)
    findings += _reward_column(recipe)
    if recipe.lora is not None and recipe.lora.dropout > 0:
        findings.append(
            Finding(
                ("lora", "dropout"), "rft needs 0: with dropout, logprobs of the same weights differ from pass to pass"
            )
        )
    if recipe.data.overlong == "truncate":
        findings.append(Finding(("data", "overlong"), "a truncated prompt asks something else; use `drop` or `error`"))
    if recipe.data.format == "text":
        findings.append(Finding(("data", "format"), "rft prompts are chats; remove `format: text`"))
    if "answers" in recipe.logging.model_fields_set and recipe.logging.answers:
        text = "is for sft; rft records the answers to all held-out rows (`data.eval`, `rollout.eval_samples`)"
        findings.append(Finding(("logging", "answers"), text))
    if recipe.rows_per_step % recipe.algorithm.minibatches_per_step:
        minibatches = recipe.algorithm.minibatches_per_step
        text = f"{minibatches} minibatches do not divide rows_per_step ({recipe.rows_per_step})"
        findings.append(Finding(("algorithm", "minibatches_per_step"), text))
    return findings


def _rewards(recipe: RFTRecipe, recipe_dir: Path) -> list[Finding]:
    from trainer.config.reward_place import JUDGE_NAMES, importable  # imported here to keep `check` of sft recipes fast

    if not recipe.rewards and recipe.rollout.environment is None:
        return [Finding(("rewards",), "missing; rft needs at least one reward, for example `- use: last_number`")]
    findings = []
    names = [reward.name for reward in recipe.rewards]
    for index, reward in enumerate(recipe.rewards):
        is_own = reward.use == ENVIRONMENT_REWARD
        problem = None if is_own else importable(reward.use, recipe_dir)
        if is_own and recipe.rollout.environment is None:
            problem = "the reward of an environment needs `rollout.environment`"
        if problem is not None:
            text = problem.removeprefix(f"reward {reward.use}: ").replace("\n", " ")
            findings.append(Finding(("rewards", index, "use"), text))
        if reward.use in JUDGE_NAMES:
            findings += _judge(recipe, index, recipe_dir)
        if names.index(reward.name) != index:
            findings.append(Finding(("rewards", index), f"two rewards are called {reward.name}; give one a `label`"))
    return findings


def _judge(recipe: RFTRecipe, index: int, recipe_dir: Path) -> list[Finding]:
    from trainer.config.judge_settings import judge_findings, judge_settings

    reward = recipe.rewards[index]
    path: KeyPath = ("rewards", index, "args")
    findings = [
        replace(finding, path=(*path, *finding.path)) for finding in judge_findings(reward.use, reward.args, recipe_dir)
    ]
    settings, _ = judge_settings(reward.use, reward.args)
    hang_s = recipe.recovery.hang_timeout_s
    if settings is not None and settings.on_outage == "wait" and (settings.max_wait_s or hang_s) >= hang_s:
        text = f"on several ranks a wait longer than recovery.hang_timeout_s ({hang_s:g}) restarts the run"
        findings.append(Finding((*path, "max_wait_s"), text, is_error=False))
    return findings


def _reward_column(recipe: RFTRecipe) -> list[Finding]:
    if recipe.reward_column is not None and not recipe.reward_functions:
        return [Finding(("reward_column",), "there is no reward function to choose")]
    return [
        Finding(("rewards", index, "every_row"), "only says something with `reward_column`")
        for index, reward in enumerate(recipe.rewards)
        if reward.every_row and recipe.reward_column is None
    ]


def _success(recipe: RFTRecipe) -> list[Finding]:
    rule, names = recipe.rollout.success, [spec.name for spec in recipe.rewards]
    if rule is None or rule.reward is None or rule.reward.partition("/")[0] in names:
        return []
    text = f"no reward is called `{rule.reward}`; the recipe has {', '.join(f'`{name}`' for name in names)}"
    return [Finding(("rollout", "success", "reward"), text)]


def _rollout(recipe: RFTRecipe) -> list[Finding]:
    findings = []
    rollout = recipe.rollout
    truncated = {"top_p": rollout.top_p < 1, "top_k": rollout.top_k > 0, "min_p": rollout.min_p > 0}
    if any(truncated.values()):
        name = next(name for name, is_on in truncated.items() if is_on)
        text = (
            "truncated sampling biases the gradient, since logprobs are those of the whole distribution, and "
            "`algorithm.mismatch_cap` does not correct that; remove it"
        )
        findings.append(Finding(("rollout", name), text))
    if rollout.keep_steps is not None and recipe.dcp_save_interval == 0:
        text = "nothing is removed without checkpoints: a resume replays all rollouts; set `dcp_save_interval`"
        findings.append(Finding(("rollout", "keep_steps"), text, is_error=False))
    if rollout.max_completion_tokens >= recipe.data.max_seq_tokens:
        text = (
            f"{rollout.max_completion_tokens:,} leaves no room for the prompt in "
            f"data.max_seq_tokens ({recipe.data.max_seq_tokens:,})"
        )
        findings.append(Finding(("rollout", "max_completion_tokens"), text))
    return findings + _stale(recipe) + _colocated(recipe) + (_served(recipe) if rollout.sampler != "local" else [])


def _stale(recipe: RFTRecipe) -> list[Finding]:
    rollout = recipe.rollout
    if not rollout.staleness:
        return []
    place, problems = ("rollout", "staleness"), []
    if recipe.algorithm.mismatch_cap is None:
        problems.append("needs `algorithm.mismatch_cap`: rollouts of another policy bias the gradient without it")
    if rollout.refill:
        problems.append("contradicts `rollout.refill`, which draws again when the rewards of a step are known")
    if rollout.has_turns:
        problems.append("is not supported with `rollout.environment` or `rollout.tools`")
    return [Finding(place, text) for text in problems]


def _colocated(recipe: RFTRecipe) -> list[Finding]:
    rollout, vllm = recipe.rollout, recipe.rollout.vllm
    place = ("rollout", "vllm", "placement")
    if vllm.placement != "colocated":
        has_no_effect = "gpu_memory_frac" in vllm.model_fields_set
        text = "has no effect without `placement: colocated`: see `rollout.vllm.arguments`"
        return [Finding(("rollout", "vllm", "gpu_memory_frac"), text)] if has_no_effect else []
    problems = []
    if not rollout.is_managed:
        problems.append("needs servers that the run starts: `rollout.sampler: vllm` without `vllm_url`")
    if rollout.staleness:
        problems.append("contradicts `rollout.staleness`: the servers sleep while the policy learns, and draw nothing")
    owned = [flag for flag in OWN_FLAGS if any(each.split("=")[0] == flag for each in vllm.arguments)]
    problems += [f"sets `{flag}` itself: remove it from `rollout.vllm.arguments`" for flag in owned]
    return [Finding(place, text) for text in problems]


def _served(recipe: RFTRecipe) -> list[Finding]:
    findings = []
    rollout = recipe.rollout
    if rollout.sampler == "served" and rollout.server_url is None:
        findings.append(Finding(("rollout", "server_url"), SERVED_NOWHERE))
    for name, url in (("vllm_url", rollout.vllm_url), ("server_url", rollout.server_url)):
        url_problem = server_url_problem(url) if url is not None else None
        if url_problem is not None:
            findings.append(Finding(("rollout", name), url_problem))
    if recipe.lora is None and not rollout.is_managed:
        findings.append(Finding(("rollout", "sampler"), VLLM_FULL))
    elif recipe.lora is not None and recipe.lora.dora:
        findings.append(Finding(("lora", "dora"), VLLM_DORA))
    if recipe.rollout.temperature != 1.0 and truncates(recipe.rollout):
        findings.append(Finding(("rollout", "temperature"), VLLM_TRUNCATED))
    return findings
