"""What fields are called in Axolotl, LLaMA-Factory and TRL, and which field of a recipe does the same.

One table: a recipe that uses a foreign name gets the remedy from it, `trainer import-config` translates by it, and
docs/migration.md shows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, final

PREFERENCE_METHODS: Final = ("dpo", "ipo", "orpo", "kto", "simpo", "cpo", "ppo", "rm", "reward", "rlhf", "preference")
NO_PREFERENCES: Final = (
    "preferences and reward models are not trained here. `sft` trains the better answers (data.columns: "
    "{completion: chosen}, data.ignore: [chosen, rejected]); `rft` trains on rewards that you write (docs/rewards.md)"
)
OTHER_METHODS: Final[Mapping[str, str]] = {
    "grpo": "write `method: rft` and `algorithm: {name: grpo}`",
    "dapo": "write `method: rft` and `algorithm: {name: dapo}`",
    "gspo": "write `method: rft` and `algorithm: {name: gspo}`",
    "cispo": "write `method: rft` and `algorithm: {name: cispo}`",
    "rl": "write `method: rft`",
    "lora": "write `method: sft`; the section `lora` describes the adapter",
    "qlora": "write `method: sft`, a section `lora`, and `model.quantization: nf4`",
    "full": "write `method: sft` and `lora: null`",
    "pt": "write `method: sft` and `data.format: text`",
    "pretrain": "write `method: sft` and `data.format: text`",
}
"""Values that other tools take for what `method` is here."""


@final
@dataclass(frozen=True)
class ForeignField:
    """A field of a recipe, and what others call it."""

    ours: str
    """With its section: `optimizer.learning_rate`."""
    axolotl: tuple[str, ...] = ()
    llamafactory: tuple[str, ...] = ()
    trl: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    """Names in no particular tool."""
    note: str = ""
    """What differs in meaning; for people."""

    def names(self, tool: str) -> tuple[str, ...]:
        """What it is called in `axolotl`, `llamafactory` or `trl`."""
        return {"axolotl": self.axolotl, "llamafactory": self.llamafactory, "trl": self.trl}[tool]


BATCH: Final = "the global batch: rows per device x accumulation x devices; micro-batches are made by tokens"
PER_DEVICE: Final = ("per_device_train_batch_size", "gradient_accumulation_steps")
TOOLS: Final = ("axolotl", "llamafactory", "trl")
FIELDS: Final = (
    ForeignField(
        "method", ("rl",), ("stage",), note="`sft`, or `rft` for GRPO; preferences (DPO, KTO, ...) are not trained"
    ),
    ForeignField("name", ("output_dir",), ("output_dir",), ("output_dir",), ("run_name",), "the run is runs/NAME/"),
    ForeignField("seed", ("seed",), ("seed",), ("seed",)),
    ForeignField(
        "model.path",
        ("base_model",),
        ("model_name_or_path",),
        ("model_name_or_path",),
        ("model_name", "pretrained_model_name_or_path", "name_or_path"),
        "a hub name also needs `model.revision`",
    ),
    ForeignField("model.revision", ("revision_of_model",), ("model_revision",), ("model_revision",)),
    ForeignField("model.trust_remote_code", ("trust_remote_code",), ("trust_remote_code",), ("trust_remote_code",)),
    ForeignField(
        "model.compute_dtype",
        ("bf16", "fp16"),
        ("bf16", "fp16"),
        ("bf16", "fp16", "dtype"),
        ("torch_dtype", "precision"),
        "bfloat16 or float32; trained parameters and optimizer state are always float32",
    ),
    ForeignField(
        "model.gradient_checkpointing",
        ("gradient_checkpointing",),
        ("disable_gradient_checkpointing",),
        ("gradient_checkpointing",),
    ),
    ForeignField(
        "model.quantization", ("load_in_4bit",), ("quantization_bit",), ("load_in_4bit",), note="`nf4`, with `lora`"
    ),
    ForeignField(
        "model.chat_template",
        ("chat_template",),
        ("template",),
        ("chat_template_path",),
        note="the model's own template is used; set it only for models that have none",
    ),
    ForeignField("lora", ("adapter",), ("finetuning_type",), ("use_peft",), note="`lora: null` trains every parameter"),
    ForeignField("lora.rank", ("lora_r",), ("lora_rank",), ("lora_r",), ("r",)),
    ForeignField("lora.alpha", ("lora_alpha",), ("lora_alpha",), ("lora_alpha",)),
    ForeignField("lora.dropout", ("lora_dropout",), ("lora_dropout",), ("lora_dropout",), note="must be 0 for rft"),
    ForeignField(
        "lora.target_modules",
        ("lora_target_modules", "lora_target_linear"),
        ("lora_target",),
        ("lora_target_modules",),
        note="`all-linear` is the default",
    ),
    ForeignField("lora.rslora", ("peft_use_rslora",), ("use_rslora",), ("use_rslora",)),
    ForeignField("lora.dora", ("peft_use_dora",), ("use_dora",), ("use_dora",)),
    ForeignField("lora.warm_start", ("lora_model_dir",), ("adapter_name_or_path",)),
    ForeignField(
        "data.train",
        ("datasets",),
        ("dataset",),
        ("dataset_name",),
        ("dataset_path", "train_file", "train_data", "data_path", "train_dataset", "train_files"),
        "a file or `{hub: owner/name, revision: COMMIT}`; the form of rows is recognised",
    ),
    ForeignField("data.eval", ("test_datasets",), ("eval_dataset",), (), ("eval_file", "val_data", "validation_file")),
    ForeignField("data.eval_frac", ("val_set_size",), ("val_size",), note="a share of the rows, not a number"),
    ForeignField(
        "data.max_seq_tokens",
        ("sequence_len",),
        ("cutoff_len",),
        ("max_length",),
        ("max_seq_length", "max_seq_len", "seq_length", "context_length"),
    ),
    ForeignField(
        "data.overlong",
        ("excess_length_strategy",),
        note="longer rows stop the run here (`error`); others drop or truncate them",
    ),
    ForeignField(
        "data.train_on",
        ("train_on_inputs", "roles_to_train"),
        ("train_on_prompt", "mask_history"),
        ("completion_only_loss", "assistant_only_loss"),
        note="assistant turns are trained, prompts are not",
    ),
    ForeignField("data.system", ("default_system_message",), ("default_system",)),
    ForeignField(
        "rows_per_step",
        ("micro_batch_size", "gradient_accumulation_steps"),
        PER_DEVICE,
        PER_DEVICE,
        ("batch_size", "train_batch_size", "global_batch_size", "per_device_batch_size"),
        BATCH,
    ),
    ForeignField("steps", ("max_steps",), ("max_steps",), ("max_steps",), ("num_steps", "total_steps", "max_iters")),
    ForeignField("epochs", ("num_epochs",), ("num_train_epochs",), ("num_train_epochs",), ("n_epochs",)),
    ForeignField(
        "optimizer.learning_rate", ("learning_rate",), ("learning_rate",), ("learning_rate",), ("lr", "max_lr")
    ),
    ForeignField(
        "optimizer.schedule",
        ("lr_scheduler",),
        ("lr_scheduler_type",),
        ("lr_scheduler_type",),
        ("scheduler",),
        "constant, linear or cosine",
    ),
    ForeignField(
        "optimizer.warmup_steps",
        ("warmup_steps", "warmup_ratio"),
        ("warmup_steps", "warmup_ratio"),
        ("warmup_steps", "warmup_ratio"),
        note="steps, not a ratio",
    ),
    ForeignField("optimizer.weight_decay", ("weight_decay",), ("weight_decay",), ("weight_decay",)),
    ForeignField("optimizer.beta1", ("adam_beta1",), ("adam_beta1",), ("adam_beta1",)),
    ForeignField("optimizer.beta2", ("adam_beta2",), ("adam_beta2",), ("adam_beta2",)),
    ForeignField("optimizer.epsilon", ("adam_epsilon",), ("adam_epsilon",), ("adam_epsilon",), ("adam_eps",)),
    ForeignField("optimizer.max_grad_norm", ("max_grad_norm",), ("max_grad_norm",), ("max_grad_norm",), ("grad_clip",)),
    ForeignField("optimizer", ("optimizer",), ("optim",), ("optim",), note="always AdamW"),
    ForeignField("eval_interval", ("eval_steps",), ("eval_steps",), ("eval_steps",)),
    ForeignField("dcp_save_interval", ("save_steps",), ("save_steps",), ("save_steps",), ("save_interval",)),
    ForeignField("keep_last", ("save_total_limit",), ("save_total_limit",), ("save_total_limit",)),
    ForeignField("logging.wandb", (), ("report_to",), ("report_to",), ("use_wandb",), "off, offline or online"),
    ForeignField("logging.wandb_project", ("wandb_project",), (), ("project",)),
    ForeignField("rollout.group_size", ("trl.num_generations",), (), ("num_generations",)),
    ForeignField(
        "rollout.max_completion_tokens",
        ("trl.max_completion_length",),
        (),
        ("max_completion_length",),
        ("max_new_tokens",),
    ),
    ForeignField("rollout.temperature", ("trl.temperature",), (), ("temperature",)),
    ForeignField("rollout.top_p", ("trl.top_p",), (), ("top_p",), note="below 1 is refused: it biases the gradient"),
    ForeignField("rollout.top_k", ("trl.top_k",), (), ("top_k",), note="above 0 is refused: it biases the gradient"),
    ForeignField("rollout.min_p", ("trl.min_p",), (), ("min_p",), note="above 0 is refused: it biases the gradient"),
    ForeignField("rollout.sampler", ("trl.use_vllm",), (), ("use_vllm",), note="`vllm` or `local`"),
    ForeignField("algorithm.kl_coef", ("trl.beta",), (), ("beta",), ("kl_beta",)),
    ForeignField("algorithm.clip_low", ("trl.epsilon",), (), ("epsilon",), note="TRL's `epsilon` is both bounds"),
    ForeignField("algorithm.clip_high", ("trl.epsilon_high",), (), ("epsilon_high",)),
    ForeignField("algorithm.epochs_per_batch", ("trl.num_iterations",), (), ("num_iterations",)),
    ForeignField("algorithm.name", ("trl.loss_type",), (), ("loss_type",), note="grpo, dapo, dr_grpo, gspo or cispo"),
    ForeignField(
        "rewards", ("trl.reward_funcs",), (), ("reward_funcs",), ("reward_function",), "`- use: file.py:name`"
    ),
)
NOT_NEEDED: Final[Mapping[str, str]] = {
    **dict.fromkeys(
        ("sample_packing", "eval_sample_packing", "packing", "padding_free", "pad_to_sequence_len", "neat_packing"),
        "rows are always packed, never padded",
    ),
    **dict.fromkeys(
        (
            "flash_attention",
            "flash_attn",
            "attn_implementation",
            "sdp_attention",
            "xformers_attention",
            "use_liger_kernel",
            "enable_liger_kernel",
        ),
        "the fastest attention of the device is taken",
    ),
    **dict.fromkeys(
        ("deepspeed", "fsdp", "fsdp_config", "fsdp_version", "ddp_timeout", "ddp_find_unused_parameters"),
        "devices and sharding are the training shape (docs/shape.md)",
    ),
    **dict.fromkeys(
        (
            "dataset_prepared_path",
            "overwrite_cache",
            "preprocessing_num_workers",
            "dataset_processes",
            "dataset_num_proc",
            "dataloader_num_workers",
            "tokenized_path",
            "dataset_dir",
            "group_by_length",
            "shuffle_merged_datasets",
        ),
        "rows are tokenized once, in parallel, and kept",
    ),
    **dict.fromkeys(
        (
            "do_train",
            "do_eval",
            "plot_loss",
            "overwrite_output_dir",
            "logging_steps",
            "logging_strategy",
            "logging_dir",
            "save_safetensors",
            "save_only_model",
            "resume_from_checkpoint",
            "auto_resume_from_checkpoints",
            "save_strategy",
            "eval_strategy",
            "evaluation_strategy",
            "local_rank",
            "strict",
            "tf32",
            "remove_unused_columns",
            "logging_first_step",
            "gradient_checkpointing_kwargs",
            "per_device_eval_batch_size",
            "eval_batch_size",
            "model_type",
            "tokenizer_type",
            "is_llama_derived_model",
            "debug",
            "wandb_entity",
            "wandb_watch",
            "wandb_name",
            "wandb_log_model",
            "run_name",
            "torch_compile",
            "push_to_hub",
            "include_num_input_tokens_seen",
        ),
        "every step is logged, every run can be resumed; no setting is needed",
    ),
}
"""Fields of other tools that have no equal because nothing needs to be said here, with the reason."""


def remedies() -> dict[str, str]:
    """What to say of an unknown field that another tool has, by its name.

    >>> remedies()["lora_r"]
    'in a recipe this is `lora.rank`'
    """
    said = {name: f"not needed: {reason}" for name, reason in NOT_NEEDED.items()}
    for each in FIELDS:
        for name in (*each.axolotl, *each.llamafactory, *each.trl, *each.others):
            note = f" ({each.note})" if each.note else ""
            said.setdefault(name.rpartition(".")[2], f"in a recipe this is `{each.ours}`{note}")
    return said


def method_remedy(value: object) -> str | None:
    """What to say of a `method` that is one of other tools; None if it is none."""
    name = value.lower() if isinstance(value, str) else ""
    return f"{value}: {NO_PREFERENCES}" if name in PREFERENCE_METHODS else OTHER_METHODS.get(name)
