"""Faults and their messages: bad input, full disks, processes that are killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from project import LONG, Done, Project, Run, is_at_step, wait_for

MIB = 2**20


def assert_is_for_people(done: Done, *words: str) -> None:
    """Exit code 2, no traceback, and these words in the message."""
    assert done.code == 2, done.said
    assert "Traceback" not in done.said
    for word in words:
        assert word in done.stderr, done.said


def test_five_mistakes_in_a_recipe_are_five_lines(project: Project) -> None:
    file = project.recipe(
        steps=0, lora__rnak=4, optimizer__learning_rate=-1, data__train="nowhere.jsonl", dcp_save_interval="often"
    )
    done = project.trainer("train", file)
    assert_is_for_people(
        done, "steps: must be", "did you mean `rank`?", "optimizer.learning_rate: must be",
        "no such file: nowhere.jsonl", "dcp_save_interval: must be a whole number",
    )  # fmt: skip
    lines = done.stderr.splitlines()
    assert len(lines) == 5, done.stderr
    assert all(line.startswith("recipe.yaml:") for line in lines)
    assert not (project.root / "runs").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            b'{"messages": [{"role": "user", "content": "hal',
            ("bad.jsonl:2: not JSON", "looks cut off", "Fix or remove the line"),
        ),
        (b'{"messages": "\xff\xfe"}\n', ("bad.jsonl:2: byte 14 is not UTF-8. Save the file as UTF-8.",)),
        (
            b'{"messages": [{"role": "robot", "content": "x"}, {"role": "assistant", "content": "y"}]}\n',
            ("bad.jsonl:2: messages[0]: unknown role 'robot'; known: system, developer, user, assistant, tool",),
        ),
    ],
    ids=["truncated line", "not UTF-8", "unknown role"],
)
def test_bad_rows_are_named(shared: Project, content: bytes, words: tuple[str, ...]) -> None:
    good = (shared.root / "train.jsonl").read_bytes().splitlines(keepends=True)[0]
    (shared.root / "bad.jsonl").write_bytes(good + content)
    file = shared.recipe("bad.yaml", name=f"bad{len(content)}", data__train="bad.jsonl")
    is_first = b"hal" in content
    done = (
        shared.trainer("train", file) if is_first else shared.worker(file)
    )  # the same code without the launcher's three seconds
    assert_is_for_people(done, *words)
    assert shared.run(f"bad{len(content)}").outcome()["exit_code"] == 2


def test_empty_file(project: Project) -> None:
    (project.root / "train.jsonl").write_bytes(b"")
    assert_is_for_people(project.trainer("train", "recipe.yaml"), "data.train: train.jsonl is empty")


def test_directory_without_a_model(project: Project) -> None:
    (project.root / "nothing").mkdir()
    done = project.trainer("train", project.recipe(model__path="nothing"))
    assert_is_for_people(done, "model.path: nothing has no config.json: not a model directory")


def test_model_with_a_broken_config(project: Project) -> None:
    (project.root / "model" / "config.json").write_text('{"model_type": "llama"')
    assert_is_for_people(project.trainer("train", "recipe.yaml"), "model/config.json", "not JSON")


def test_model_without_weights(project: Project) -> None:
    (project.root / "model" / "model.safetensors").unlink()
    assert_is_for_people(project.trainer("train", "recipe.yaml"), "model: cannot be loaded")


class TestFullDisk:
    """runs/ is a small file system that fills up; all tests continue one run."""

    @pytest.fixture(scope="class")
    def disk(self, shared: Project) -> Iterator[Path]:
        """A directory on a file system of 16 MiB."""
        place = shared.root / "disk"
        shutil.copytree(shared.root, place, ignore=shutil.ignore_patterns("disk", "runs", ".*"))
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

    @pytest.fixture
    def project(self, disk: Path) -> Iterator[Project]:
        project = Project(disk)
        project.recipe(name="disk", lora__rank=64, eval_interval=0, data__eval=None, keep_last=1)
        yield project
        project.kill_all()

    def fill(self, project: Project, *, leave: int) -> Path:
        ballast = project.root / "runs" / "ballast"
        free = shutil.disk_usage(ballast.parent).free
        with ballast.open("wb") as file:
            file.write(b"x" * (free - leave))
        return ballast

    def test_full_while_writing_the_adapter(self, project: Project) -> None:
        done = project.trainer("train", "recipe.yaml", "--set", "steps=4")
        assert done.code == 0, done.said
        run = project.run("disk")
        adapter = run.adapter()
        assert len(adapter) > MIB // 4
        self.fill(project, leave=MIB // 4)
        done = project.trainer("train", "recipe.yaml", "--set", "steps=6", "--set", "recovery.max_restarts=0")
        assert done.code == 1, done.said
        assert "runs/disk/adapter: not written: " in done.stderr
        assert "No space left on device" in done.stderr
        assert "the checkpoint of step 4 is kept. Fix the problem above and run the same command again." in done.stderr
        assert "Traceback" not in done.stderr
        assert run.outcome()["state"] == "failed"
        assert run.checkpoints() == [4]
        assert run.adapter() == adapter, "the old one is intact"
        assert not list(run.root.rglob(".adapter*"))

    def test_failed_save_is_a_warning_and_the_next_one_works(self, project: Project) -> None:
        """Continues the run above; the disk is full until the second warning."""
        run = project.run("disk")
        started = project.start_trainer("train", "recipe.yaml", "--set", "steps=200")
        ballast = project.root / "runs" / "ballast"
        wait_for(lambda: run.log().count("the next save tries again") >= 2, started, poll_s=0.005)
        ballast.unlink()
        done = started.wait()
        assert done.code == 0, done.said
        assert run.steps() == list(range(1, 201))
        assert run.checkpoints() == [200]
        warning = "not written: [Errno 28] No space left on device; going on, the next save tries again"
        assert f"warning: runs/disk/checkpoints/step-000006: {warning}" in run.log()


class TestVanishingProcesses:
    """One long run; each test continues it."""

    @pytest.fixture(scope="class")
    def run(self, shared: Project) -> Run:
        shared.recipe("long.yaml", **LONG | {"steps": 9999, "dcp_save_interval": 10})
        return shared.run("long")

    def test_second_attempt_is_refused(self, shared: Project, run: Run) -> None:
        """Also while the worker of the first one is starting."""
        first = shared.start_trainer("train", "long.yaml")
        wait_for(lambda: (run.root / "supervisor.lock").exists(), first)
        assert not (run.root / "attempts.jsonl").exists(), "the worker is not up yet"
        assert_is_for_people(shared.trainer("train", "long.yaml"), "runs/long: another attempt is running")
        wait_for(is_at_step(run, 2), first)
        assert_is_for_people(shared.trainer("train", "long.yaml"), "runs/long: another attempt is running")
        assert_is_for_people(shared.worker("runs/long"), "runs/long: another attempt is running")
        assert first.process.poll() is None
        assert [attempt["attempt"] for attempt in run.attempts()] == [1]
        first.signal(signal.SIGTERM)
        assert first.wait().code == 75

    def test_worker_stops_when_its_supervisor_is_killed(self, shared: Project, run: Run) -> None:
        before = run.steps()[-1]
        started = shared.start_trainer("train", "long.yaml")
        wait_for(is_at_step(run, before + 2), started)
        worker = psutil.Process(run.worker_pid())
        started.signal(signal.SIGKILL)
        psutil.wait_procs([worker], 60)
        wait_for(lambda: not shared.processes())
        assert run.outcome()["state"] == "preempted"
        assert run.checkpoints()[-1] == run.steps()[-1], "saved"
        assert "the supervisor is gone: saving after this step" in run.log()

    def test_run_goes_on_when_only_the_launcher_is_killed(self, shared: Project, run: Run) -> None:
        """The supervisor waits for the worker and has its outcome."""
        before = run.steps()[-1]
        started = shared.start_trainer("train", "long.yaml", "--set", f"steps={before + 100}")
        wait_for(is_at_step(run, before + 2), started)
        worker = psutil.Process(run.worker_pid())
        launcher = worker.parent()
        assert launcher is not None
        assert launcher.pid != started.process.pid
        launcher.kill()
        done = started.wait()
        assert done.code == 0, done.said
        assert done.stdout == "runs/long/adapter\n"
        assert run.steps() == list(range(before + 101))
        assert run.outcome()["state"] == "finished"

    def test_worker_that_dies_is_reported_with_its_last_words(self, shared: Project, run: Run) -> None:
        before = run.steps()[-1]
        started = shared.start_trainer("train", "long.yaml", "--set", "recovery.max_restarts=0")
        wait_for(is_at_step(run, before + 2), started)
        os.kill(run.worker_pid(), signal.SIGKILL)
        done = started.wait()
        assert done.code == 1, done.said
        assert "the worker ended without an outcome" in done.stderr
        assert f"resumed runs/long at step {before} of 9999" in done.stderr, "the end of its log"
        assert run.outcome()["state"] == "failed"
