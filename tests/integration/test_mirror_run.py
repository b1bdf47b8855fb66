"""A run whose directory is lost continues from its mirror and equals an uninterrupted run, bit for bit."""

from __future__ import annotations

import shutil
from typing import Final

import pytest
from project import LONG, Project, Run, is_at_step, wait_for

RECIPE: Final = LONG | {"lora__dropout": 0.1}


@pytest.fixture(scope="module")
def whole(shared: Project) -> Run:
    """The uninterrupted run, without a mirror: the mirror is not part of a run's identity."""
    done = shared.worker(shared.recipe("whole.yaml", **RECIPE), "--name", "whole")
    assert done.code == 0, done.said
    return shared.run("whole")


def test_a_lost_run_directory_is_fetched(shared: Project, whole: Run) -> None:
    backup = shared.root / "backup"
    recipe = shared.recipe("mirrored.yaml", **RECIPE, checkpoint__mirror=f"file://{backup}")
    run = shared.run("mirrored")
    started = shared.start_trainer("train", recipe, "--name", "mirrored")
    wait_for(is_at_step(run, 30), started)
    wait_for(lambda: any(backup.glob("mirrored/step-00002?/complete.json")), started)
    shared.kill_all()
    shutil.rmtree(run.root)

    done = shared.worker(recipe, "--name", "mirrored")
    assert done.code == 0, done.said
    assert "resumed runs/mirrored at step" in done.stderr, "not from the beginning"
    assert run.steps() == list(range(61))
    assert run.values() == whole.values()
    assert run.adapter() == whole.adapter()
    assert run.adapter("adapter-best") == whole.adapter("adapter-best")
    kept = sorted(path.parent.name for path in backup.glob("mirrored/*/complete.json"))
    assert kept == ["step-000058", "step-000060"], "exit waits for the last copy"


def test_a_foreign_mirror_is_a_warning_and_the_run_goes_on(shared: Project, whole: Run) -> None:
    """The name on the mirror belongs to another run: its copies are neither fetched nor touched."""
    backup = shared.root / "backup"
    before = sorted(path.read_bytes() for path in backup.glob("mirrored/*/complete.json"))
    assert before, "the test above has left copies"
    shutil.rmtree(shared.run("mirrored").root)
    recipe = shared.recipe("other.yaml", seed=7, checkpoint__mirror=f"file://{backup}")
    done = shared.worker(recipe, "--name", "mirrored")
    assert done.code == 0, done.said
    assert "holds another run" in done.stderr
    assert sorted(path.read_bytes() for path in backup.glob("mirrored/*/complete.json")) == before
