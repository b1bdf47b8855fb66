"""Weights & Biases: one run for all attempts, what a loss leaves behind, `trainer sync`. The real client, offline."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from small_recipe import SFT, write_small
from wandb.proto import wandb_internal_pb2

from trainer.commands.cli import main
from trainer.config.load import load_recipe
from trainer.planning.plan import Plan, make_plan
from trainer.run.directory import RunDir
from trainer.run.find import open_run
from trainer.run.polling import wait_until
from trainer.run.tracker import Tracker, TrackerState, read_tracker, tracker_mode

BLOCK: Final = 2**15


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    run = open_run(plan())
    run.metrics_file.write_text("".join(json.dumps(record) + "\n" for record in records(4)))
    return run


def plan() -> Plan:
    return make_plan(load_recipe(write_small(Path(), SFT + "logging:\n  wandb: online\n")))


def records(number: int) -> list[dict[str, Any]]:
    return [{"step": step, "time": 1.0, "train/loss": 1 / (step + 1)} for step in range(number)]


def transactions(file: Path) -> Iterator[bytes]:
    """The messages of a .wandb file: a LevelDB log of 32 KiB blocks, behind a header of 7 bytes."""
    data, position, message = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = BLOCK - position % BLOCK
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack("<HB", data[position + 4 : position + 7])
        message += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in {1, 4}:  # whole, or its last part
            yield message
            message = b""


def logged_steps(run: RunDir) -> list[list[int]]:
    """Steps that each session of the client has written, the oldest first."""
    sessions = []
    for file in sorted(run.root.glob("wandb/offline-run-*/run-*.wandb"), key=lambda each: each.stat().st_mtime_ns):
        steps = []
        for message in transactions(file):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(message)
            if record.WhichOneof("record_type") == "history":
                steps.append(record.history.step.num)
        sessions.append(steps)
    return sessions


@pytest.mark.parametrize(
    ("wanted", "variable", "mode"),
    [
        ("online", "", "online"),
        ("online", "offline", "offline"),
        ("online", "disabled", None),
        ("offline", "online", "offline"),
        ("offline", "", "offline"),
        ("off", "online", None),
    ],
)
def test_wandb_mode_is_honoured(wanted: Any, variable: str, mode: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", variable)
    monkeypatch.delenv("WANDB_DISABLED", raising=False)
    assert tracker_mode(wanted) == mode


def test_next_attempt_sends_what_is_missing_and_sync_sends_all(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    first = Tracker(run, plan(), "offline", said.append)
    first.send(0, {"train/loss": 1.0})
    first.send(1, {"train/loss": 0.5})
    first.close(1)
    second = Tracker(run, plan(), "offline", said.append)
    second.catch_up(records(4))
    second.send(4, {"train/loss": 0.2})
    second.close(0)
    state = read_tracker(run)
    assert state is not None
    assert (state.step, state.online_step, state.problem) == (4, -1, None)
    assert first.state.id == second.state.id
    # The client's background process may still be writing when `finish` returns.
    assert wait_until(lambda: logged_steps(run) == [[0, 1], [2, 3, 4]], timeout_s=30, poll_s=0.1), logged_steps(run)

    monkeypatch.setenv("WANDB_MODE", "offline")  # as the upload, into a file
    assert main(["sync", "small"]) == 0
    assert f"4 records of runs/small are in W&B run {state.id} (offline)" in capsys.readouterr().err
    assert wait_until(lambda: logged_steps(run)[-1] == [0, 1, 2, 3], timeout_s=30, poll_s=0.1), logged_steps(run)
    assert not said


def test_loss_is_said_and_shown_by_status(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a key the client refuses to go online."""
    said: list[str] = []
    tracker = Tracker(run, plan(), "online", said.append)
    tracker.send(4, {"train/loss": 0.2})
    tracker.close(0)
    assert len(said) == 1
    assert said[0].startswith("warning: W&B is lost after step -1 (")
    assert main(["status", "small"]) == 0
    out = capsys.readouterr().out
    assert "W&B is lost after step -1" in out
    assert "`trainer sync runs/small` sends what is missing" in out
    assert main(["sync", "small"]) == 1


def test_copy_gets_an_id_of_its_own_and_a_moved_run_keeps_its_id(run: RunDir) -> None:
    run.tracker_file.write_text(json.dumps({"id": "first", "step": 3, "root": str(run.root.resolve())}))
    copy = RunDir(run.root.with_name("copy"))
    copy.root.mkdir()
    copy.tracker_file.write_bytes(run.tracker_file.read_bytes())
    own = Tracker(copy, plan(), "offline", print)
    own.close(0)
    assert own.state.id != "first"
    assert own.state.step == -1
    moved = RunDir(run.root.rename(run.root.with_name("moved")))
    kept = Tracker(moved, plan(), "offline", print)
    kept.close(0)
    assert (kept.state.id, kept.state.step) == ("first", 3)


def test_state_of_an_earlier_version_is_read(run: RunDir) -> None:
    run.tracker_file.write_text('{"id": "4f1c", "step": 5}')
    assert read_tracker(run) == TrackerState("4f1c", 5)
