"""A run survives every fault, at every point of its file operations, and ends with the bits of an undisturbed one."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import psutil
import pytest
from chaos_runs import (
    Chaos,
    Fault,
    Report,
    Row,
    chaos,
    differences,
    fired,
    is_stopped,
    read_events,
    settings,
    table,
)
from project import BIN, Project, Run, Running, wait_for

SEED: Final = 11
ROLLBACK: Final = [("excluded half", 1), ("excluded renamed", 1), ("rewind half", 1), ("rewind renamed", 1)]
SAVING: Final = [
    ("shard written", 2), ("manifest half", 2), ("manifest renamed", 2), ("target removed", 2), ("before rename", 2),
    ("renamed", 2), ("committed", 2), ("metrics half", 3), ("metrics synced", 3), ("best retired", 1),
    ("best renamed", 1),
]  # fmt: skip
ENDING: Final = [("outcome half", 1), ("outcome renamed", 1)]
JOURNAL: Final = [
    ("committed", 1), ("metrics synced", 1), ("chunk half", 6), ("chunk renamed", 6), ("chunk synced", 6),
    ("renamed", 1),
]  # fmt: skip
"""Steps have four chunks. The first: a cut before anything but the checkpoint's own fsyncs could keep it."""
MUTANTS: Final = {
    "metrics not fsynced": ([Fault("committed", "cut", 4)], "differ"),  # lost records are rebuilt in part
    "checkpoint not fsynced before its rename": ([Fault("committed", "cut", 4)], "steps lost"),
    "directory not fsynced after the rename": ([Fault("committed", "cut", 4)], "steps lost"),
    "manifest trusted": ([Fault("metrics synced", "kill", 16, "damage")], "differ"),
}
ASLEEP: Final = Fault("metrics synced", "stop", 15)
MIB: Final = 2**20


@pytest.fixture(scope="module")
def it(shared: Project) -> Iterator[Chaos]:
    with chaos(shared) as found:
        yield found


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """The table, filled by the tests and printed by the last one."""
    return []


def assert_survived(report: Report, rows: list[Row]) -> None:
    rows += report.rows
    assert not report.problems, f"{report.problems}\n{table(report.rows)}"
    assert not report.missed


@pytest.mark.parametrize("action", ["kill", "cut", "torn"])
def test_at_every_point_of_sft(it: Chaos, rows: list[Row], action: str) -> None:
    faults = [Fault(point, action, nth) for point, nth in [*ROLLBACK, *SAVING, *ENDING]]
    assert_survived(it.survive(f"sft-{action}", "sft", faults, seed=SEED), rows)


@pytest.mark.parametrize("action", ["kill", "cut", "torn"])
def test_at_every_point_of_the_journal(it: Chaos, rows: list[Row], action: str) -> None:
    faults = [Fault(point, action, nth) for point, nth in JOURNAL]
    assert_survived(it.survive(f"rft-{action}", "rft", faults, seed=SEED), rows)


@pytest.mark.parametrize("kind", ["sft", "rft"])
def test_anywhere(it: Chaos, rows: list[Row], kind: str) -> None:
    moments = random.Random(f"{kind}:{SEED}")
    actions = ["kill", "cut", "torn", "kill", "cut", "torn"]
    faults = [Fault("anywhere", action, moments.randint(1, 60)) for action in actions]
    assert_survived(it.survive(f"{kind}-anywhere", kind, faults, seed=SEED), rows)


def test_damaged_checkpoint_and_a_clock_that_jumps(it: Chaos, rows: list[Row]) -> None:
    """Forward by a day within an attempt, and back by an hour in the next."""
    faults = [
        Fault("metrics synced", "clock:86400", 3), Fault("metrics synced", "kill", 14, "damage"),
        Fault("metrics synced", "clock:-3600", 3), Fault("committed", "kill", 3, "damage"),
    ]  # fmt: skip
    assert_survived(it.survive("damaged", "sft", faults), rows)
    assert len(list((it.project.run("damaged").root / "checkpoints").glob("*.broken-*"))) == 2


def test_processes_that_vanish(it: Chaos, rows: list[Row]) -> None:
    """Under `trainer train`: worker, launcher and supervisor are killed one by one; then a SIGTERM."""
    faults = [Fault("metrics synced", "clock:-3600", 2)] + [Fault("metrics synced", "stop", 3)] * 4
    state = it.prepare("vanish", faults)
    names = [
        "clock back by an hour, supervised",
        "worker killed",
        "launcher killed",
        "supervisor killed",
        "SIGTERM",
    ]

    def start() -> Running:
        return it.project.start([str(BIN / "trainer"), "train", "sft.yaml", "--name", "vanish"], settings(state))

    def stopped(number: int) -> psutil.Process:
        wait_for(lambda: fired(state) >= number, running)
        pid = read_events(state)[-1]["pid"]
        wait_for(is_stopped(pid))
        return psutil.Process(pid)

    running = start()
    worker = stopped(2)
    second = it.zygote.start(it.prepare("second", [], run=it.project.run("vanish").root), "runs/vanish")
    assert second.wait() == 2
    assert "runs/vanish: another attempt is running" in second.err.read_text()
    time.sleep(0.5)
    assert "no heartbeat for" not in running.err.read_text(), "its heartbeat is an hour old, but new"
    worker.kill()
    worker = stopped(3)
    launcher = worker.parent()
    assert launcher is not None
    assert launcher.pid != running.process.pid
    launcher.kill()
    worker.resume()
    worker = stopped(4)
    running.signal(signal.SIGKILL)
    time.sleep(1.1)  # the worker looks every second whether its supervisor lives, and so as soon as it goes on
    worker.resume()
    psutil.wait_procs([worker], 60)
    run = it.project.run("vanish")
    assert run.outcome()["state"] == "preempted"
    running = start()
    worker = stopped(5)
    running.signal(signal.SIGTERM)
    worker.resume()
    done = running.wait()
    assert done.code == 75, done.said
    assert run.checkpoints()[-1] == run.steps()[-1], "saved"
    done = start().wait()
    assert done.code == 0, done.said
    report = it.report("vanish", "sft", faults)
    for row, name in zip(report.rows, names, strict=True):
        row.fault = name
    assert {row.attempts for row in report.rows} == {4}
    assert_survived(report, rows)


