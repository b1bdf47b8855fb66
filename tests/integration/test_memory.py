"""Predicted against resident memory of fresh processes that train: four sizes, SFT and RFT."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest
from tiny import tiny_model_dir, tiny_tokenizer

from trainer.config.load import load_recipe
from trainer.planning.memory import MemoryEstimate
from trainer.planning.plan import make_plan

HERE: Final = Path(__file__).parent
SEQ_TOKENS: Final = 512
COMPLETION_TOKENS: Final = 8
TOLERANCE: Final = 0.15
SIZES: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "15M": ("qwen2", {"hidden_size": 384, "num_hidden_layers": 8, "intermediate_size": 1024, "vocab_size": 8192}),
    "25M": ("llama", {"hidden_size": 512, "num_hidden_layers": 6, "intermediate_size": 1408, "vocab_size": 16384}),
    "88M": ("llama", {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 2048, "vocab_size": 16384}),
    "99M": ("qwen3", {"hidden_size": 768, "num_hidden_layers": 8, "intermediate_size": 2048, "vocab_size": 32000}),
}
"""Parameters, about; heads of 64; only the largest does not tie its embeddings."""


def prepare(root: Path, size: str, method: str, **changes: Any) -> str:
    """A model, rows that fill every sequence to its limit, a shape and a recipe; returns the model's type."""
    arch, sizes = SIZES[size]
    heads = sizes["hidden_size"] // 64
    more = {"num_attention_heads": heads, "num_key_value_heads": heads // 2 if heads % 2 == 0 else heads}
    more |= {"max_position_embeddings": 1024, "tie_word_embeddings": size != "99M"}
    more |= {"head_dim": 64} if arch == "qwen3" else {}
    tiny_model_dir(root / "model", arch, scale=1.0, **sizes, **more)
    shutil.copy(HERE / "rft_rewards.py", root / "rewards.py")
    row = {"prompt": "Say it.", "completion": "the quick brown fox jumps over the lazy dog. " * 60}
    (root / "train.jsonl").write_text(f"{json.dumps(row)}\n" * 2)
    (root / "prompts.jsonl").write_text(f"{json.dumps(longest_prompt())}\n" * 2)
    recipe: dict[str, Any] = {
        "name": "run",
        "method": method,
        "model": {"path": "model"} | changes.pop("model", {}),
        "data": {"train": "train.jsonl", "max_seq_tokens": SEQ_TOKENS, "overlong": "truncate"},
        "rows_per_step": 1,
        "steps": 2,
        "dcp_save_interval": 1,
        "shape": "shape.yaml",
    }
    if method == "rft":
        recipe["data"] = {"train": "prompts.jsonl", "max_seq_tokens": SEQ_TOKENS}
        recipe["rollout"] = {"group_size": 2, "max_completion_tokens": COMPLETION_TOKENS}
        recipe["rewards"] = [{"use": "rewards.py:digits"}]
    (root / "recipe.yaml").write_text(json.dumps(recipe | changes))
    limit = {"max_params_b": 9, "max_seq_tokens": 4096, "basis": "estimated"}
    shape = {"name": "here", "device": "cpu", "device_name": "CPU", "gpus": 0, "gpu_memory_gib": 64}
    shape |= {"micro_batch_tokens": SEQ_TOKENS, "limits": {"lora": limit, "full": limit}, "accelerate": "cpu"}
    (root / "shape.yaml").write_text(json.dumps(shape))
    return arch


def longest_prompt() -> dict[str, Any]:
    """A prompt that leaves just the completion's room."""
    tokenizer, length = tiny_tokenizer(), SEQ_TOKENS
    while True:
        messages = [{"role": "user", "content": "a" * length}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        if len(ids) <= SEQ_TOKENS - COMPLETION_TOKENS:
            return {"messages": messages}
        length -= 1


def train(root: Path, arch: str) -> dict[str, float]:
    """Base after the imports and peak at the end, GiB, of a process whose freed memory goes back at once."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("TRAINER_", "PYTEST_"))}
    ours = {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    argv = [sys.executable, str(HERE / "memory_child.py"), "recipe.yaml", arch]
    done = subprocess.run(argv, cwd=root, env=clean | ours, capture_output=True, text=True, timeout=240, check=False)
    found = json.loads(done.stdout.splitlines()[-1]) if done.stdout else {"code": -1}
    assert found["code"] == 0, done.stderr
    return dict(found)


def predicted(root: Path) -> MemoryEstimate:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        estimate = make_plan(load_recipe(Path("recipe.yaml"))).memory
    assert estimate is not None
    return estimate


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "method", "changes"),
    [
        ("15M", "sft", {"model": {"compute_dtype": "float32"}, "lora": None}),
        ("25M", "sft", {}),
        ("88M", "sft", {"model": {"gradient_checkpointing": True}}),
        ("99M", "sft", {}),
        ("15M", "rft", {"model": {"compute_dtype": "float32"}, "lora": None}),
        ("25M", "rft", {}),
    ],
    ids=["15M-full", "25M", "88M-checkpointed", "99M", "15M-full-rft", "25M-rft"],
)
def test_peak_is_within_15_percent_of_the_prediction(tmp_path, size, method, changes):
    arch = prepare(tmp_path, size, method, **changes)
    found, estimate = train(tmp_path, arch), predicted(tmp_path)
    total = estimate.total_gib - estimate.parts["process"] + found["base"]  # this machine's base, not the allowance
    print(f"{size} {method}: base {found['base']:.3f}, peak {found['peak']:.3f}, predicted {total:.3f} GiB")
    assert total == pytest.approx(found["peak"], rel=TOLERANCE)
    assert found["peak"] - found["base"] > 0.1, "the model must be what is measured"
    record = json.loads((tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()[-1])
    assert record["perf/predicted_gib"] == pytest.approx(estimate.total_gib)
    attempt = json.loads((tmp_path / "runs/run/attempts.jsonl").read_text())
    assert attempt["predicted_gib"] == pytest.approx(estimate.total_gib)
