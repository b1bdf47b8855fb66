"""Compare the memory estimate with the step measured on fake tensors, for several architectures.

    python benchmarks/memory_estimate.py

Needs no weights and no accelerator; deterministic. Writes benchmarks/results/memory_estimate.json and .md.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any, Final

import common

from trainer.checks.memory_dry_run import config_of, measure
from trainer.config.load import load_recipe
from trainer.planning.plan import make_plan

SMALL: Final[dict[str, Any]] = {
    "vocab_size": 16384, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 4096, "tie_word_embeddings": True,
}  # fmt: skip
QWEN3_8B: Final[dict[str, Any]] = {
    "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}  # fmt: skip
MIXTURE: Final = {"num_local_experts": 4, "num_experts_per_tok": 2}
EXPERTS: Final = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 704}
LORA: Final[list[str]] = []
CHECKPOINTED: Final = ["model.gradient_checkpointing=true"]
FULL: Final = ["lora=null"]
WAYS: Final = {"LoRA": LORA, "checkpointed": CHECKPOINTED, "full": FULL}
CASES: Final[list[tuple[str, dict[str, Any], dict[str, list[str]]]]] = [
    ("llama", SMALL, WAYS),
    ("qwen3", SMALL | {"head_dim": 64}, {"LoRA": LORA, "full": FULL}),
    ("mixtral", SMALL | MIXTURE, {"LoRA": LORA, "checkpointed": CHECKPOINTED}),
    ("qwen3", QWEN3_8B, {"LoRA": LORA, "checkpointed": CHECKPOINTED, "full, checkpointed": FULL + CHECKPOINTED}),
    ("phi3", SMALL | {"pad_token_id": 0}, WAYS),
    ("gemma2", SMALL | {"head_dim": 64, "attn_logit_softcapping": 50.0}, WAYS),
    ("glm4", SMALL | {"head_dim": 64, "pad_token_id": 0}, {"LoRA": LORA}),
    ("qwen3_moe", SMALL | EXPERTS | {"head_dim": 64}, {"LoRA": LORA}),
    ("qwen2_moe", SMALL | EXPERTS | {"shared_expert_intermediate_size": 704}, {"LoRA": LORA}),
]  # fmt: skip


def compare(model_type: str, sizes: dict[str, Any], overrides: list[str]) -> dict[str, float]:
    """Relative errors of the estimate: of the step alone, and of weights, state and step together."""
    tokens = 4096 if sizes is QWEN3_8B else 512
    recipe = {
        "name": "memory", "method": "sft", "model": {"path": "model"}, "rows_per_step": 8, "steps": 2,
        "data": {"train": "train.jsonl", "max_seq_tokens": tokens}, "shape": "shape.yaml",
    }  # fmt: skip
    limit = {"max_params_b": 999, "max_seq_tokens": 99999, "basis": "estimated"}
    shape = {
        "name": "here", "device": "cpu", "device_name": "CPU", "gpus": 0, "gpu_memory_gib": 1000, "accelerate": "cpu",
        "micro_batch_tokens": max(1024, tokens), "limits": {"lora": limit, "full": limit},
    }  # fmt: skip
    Path("model").mkdir(exist_ok=True)
    files = {"model/config.json": {"model_type": model_type, **sizes}, "recipe.yaml": recipe, "shape.yaml": shape}
    for name, content in files.items():
        Path(name).write_text(json.dumps(content))
    Path("train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 8)
    plan = make_plan(load_recipe(Path("recipe.yaml"), overrides))
    measured, estimate = measure(plan, config_of(plan)), plan.memory
    assert estimate is not None
    step = estimate.phases["learning"]
    return {
        "step_gib": measured.step_gib,
        "total_gib": measured.total_gib,
        "step_error": step / measured.step_gib - 1,
        "total_error": (estimate.weights_gib + estimate.state_gib + step) / measured.total_gib - 1,
        "seconds": measured.seconds,
    }


def main() -> None:
    """Measure every case and write the table."""
    common.quiet()
    warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern")  # PEFT warns for experts
    out = Path("benchmarks/results/memory_estimate").resolve()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        home = Path.cwd()
        os.chdir(folder)
        for model_type, sizes, ways in CASES:
            name = f"{model_type}, {sizes['hidden_size']} wide, {sizes['num_hidden_layers']} layers"
            errors = {way: compare(model_type, sizes, overrides) for way, overrides in ways.items()}
            found.append({"model": name, "training": errors})
            print(name, {way: f"{error['step_error']:+.1%}" for way, error in errors.items()}, flush=True)
        os.chdir(home)
    lines = [
        "The memory estimate against a step on tensors without contents, `python benchmarks/memory_estimate.py`.",
        "Step is what comes on top of weights and state.\n",
        "| model | training | step | total |\n|---|---|---|---|",
        *(
            f"| {row['model']} | {' / '.join(row['training'])} "
            f"| {' / '.join(format(error['step_error'], '+.1%') for error in row['training'].values())} "
            f"| {' / '.join(format(error['total_error'], '+.1%') for error in row['training'].values())} |"
            for row in found
        ),
    ]
    common.write_result(out, {"cases": found}, lines)


if __name__ == "__main__":
    main()
