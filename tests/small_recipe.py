"""A small valid recipe on disk for tests of what reads recipes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

SFT: Final = """\
name: small
method: sft
model:
  path: model
lora:
  rank: 4
data:
  train: train.jsonl
  eval: eval.jsonl
  max_seq_tokens: 128
rows_per_step: 2
steps: 10
optimizer:
  learning_rate: 1e-3
  warmup_steps: 2
eval_interval: 5
dcp_save_interval: 5
shape: cpu
"""
"""Valid, without warnings, in a directory that `write_small` has filled."""

RFT: Final = """\
name: small
method: rft
model:
  path: model
data:
  train: train.jsonl
  max_seq_tokens: 128
rows_per_step: 2
steps: 10
algorithm:
  name: dapo
  clip_low: 0.1
rollout:
  group_size: 4
  max_completion_tokens: 16
rewards:
  - use: last_number
dcp_save_interval: 5
shape: cpu
"""

SIZES: Final = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
"""16,384 + 2 * 32 a layer (9,216 linear: q 1024, k 512, v 512, o 1024, mlp 3 * 2048), twice, and 32."""


def write_small(directory: Path, recipe: str = SFT, *, num_rows: int = 6) -> Path:
    """Write the recipe, its rows and a model's config.json; returns the recipe's path."""
    (directory / "model").mkdir(exist_ok=True)
    (directory / "model" / "config.json").write_text(json.dumps(SIZES))
    rows: list[dict[str, Any]] = [
        {"prompt": f"What is {number} + 1?", "completion": f"It is {number + 1}.", "answer": str(number + 1)}
        for number in range(num_rows)
    ]
    (directory / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out = {"prompt": "What is 70 + 1?", "completion": "It is 71.", "answer": "71"}
    (directory / "eval.jsonl").write_text(json.dumps(held_out) + "\n")
    path = directory / "recipe.yaml"
    path.write_text(recipe)
    return path
