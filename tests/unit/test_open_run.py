"""Which directory a plan gets: a new one, that of the same run, or that of one that never trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_recipe import write_small

from trainer.config.load import load_recipe
from trainer.errors import LaunchError, RunConflictError
from trainer.planning.plan import Plan, make_plan
from trainer.run.directory import RunDir
from trainer.run.find import named_run, open_run
from trainer.run.state import Outcome


@pytest.fixture(autouse=True)
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_small(Path())


def planned(*overrides: str) -> Plan:
    return make_plan(load_recipe(Path("recipe.yaml"), list(overrides)))


def step_made(run: RunDir, step: int) -> None:
    run.metrics_file.write_text(json.dumps({"step": step, "time": 1.0}) + "\n")
    run.checkpoint(step).mkdir(parents=True)


def test_run_that_made_no_step_gives_up_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    run = open_run(planned())
    run.take_attempt({})
    run.metrics_file.write_text('{"step": 0, "time": 1.0, "eval/loss": 3.0}\n')
    run.write_outcome(Outcome("failed", 0, "train.jsonl:3: not JSON", 2))
    run.journal(0).mkdir(parents=True)
    open_run(planned("seed=1"))
    assert run.read_plan() == planned("seed=1")
    assert run.read_metrics() == []
    assert run.read_outcome() is None
    assert run.journal_steps() == []
    assert run.newest_attempt() == 1, "numbers of attempts are never used twice"
    assert "runs/small: the earlier run of this name made no step and is replaced" in capsys.readouterr().err


def test_run_that_is_about_to_start_keeps_its_plan() -> None:
    run = open_run(planned())
    with run.launching(), pytest.raises(LaunchError, match="about to start"):
        open_run(planned("seed=1"))
    with run.locked(), pytest.raises(LaunchError, match="another attempt is running"):
        open_run(planned("seed=1"))
    assert run.read_plan() == planned()


def test_run_with_steps_is_kept_or_moved_aside(capsys: pytest.CaptureFixture[str]) -> None:
    run = open_run(planned())
    for number in (1, 2):
        step_made(run, 5)
        with pytest.raises(RunConflictError, match=rf"seed: {number - 1} -> {number}(.|\n)*--overwrite"):
            open_run(planned(f"seed={number}"))
        assert open_run(planned(f"seed={number}"), overwrites=True) == run
        kept = RunDir(run.root.with_name(f"small.old-{number}"))
        assert kept.newest_logged_step() == 5
        assert run.newest_logged_step() == 0
        assert f"kept as runs/small.old-{number}" in capsys.readouterr().err


def test_overwrite_continues_the_same_run() -> None:
    run = open_run(planned())
    step_made(run, 5)
    assert open_run(planned(), overwrites=True).newest_logged_step() == 5


@pytest.mark.parametrize("name", ["../x", ".", "..", "a b", "a\n", "", "a%j", "a/b", "-x"])
def test_names_that_a_recipe_may_not_have_are_refused(name: str) -> None:
    with pytest.raises(LaunchError, match="not a name of a run"):
        named_run(name)
    with pytest.raises(LaunchError, match="not a name of a run"):
        open_run(planned(), name)
    assert not Path("runs").exists()


def test_fewer_steps_than_made_leave_the_plan_alone() -> None:
    run = open_run(planned())
    step_made(run, 9)
    with pytest.raises(LaunchError, match=r"is at step 9 already; set `steps` to that or more \(got 6\)"):
        open_run(planned("steps=6"))
    assert run.read_plan().steps == 10
    run.write_outcome(Outcome("finished", 9, "finished", 0))
    open_run(planned("steps=6"))
    assert run.read_plan().steps == 10


@pytest.mark.parametrize(("schedule", "warns"), [("cosine", True), ("linear", True), ("constant", False)])
def test_more_steps_warn_of_a_jump_in_the_learning_rate(
    schedule: str, warns: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    run = open_run(planned(f"optimizer.schedule={schedule}"))
    step_made(run, 10)
    open_run(planned(f"optimizer.schedule={schedule}", "steps=20"))
    assert ("warning: with `steps` 10 -> 20 the learning rate jumps from" in capsys.readouterr().err) is warns


def test_directory_that_cannot_be_created() -> None:
    Path("runs").write_text("a file")
    with pytest.raises(LaunchError, match=r"runs/small: cannot be created: .* Make it writable"):
        open_run(planned())


def test_damaged_plan_is_no_obstacle_before_the_first_step_and_named_after_it() -> None:
    run = open_run(planned())
    text = run.plan_file.read_text()
    run.plan_file.write_text(text[:300])
    open_run(planned())
    assert run.plan_file.read_text() == text
    step_made(run, 5)
    run.plan_file.write_text(text[:300])
    with pytest.raises(LaunchError, match=r"plan\.json: "):
        open_run(planned())
