"""`trainer check` refuses names in lora.target_modules that select no layer, from the files of the weights."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from trainer.config.load import load_recipe
from trainer.errors import ModelError
from trainer.planning.plan import make_plan

CONFIG = {
    "model_type": "qwen2",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 320,
}
SHAPES = {
    "model.embed_tokens.weight": [320, 32],
    "model.layers.0.self_attn.q_proj.weight": [32, 32],
    "model.layers.0.self_attn.k_proj.weight": [32, 32],
    "model.layers.0.mlp.down_proj.weight": [32, 64],
    "model.layers.0.input_layernorm.weight": [32],
}


def recipe_with(directory: Path, targets: list[str], *, sharded: bool = False, **config: object) -> Path:
    """A recipe whose model has a config.json and the names, not the values, of its weights."""
    model = directory / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({**CONFIG, **config}))
    if sharded:
        names = {"weight_map": dict.fromkeys(SHAPES, "model-00001-of-00001.safetensors")}
        (model / "model.safetensors.index.json").write_text(json.dumps(names))
    else:
        header = json.dumps({"__metadata__": {"format": "pt"}, **{name: {"shape": s} for name, s in SHAPES.items()}})
        (model / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode())
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (directory / "rows.jsonl").write_text(json.dumps(row))
    recipe = {
        "name": "targets",
        "method": "sft",
        "model": {"path": str(model)},
        "lora": {"target_modules": targets},
        "data": {"train": str(directory / "rows.jsonl"), "max_seq_tokens": 128},
        "rows_per_step": 1,
        "steps": 1,
        "shape": "cpu",
    }
    file = directory / "recipe.yaml"
    file.write_text(json.dumps(recipe, indent=1))
    return file


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "index"])
@pytest.mark.parametrize(
    ("targets", "problem"),
    [
        (["q_proj", "k_porj"], "no layer of the model is named `k_porj`; did you mean `k_proj`?"),
        (
            ["q_proj", "nothing"],
            "no layer of the model is named `nothing`; known here: down_proj, k_proj, q_proj",
        ),
        (["q_proj", "self_attn"], "no layer of the model is named `self_attn`"),
        (
            ["q_proj", "embed_tokens"],
            "the token embedding cannot have an adapter; leave it out, or train all parameters",
        ),
        (["q_proj", "lm_head"], "the head cannot have an adapter; leave it out"),
    ],
)
def test_a_name_that_selects_no_layer_is_refused_with_file_and_line(
    tmp_path: Path, targets: list[str], problem: str, sharded: bool
) -> None:
    file = recipe_with(tmp_path, targets, sharded=sharded)
    with pytest.raises(ModelError) as error:
        make_plan(load_recipe(file))
    assert f"{file}:" in str(error.value)
    assert f"lora.target_modules: {problem}" in str(error.value)


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["self_attn.q_proj"], ["model.layers.0.mlp.down_proj"]])
def test_names_of_layers_are_accepted_as_peft_does(tmp_path: Path, targets: list[str]) -> None:
    assert make_plan(load_recipe(recipe_with(tmp_path, targets))).recipe.lora is not None


def test_a_name_of_fused_experts_is_left_to_the_run(tmp_path: Path) -> None:
    file = recipe_with(tmp_path, ["q_proj", "w1"], model_type="mixtral", num_local_experts=4)
    assert make_plan(load_recipe(file)).facts is not None
