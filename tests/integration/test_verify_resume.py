"""`trainer verify-resume` on real runs, and what it says of runs that are not equal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from project import LONG, Done, Project
from rft_project import NO_EVALUATION, prepare

from trainer.commands.certificate import compare_runs
from trainer.errors import LaunchError
from trainer.run.directory import RunDir


@pytest.fixture(scope="module")
def project(shared: Project) -> Project:
    return prepare(shared)


@pytest.fixture(scope="module")
def rft(project: Project) -> tuple[Done, Path]:
    """An RFT recipe, killed while saving, while sampling and while training."""
    recipe = json.loads((project.root / "rft.yaml").read_text())
    recipe["rollout"] |= {"max_completion_tokens": 40}  # chunks that take long enough to be killed in
    recipe["data"] |= {"max_seq_tokens": 160}
    (project.root / "slow.yaml").write_text(json.dumps(recipe | {"dcp_save_interval": 1, "steps": 6}))
    done = project.trainer("verify-resume", "slow.yaml", "--kills", "3", "--json")
    (home,) = (project.root / "runs").glob("rft.verify-*")
    return done, home


def test_killed_rft_run_is_equal_and_the_certificate_says_what_was_paid_twice(rft: tuple[Done, Path]) -> None:
    done, home = rft
    assert done.code == 0, done.said
    certificate = json.loads(done.stdout)
    assert certificate == json.loads((home / "certificate.json").read_text())
    assert certificate["equal"] is True
    assert [kill["phase"] for kill in certificate["kills"]] == ["saving", "sampling", "training"]
    assert certificate["attempts"] == {"whole": 1, "interrupted": 4}
    assert certificate["steps"] == 6
    assert 0 < certificate["tokens_sampled_twice"] < certificate["tokens_sampled"]
    assert set(certificate["weights"]) == {
        "adapter/adapter_model.safetensors", "adapter-best/adapter_model.safetensors",
    }  # fmt: skip
    assert certificate["environment"]["threads"] == 1
    assert "torch" in certificate["environment"]["versions"]


def test_asked_to_stop_and_shown_as_a_table(project: Project) -> None:
    recipe = project.recipe("long.yaml", **{**LONG, **NO_EVALUATION})
    done = project.trainer("verify-resume", recipe, "--kills", "1", "--steps", "40", "--signal", "TERM", "--seed", "3")
    assert done.code == 0, done.said
    assert "verdict" in done.stdout
    assert "SIGTERM at step" in done.stdout
    assert "0 steps were repeated" in done.stdout
    assert "40 steps, to the bit" in done.stdout


def test_too_many_kills_are_refused(project: Project) -> None:
    done = project.trainer("verify-resume", "rft.yaml", "--kills", "5")
    assert (done.code, done.stdout) == (2, "")
    assert "the run has 5 steps" in done.stderr


class TestUnequal:
    """The same pair of runs, changed by hand."""

    @pytest.fixture
    def pair(self, rft: tuple[Done, Path], tmp_path: Path) -> tuple[RunDir, RunDir]:
        shutil.copytree(rft[1], tmp_path, dirs_exist_ok=True)
        return RunDir(tmp_path / "whole"), RunDir(tmp_path / "interrupted")

    def test_a_metric(self, pair: tuple[RunDir, RunDir]) -> None:
        lines = pair[1].metrics_file.read_text().splitlines()
        record = json.loads(lines[3])
        value = record["train/loss"]
        lines[3] = json.dumps(record | {"train/loss": value + 1e-9})
        pair[1].metrics_file.write_text("\n".join(lines) + "\n")
        found = compare_runs(*pair)
        assert found["problems"] == [f"step 3: train/loss is {value + 1e-9} and was {value} (1 differ)"]
        assert compare_runs(*pair, tolerance=1e-6)["equal"], "within a tolerance it is equal"

    def test_a_missing_and_a_double_step(self, pair: tuple[RunDir, RunDir]) -> None:
        lines = pair[1].metrics_file.read_text().splitlines()
        pair[1].metrics_file.write_text("\n".join([*lines[:3], lines[2], *lines[4:]]) + "\n")
        assert compare_runs(*pair)["problems"] == ["steps: 7 records instead of 7; twice: [2], missing: [3]"]

    def test_the_weights(self, pair: tuple[RunDir, RunDir]) -> None:
        file = pair[1].root / "adapter" / "adapter_model.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        assert compare_runs(*pair)["problems"] == ["weights differ: adapter/adapter_model.safetensors"]

    def test_other_threads_are_not_compared(self, pair: tuple[RunDir, RunDir]) -> None:
        file = pair[1].attempts_file
        file.write_text(file.read_text().replace('"threads": 1', '"threads": 2'))
        with pytest.raises(LaunchError, match="different conditions, which give other bits: threads: 1 and 2"):
            compare_runs(*pair)
