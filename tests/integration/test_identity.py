"""Every attempt proves that it continues the same run: inputs that were replaced between two attempts."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from preloaded import FLOCK, preloaded
from project import BIN, LONG, Project, Run, is_at_step, wait_for
from rft_project import prepare
from tiny import tiny_model_dir

from trainer.worker import main


@contextmanager
def working_in(directory: Path) -> Iterator[None]:
    """The worker's `main` in this process, which spares its start; restores the handlers that it sets."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def attempt(project: Project, *arguments: str) -> int:
    with working_in(project.root):
        return main(list(arguments))


@pytest.fixture
def begun(project: Project) -> Run:
    """A run of 2 of 4 steps: its plan says 4, as if it had been interrupted."""
    assert attempt(project, project.recipe(steps=2)) == 0
    run = project.run("tiny")
    plan = json.loads((run.root / "plan.json").read_text())
    (run.root / "plan.json").write_text(json.dumps(plan | {"steps": 4}))
    return run


def refused(project: Project, run: Run) -> str:
    """What the next attempt says as it refuses to train."""
    steps = run.steps()
    assert attempt(project, "runs/tiny") == 2
    assert run.steps() == steps
    assert run.outcome()["exit_code"] == 2
    return str(run.outcome()["message"])


def test_rows_or_model_replaced_between_two_attempts(project: Project, begun: Run) -> None:
    rows = (project.root / "train.jsonl").read_text()
    (project.root / "train.jsonl").write_text("".join(rows.splitlines(keepends=True)[::2]))
    assert "data.train (train.jsonl): 24 rows, now 12" in refused(project, begun)
    (project.root / "train.jsonl").write_text(rows.replace("sum", "SUM"))
    assert "data.train (train.jsonl): other rows" in refused(project, begun)
    (project.root / "train.jsonl").write_text(rows)

    shutil.move(project.root / "model", project.root / "kept")
    assert "model.path (model): no such file or directory" in refused(project, begun)
    tiny_model_dir(project.root / "model", seed=1)
    assert "model.path (model): other content" in refused(project, begun)
    shutil.rmtree(project.root / "model")
    shutil.move(project.root / "kept", project.root / "model")

    assert attempt(project, "runs/tiny") == 0
    assert begun.steps() == [0, 1, 2, 3, 4]


def test_replaced_held_out_rows_end_the_comparison_with_the_old_best_value(
    project: Project, begun: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    metrics = begun.root / "metrics.jsonl"
    records = begun.metrics()
    records[0]["eval/loss"] = 1e-9  # no value of the new rows is better
    metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    before = begun.adapter("adapter-best")
    rows = (project.root / "eval.jsonl").read_text().splitlines(keepends=True)
    (project.root / "eval.jsonl").write_text("".join(rows[:5]))
    assert attempt(project, "runs/tiny") == 0
    assert "warning: the held-out rows were replaced: values up to step 2 count no more" in capfd.readouterr().err
    assert "best" in begun.outcome()["message"]
    assert "at step 4" in begun.outcome()["message"]
    assert begun.adapter("adapter-best") != before


def test_changed_reward_code_is_recorded(project: Project, capfd: pytest.CaptureFixture[str]) -> None:
    prepare(project)
    recipe = json.loads((project.root / "rft.yaml").read_text())
    (project.root / "rft.yaml").write_text(json.dumps(recipe | {"steps": 1, "eval_interval": 0}))
    assert attempt(project, "rft.yaml") == 0
    run = project.run("rft")
    with (project.root / "rewards.py").open("a") as file:
        file.write("\n# stricter\n")
    assert attempt(project, "rft.yaml", "--set", "steps=2") == 0
    assert [each["changed_rewards"] for each in run.attempts()] == [[], ["rewards.py"]]
    assert "warning: rewards.py changed since the attempt before" in capfd.readouterr().err


def test_file_system_without_locks(project: Project, tmp_path_factory: pytest.TempPathFactory) -> None:
    environment = preloaded(tmp_path_factory.mktemp("shim"), FLOCK, FLOCK_ERRNO=str(errno.ENOSYS))
    started = project.start([str(BIN / "trainer"), "train", project.recipe()], environment)
    done = started.wait()
    assert done.code == 0, done.said
    assert done.stderr.count("has no working file locks") == 1
    assert project.run("tiny").steps() == list(range(7))


def test_copied_project_trains_on_its_own_files(project: Project, begun: Run, tmp_path_factory) -> None:
    copy = Project(shutil.copytree(project.root, tmp_path_factory.mktemp("other") / "copy"))
    shutil.rmtree(project.root / "model")
    done = copy.trainer("reconnect", "tiny")
    assert done.code == 0, done.said
    assert f"note: runs/tiny is a copy of the run in {project.root}; its paths now start in {copy.root}" in done.stderr
    wait_for(lambda: copy.run("tiny").steps() == [0, 1, 2, 3, 4])
    copy.kill_all()
    assert begun.steps() == [0, 1, 2]


def test_stopped_and_continued_is_no_hang(project: Project) -> None:
    """Stopped for longer than `hang_timeout_s`, as a suspended machine is."""
    started = project.start_worker(project.recipe(**LONG, recovery__hang_timeout_s=8))
    run = project.run("long")
    wait_for(is_at_step(run, 3), started)
    started.signal(signal.SIGSTOP)
    time.sleep(10)
    started.signal(signal.SIGCONT)
    done = started.wait()
    assert done.code == 0, done.said
    assert len(run.attempts()) == 1


@pytest.mark.parametrize("damage", ["nul", "deleted", "cut"])
def test_damaged_metrics_are_named_kept_and_rebuilt(
    project: Project, begun: Run, damage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    metrics = begun.root / "metrics.jsonl"
    whole = begun.metrics()
    lines = metrics.read_bytes().splitlines(keepends=True)
    match damage:
        case "nul":
            metrics.write_bytes(lines[0] + b"\0" * len(lines[1]) + b"\n" + lines[2])
        case "cut":
            metrics.write_bytes(lines[0] + lines[1][:20])
        case "deleted":
            metrics.unlink()
    damaged = metrics.read_bytes() if metrics.exists() else None
    assert attempt(project, "runs/tiny") == 0
    said = capfd.readouterr().err
    expected = "damaged lines: 2; steps without a record: 1" if damage == "nul" else "steps without a record: 1-2"
    assert f"warning: runs/tiny/metrics.jsonl: {expected}" in said
    assert "Traceback" not in said
    kept = begun.root / "metrics.jsonl.broken-1"
    assert (kept.read_bytes() if kept.exists() else None) == damaged
    assert begun.steps()[-4:] == [1, 2, 3, 4]
    rebuilt = [record for record in begun.metrics() if "rebuilt" in record]
    assert [record["step"] for record in rebuilt] == ([1] if damage == "nul" else [1, 2])
    if damage != "nul":
        assert rebuilt[-1]["train/updates"] == whole[-1]["train/updates"]


def test_rollout_values_are_rebuilt_from_the_journal(project: Project) -> None:
    prepare(project)
    assert attempt(project, "rft.yaml", "--set", "steps=2") == 0
    run = project.run("rft")
    whole = run.metrics()
    (run.root / "metrics.jsonl").unlink()
    assert attempt(project, "rft.yaml", "--set", "steps=3") == 0
    names = ("step", "rollout/reward", "rollout/completion_tokens", "rollout/truncated_frac", "eval/reward")
    for before, after in zip(whole[1:], run.metrics(), strict=False):
        assert {name: before.get(name) for name in names} == {name: after.get(name) for name in names}
