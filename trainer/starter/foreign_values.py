"""Fields of other tools whose value is not taken as it stands."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from trainer.config.reward_place import BUILT_IN
from trainer.starter.foreign_rows import axolotl_rows, llamafactory_rows, trl_rows
from trainer.starter.translation import Translation, Value

SCHEDULES: Final = {
    "constant": "constant",
    "constant_with_warmup": "constant",
    "linear": "linear",
    "cosine": "cosine",
    "cosine_with_min_lr": "cosine",
}
ALGORITHMS: Final = ("grpo", "dapo", "dr_grpo", "cispo")


def _name(told: Translation, name: str, value: Value, given: Mapping[str, Value]) -> None:
    words = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(str(value)).name).strip("-._")
    told.put(name, "name", words or "imported")


def _dtype(told: Translation, name: str, value: Value, given: Mapping[str, Value]) -> None:
    if (name == "fp16" and value is True) or value in {"float16", "fp16"}:
        told.leave(name, value, "float16 is not supported; bfloat16 is taken")
    elif name == "bf16" and value is False and not given.get("fp16"):
        told.put(name, "model.compute_dtype", "float32")
    elif name == "dtype" and value in {"float32", "bfloat16"}:
        told.put(name, "model.compute_dtype", value)
    elif value is not False:
        told.not_needed.append(f"{name}: bfloat16 is the default")


def _quantization(told: Translation, name: str, value: Value, given: Mapping[str, Value]) -> None:
    if value is True or value == 4:
        told.put(name, "model.quantization", "nf4")
    elif value is not False:
        told.leave(name, value, "only 4 bits (nf4) are supported")


def _checkpointing(told: Translation, name: str, value: Value, given: Mapping[str, Value]) -> None:
    is_on = not value if name.startswith("disable") else bool(value)
    told.put(name, "model.gradient_checkpointing", is_on)


def _template(told: Translation, name: str, value: Value, given: Mapping[str, Value]) -> None:
    if str(value).endswith(".jinja"):
        told.put(name, "model.chat_template", value)
    elif value == "tokenizer_default":
        told.not_needed.append(f"{name}: the model's own template is used")
    else:
        told.leave(name, value, "the model's own template is used; compare with `trainer check RECIPE --data`")


def _adapter(told: Translation, name: str, value: Value, given: Mapping[str, Value]) -> None:
    if value == "qlora":
        told.put(name, "model.quantization", "nf4")
    if value in {"lora", "qlora", True}:
        told.recipe.setdefault("lora", {})
        told.done.append(f"{name} -> lora")
    elif value not in {"full", False}:
        told.leave(name, value, "only LoRA and full-parameter training; decide for one")


def _targets(told: Translation, name: str, value: Value, given: Mapping[str, Value]) -> None:
    if name == "lora_target_linear":
        told.not_needed.append(f"{name}: `all-linear` is the default")
        return
    names = [each.strip() for each in value.split(",")] if isinstance(value, str) else value
    told.put(name, "lora.target_modules", "all-linear" if names in (["all"], ["all-linear"]) else names)


def _held_out(told: Translation, name: str, value: Value, given: Mapping[str, Value]) -> None:
    if isinstance(value, int | float) and 0 < value < 1:
        told.put(name, "data.eval_frac", value)
    elif value:
        told.leave(name, value, "a number of rows; write a share as data.eval_frac, or a file as data.eval")


def _overlong(told: Translation, name: str, value: Value, given: Mapping[str, Value]) -> None:
    told.put(name, "data.overlong", {"raise": "error"}.get(value, value))


def _train_on(told: Translation, name: str, value: Value, given: Mapping[str, Value]) -> None:
    if name == "mask_history" and value:
        told.put(name, "data.train_on", "last")
    elif name == "roles_to_train":
        told.put(name, "data.train_on", ["assistant" if role == "gpt" else role for role in value])
    elif value and name in {"train_on_inputs", "train_on_prompt"}:
        told.leave(name, value, "prompts are not trained; data.train_on takes roles, data.format: text whole texts")
    else:
        told.not_needed.append(f"{name}: assistant turns are trained and nothing else")


def _steps(told: Translation, name: str, value: Value, given: Mapping[str, Value]) -> None:
    if isinstance(value, int) and value > 0:
        told.put(name, "steps", value)


def _epochs(told: Translation, name: str, value: Value, given: Mapping[str, Value]) -> None:
    steps = given.get("max_steps")
    if isinstance(steps, int) and steps > 0:
        told.not_needed.append(f"{name}: max_steps takes precedence")
    else:
        told.put(name, "epochs", value)


def _schedule(told: Translation, name: str, value: Value, given: Mapping[str, Value]) -> None:
    known = SCHEDULES.get(str(value))
    if known is None:
        told.leave(name, value, "constant, linear or cosine; cosine is taken")
    else:
        told.put(name, "optimizer.schedule", known)


def _warmup(told: Translation, name: str, value: Value, given: Mapping[str, Value]) -> None:
    steps = given.get("max_steps")
    if not value:
        return
    if float(value) >= 1:
        told.put(name, "optimizer.warmup_steps", int(value))
    elif isinstance(steps, int) and steps > 0:
        told.put(name, "optimizer.warmup_steps", round(value * steps))
    else:
        told.leave(name, value, "a share of the run: write its steps as optimizer.warmup_steps")


def _optimizer(told: Translation, name: str, value: Value, given: Mapping[str, Value]) -> None:
    if "adamw" in str(value):
        told.not_needed.append(f"{name}: AdamW")
    else:
        told.leave(name, value, "the optimizer is AdamW")


def _interval(told: Translation, name: str, value: Value, given: Mapping[str, Value]) -> None:
    ours = "eval_interval" if name == "eval_steps" else "dcp_save_interval"
    if isinstance(value, int) and value >= 1:
        told.put(name, ours, value)
    else:
        told.leave(name, value, f"a share of the run: write its steps as {ours}")


def _report_to(told: Translation, name: str, value: Value, given: Mapping[str, Value]) -> None:
    if "wandb" in (value if isinstance(value, list) else [value]):
        told.put(name, "logging.wandb", "online")
    elif value not in {"none", "all"}:
        told.leave(name, value, "metrics.jsonl is always written; logging.wandb copies it")


def _sampler(told: Translation, name: str, value: Value, given: Mapping[str, Value]) -> None:
    told.put(name, "rollout.sampler", "vllm" if value else "local")


def _top_k(told: Translation, name: str, value: Value, given: Mapping[str, Value]) -> None:
    told.put(name, "rollout.top_k", max(0, int(value)))


def _loss_type(told: Translation, name: str, value: Value, given: Mapping[str, Value]) -> None:
    if told.recipe["method"] == "sft":
        told.leave(name, value, "the loss of sft is the negative log-likelihood")
    elif value in ALGORITHMS:
        told.put(name, "algorithm.name", value)
    else:
        told.leave(name, value, f"one of {', '.join(ALGORITHMS)}; grpo is taken")


def _clip(told: Translation, name: str, value: Value, given: Mapping[str, Value]) -> None:
    told.put(name, "algorithm.clip_low", value)
    if f"{name}_high" not in given:
        told.put(name, "algorithm.clip_high", value)


def _rewards(told: Translation, name: str, value: Value, given: Mapping[str, Value]) -> None:
    weights = given.get("reward_weights") or given.get("trl.reward_weights") or []
    rewards = []
    for index, use in enumerate(value if isinstance(value, list) else [value]):
        text = str(use) if ":" in str(use) or use in BUILT_IN else ":".join(str(use).rpartition(".")[::2])
        rewards.append({"use": text.lstrip(":"), **({"weight": float(weights[index])} if index < len(weights) else {})})
    told.put(name, "rewards", rewards)


SPECIAL: Final[Mapping[str, Callable[[Translation, str, Value, Mapping[str, Value]], None]]] = {
    "output_dir": _name,
    **dict.fromkeys(("bf16", "fp16", "dtype"), _dtype),
    **dict.fromkeys(("load_in_4bit", "quantization_bit"), _quantization),
    **dict.fromkeys(("gradient_checkpointing", "disable_gradient_checkpointing"), _checkpointing),
    **dict.fromkeys(("chat_template", "template", "chat_template_path"), _template),
    **dict.fromkeys(("adapter", "finetuning_type", "use_peft"), _adapter),
    **dict.fromkeys(("lora_target_modules", "lora_target_linear", "lora_target"), _targets),
    **dict.fromkeys(("datasets", "test_datasets"), axolotl_rows),
    **dict.fromkeys(("dataset", "eval_dataset"), llamafactory_rows),
    "dataset_name": trl_rows,
    **dict.fromkeys(("val_set_size", "val_size"), _held_out),
    "excess_length_strategy": _overlong,
    **dict.fromkeys(
        (
            "train_on_inputs",
            "roles_to_train",
            "train_on_prompt",
            "mask_history",
            "completion_only_loss",
            "assistant_only_loss",
        ),
        _train_on,
    ),
    "max_steps": _steps,
    **dict.fromkeys(("num_epochs", "num_train_epochs"), _epochs),
    **dict.fromkeys(("lr_scheduler", "lr_scheduler_type"), _schedule),
    **dict.fromkeys(("warmup_steps", "warmup_ratio"), _warmup),
    **dict.fromkeys(("optimizer", "optim"), _optimizer),
    **dict.fromkeys(("eval_steps", "save_steps"), _interval),
    "report_to": _report_to,
    **dict.fromkeys(("use_vllm", "trl.use_vllm"), _sampler),
    **dict.fromkeys(("top_k", "trl.top_k"), _top_k),
    **dict.fromkeys(("loss_type", "trl.loss_type"), _loss_type),
    **dict.fromkeys(("epsilon", "trl.epsilon"), _clip),
    **dict.fromkeys(("reward_funcs", "trl.reward_funcs"), _rewards),
}
"""Fields whose value is not taken as it stands."""
BATCH_PARTS: Final = ("micro_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps")
HANDLED: Final = frozenset(
    {*BATCH_PARTS, "rl", "stage", "dataset_config", "dataset_train_split", "reward_weights", "trl.reward_weights"}
)
"""Fields that belong to another one."""
