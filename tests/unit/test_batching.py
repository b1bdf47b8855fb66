"""Whether sequences can be packed, as far as config.json tells, and what `trainer check` says about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model_dir

from trainer.commands.cli import main
from trainer.planning.batching import rotary_switch, why_separate

MODELS = json.loads((Path(__file__).parents[2] / "docs/models.json").read_text(encoding="utf-8"))["families"]
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64,
    "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
}  # fmt: skip
RECIPE = """\
name: small
method: METHOD
model: {path: model}
data: {train: rows.jsonl, max_seq_tokens: 128}
rows_per_step: 2
steps: 1
shape: cpu
"""
RFT = "rollout: {group_size: 4, max_completion_tokens: 32}\nrewards: [{use: last_number}]\n"


def write_small(directory: Path, method: str, arch: str, **config: Any) -> None:
    tiny_model_dir(directory / "model", arch, **config)
    turns = [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5"}]
    row = {"messages": turns[:1], "answer": "5"} if method == "rft" else {"messages": turns}
    (directory / "rows.jsonl").write_text((json.dumps(row) + "\n") * 4)
    recipe = RECIPE.replace("METHOD", method) + (RFT if method == "rft" else "")
    (directory / "recipe.yaml").write_text(recipe)


@pytest.mark.parametrize(
    "record", [each for each in MODELS if "alone" in each["numbers"] and "+" not in each["family"]],
    ids=lambda record: record["family"],
)  # fmt: skip
def test_what_was_measured_is_predicted(record):
    measured = record["numbers"].get("separate")
    if measured is None or "window" not in measured:  # a window that attention does not get depends on the rows
        predicted = why_separate({"model_type": record["family"]}, 128)
        assert (predicted is None) == (measured is None)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, None),
        ({"rope_scaling": None}, None),
        ({"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 8}}, None),
        ({"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 4096}, 4096),
        ({"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 64}}, 64),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 2048}, 2048),
        ({"rope_parameters": {"full_attention": {"rope_type": "dynamic"}}, "max_position_embeddings": 16}, 16),
        ({"text_config": {"rope_scaling": {"rope_type": "longrope", "original_max_position_embeddings": 9}}}, 9),
    ],
)
def test_the_length_at_which_rotary_factors_change(config, expected):
    assert rotary_switch(config) == expected


def test_a_kind_of_layer_that_keeps_state_is_known_without_the_family():
    config = {"model_type": "new", "layer_types": ["full_attention", "linear_attention"]}
    assert why_separate(config, 128) == "new keeps state between packed sequences"
    assert why_separate({**config, "layer_types": ["full_attention", "sliding_attention"]}, 128) is None


def test_check_says_that_sequences_run_one_by_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_small(tmp_path, "sft", "lfm2")
    assert main(["check", "recipe.yaml"]) == 0
    out = capsys.readouterr().out
    assert "sequences one by one: lfm2 keeps state between packed sequences\n" in out
    assert "micro-batches of one sequence x 1 rank x 2 accumulated" in " ".join(out.split())


def test_rft_across_a_change_of_rotary_factors_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_small(tmp_path, "rft", "llama", rope_parameters=LONGROPE)
    assert main(["check", "recipe.yaml"]) == 2
    assert "recipe.yaml:4: data.max_seq_tokens: rft of 128 tokens is not supported" in capsys.readouterr().err
    assert main(["check", "recipe.yaml", "--set", "data.max_seq_tokens=64"]) == 0
