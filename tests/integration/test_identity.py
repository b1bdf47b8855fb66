"""Every attempt proves that it continues the same run: inputs that were replaced between two attempts."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from project import Project, Run
from rft_project import prepare
from tiny import tiny_model_dir

from trainer.worker import main


@contextmanager
def working_in(directory: Path) -> Iterator[None]:
    """The worker's `main` in this process, which spares its start; restores the handlers that it sets."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def attempt(project: Project, *arguments: str) -> int:
    with working_in(project.root):
        return main(list(arguments))


@pytest.fixture
def begun(project: Project) -> Run:
    """A run of 2 of 4 steps: its plan says 4, as if it had been interrupted."""
    assert attempt(project, project.recipe(steps=2)) == 0
    run = project.run("tiny")
    plan = json.loads((run.root / "plan.json").read_text())
    (run.root / "plan.json").write_text(json.dumps(plan | {"steps": 4}))
    return run


def refused(project: Project, run: Run) -> str:
    """What the next attempt says as it refuses to train."""
    steps = run.steps()
    assert attempt(project, "runs/tiny") == 2
    assert run.steps() == steps
    assert run.outcome()["exit_code"] == 2
    return str(run.outcome()["message"])


def test_rows_or_model_replaced_between_two_attempts(project: Project, begun: Run) -> None:
    rows = (project.root / "train.jsonl").read_text()
    (project.root / "train.jsonl").write_text("".join(rows.splitlines(keepends=True)[::2]))
    assert "data.train (train.jsonl): 24 rows, now 12" in refused(project, begun)
    (project.root / "train.jsonl").write_text(rows.replace("sum", "SUM"))
    assert "data.train (train.jsonl): other rows" in refused(project, begun)
    (project.root / "train.jsonl").write_text(rows)

    shutil.move(project.root / "model", project.root / "kept")
    assert "model.path (model): no such file or directory" in refused(project, begun)
    tiny_model_dir(project.root / "model", seed=1)
    assert "model.path (model): other content" in refused(project, begun)
    shutil.rmtree(project.root / "model")
    shutil.move(project.root / "kept", project.root / "model")

    assert attempt(project, "runs/tiny") == 0
    assert begun.steps() == [0, 1, 2, 3, 4]


def test_replaced_held_out_rows_end_the_comparison_with_the_old_best_value(
    project: Project, begun: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    metrics = begun.root / "metrics.jsonl"
    records = begun.metrics()
    records[0]["eval/loss"] = 1e-9  # no value of the new rows is better
    metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    before = begun.adapter("adapter-best")
    rows = (project.root / "eval.jsonl").read_text().splitlines(keepends=True)
    (project.root / "eval.jsonl").write_text("".join(rows[:5]))
    assert attempt(project, "runs/tiny") == 0
    assert "warning: the held-out rows were replaced: values up to step 2 count no more" in capfd.readouterr().err
    assert "best" in begun.outcome()["message"]
    assert "at step 4" in begun.outcome()["message"]
    assert begun.adapter("adapter-best") != before


def test_changed_reward_code_is_recorded(project: Project, capfd: pytest.CaptureFixture[str]) -> None:
    prepare(project)
    recipe = json.loads((project.root / "rft.yaml").read_text())
    (project.root / "rft.yaml").write_text(json.dumps(recipe | {"steps": 1, "eval_interval": 0}))
    assert attempt(project, "rft.yaml") == 0
    run = project.run("rft")
    with (project.root / "rewards.py").open("a") as file:
        file.write("\n# stricter\n")
    assert attempt(project, "rft.yaml", "--set", "steps=2") == 0
    assert [each["changed_rewards"] for each in run.attempts()] == [[], ["rewards.py"]]
    assert "warning: rewards.py changed since the attempt before" in capfd.readouterr().err
