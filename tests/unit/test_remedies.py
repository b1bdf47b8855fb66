"""Remedies: whatever is advised, applied as it is printed, fits."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from small_recipe import RFT, SFT, write_small

from trainer.commands.cli import main
from trainer.config.load import RECIPES, all_shapes, load_recipe
from trainer.config.recipe import Recipe
from trainer.config.shape import TrainingShape
from trainer.planning.fit import misfit
from trainer.planning.model_facts import ModelFacts
from trainer.planning.remedies import find_remedies, find_remedies_on_any_shape, remedy_lines

SHAPES: Final = {shape.name: shape for shape in all_shapes()}
MODELS: Final = {
    "1B": ModelFacts(
        hidden=2048, layers=16, query_width=2048, key_width=512, intermediate=8192, vocab=128_256, is_tied=True,
        heads=32,
    ),
    "8B": ModelFacts(
        hidden=4096, layers=36, query_width=4096, key_width=1024, intermediate=12288, vocab=151_936, is_tied=False,
        heads=32,
    ),
    "70B": ModelFacts(
        hidden=8192, layers=80, query_width=8192, key_width=1024, intermediate=28672, vocab=128_256, is_tied=False,
        heads=64,
    ),
    "unknown": None,
}  # fmt: skip
KINDS: Final = [("sft", "none"), ("rft", "local"), ("rft", "vllm")]


def recipe_of(method: str, sampler: str, *, is_lora: bool, max_seq_tokens: int) -> Recipe:
    fields: dict[str, Any] = {
        "name": "small", "method": method, "model": {"path": "model"}, "steps": 10, "rows_per_step": 64,
        "data": {"train": "train.jsonl", "max_seq_tokens": max_seq_tokens},
        "lora": {} if is_lora else None,
    }  # fmt: skip
    if method == "rft":
        fields |= {"rollout": {"sampler": sampler, "max_completion_tokens": 512}, "rewards": [{"use": "last_number"}]}
    return RECIPES[method].model_validate(fields)


def applied(line: str, recipe: Recipe, shape: TrainingShape) -> tuple[Recipe, TrainingShape]:
    """What a user has after doing what the line says."""
    fields = recipe.model_dump()
    changes = re.findall(r"`([^`]+)`", line)
    assert changes
    for change in changes:
        option, _, name = change.partition(" ")
        if option == "--shape":
            shape = SHAPES[name]
            continue
        ((key, value),) = yaml.safe_load(change).items()
        if key == "micro_batch_tokens":
            shape = shape.model_copy(update={key: value})
            continue
        *sections, field = key.split(".")
        target = fields
        for section in sections:
            target = target[section]
        target[field] = value
    return RECIPES[recipe.method].model_validate(fields), shape


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("method", "sampler"), KINDS)
@pytest.mark.parametrize("is_lora", [True, False], ids=["lora", "full"])
def test_every_remedy_fits_when_it_is_applied_as_printed(model, method, sampler, is_lora):
    facts, num_refused = MODELS[model], 0
    for shape, max_seq_tokens in itertools.product(SHAPES.values(), (1024, 8192, 40_000, 140_000)):
        recipe = recipe_of(method, sampler, is_lora=is_lora, max_seq_tokens=max_seq_tokens)
        if misfit(recipe, shape, facts) is None:
            continue
        num_refused += 1
        remedies = find_remedies(recipe, shape, facts, list(SHAPES.values()))
        lines = remedy_lines(remedies)[1:]
        assert len(lines) == len(remedies)
        for line in lines:
            changed, on = applied(line, recipe, shape)
            assert misfit(changed, on, facts) is None, (shape.name, line)
            if changed.method == "rft":
                assert changed.rollout.max_completion_tokens < changed.data.max_seq_tokens, (shape.name, line)
    assert num_refused > 0


@pytest.mark.parametrize(("method", "sampler"), KINDS)
@pytest.mark.parametrize("is_lora", [True, False], ids=["lora", "full"])
def test_where_no_shape_fits_every_remedy_names_one_that_does_afterwards(method, sampler, is_lora):
    shapes, num_lines = list(SHAPES.values()), 0
    for facts, max_seq_tokens in itertools.product(MODELS.values(), (8192, 200_000)):
        recipe = recipe_of(method, sampler, is_lora=is_lora, max_seq_tokens=max_seq_tokens)
        if any(misfit(recipe, shape, facts) is None for shape in shapes):
            continue
        for line in remedy_lines(find_remedies_on_any_shape(recipe, facts, shapes))[1:]:
            num_lines += 1
            assert misfit(*applied(line, recipe, shapes[0]), facts) is None, line
    assert num_lines > 0


def test_a_run_out_of_memory_is_not_sent_to_a_shape_with_less_room():
    """The recipe was predicted to fit, so every shape that it fits would be advised without this rule."""
    recipe = recipe_of("sft", "none", is_lora=True, max_seq_tokens=1024)
    assert misfit(recipe, SHAPES["h200x1"], MODELS["1B"]) is None
    assert misfit(recipe, SHAPES["h100x1"], MODELS["1B"]) is None
    advised = [remedy.shape.name for remedy in find_remedies(recipe, SHAPES["h200x1"], MODELS["1B"], all_shapes())]
    assert "h100x1" not in advised


def test_a_sharded_shape_is_refused_to_the_local_sampler_with_a_remedy_that_works(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_small(Path(), RFT)
    assert main(["check", "recipe.yaml", "--shape", "a100x8"]) == 2
    assert capsys.readouterr().err == (
        "--shape: a100x8 does not fit: shards the base model, which the local sampler does not support: "
        "`rollout.sampler: vllm`\n"
        "What would fit, as predicted:\n"
        "  `rollout.sampler: vllm`: 1.2 of 79 GiB\n"
        "  `--shape cpu`: 0.6 of 16 GiB\n"
        "See also `trainer shapes RECIPE`.\n"
    )
    at_a_server = ["--set", "rollout.sampler=vllm", "--set", "rollout.vllm_url=http://127.0.0.1:8000"]
    assert main(["check", "recipe.yaml", "--shape", "a100x8", *at_a_server]) == 0
    assert main(["check", "recipe.yaml", "--shape", "cpu"]) == 0


def test_sequences_are_shortened_only_where_nothing_else_helps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(
        write_small(Path(), SFT), ["data.max_seq_tokens=4096", "model.gradient_checkpointing=true", "rows_per_step=1"]
    ).recipe
    shape = SHAPES["cpu"].model_copy(update={"gpu_memory_gib": 8.5, "micro_batch_tokens": 64})
    (remedy,) = find_remedies(recipe, shape, MODELS["1B"], [])
    assert remedy.changes == ("`data.max_seq_tokens: 2048`",)
