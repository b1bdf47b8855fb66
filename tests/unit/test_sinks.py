"""Copies of the metrics for TensorBoard, trackio and MLflow, with the real packages: each step once, after any kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_recipe import SFT, write_small

from trainer.commands.cli import main
from trainer.config import semantics
from trainer.config.load import load_recipe
from trainer.config.recipe import LoggingSettings
from trainer.planning.plan import make_plan
from trainer.report.run_report import RunReporter, Standing
from trainer.run.directory import RunDir
from trainer.run.find import open_run
from trainer.run.sinks import Sinks, sinks_file, wanted_sinks

CHILD = """
import json, os, signal, sys
from pathlib import Path
from trainer.config.recipe import LoggingSettings
from trainer.run.directory import RunDir
from trainer.run.sinks import Sinks
name, first, last, offset = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
record = lambda step: {"step": step, "time": 100.0 + step, "train/loss": step + offset, "train/skipped_rows": ["a:1"]}
logging = LoggingSettings(wandb_project="mine", mlflow=f"sqlite:///{Path.cwd()}/mlflow.db")
sinks = Sinks(RunDir(Path("runs/small")), [name], logging, lambda text: sys.exit(text))
sinks.rebuild([record(step) for step in range(first)])
for step in range(first, last):
    sinks.add(record(step))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    return open_run(make_plan(load_recipe(write_small(tmp_path, SFT))))


def of_tensorboard(run: RunDir) -> list[tuple[int, float]]:
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    (file,) = run.tensorboard.iterdir()
    events = [event for event in loader.LegacyEventFileLoader(str(file)).Load() if event.HasField("summary")]
    assert {value.tag for event in events for value in event.summary.value} == {"train/loss"}
    assert [event.wall_time for event in events] == [100.0 + event.step for event in events]
    return [(event.step, event.summary.value[0].simple_value) for event in events]


def of_trackio(run: RunDir) -> list[tuple[int, float]]:
    storage = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage
    return [(row["step"], row["train/loss"]) for row in storage.get_logs("mine", run.name)]


def of_mlflow(run: RunDir) -> list[tuple[int, float]]:
    client = pytest.importorskip("mlflow").MlflowClient(tracking_uri=f"sqlite:///{Path.cwd()}/mlflow.db")
    experiment = client.get_experiment_by_name("mine").experiment_id
    (found,) = client.search_runs([experiment])
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert [each.timestamp for each in history] == [1000 * (100 + each.step) for each in history]
    return [(each.step, each.value) for each in history]


READERS: dict[str, Callable[[RunDir], list[tuple[int, float]]]] = {
    "tensorboard": of_tensorboard,
    "trackio": of_trackio,
    "mlflow": of_mlflow,
}


NAMES = ["tensorboard", "trackio", pytest.param("mlflow", marks=pytest.mark.heavy)]
"""Making MLflow's database takes 10 seconds."""


