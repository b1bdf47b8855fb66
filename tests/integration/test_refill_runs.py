"""Runs with `refill`: what earlier steps have shown orders the draws, also after a kill."""

from __future__ import annotations

import json
import shutil
import sys
from copy import deepcopy
from typing import Any, Final

import pytest
from project import Project, Run, is_at_step, wait_for
from rft_project import NO_EVALUATION, RECIPE, prepare, rollouts, run_here

REFILL: Final[dict[str, Any]] = {
    **NO_EVALUATION,
    "steps": 8,  # two epochs of 24 rows
    "rollout": RECIPE["rollout"] | {"group_size": 2, "max_completion_tokens": 4, "refill": True, "chunk_prompts": 2},
    "rewards": [{"use": "rewards.py:hard_or_easy"}],
    "dcp_save_interval": 2,
}


@pytest.fixture(scope="module")
def project(shared: Project) -> Project:
    return prepare(shared)


@pytest.fixture(scope="module")
def whole(project: Project) -> Run:
    """A run that nothing disturbs."""
    return run_here(project, "refill", **REFILL)


def drawn_rows(run: Run, step: int) -> list[int]:
    return [record["row"] for record in rollouts(run, step)[::2]]


def test_flat_prompts_are_drawn_again_after_those_with_a_signal(whole):
    """Two of three rows earn the same in every rollout."""
    seen = {row for step in range(4) for row in drawn_rows(whole, step)}
    assert len(seen) == 24
    for step in range(4, 8):  # the first six are those of the epoch
        spare = [row % 3 == 0 for row in drawn_rows(whole, step)[6:]]
        assert spare[0], "a row with a signal comes first"
        assert spare == sorted(spare, reverse=True)


def test_the_share_of_tokens_with_a_gradient_is_logged(whole):
    for step, record in enumerate(whole.metrics()):
        drawn = rollouts(whole, step)
        tokens = {True: 0, False: 0}
        for first, second in zip(drawn[::2], drawn[1::2], strict=True):
            has_signal = first["reward"] != second["reward"]
            tokens[has_signal] += first["trained"].count("1") + second["trained"].count("1")
        assert record["rollout/gradient_token_frac"] == tokens[True] / sum(tokens.values())
        assert 0 < record["rollout/gradient_token_frac"] < 1


def test_what_a_kill_would_leave_goes_on_alike(project, whole):
    """Checkpoint of step 4, journal up to the middle of step 6, no outcome."""
    name = "refill"
    shutil.copytree(whole.root, project.root / "whole")
    kept = Run(project.root / "whole")
    for step in (6, 8):
        shutil.rmtree(whole.root / "checkpoints" / f"step-{step:06d}")
    for step in (6, 7):
        shutil.rmtree(whole.root / "rollouts" / f"step-{step:06d}")
    chunks = sorted((whole.root / "rollouts" / "step-000005").iterdir())
    assert len(chunks) > 3, "it was refilled"
    chunks[-1].unlink()
    (whole.root / "outcome.json").unlink()
    resumed = run_here(project, name, **REFILL)
    assert len(resumed.attempts()) == 2
    assert resumed.values() == kept.values()
    assert resumed.adapter() == kept.adapter()


@pytest.mark.heavy
def test_a_killed_run_remembers_and_equals_the_undisturbed_one(project, whole):
    file = project.recipe("killed.yaml", **deepcopy(RECIPE) | {"name": "killed"} | REFILL)
    run = project.run("killed")
    for step in (3, 5):
        started = project.start([sys.executable, "-m", "trainer.worker", file], {"SLOW_S": "0.03"})
        wait_for(is_at_step(run, step), started)
        assert started.process.poll() is None
        project.kill_all()
    assert json.loads((run.newest_checkpoint() / "refill.json").read_text())
    done = project.worker(file)
    assert done.code == 0, done.said
    assert "knows nothing" not in done.said
    assert run.values() == whole.values()
    assert run.adapter() == whole.adapter()
    assert [drawn_rows(run, step) for step in range(8)] == [drawn_rows(whole, step) for step in range(8)]


def test_a_checkpoint_of_an_older_version_is_gone_on_from_and_the_user_is_told(project, capfd):
    """Its manifest lists no refill.json."""
    run = run_here(project, "older", **REFILL | {"steps": 2})
    (checkpoint,) = (run.root / "checkpoints").glob("step-*")
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    del manifest["files"]["refill.json"]
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    (checkpoint / "refill.json").unlink()
    run_here(project, "older", **REFILL | {"steps": 3})
    assert "the checkpoint has no refill.json: `refill` knows nothing of earlier steps" in capfd.readouterr().err
    assert run.steps() == [1, 2, 3]


def test_runs_without_refill_have_neither_file_nor_metric(project):
    run = run_here(project, "plain", **NO_EVALUATION, steps=1, dcp_save_interval=1)
    assert not (run.newest_checkpoint() / "refill.json").exists()
    assert "rollout/gradient_token_frac" not in run.metrics()[0]
