"""Settings of rollouts with several turns: what `check` refuses, and the shipped rows and recipes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.config.recipe import RFTRecipe
from trainer.config.rft_sections import RolloutSettings
from trainer.config.turn_settings import turn_findings
from trainer.environments.loading import load_tools
from trainer.planning.identity import LATER_ROLLOUT_FIELDS, ROLLOUT_EXEMPT
from trainer.sampling import noise

ROOT = Path(__file__).parents[2]
GAME = "class Game:\n    def reset(self, row, *, seed): ...\n    def step(self, turn): ...\ndef tool(a: int): ...\n"


def findings(tmp_path: Path, **rollout: Any) -> dict[str, str]:
    (tmp_path / "game.py").write_text(GAME)
    fields = {"name": "a", "method": "rft", "model": {"path": "m"}, "data": {"train": "r.jsonl", "max_seq_tokens": 64}}
    recipe = RFTRecipe.model_validate({**fields, "rollout": rollout})
    return {".".join(map(str, each.path)): each.text for each in turn_findings(recipe, tmp_path)}


def test_an_environment_and_tools_that_exist_are_accepted(tmp_path):
    assert findings(tmp_path, environment="game.py:Game", tools=["game.py:tool"], max_tokens=64) == {}


@pytest.mark.parametrize(
    ("rollout", "place", "problem"),
    [
        ({"environment": "game.py:Gane"}, "rollout.environment", "has no class `Gane`; did you mean `Game`?"),
        ({"environment": "gane.py:Game"}, "rollout.environment", "no file"),
        ({"environment": "Game"}, "rollout.environment", "name a class as `module:class` or `file.py:class`"),
        ({"tools": ["game.py:tol"]}, "rollout.tools.0", "has no function `tol`; did you mean `tool`?"),
        ({"max_turns": 3}, "rollout.max_turns", "has no effect without"),
        ({"deterministic": True}, "rollout.deterministic", "has no effect without"),
        ({"environment": "game.py:Game", "max_tokens": 65}, "rollout.max_tokens", "more than data.max_seq_tokens"),
        (
            {"environment": "game.py:Game", "deterministic": True, "max_time_s": 5},
            "rollout.max_time_s",
            "contradicts `deterministic: true`",
        ),
    ],
)
def test_what_the_run_would_refuse_is_refused(tmp_path, rollout, place, problem):
    found = findings(tmp_path, **rollout)
    assert list(found) == [place]
    assert problem in found[place]


def test_runs_without_turns_keep_their_identity():
    """Every field of several turns is left out of the hash at its default, or altogether."""
    new = {"environment", "tools", "max_turns", "max_tokens", "max_time_s", "tool_errors", "staleness"}
    assert new == set(LATER_ROLLOUT_FIELDS)
    assert {"environment_limits", "deterministic"} <= ROLLOUT_EXEMPT
    assert new | ROLLOUT_EXEMPT < set(RolloutSettings.model_fields)


def test_noise_of_turn_0_is_as_it_was_and_later_turns_differ():
    keys = noise.row_keys(3, 1, [5, 5, 5], [0, 0, 0], torch.device("cpu"))
    with_turns = noise.turn_keys(keys, [0, 1, 2])
    assert with_turns[0] == keys[0]
    assert len(set(with_turns.tolist())) == 3
    drawn = torch.stack([noise.uniforms(noise.turn_keys(keys, [0, 1, 2]), position) for position in range(400)])
    assert abs(torch.corrcoef(drawn.T) - torch.eye(3)).max() < 0.15, "within 3 / sqrt(400)"


def rows(name: str, split: str) -> list[dict[str, Any]]:
    lines = (ROOT / "datasets" / f"{name}_{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_demonstrations_show_the_tool_that_the_run_offers():
    tools = load_tools(["recipes/environments/calculator.py:multiply"], ROOT)
    (tool,) = rows("calculator_sft", "train")[0]["tools"]
    assert tool == tools["multiply"].schema


@pytest.mark.parametrize("name", ["calculator_sft", "calculator_rft", "guess_sft", "guess_rft"])
def test_held_out_wordings_and_numbers_are_absent_from_training(name):
    train, held_out = rows(name, "train"), rows(name, "heldout")
    assert not {row["family"] for row in train} & {row["family"] for row in held_out}
    if name == "calculator_rft":
        assert not {row[factor] for row in train for factor in "ab"} & {
            row[factor] for row in held_out for factor in "ab"
        }
    if name == "guess_rft":
        assert not {row["low"] for row in train} & {row["low"] for row in held_out}