@pytest.mark.parametrize("name", NAMES)
def test_each_step_is_there_once_after_kills(run: RunDir, name: str) -> None:
    pytest.importorskip(name)
    for first, last, offset in ((0, 5, 0.0), (3, 6, 0.5), (5, 8, 0.25)):  # the second begins at a checkpoint of step 2
        argv = [sys.executable, "-c", CHILD, name, str(first), str(last), str(offset)]
        done = subprocess.run(argv, env=os.environ, capture_output=True, text=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert READERS[name](run) == [(step, step + 0.25) for step in range(8)]


@pytest.mark.parametrize("name", NAMES)
def test_sync_builds_a_sink_again(run: RunDir, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip(name)
    records: list[dict[str, Any]] = [{"step": step, "time": 100.0 + step, "train/loss": step / 4} for step in range(3)]
    run.metrics_file.write_text("".join(json.dumps(record) + "\n" for record in records))
    run.write_plan(
        make_plan(
            load_recipe(
                Path("recipe.yaml"), ["logging.wandb_project=mine", f"logging.mlflow=sqlite:///{Path.cwd()}/mlflow.db"]
            )
        )
    )
    for _ in range(2):
        assert main(["sync", "small", "--to", name]) == 0
    assert "3 records of runs/small are in" in capsys.readouterr().err
    assert READERS[name](run) == [(0, 0.0), (1, 0.25), (2, 0.5)]


def test_missing_package_is_said_and_training_goes_on(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("trackio", "trackio.sqlite_storage"):
        monkeypatch.setitem(sys.modules, module, None)  # as where it is not installed
    said: list[str] = []
    sinks = Sinks(run, ["trackio"], LoggingSettings(), said.append)
    sinks.rebuild([])
    sinks.add({"step": 1, "time": 1.0, "train/loss": 1.0})
    sinks.close(0)
    assert len(said) == 1
    assert "pip install 'tunesmith[trackio]'" in said[0]
    assert "trainer sync runs/small --to trackio" in said[0]


def test_a_sink_that_fails_is_left_out_and_said_once(run: RunDir) -> None:
    pytest.importorskip("tensorboard")
    run.tensorboard.write_text("a file where the directory should be")
    said: list[str] = []
    sinks = Sinks(run, ["tensorboard"], LoggingSettings(), said.append)
    sinks.rebuild([])
    sinks.add({"step": 1, "time": 1.0, "train/loss": 1.0})
    assert len(said) == 1
    assert list(sinks.problems) == ["tensorboard"]


def test_a_lost_tracker_is_named_by_status_runs_and_report_until_it_works_again(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard")
    record = {"step": 4, "time": 1.0, "train/loss": 1.0}
    run.metrics_file.write_text(json.dumps(record) + "\n")
    sinks = Sinks(run, ["tensorboard"], LoggingSettings(), lambda _: None)
    sinks.rebuild([record])
    shutil.rmtree(run.tensorboard)
    run.tensorboard.write_text("a full disk, or a directory that was taken away")
    sinks._sinks["tensorboard"].close(0)  # what the package's own thread finds out sooner or later
    sinks.add({**record, "step": 5})
    reasons = json.loads(sinks_file(run).read_text())
    assert reasons["tensorboard"].startswith("after step 4: ")
    assert shown(capsys, "status", "small").count("tensorboard receives nothing more (after step 4: ") == 1
    assert json.loads(shown(capsys, "status", "small", "--json"))["trackers"] == reasons
    assert shown(capsys, "runs").rstrip().endswith("lost: tensorboard")
    (note,) = [note for note in RunReporter(run, lambda _: Standing("failed", False)).read().notes if "tensor" in note]
    assert note.endswith("trainer sync runs/small --to tensorboard copies all.")
    Sinks(run, ["trackio"], LoggingSettings(), lambda _: None)
    assert json.loads(sinks_file(run).read_text())["tensorboard"] == reasons["tensorboard"]  # it is still lost
    run.tensorboard.unlink()
    assert main(["sync", "small", "--to", "tensorboard"]) == 0
    assert "tensorboard" not in shown(capsys, "status", "small")


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main([*arguments]) == 0
    return capsys.readouterr().out


def test_a_recipe_asks_for_sinks(run: RunDir) -> None:
    recipe = load_recipe(Path("recipe.yaml"), ["logging.trackio=true", "logging.mlflow=http://127.0.0.1:5000"]).recipe
    assert wanted_sinks(recipe.logging) == ["trackio", "mlflow"]


def test_check_warns_of_a_missing_package_with_its_line(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(semantics, "find_spec", lambda name: None)
    write_small(Path.cwd(), SFT + "logging:\n  tensorboard: true\n")
    assert main(["check", "recipe.yaml"]) == 0
    assert (
        "recipe.yaml:20: logging.tensorboard: the package is missing here, so nothing is copied; "
        "pip install 'tunesmith[tensorboard]'"
    ) in capsys.readouterr().err
