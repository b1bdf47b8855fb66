"""`trainer runs`, `logs`, `delete`, `diff`, other names of commands, and what a mistyped one gets."""

from __future__ import annotations

import io
import json
import os
import pty
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from small_recipe import RFT, SFT, write_small

from trainer.commands.cli import main
from trainer.commands.diff import diff_lines, diff_runs
from trainer.config.load import load_recipe
from trainer.jobs.logs import log_lines
from trainer.planning.plan import make_plan
from trainer.run.directory import RunDir
from trainer.run.find import open_run
from trainer.run.readers import HeldOut
from trainer.run.state import Outcome


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_run(name: str, recipe: str = SFT, **overrides: Any) -> RunDir:
    """A run that has not begun."""
    settings = [f"{field.replace('__', '.')}={value}" for field, value in overrides.items()]
    return open_run(make_plan(load_recipe(write_small(Path.cwd(), recipe), settings)), name)


def write_metrics(run: RunDir, *records: dict[str, Any]) -> None:
    run.metrics_file.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_answers(run: RunDir, step: int, rewards: dict[str, list[float | None]]) -> None:
    """Held-out answers by the text of the prompt."""
    run.evaluation(step).parent.mkdir(exist_ok=True)
    lines = [
        {"row": row, "where": f"e.jsonl:{row}", "prompt": [{"role": "user", "content": text}], "fields": {},
         "answers": [{"reward": reward} for reward in of_prompt]}
        for row, (text, of_prompt) in enumerate(rewards.items())
    ]  # fmt: skip
    run.evaluation(step).write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_runs_lists_every_run_and_a_damaged_one_hides_none(capsys):
    first, broken = make_run("first"), make_run("broken", RFT)
    write_metrics(first, {"step": 0, "time": 1.0, "eval/loss": 2.0}, {"step": 5, "time": 2.0, "eval/loss": 0.5})
    broken.plan_file.write_text("{")
    for age, run in enumerate((broken, first)):
        os.utime(run.plan_file, (age, age))
    assert main(["runs", "--json"]) == 0
    broken_entry, entry = json.loads(capsys.readouterr().out)
    assert entry == {
        "run": "runs/first", "state": "pending", "method": "sft", "model": "model", "step": 5, "steps": 10,
        "best": {"step": 5, "name": "eval/loss", "value": 0.5}, "problem": None, "lost_trackers": [],
    }  # fmt: skip
    assert (broken_entry["run"], broken_entry["state"]) == ("runs/broken", "unreadable")
    assert main(["ls"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == [
        "runs/first", "pending", "sft", "model", "step", "5", "of", "10", "eval/loss", "0.5000", "at", "step", "5",
    ]  # fmt: skip


def test_logs_prints_the_newest_attempt_or_another(capsys):
    run = make_run("small")
    run.logs.mkdir()
    for number in (1, 2):
        run.take_attempt({})
        run.log_file(number).write_text(f"of attempt {number}\nlast of {number}\n")
    assert main(["logs", "small"]) == 0
    assert capsys.readouterr().out == "of attempt 2\nlast of 2\n"
    assert main(["logs", "small", "--attempt", "1", "--lines", "1"]) == 0
    assert capsys.readouterr().out == "last of 1\n"
    assert main(["logs", "small", "--attempt", "7"]) == 2
    assert capsys.readouterr().err == (
        "runs/small/logs/attempt-7.log: does not exist; there are attempt-1.log, attempt-2.log\n"
    )


def test_logs_of_a_run_without_any_says_which_runs_have_some(capsys):
    make_run("small")
    assert main(["logs", "small"]) == 2
    assert capsys.readouterr().err.startswith("runs/small/logs: no log yet. Only runs that `trainer train`")


def test_followed_log_goes_through_attempts_and_ends_with_the_run():
    run = make_run("small")
    run.logs.mkdir()
    run.take_attempt({})
    run.log_file(1).write_text("one\nhalf é")
    lines: list[str] = []
    with run.supervised():
        reader = threading.Thread(target=lambda: lines.extend(log_lines(run, follow=True, poll_s=0.01)))
        reader.start()
        deadline = time.monotonic() + 30
        while not lines and time.monotonic() < deadline:  # it reads the first attempt before the second begins
            time.sleep(0.01)
        with run.log_file(1).open("ab") as file:
            file.write("日".encode()[:2])  # a character is cut by the read
        run.take_attempt({})
        with run.log_file(1).open("ab") as file:
            file.write("日".encode()[2:])
        run.log_file(2).write_text("two\n")
        assert reader.is_alive()
    reader.join(30)
    assert lines == ["one", "half é日", "two"]


def test_delete_needs_a_yes_where_nobody_can_be_asked(capsys, monkeypatch):
    run = make_run("small")
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert main(["delete", "small"]) == 2
    assert capsys.readouterr().err == "runs/small: not deleted, since no terminal can confirm it. Add --yes.\n"
    assert run.is_run()
    assert main(["rm", "small", "--yes"]) == 0
    assert list(Path("runs").iterdir()) == []


def test_delete_refuses_a_run_that_goes_on(capsys):
    run = make_run("small")
    with run.supervised():
        assert main(["delete", "small", "--yes"]) == 2
    assert capsys.readouterr().err == "runs/small is running; stop it first: trainer cancel runs/small\n"
    assert run.is_run()


@pytest.mark.parametrize(("answer", "is_kept"), [("y", False), ("", True), ("no", True)])
def test_delete_asks_on_a_terminal(answer, is_kept):
    run = make_run("small")
    (run.root / "adapter").mkdir()
    ours, theirs = pty.openpty()
    os.write(ours, f"{answer}\n".encode())
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "delete", "small"], stdin=theirs, capture_output=True, text=True, check=True
    )
    os.close(ours)
    os.close(theirs)
    assert done.stderr.startswith("delete runs/small (pending, step 0 of 10, adapter, 0 MiB)? [y/N] ")
    assert run.root.exists() is is_kept


