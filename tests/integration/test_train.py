"""`trainer train` from a recipe to an adapter that plain PEFT loads."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from project import BIN, Done, Project

PLAIN_LOSS = Path(__file__).with_name("plain_loss.py")


@pytest.fixture(scope="module")
def first(shared: Project) -> Done:
    """The run that most tests inspect: six steps, evaluated and saved at every second step."""
    return shared.trainer("train", "recipe.yaml", "--name", "first")


@pytest.fixture(scope="module")
def full(shared: Project) -> Done:
    """A run that trains every parameter."""
    return shared.worker(shared.recipe("full.yaml", name="full", lora=None, optimizer__learning_rate=1e-4))


@pytest.fixture(scope="module")
def merged(shared: Project, first: Done) -> Done:
    """The first run's adapter, merged."""
    assert first.code == 0, first.said
    return shared.trainer("export", "first", "--merge", "--out", "merged")


@pytest.fixture(scope="module")
def plain_losses(shared: Project, first: Done, full: Done, merged: Done) -> dict[str, float]:
    """Held-out losses by transformers and PEFT in a process that cannot import this package."""
    assert (first.code, full.code, merged.code) == (0, 0, 0), first.said + full.said + merged.said
    models = ["model+runs/first/adapter", "model+runs/first/adapter-best", "runs/full/model", "merged", "model"]
    done = shared.start([sys.executable, "-I", str(PLAIN_LOSS), "eval.jsonl", *models]).wait()
    assert done.code == 0, done.said
    return dict(json.loads(done.stdout))


def test_training_prints_the_adapter_and_nothing_else_on_stdout(first: Done) -> None:
    assert first.code == 0, first.said
    assert first.stdout == "runs/first/adapter\n"
    assert "Traceback" not in first.stderr


def test_every_step_is_logged_once(shared: Project, first: Done) -> None:
    records = shared.run("first").metrics()
    assert [record["step"] for record in records] == [0, 1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in records if "eval/loss" in record] == [0, 2, 4, 6]
    assert set(records[-1]) >= {
        "train/loss", "train/grad_norm", "train/learning_rate", "train/tokens", "train/updates", "perf/tokens_per_s",
        "perf/step_s", "perf/peak_gib",
    }  # fmt: skip
    assert [record["step"] for record in records if "perf/save_s" in record] == [3, 5]  # the step after a save


def test_run_directory_is_as_the_contract_says(shared: Project, first: Done) -> None:
    run = shared.run("first")
    assert {path.name for path in run.root.iterdir()} >= {
        "plan.json", "attempts.jsonl", "lock", "heartbeat.json", "metrics.jsonl", "checkpoints", "adapter",
        "adapter-best", "outcome.json", "logs",
    }  # fmt: skip
    assert not list(run.root.rglob("*.tmp")), "no unfinished file is left"
    assert run.outcome()["state"] == "finished"
    assert run.outcome()["step"] == 6
    (attempt,) = run.attempts()
    assert (attempt["attempt"], attempt["shape"], attempt["ranks"], attempt["threads"]) == (1, "cpu", 1, 1)
    manifest = json.loads((run.newest_checkpoint() / "manifest.json").read_text())
    assert manifest["step"] == 6
    assert set(manifest["files"]) == {".metadata", "__0_0.distcp"}


def test_loss_falls(shared: Project, first: Done) -> None:
    losses = [record["eval/loss"] for record in shared.run("first").metrics() if "eval/loss" in record]
    assert losses == sorted(losses, reverse=True)


def test_plain_accelerate_launch_gives_the_same_bits(shared: Project, first: Done) -> None:
    argv = [str(BIN / "accelerate"), "launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
    argv += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "trainer.worker", "recipe.yaml"]
    done = shared.start([*argv, "--name", "plain"]).wait()
    assert done.code == 0, done.said
    ours, theirs = shared.run("first"), shared.run("plain")
    assert theirs.values() == ours.values()
    assert theirs.adapter() == ours.adapter()


def test_finished_run_is_left_alone(shared: Project, first: Done) -> None:
    root = shared.run("first").root
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    done = shared.trainer("train", "recipe.yaml", "--name", "first")
    assert (done.code, done.stdout) == (0, "runs/first/adapter\n")
    assert "is finished" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()} == before


def test_another_identity_in_the_same_directory_is_refused(shared: Project, first: Done) -> None:
    done = shared.trainer(
        "train", "recipe.yaml", "--name", "first", "--set", "seed=7", "--set", "optimizer.learning_rate=0.02"
    )
    assert done.code == 2
    assert "seed: 0 -> 7" in done.stderr
    assert "optimizer.learning_rate: 0.01 -> 0.02" in done.stderr
    assert shared.run("first").outcome()["state"] == "finished"


