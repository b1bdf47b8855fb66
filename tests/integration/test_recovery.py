"""Ends of an attempt from within: non-finite numbers, an overrun grace period, a worker that hangs."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from project import Project, Run, Running, is_at_step, wait_for
from rft_project import NO_EVALUATION, RECIPE, journal, prepare
from safetensors.torch import load_file, save_file

from trainer.run.protocol import STACKS_SIGNAL

SFT: dict[str, Any] = {
    "eval_interval": 0, "data__eval": None, "steps": 12, "dcp_save_interval": 4, "model__path": "poisoned",
    "recovery__max_bad_steps": 2,
}  # fmt: skip
HOT: dict[str, Any] = {"dcp_save_interval": 1, "optimizer__learning_rate": 1e30, "model__path": "model"}
BAD_LINES = (5, 17)


@pytest.fixture(scope="module")
def project(shared: Project) -> Project:
    """Two rows contain a letter whose embedding is NaN."""
    prepare(shared)
    shutil.copytree(shared.root / "model", shared.root / "poisoned")
    tokens = json.loads((shared.root / "model" / "tokenizer.json").read_text())["model"]["vocab"]
    weights = shared.root / "poisoned" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.embed_tokens.weight"][tokens["~"]] = torch.nan
    save_file(tensors, weights, {"format": "pt"})
    lines = (shared.root / "train.jsonl").read_text().splitlines()
    for number in BAD_LINES:
        lines[number - 1] = lines[number - 1].replace("what", "~what")
    (shared.root / "poisoned.jsonl").write_text("\n".join(lines) + "\n")
    return shared


class TestNumbersThatBreak:
    @pytest.fixture(scope="class")
    def run(self, project: Project) -> Run:
        recipe = project.recipe("bad.yaml", name="bad", data__train="poisoned.jsonl", **SFT)
        done = project.worker(recipe)
        assert done.code == 0, done.said
        assert "their updates were skipped. Rows: poisoned.jsonl:17, poisoned.jsonl:5. Returning" in done.stderr
        return project.run("bad")

    def test_rows_are_named_and_left_out_once_too_many_updates_were_skipped(self, run: Run) -> None:
        assert set(json.loads((run.root / "excluded.json").read_text())["rows"]) == {
            f"poisoned.jsonl:{number}" for number in BAD_LINES
        }
        assert run.steps() == list(range(1, 13))
        skipped = [record for record in run.values() if "train/skipped" in record]
        assert [record["step"] for record in skipped] == [1], "the second skipped step was repeated without its row"
        assert skipped[0]["train/skipped_rows"] == ["poisoned.jsonl:17"] or skipped[0]["train/skipped_rows"] == [
            "poisoned.jsonl:5"
        ]
        assert "train/loss" not in skipped[0]
        assert run.outcome()["state"] == "finished"

    def test_killed_after_that_it_ends_with_the_same_bits(self, project: Project, run: Run) -> None:
        copy = project.run("bad_again")
        decided = json.loads((run.root / "excluded.json").read_text())["decided_at_step"]
        started = project.start_worker("bad.yaml", "--name", "bad_again")
        wait_for(lambda: (copy.root / "excluded.json").exists() and copy.steps()[-1] > decided, started, poll_s=0.001)
        project.kill_all()
        done = project.worker("bad.yaml", "--name", "bad_again")
        assert done.code == 0, done.said
        assert copy.values() == run.values()
        assert copy.adapter() == run.adapter()

    def test_a_run_that_breaks_on_every_row_stops_and_says_what_to_do(self, project: Project) -> None:
        recipe = project.recipe("hot.yaml", name="hot", **SFT | HOT)
        done = project.trainer("train", recipe)
        assert done.code == 1, done.said
        assert "Rows were excluded once already. Lower optimizer.learning_rate, or correct the rows." in done.stderr
        assert "restart" not in done.stderr
        assert project.run("hot").outcome()["state"] == "failed"


class TestGracePeriod:
    def test_a_step_longer_than_the_grace_period_is_abandoned_and_the_one_before_saved(self, project: Project) -> None:
        """Each micro-batch is one row, and the step has thousands."""
        shape = {
            "name": "narrow", "device": "cpu", "device_name": "CPU", "gpus": 0, "gpu_memory_gib": 16,
            "micro_batch_tokens": 16, "accelerate": "cpu",
            "limits": {"lora": {"max_params_b": 1, "max_seq_tokens": 4096, "basis": "estimated"}},
        }  # fmt: skip
        (project.root / "narrow.yaml").write_text(json.dumps(shape))
        recipe = project.recipe(
            "wide.yaml", name="wide", shape="narrow.yaml", steps=3, rows_per_step=20_000, eval_interval=0,
            data__eval=None, recovery__grace_period_s=3,
        )  # fmt: skip
        run = project.run("wide")
        started = project.start_worker(recipe)
        wait_for(lambda: phase(run) == "training", started)
        started.signal(signal.SIGTERM)
        started.signal(signal.SIGTERM)  # a second one is normal
        done = started.wait(60)
        assert done.code == 75, done.said
        assert "the step begun is abandoned; the state of step 0 of 3 is saved" in run.outcome()["message"]
        assert run.checkpoints() == [0]

    def test_when_it_runs_out_the_worker_exits_with_the_last_checkpoint_intact(self, project: Project) -> None:
        run, started = blocked(project, "overdue", recovery__grace_period_s=2)
        # A signal that comes before the worker opens the FIFO would be seen at the end of the step, and saved.
        wait_for(lambda: "in write_chunk" in stacks(run, started), started)
        started.signal(signal.SIGTERM)
        done = started.wait(60)
        assert done.code == 75, done.said
        assert "the grace period of 2 s ran out" in run.outcome()["message"]
        assert run.outcome()["state"] == "preempted"
        assert run.checkpoints() == [2]


def test_a_worker_that_hangs_shows_its_stacks_and_is_started_again(project: Project) -> None:
    whole = project.worker("rft.yaml", "--name", "calm", "--set", "data.eval=null", "--set", "eval_interval=0")
    assert whole.code == 0, whole.said
    run, started = blocked(project, "hung", supervised=True, recovery__hang_timeout_s=4)
    done = started.wait()
    assert done.code == 0, done.said
    assert "hung while training after step 3; the stacks of all ranks are in the log" in done.stderr
    first_log = (run.root / "logs" / "attempt-1.log").read_text()
    assert "rank 0 has not moved for 4 s while training" in first_log
    assert "in write_atomically" in first_log
    assert "in write_chunk" in first_log
    assert len(run.attempts()) == 2
    assert run.values() == project.run("calm").values()
    assert run.adapter() == project.run("calm").adapter()


def test_a_stopped_process_is_ended_by_the_supervisor(project: Project) -> None:
    """SIGSTOP stops the watchdog thread too."""
    recipe = project.recipe("stopped.yaml", name="stopped", recovery__hang_timeout_s=3, steps=2000, dcp_save_interval=5)
    started = project.start_trainer("train", recipe)
    run = project.run("stopped")
    wait_for(is_at_step(run, 12), started)
    psutil.Process(run.worker_pid()).suspend()
    wait_for(lambda: "no heartbeat for" in started.err.read_text(), started)
    wait_for(lambda: (run.root / "fence" / "000002").exists(), started)
    started.signal(signal.SIGTERM)
    assert started.wait().code == 75


def phase(run: Run) -> str:
    try:
        return str(json.loads((run.root / "heartbeat.json").read_text())["phase"])
    except FileNotFoundError:
        return ""


def stacks(run: Run, started: Running) -> str:
    """The stacks of the worker's threads, which it writes to stderr when it is asked to.

    One request at a time: while one is pending, the kernel gives a further signal to another thread, and a main thread
    that waits in a system call would not notice it.
    """
    before = len(started.err.read_text())
    os.kill(run.worker_pid(), STACKS_SIGNAL)

    def written() -> str:
        text = started.err.read_text()[before:]
        return text if "in _run_module_as_main" in text else ""  # the outermost frame of the main thread

    return wait_for(written, started)


def blocked(project: Project, name: str, *, supervised: bool = False, **changes: Any) -> tuple[Run, Running]:
    """A run whose worker blocks on its file system: the next journal file is a FIFO without a reader."""
    recipe = project.recipe(
        f"{name}.yaml", **{**RECIPE, **NO_EVALUATION, "dcp_save_interval": 2, **changes, "name": name}
    )
    run = project.run(name)
    start = project.start_trainer if supervised else project.start_worker
    started = start(*(["train"] if supervised else []), recipe)
    wait_for(lambda: (run.root / "heartbeat.json").exists(), started)
    pid = run.worker_pid()
    step: Path = run.root / "rollouts" / "step-000003"
    step.mkdir(parents=True)
    for number in range(6):
        os.mkfifo(step / f".chunk-{number:04d}.jsonl.{pid}.tmp")
    wait_for(lambda: run.steps()[-1:] == [3], started)
    assert not journal(run, 3)
    return run, started
