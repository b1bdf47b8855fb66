"""A disk that reports an error as data is synced: what was not written durably does not count."""

from __future__ import annotations

from pathlib import Path

import pytest
from preloaded import FSYNC, preloaded
from project import BIN, Project


def train(project: Project, shims: Path, part: str) -> tuple[int, str]:
    """Six steps with a checkpoint every second one, where fsync fails for paths with `part`."""
    environment = preloaded(shims, FSYNC, FSYNC_PART=part)
    done = project.start([str(BIN / "trainer"), "train", project.recipe()], environment).wait()
    return done.code, done.said + project.run("tiny").log()


def test_checkpoint_that_cannot_be_synced_is_no_checkpoint(
    project: Project, tmp_path_factory: pytest.TempPathFactory
) -> None:
    code, said = train(project, tmp_path_factory.mktemp("shim"), "/.step-000002.tmp")
    run = project.run("tiny")
    assert code == 0, said
    assert run.checkpoints() == [4, 6]
    assert "Input/output error; going on, the next save tries again" in said
    assert run.steps() == list(range(7))


def test_metrics_that_cannot_be_synced_end_the_attempt(
    project: Project, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Records must be durable before the checkpoint of their step; here no attempt can make them so."""
    project.recipe(recovery={"restart_backoff_s": 0, "max_restarts": 0})
    environment = preloaded(tmp_path_factory.mktemp("shim"), FSYNC, FSYNC_PART="/metrics.jsonl")
    done = project.start([str(BIN / "trainer"), "train", "recipe.yaml"], environment).wait()
    run = project.run("tiny")
    assert done.code == 1, done.said
    assert run.checkpoints() == []
    assert "metrics.jsonl: Input/output error" in run.outcome()["message"]
    assert "Traceback" not in done.said