def test_raising_steps_goes_on(shared: Project, first: Done) -> None:
    shutil.copytree(shared.run("first").root, shared.run("longer").root)
    done = shared.trainer("train", "recipe.yaml", "--name", "longer", "--set", "steps=9")
    assert done.code == 0, done.said
    run = shared.run("longer")
    assert run.steps() == list(range(10))
    assert run.values()[:7] == shared.run("first").values()
    assert [attempt["steps"] for attempt in run.attempts()] == [6, 9]
    assert "resumed runs/longer at step 6 of 9" in run.log()


def test_full_parameter_run_writes_a_model(shared: Project, full: Done) -> None:
    assert full.code == 0, full.said
    run = shared.run("full")
    assert run.steps() == [0, 1, 2, 3, 4, 5, 6]
    assert (run.root / "model" / "model.safetensors").is_file()
    assert (run.root / "model-best" / "model.safetensors").is_file()
    assert not (run.root / "adapter").exists()


def test_adapter_gives_the_same_loss_in_plain_peft(shared: Project, plain_losses: dict[str, float]) -> None:
    records = shared.run("first").metrics()
    assert plain_losses["model+runs/first/adapter"] == pytest.approx(records[6]["eval/loss"], abs=1e-3)
    assert plain_losses["model"] == pytest.approx(records[0]["eval/loss"], abs=1e-3)


def test_best_adapter_is_of_the_step_that_the_metrics_say(shared: Project, plain_losses: dict[str, float]) -> None:
    best = min(record["eval/loss"] for record in shared.run("first").metrics() if "eval/loss" in record)
    assert plain_losses["model+runs/first/adapter-best"] == pytest.approx(best, abs=1e-3)


def test_full_model_gives_the_same_loss_in_plain_transformers(shared: Project, plain_losses: dict[str, float]) -> None:
    records = shared.run("full").metrics()
    assert records[6]["eval/loss"] < records[0]["eval/loss"]
    assert plain_losses["runs/full/model"] == pytest.approx(records[6]["eval/loss"], abs=1e-3)


def test_merged_export_is_verified_and_is_the_adapter(merged: Done, plain_losses: dict[str, float]) -> None:
    assert merged.stdout == "merged\n"
    assert "verified on 4 held-out rows" in merged.stderr
    assert plain_losses["merged"] == pytest.approx(plain_losses["model+runs/first/adapter"], abs=1e-3)
    assert plain_losses["merged"] != pytest.approx(plain_losses["model"], abs=1e-2)


def test_best_is_kept_when_later_steps_are_worse(shared: Project) -> None:
    """At too high a learning rate an early step is the best; its weights and its checkpoint are kept."""
    changes = {"optimizer__learning_rate": 0.1, "eval_interval": 1, "dcp_save_interval": 1, "keep_last": 1}
    file = shared.recipe("ruin.yaml", name="ruin", logging__wandb="offline", **changes)
    done = shared.worker(file, "--set", "steps=4", "--set", "optimizer.schedule=constant")
    assert done.code == 0, done.said
    run = shared.run("ruin")
    losses = {record["step"]: record["eval/loss"] for record in run.metrics()}
    best = min(losses, key=losses.__getitem__)
    assert 0 < best < 4, losses
    assert run.checkpoints() == [best, 4]
    assert run.adapter("adapter-best") != run.adapter()
    assert f"best {losses[best]:.4f} at step {best}" in run.outcome()["message"]


def test_wandb_offline_keeps_one_id_over_a_resume(shared: Project) -> None:
    """Continues the run above, which logs to W&B."""
    run = shared.run("ruin")
    identifier = json.loads((run.root / "wandb.json").read_text())["id"]
    done = shared.worker("ruin.yaml", "--set", "steps=6", "--set", "optimizer.schedule=constant")
    assert done.code == 0, done.said
    tracked = json.loads((run.root / "wandb.json").read_text())
    assert (tracked["id"], tracked["step"], tracked["online_step"]) == (identifier, 6, -1)
    wandb_runs = [path.name for path in (run.root / "wandb").glob("offline-run-*")]
    assert len(wandb_runs) == 2
    assert all(name.endswith(f"-{identifier}") for name in wandb_runs)
    assert run.steps() == [0, 1, 2, 3, 4, 5, 6]
