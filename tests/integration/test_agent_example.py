"""The example of an agent runs: two steps of its own recipe with a tiny model, which never calls a tool."""

from __future__ import annotations

import shutil
from pathlib import Path

import yaml
from project import Project
from rft_project import rollouts, work
from tiny import tiny_model_dir

EXAMPLE = Path(__file__).parents[2] / "examples/agent_rft"


def test_the_agent_example_makes_two_steps(project: Project) -> None:
    recipe = yaml.safe_load((EXAMPLE / "recipe.yaml").read_text())
    shutil.copytree(EXAMPLE, project.root / "examples/agent_rft")
    tiny_model_dir(project.root / "long", max_position_embeddings=4096)
    recipe["model"]["path"] = "long"
    recipe["data"]["max_seq_tokens"] = 4096  # a byte is a token
    recipe["rollout"] |= {"group_size": 2, "max_completion_tokens": 12}
    recipe["rollout"]["stop"] = list("aeions ")  # a random model draws no stop token, but soon a letter
    del recipe["epochs"]
    recipe |= {"steps": 2, "rows_per_step": 2}
    file = project.root / "examples/agent_rft/recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    run = work(project, "examples/agent_rft/recipe.yaml", "agent_rft")
    assert run.steps() == [1, 2]
    records = rollouts(run, 0)
    assert len(records) == 4
    for record in records:
        assert record["conversation"]["stop"] == "done"
        assert record["reward"] == 0.0
        first = record["conversation"]["messages"][:2]
        assert [message["role"] for message in first] == ["system", "user"]
