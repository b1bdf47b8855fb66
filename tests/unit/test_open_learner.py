"""Which sharded models are loaded by all ranks at once."""

import json
from pathlib import Path

import pytest
from small_recipe import write_small

from trainer.config.load import load_recipe
from trainer.training.open_learner import is_converted


@pytest.mark.parametrize(
    ("stored", "computed", "converted"),
    [
        ("bfloat16", "bfloat16", False),
        ("float32", "float32", False),
        ("float32", "bfloat16", True),
        ("bfloat16", "float32", True),
    ],
)
def test_only_files_of_another_dtype_are_converted_in_turn(tmp_path, monkeypatch, stored, computed, converted):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(write_small(Path()), [f"model.compute_dtype={computed}"]).recipe
    config = Path("model/config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": stored, "torch_dtype": stored}))
    assert is_converted(recipe) is converted


def test_a_model_of_unknown_sizes_is_loaded_in_turn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(write_small(Path()), []).recipe
    Path("model/config.json").unlink()
    assert is_converted(recipe)
