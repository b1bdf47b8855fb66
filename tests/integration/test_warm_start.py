"""`lora.warm_start` names a run: its last or best adapter, or a checkpoint."""

from __future__ import annotations

import json

import pytest
from project import Done, Project

LORA = {"rank": 4, "alpha": 8}


@pytest.fixture(scope="module")
def source(shared: Project) -> Done:
    """Six steps, with checkpoints at steps 4 and 6."""
    return shared.trainer("train", "recipe.yaml", "--name", "source")


@pytest.mark.parametrize(("which", "step"), [("source", 6), ("source@4", 4)])
def test_a_run_begins_where_the_named_one_was(shared: Project, source: Done, which: str, step: int) -> None:
    name = which.replace("@", "-")
    file = shared.recipe(f"{name}.yaml", name=f"from-{name}", lora={**LORA, "warm_start": which}, steps=2)
    done = shared.trainer("train", file)
    assert done.code == 0, source.said + done.said
    before = {record["step"]: record.get("eval/loss") for record in shared.run("source").metrics()}
    assert shared.run(f"from-{name}").metrics()[0]["eval/loss"] == before[step]
    plan = json.loads((shared.root / "runs" / f"from-{name}" / "plan.json").read_text())
    assert plan["identity"]["lora"]["warm_start"].startswith("sha256:")


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"warm_start": "source@5"}, "source: no checkpoint 5: there is source, source@best, source@4, source@6"),
        ({"warm_start": "other"}, "other: no such run. There are: "),
        ({"warm_start": "source", "rank": 8}, "source was trained with rank 4; the recipe has 8. Make them equal."),
    ],
)
def test_what_cannot_be_begun_from_is_an_error_at_its_line(
    shared: Project, source: Done, lora: dict[str, object], message: str
) -> None:
    file = shared.recipe("wrong.yaml", name="wrong", lora=LORA | lora)
    done = shared.trainer("check", file)
    assert done.code == 2, source.said + done.said
    lines = (shared.root / file).read_text().splitlines()
    number = next(index for index, line in enumerate(lines, 1) if "warm_start" in line)
    assert f"{file}:{number}: lora.warm_start: {message}" in done.stderr
