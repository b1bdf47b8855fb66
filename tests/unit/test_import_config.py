"""`trainer import-config`: what is translated is valid, what is not is named, nothing is lost without a word."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_recipe import RFT, SFT, write_small

from trainer.commands.cli import main
from trainer.config.foreign_names import FIELDS, TOOLS
from trainer.config.load import load_recipe
from trainer.errors import RecipeError
from trainer.starter.foreign_config import translate
from trainer.starter.foreign_values import HANDLED, SPECIAL

AXOLOTL = """\
base_model: model
adapter: qlora
load_in_4bit: true
datasets:
  - path: train.jsonl
    type: chat_template
    field_messages: turns
    message_property_mappings: {role: who, content: text}
val_set_size: 0.1
output_dir: ./outputs/my lora
sequence_len: 128
sample_packing: true
lora_r: 8
lora_alpha: 16
lora_target_linear: true
gradient_accumulation_steps: 2
micro_batch_size: 3
max_steps: 50
num_epochs: 4
optimizer: adamw_bnb_8bit
lr_scheduler: linear
learning_rate: 0.0002
warmup_ratio: 0.1
bf16: auto
save_steps: 25
evals_per_epoch: 4
special_tokens: {pad_token: "<|pad|>"}
wandb_project:
"""
LLAMAFACTORY = """\
model_name_or_path: model
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: mine
template: qwen3
cutoff_len: 128
output_dir: saves/mine
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
bf16: true
ddp_timeout: 180000000
val_size: 0.1
eval_steps: 500
"""
TRL = """\
model_name_or_path: model
dataset_name: train.jsonl
use_peft: true
lora_r: 32
lora_target_modules: [q_proj, v_proj]
reward_funcs: [last_number, "rewards.py:brief"]
reward_weights: [1.0, 0.5]
num_generations: 4
max_completion_length: 32
per_device_train_batch_size: 8
gradient_accumulation_steps: 2
beta: 0.04
epsilon: 0.2
loss_type: dapo
max_steps: 20
learning_rate: 1.0e-5
lr_scheduler_type: constant_with_warmup
warmup_steps: 2
max_length: 128
report_to: wandb
"""


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_small(tmp_path)
    (tmp_path / "rewards.py").write_text("def brief(completion, row):\n    return 1.0\n")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/mine.jsonl").write_bytes((tmp_path / "train.jsonl").read_bytes())
    info = {"mine": {"file_name": "mine.jsonl", "columns": {"prompt": "prompt", "response": "completion"}}}
    (tmp_path / "data/dataset_info.json").write_text(json.dumps(info))
    return tmp_path


def imported(text: str, *arguments: str, code: int = 0) -> dict[str, Any]:
    Path("other.yml").write_text(text)
    assert main(["import-config", "other.yml", "--out", "mine.yaml", "--force", *arguments]) == code
    return dict(yaml.safe_load(Path("mine.yaml").read_text()))


def test_axolotl(capsys) -> None:
    recipe = imported(AXOLOTL, "--gpus", "2")
    assert recipe["data"] == {
        "train": "train.jsonl", "columns": {"messages": "turns", "role": "who", "content": "text"},
        "eval_frac": 0.1, "max_seq_tokens": 128,
    }  # fmt: skip
    assert recipe["model"] == {"path": "model", "quantization": "nf4"}
    assert recipe["lora"] == {"rank": 8, "alpha": 16}
    assert (recipe["name"], recipe["rows_per_step"], recipe["steps"], "epochs" in recipe) == ("my-lora", 12, 50, False)
    assert recipe["optimizer"] == {"schedule": "linear", "learning_rate": 0.0002, "warmup_steps": 5}
    said = capsys.readouterr().err
    assert "left to you: evals_per_epoch: 4: has no equal here" in said
    assert "left to you: special_tokens: " in said
    assert "not needed: sample_packing: rows are always packed" in said
    assert "# decide: special_tokens: " in Path("mine.yaml").read_text()


def test_llamafactory(capsys) -> None:
    recipe = imported(LLAMAFACTORY)
    assert recipe["data"]["train"] == "data/mine.jsonl"
    assert recipe["lora"] == {"rank": 8, "target_modules": "all-linear"}
    assert (recipe["rows_per_step"], recipe["epochs"], recipe["eval_interval"]) == (8, 3.0, 500)
    assert "left to you: template: 'qwen3': the model's own template is used" in capsys.readouterr().err


def test_trl_grpo(capsys) -> None:
    recipe = imported(TRL)
    assert recipe["method"] == "rft"
    assert recipe["rewards"] == [{"use": "last_number", "weight": 1.0}, {"use": "rewards.py:brief", "weight": 0.5}]
    assert recipe["rollout"] == {"group_size": 4, "max_completion_tokens": 32}
    assert recipe["algorithm"] == {"kl_coef": 0.04, "clip_low": 0.2, "clip_high": 0.2, "name": "dapo"}
    assert recipe["rows_per_step"] == 4  # 16 completions are 4 prompts of 4
    assert recipe["logging"] == {"wandb": "online"}
    assert recipe["optimizer"]["schedule"] == "constant"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (AXOLOTL + "rl: dpo\n", "dpo: preferences and reward models are not trained here"),
        (LLAMAFACTORY.replace("stage: sft", "stage: kto"), "kto: preferences and reward models"),
        ("foo: 1\n", "other.yml: cannot tell which tool it is for; say it with --from axolotl, llamafactory, trl"),
        ("- 1\n", "other.yml:1: expected a mapping of fields"),
    ],
)
def test_what_cannot_be_translated_is_refused(text, said, capsys) -> None:
    Path("other.yml").write_text(text)
    assert main(["import-config", "other.yml"]) == 2
    assert said in capsys.readouterr().err


def test_a_recipe_that_needs_more_is_written_and_says_what(capsys) -> None:
    imported(LLAMAFACTORY.replace("dataset: mine", "dataset: alpaca_en"), code=2)
    said = capsys.readouterr().err
    assert "left to you: dataset: 'alpaca_en': not in data/dataset_info.json" in said
    assert "no such file: alpaca_en.jsonl" in said


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "warmup_ratio: 0.1",
            "warmup_ratio: some",
            "left to you: warmup_ratio: 'some': cannot be read as axolotl writes",
        ),
        (
            "micro_batch_size: 3",
            "micro_batch_size: auto",
            "left to you: micro_batch_size: 'auto': no number; write the",
        ),
        ("bf16: auto", "fp16: true", "left to you: fp16: True: float16 is not supported; bfloat16 is taken"),
        ("lr_scheduler: linear", "lr_scheduler: rex", "left to you: lr_scheduler: 'rex': constant, linear or cosine"),
        ("optimizer: adamw_bnb_8bit", "optimizer: muon", "left to you: optimizer: 'muon': the optimizer is AdamW"),
        ("path: train.jsonl", "path: ", "names no path; write its rows as data.train"),
        ("adapter: qlora", "adapter: llama-adapter", "left to you: adapter: 'llama-adapter': only LoRA"),
    ],
)
def test_values_that_have_no_equal_are_left_to_the_user(old, new, said, capsys) -> None:
    Path("other.yml").write_text(AXOLOTL.replace(old, new))
    assert main(["import-config", "other.yml"]) == 0
    assert said in capsys.readouterr().err


def test_defaults_that_differ_between_tools_are_named(capsys) -> None:
    Path("other.yml").write_text(AXOLOTL.replace("learning_rate: 0.0002\n", "").replace("lr_scheduler: linear\n", ""))
    assert main(["import-config", "other.yml"]) == 0
    said = capsys.readouterr().err
    assert "left to you: optimizer.learning_rate: 0.0002, the default here; the configuration does not say it" in said
    assert "left to you: optimizer.schedule: cosine, the default here" in said
    assert "data.max_seq_tokens" not in said.partition("left to you")[2]


def test_a_broken_dataset_info_is_named(capsys) -> None:
    Path("data/dataset_info.json").write_text("{")
    Path("other.yml").write_text(LLAMAFACTORY)
    assert main(["import-config", "other.yml"]) == 2
    assert "data/dataset_info.json: is not JSON" in capsys.readouterr().err


@pytest.mark.parametrize("tool", TOOLS)
def test_no_field_is_lost_without_a_word(tool: str) -> None:
    text = {"axolotl": AXOLOTL, "llamafactory": LLAMAFACTORY, "trl": TRL}[tool]
    Path("other.yml").write_text(text)
    told = translate(Path("other.yml"))
    assert told.tool == tool
    said = "\n".join([*told.done, *told.not_needed, *told.left])
    given = yaml.safe_load(text)
    silent = {"stage", "reward_weights", "wandb_project", "max_steps", "num_epochs"}
    assert [name for name in given if name not in said and name not in silent] == []


PLAIN: dict[str, Any] = {
    "seed": 3, "model.path": "model", "model.revision": "main", "model.trust_remote_code": True,
    "lora.rank": 8, "lora.alpha": 16.0, "lora.dropout": 0.05, "lora.rslora": True, "lora.dora": True,
    "lora.warm_start": "adapter", "data.max_seq_tokens": 100, "data.system": "Be brief.",
    "optimizer.learning_rate": 1e-4, "optimizer.weight_decay": 0.1, "optimizer.beta1": 0.8, "optimizer.beta2": 0.9,
    "optimizer.epsilon": 1e-7, "optimizer.max_grad_norm": 0.5, "keep_last": 3, "logging.wandb_project": "mine",
    "rollout.group_size": 4, "rollout.max_completion_tokens": 16, "rollout.temperature": 0.9, "rollout.top_p": 0.9,
    "rollout.min_p": 0.1, "algorithm.kl_coef": 0.01, "algorithm.clip_high": 0.3, "algorithm.epochs_per_batch": 2,
}  # fmt: skip
"""A value of each field that is copied as it stands."""


@pytest.mark.parametrize("tool", TOOLS)
def test_every_name_of_the_table_is_translated(tool: str) -> None:
    """By a function, as a part of another field, or by copying a value that the recipe accepts."""
    for each in FIELDS:
        for name in each.names(tool):
            if name in SPECIAL or name in HANDLED:
                continue
            assert each.ours in PLAIN, f"{tool}: {name}"
            section, _, inner = name.rpartition(".")
            text: dict[str, Any] = {section: {inner: PLAIN[each.ours]}} if section else {name: PLAIN[each.ours]}
            Path("other.yml").write_text(yaml.safe_dump({**text, "max_steps": 3}))
            value: Any = translate(Path("other.yml"), tool).recipe
            for part in each.ours.split("."):
                value = value[part]
            assert value == PLAIN[each.ours]
            base = SFT if each.ours.partition(".")[0] not in {"rollout", "algorithm"} else RFT
            field = f"{each.ours}={json.dumps(value)}"
            others = ["lora.warm_start=null"] if each.ours == "lora.warm_start" else []
            is_refused = each.ours in ("rollout.top_p", "rollout.top_k", "rollout.min_p")
            with pytest.raises(RecipeError, match="biases the gradient") if is_refused else nullcontext():
                load_recipe(write_small(Path.cwd(), base), [field, *others])