def test_deleted_directory_that_is_linked_is_deleted_with_its_link(tmp_path):
    run = make_run("small")
    elsewhere = tmp_path / "elsewhere"
    shutil.move(run.root, elsewhere)
    run.root.symlink_to(elsewhere)
    assert main(["delete", "small", "--yes"]) == 0
    assert not elsewhere.exists()
    assert not run.root.is_symlink()


def test_diff_of_settings_names_fields_and_changed_files():
    first = make_run("first")
    second = make_run("second", optimizer__learning_rate="5e-4", steps=20)
    report = diff_runs(first, second)
    assert [(each.field, each.first, each.second) for each in report.settings] == [
        ("optimizer.learning_rate", 1e-3, 5e-4), ("steps", 10, 20),
    ]  # fmt: skip
    third_recipe = write_small(Path.cwd(), num_rows=7)  # other rows under the same name
    third = open_run(make_plan(load_recipe(third_recipe)), "third")
    assert [each.field for each in diff_runs(first, third).settings] == ["data.digest"]


def test_diff_compares_the_same_steps_of_the_same_rows_only():
    first, second, other = make_run("first"), make_run("second", lora__rank=8), make_run("other", seed=3)
    for run, losses in ((first, [3.0, 2.0, 1.0]), (second, [2.0, 1.0]), (other, [1.0, 1.0])):
        write_metrics(run, *({"step": step + 1, "train/loss": loss} for step, loss in enumerate(losses)))
    curve = diff_runs(first, second).curve
    assert curve is not None
    assert (curve.metric, curve.num_steps, curve.first, curve.second) == ("train/loss", 2, 2.5, 1.5)
    assert diff_runs(first, other).curve is None  # another seed: other rows at each step


def test_diff_pairs_equal_prompts_of_the_last_evaluations():
    first, second = make_run("first", RFT), make_run("second", RFT, algorithm__clip_low="0.3")
    write_answers(first, 0, {"a": [9.0], "b": [9.0]})
    write_answers(first, 5, {"a": [0.0, 1.0], "b": [None, 1.0], "gone": [1.0, 1.0]})
    write_answers(second, 5, {"new": [0.0, 0.0], "b": [1.0, 1.0], "a": [0.0, 1.0]})
    held_out = diff_runs(first, second).held_out
    assert held_out is not None
    assert (held_out.num_pairs, held_out.first, held_out.second) == (2, 0.5, 0.75)  # a failed reward earns 0
    assert (held_out.num_better, held_out.num_worse) == (1, 0)
    assert (held_out.low, held_out.high) == (0.0, 0.5)
    (line,) = [line for line in diff_lines(diff_runs(first, second)) if line.startswith("held-out")]
    assert line == (
        "held-out reward, prompt by prompt: 0.5000, 0.7500; +0.25 (95% interval +0 to +0.5) over 2 pairs; "
        "better on 1, worse on 0"
    )


def test_diff_shows_last_values_and_their_differences(capsys):
    first, second = make_run("first"), make_run("second", lora__rank=8)
    write_metrics(first, {"step": 5, "eval/loss": 0.5, "train/loss": 1.0}, {"step": 6, "train/loss": 0.25})
    write_metrics(second, {"step": 5, "eval/loss": 0.75})
    second.write_outcome(Outcome("finished", 10, "words", 0))
    assert main(["compare", "first", "second"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["lora.rank", "4", "8"] in lines
    assert ["eval/loss", "0.5", "0.75", "+0.25"] in lines
    assert ["train/loss", "0.25", "-"] in lines
    assert ["last", "step", "6", "5"] in lines


def test_diff_leaves_values_of_replaced_held_out_rows_out(capsys):
    first, second = make_run("first"), make_run("second", lora__rank=8)
    write_metrics(first, {"step": 5, "eval/loss": 0.1}, {"step": 9, "eval/loss": 0.5}, {"step": 10, "train/loss": 1.0})
    write_metrics(second, {"step": 5, "eval/loss": 0.75})
    first.write_held_out(HeldOut("sha256:new", 5))
    second.write_held_out(HeldOut("sha256:old", -1))
    report = diff_runs(first, second)
    assert report.best == ("eval/loss 0.5000 at step 9", "eval/loss 0.7500 at step 5")
    assert main(["diff", "first", "second"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert ["eval/loss", "0.5", "0.75"] in [line.split() for line in lines], (
        "no difference of two means over other rows"
    )
    assert "runs/first: held-out rows were replaced at step 5; earlier values are left out" in lines
    assert "the runs have other held-out rows: their held-out values are not compared" in lines


def test_diff_of_a_copy_shows_no_difference_by_its_place(directory, monkeypatch, capsys):
    project = directory / "project"
    project.mkdir()
    monkeypatch.chdir(project)
    make_run("small", RFT, model__path=f"{write_small(project, RFT).parent}/model")
    shutil.copytree(project, directory / "copy")
    report = diff_runs(RunDir(Path("runs/small")), RunDir(directory / "copy/runs/small"))
    assert report.settings == []
    assert "is a copy of the run in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("trian", "trainer: no command `trian`; did you mean `train`?\n"),
        ("fit", "trainer: no command `fit`; did you mean `train`?\n"),
        ("lsit", "trainer: no command `lsit`; did you mean `runs`?\n"),
    ],
)
def test_mistyped_command_is_guessed(capsys, typed, said):
    assert main([typed, "recipe.yaml"]) == 2
    assert capsys.readouterr().err == said