@pytest.mark.parametrize("asleep", [ASLEEP, Fault("excluded renamed", "stop", 1)], ids=["a step", "going back"])
def test_two_attempts_and_a_lock_that_does_nothing(it: Chaos, rows: list[Row], asleep: Fault) -> None:
    """As on some network file systems: the fence alone stops the older one, which says nothing of the outcome."""
    assert_survived(it.two_at_once(f"two-{asleep.point.split()[0]}", asleep), rows)


def test_reward_server_goes_away_and_comes_back(it: Chaos, rows: list[Row]) -> None:
    faults = [Fault("chunk synced", "stop", 5)]
    attempt = it.zygote.start(it.prepare("server", faults), "rft.yaml", "--name", "server")
    wait_for(is_stopped(attempt.pid))
    it.server.down()
    os.kill(attempt.pid, signal.SIGCONT)
    time.sleep(3)
    assert not (it.project.run("server").root / "outcome.json").exists(), "it waits"
    it.server.up()
    assert attempt.wait() == 0, attempt.err.read_text()
    report = it.report("server", "rft", faults)
    report.rows[0].fault = "reward server away for 3 s"
    assert_survived(report, rows)


@pytest.fixture
def disk(it: Chaos) -> Iterator[Path]:
    """A project directory whose runs/ is a file system of 16 MiB."""
    place = it.project.root / "disk"
    shutil.copytree(it.project.root, place, ignore=shutil.ignore_patterns("disk", "runs", "states", ".*"))
    runs = place / "runs"
    runs.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(runs)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"needs a small file system, and mounting one is not permitted: {mounted.stderr.decode()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(runs)], check=True)


def test_disk_that_fills_up(it: Chaos, rows: list[Row], disk: Path) -> None:
    """First there is no room for a checkpoint, then for nothing; then somebody makes room."""
    run = Run(disk / "runs" / "full")
    ballast = disk / "runs" / "ballast"

    def fill(leave: int) -> None:
        with ballast.open("ab") as file:
            file.write(b"x" * (shutil.disk_usage(disk / "runs").free - leave))

    faults = [Fault("metrics synced", "stop", 16), Fault("metrics synced", "stop", 9)]
    state = it.prepare("full", faults, run=run.root)
    attempt = it.zygote.start(state, "sft.yaml", "--name", "full", cwd=disk)
    wait_for(is_stopped(attempt.pid))
    fill(MIB // 8)
    os.kill(attempt.pid, signal.SIGCONT)
    wait_for(lambda: fired(state) == 2)
    wait_for(is_stopped(attempt.pid))
    fill(0)
    os.kill(attempt.pid, signal.SIGCONT)
    assert attempt.wait() == 1, attempt.err.read_text()
    said = attempt.err.read_text()
    assert "No space left on device; going on, the next save tries again" in said
    assert "Traceback" not in said
    saved = run.checkpoints()[-1]
    ballast.unlink()
    attempt = it.zygote.start(state, "sft.yaml", "--name", "full", cwd=disk)
    assert attempt.wait() == 0, attempt.err.read_text()
    assert f"resumed runs/full at step {saved} of 40" in attempt.err.read_text()
    found = differences(run, it.undisturbed("sft"))
    rows.append(Row("disk full", "full", not found, 2, 0, not found))
    assert not found


class TestMutants:
    """Each line that durability rests on is left out once: the checks above must see it."""

    @pytest.mark.parametrize("faults", [MUTANTS["metrics not fsynced"][0], MUTANTS["manifest trusted"][0]])
    def test_without_one_all_is_well(self, it: Chaos, faults: list[Fault]) -> None:
        report = it.survive(f"whole-{faults[0].point.replace(' ', '-')}", "sft", faults)
        assert not report.problems
        assert not report.missed

    @pytest.mark.parametrize("mutant", MUTANTS)
    def test_is_seen(self, it: Chaos, mutant: str) -> None:
        faults, what = MUTANTS[mutant]
        report = it.survive(mutant.replace(" ", "-"), "sft", faults, mutant)
        assert not report.missed
        assert any(what in problem for problem in report.problems), report.problems

    def test_no_fence_is_seen(self, it: Chaos) -> None:
        report = it.two_at_once("no-fence", ASLEEP, "no fence")
        assert any("steps twice" in problem for problem in report.problems), report.problems


def test_table(rows: list[Row]) -> None:
    print(f"\n{table(rows)}")
    assert all(row.survived and row.equal and row.lost_steps == 0 for row in rows)
