"""Names and values of other tools in a recipe get the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_recipe import RFT, SFT, write_small

from trainer.config.foreign_names import FIELDS, NOT_NEEDED, PREFERENCE_METHODS, remedies
from trainer.config.load import load_recipe
from trainer.config.recipe import RFTRecipe
from trainer.config.validate import _fields_at
from trainer.errors import RecipeError
from trainer.planning.plan import make_plan


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.setenv("ROWS", "/mnt/rows")
    return tmp_path


def mistakes(recipe: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write_small(Path.cwd(), recipe).relative_to(Path.cwd()))
    return caught.value.mistakes


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("lr: 1e-4", "lr: unknown field; in a recipe this is `optimizer.learning_rate`"),
        ("learning_rate: 1e-4", "learning_rate: unknown field; write it as `optimizer.learning_rate`"),
        (
            "batch_size: 8",
            "batch_size: unknown field; in a recipe this is `rows_per_step` (the global batch: rows per ",
        ),
        (
            "gradient_accumulation_steps: 4",
            "gradient_accumulation_steps: unknown field; in a recipe this is `rows_per_",
        ),
        ("lora_r: 8", "lora_r: unknown field; in a recipe this is `lora.rank`"),
        ("lora_alpha: 8", "lora_alpha: unknown field; in a recipe this is `lora.alpha`"),
        ("num_epochs: 3", "num_epochs: unknown field; in a recipe this is `epochs`"),
        ("max_steps: 3", "max_steps: unknown field; in a recipe this is `steps`"),
        ("base_model: x", "base_model: unknown field; in a recipe this is `model.path` (a hub name also needs "),
        ("dataset_path: x", "dataset_path: unknown field; in a recipe this is `data.train` (a file or "),
        ("sample_packing: true", "sample_packing: unknown field; not needed: rows are always packed, never padded"),
        ("max_seq_tokens: 5", "max_seq_tokens: unknown field; write it as `data.max_seq_tokens`"),
        ("rank: 5", "rank: unknown field; write it as `lora.rank`"),
        ("stepz: 5", "stepz: unknown field; did you mean `steps`?"),
    ],
)
def test_a_foreign_name_gets_the_remedy(line, said) -> None:
    (mistake,) = mistakes(SFT + line + "\n")
    assert mistake.startswith(f"recipe.yaml:{SFT.count(chr(10)) + 1}: {said}")


def test_a_foreign_name_inside_a_section_gets_the_remedy() -> None:
    (mistake,) = mistakes(SFT.replace("  rank: 4", "  r: 4"))
    assert mistake == "recipe.yaml:6: lora.r: unknown field; in a recipe this is `lora.rank`"


@pytest.mark.parametrize("method", ["dpo", "ppo", "orpo", "kto", "reward", "DPO"])
def test_preferences_are_refused_by_name(method) -> None:
    assert any(
        mistake.startswith(f"recipe.yaml:2: method: {method}: preferences and reward models are not trained here.")
        for mistake in mistakes(SFT.replace("method: sft", f"method: {method}"))
    )


def test_grpo_is_an_algorithm() -> None:
    (mistake,) = mistakes(RFT.replace("method: rft", "method: grpo"))
    assert mistake == "recipe.yaml:2: method: write `method: rft` and `algorithm: {name: grpo}`"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("  rank: 4", "\trank: 4", "recipe.yaml:6: not YAML: the line is indented with a tab; use spaces"),
        ("train.jsonl", "~/train.jsonl", "`~` is not your home directory in a recipe: write /home/ann/train.jsonl"),
        (
            "train.jsonl",
            "${ROWS}/train.jsonl",
            "are not replaced in a recipe: write /mnt/rows/train.jsonl, or use --set",
        ),
        ("path: model", "path: ~/model", "no such directory: ~/model; `~` is not your home directory in a recipe"),
        (
            "path: model",
            "path: $ROWS/model",
            "variables of the shell are not replaced in a recipe: write /mnt/rows/model",
        ),
        ("name: small", "name: ${USER}", "(got '${USER}'); variables of the shell are not replaced in a recipe"),
    ],
)
def test_tabs_variables_and_home_are_explained(old, new, said) -> None:
    found = mistakes(SFT.replace(old, new, 1))
    assert [mistake for mistake in found if said in mistake], found


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "learning_rate: 1e-3",
            "learning_rate: 10",
            "optimizer.learning_rate: 10 is unusually high; values above 0.01",
        ),
        ("steps: 10", "epochs: 500", "epochs: 500 is unusually high; values above 100"),
        ("rank: 4", "rank: 64", "lora.rank: 64 is more than the width of the model (32)"),
    ],
)
def test_absurd_numbers_are_warned_of(old, new, said) -> None:
    plan = make_plan(load_recipe(write_small(Path.cwd(), SFT.replace(old, new))))
    assert [warning for warning in plan.warnings if said in warning]


def test_the_table_names_fields_that_exist() -> None:
    for each in FIELDS:
        *sections, name = each.ours.split(".")
        assert name in _fields_at(RFTRecipe, tuple(sections)), each.ours


def test_a_name_has_one_meaning() -> None:
    names = [name for each in FIELDS for name in each.others]
    assert len(names) == len(set(names))
    assert set(remedies()) >= {*names, *NOT_NEEDED}
    assert "dpo" in PREFERENCE_METHODS
