"""Rollouts one step ahead: which policy drew which step; the same bits after a kill; local and on a server."""

from __future__ import annotations

import shutil
import sys
from copy import deepcopy
from typing import Any, Final

import pytest
from project import Project, Run, Running, is_at_step, wait_for
from rft_project import NO_EVALUATION, RECIPE, prepare, rollouts, run_here
from serving import serving

AHEAD: Final[dict[str, Any]] = {
    **NO_EVALUATION,
    "rollout__staleness": 1,
    "algorithm__mismatch_cap": 2.0,
    "dcp_save_interval": 2,
    "optimizer__learning_rate": 5e-3,
}


@pytest.fixture(scope="module")
def project(shared: Project) -> Project:
    return prepare(shared)


@pytest.fixture(scope="module")
def whole(project: Project) -> Run:
    """A run that nothing disturbs."""
    return run_here(project, "ahead", **AHEAD)


def start_slowly(project: Project, file: str) -> Running:
    """A step takes a second, so that a kill arrives before the end."""
    return project.start([sys.executable, "-m", "trainer.worker", file], {"SLOW_S": "0.05"})


def versions(run: Run) -> list[set[int]]:
    return [{record["policy_version"] for record in rollouts(run, step)} for step in range(5)]


def test_each_step_is_drawn_with_the_policy_before_the_step_before(whole):
    assert versions(whole) == [{0}, {0}, {1}, {2}, {3}]
    assert [record["rollout/policy_version"] for record in whole.metrics()] == [0, 0, 1, 2, 3]


def test_the_first_two_steps_see_the_same_policy_and_later_ones_an_older_one(whole):
    """sampler_kl compares the policy that draws with the one that learns."""
    divergence = [record["train/sampler_kl"] for record in whole.metrics()]
    assert divergence[0] < 1e-9
    assert all(each > 1e-6 for each in divergence[1:])


def test_another_staleness_is_another_run(project, whole):
    run_here(project, "ahead", code=2, **(AHEAD | {"rollout__staleness": 0}))
    assert versions(whole)[2] == {1}, "nothing was drawn again"


def test_a_killed_run_replays_what_older_policies_drew_and_equals_the_undisturbed_one(project, whole):
    file = project.recipe("killed.yaml", **deepcopy(RECIPE) | {"name": "killed"} | AHEAD)
    run = project.run("killed")
    for step in (1, 3):
        wait_for(is_at_step(run, step), started := start_slowly(project, file))
        assert started.process.poll() is None
        project.kill_all()
    done = project.worker(file)
    assert done.code == 0, done.said
    assert "not in the journal" not in done.said
    assert run.values() == whole.values()
    assert run.adapter() == whole.adapter()
    assert versions(run) == versions(whole)


def test_rollouts_whose_files_are_gone_are_drawn_anew_and_the_user_is_told(project, whole):
    file = project.recipe("lost.yaml", **deepcopy(RECIPE) | {"name": "lost"} | AHEAD)
    run = project.run("lost")
    wait_for(lambda: run.checkpoints()[-1:] == [2], start_slowly(project, file))
    project.kill_all()
    shutil.rmtree(run.root / "checkpoints/step-000004", ignore_errors=True)  # where the kill came late
    for chunk in run.root.glob("rollouts/step-000002/chunk-*"):
        chunk.unlink()
    done = project.worker(file)
    assert done.code == 0, done.said
    assert "24 rollouts of step 3 are not in the journal; they are drawn with the policy of step 2" in done.said
    assert versions(run) == [{0}, {0}, {2}, {2}, {3}]


def test_a_server_draws_beside_the_learner_and_has_the_weights_that_the_plan_says(project):
    with serving(project, "model", "--kv-cache-tokens", "4096") as server:
        settings: dict[str, Any] = {"rollout__sampler": "served", "rollout__server_url": server.url}
        run = run_here(project, "beside", **AHEAD, **settings)
    assert versions(run) == [{0}, {0}, {1}, {2}, {3}]
    divergence = [record["train/sampler_kl"] for record in run.metrics()]
    assert divergence[0] < 1e-6, "float32 on both sides"
    assert all(each > 1e-6 for each in divergence[1:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm__mismatch_cap": None}, "needs `algorithm.mismatch_cap`"),
        ({"rollout__refill": True}, "contradicts `rollout.refill`"),
        ({"rollout__staleness": 2}, "must be at most 1 (got 2)"),
        ({"rollout__tools": ["rewards.py:digits"]}, "is not supported with"),
    ],
)
def test_what_cannot_be_drawn_ahead_is_refused(project, changes, message, capsys):
    run_here(project, "refused", code=2, **(AHEAD | changes))
    assert message in capsys.readouterr().err
