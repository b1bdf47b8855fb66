"""The run directory: who spells its file names, and files that are damaged."""

from __future__ import annotations

import ast
import fcntl
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

import trainer
from trainer.errors import LaunchError, TrainerError
from trainer.run.directory import RunDir
from trainer.run.state import Outcome

PACKAGE: Final = Path(trainer.__file__).parent
NAMES: Final = re.compile(
    r"""(.*/)?(plan\.json|attempts\.jsonl|metrics\.jsonl|outcome\.json|heartbeat\.json|excluded\.json|wandb\.json
    |begun\.jsonl|supervisor\.lock|launch\.lock|fence|adapter-best|model-best|evaluations
    |\.?step-(\*|[0-9])*.*|chunk-(\*|[0-9])*.*|attempt-.*|logs|logs/.*)""",
    re.VERBOSE,
)
ALLOWED: Final = {
    *((f"commands/{module}.py", "logs") for module in ("cli", "help_text", "other_names")),  # a command
    ("checkpoints/mirror.py", "run/metrics.jsonl"),  # a name on the mirror, whose layout is that module's
    *((f"jobs/{module}.py", f"logs/{file}") for module, file in [  # names that RunDir.of_job accepts, typed
        ("job", "supervisor.log"), ("start", "supervisor.log"), ("slurm_script", "slurm-%j.log"),
    ]),
}  # fmt: skip
"""Module and literal."""


def literals(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of each string literal that is no docstring; parts of f-strings too."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value


def test_only_the_room_run_spells_names_of_the_run_directory():
    spelled = []
    for file in sorted(PACKAGE.rglob("*.py")):
        module = file.relative_to(PACKAGE).as_posix()
        if module.startswith("run/"):
            continue
        for number, text in literals(ast.parse(file.read_text())):
            if NAMES.fullmatch(text) and (module, text) not in ALLOWED:
                spelled.append(f"{module}:{number}: {text!r}")
    assert not spelled, "add a property to RunDir (trainer/run/directory.py) and use it: " + ", ".join(spelled)


def test_names_are_found_where_they_are_spelled():
    tree = ast.parse("def f(root, step):\n    '''plan.json'''\n    return root / 'plan.json', f'step-{step:06d}'")
    assert [text for _, text in literals(tree) if NAMES.fullmatch(text)] == ["plan.json", "step-"]


@pytest.fixture
def run(tmp_path) -> RunDir:
    return RunDir(tmp_path)


@pytest.mark.parametrize("damage", ["", "\0" * 90, "{}", '{"state": "finished"}'])
def test_damaged_outcome_is_an_error_for_people(run, damage):
    run.outcome_file.write_text(damage)
    with pytest.raises(LaunchError, match=r"outcome\.json: damaged .* Delete it and run the same command again"):
        run.read_outcome()


@pytest.mark.parametrize("damage", ["", "\0" * 90, "{}"])
def test_damaged_heartbeat_counts_as_none(run, damage):
    run.heartbeat_file.write_text(damage)
    assert run.read_heartbeat() is None


def test_outcome_and_heartbeat_are_read_as_written(run):
    outcome = Outcome("failed", 3, "words", 1, is_transient=True)
    run.write_outcome(outcome)
    assert run.read_outcome() == outcome
    run.write_heartbeat(2, 7, "saving")
    beat = run.read_heartbeat()
    assert beat is not None
    assert (beat.attempt, beat.step, beat.phase) == (2, 7, "saving")
    assert 0 <= beat.age_s() < 60


def test_attempts_leave_out_a_line_that_a_power_cut_damaged(run):
    run.take_attempt({"host": "a"})
    with run.attempts_file.open("a") as file:
        file.write("\0\0\0\n")
    run.take_attempt({"host": "b"})
    assert run.read_attempts() == [{"attempt": 1, "host": "a"}, {"attempt": 2, "host": "b"}]


def test_a_fact_is_added_to_the_record_of_its_attempt_only(run):
    first, second = run.take_attempt({"host": "a"}), run.take_attempt({"host": "b"})
    run.note_attempt(second, {"sequences": "packed"})
    run.note_attempt(first, {"sequences": "lfm2 keeps state between packed sequences"})
    assert run.read_attempts() == [
        {"attempt": 1, "host": "a", "sequences": "lfm2 keeps state between packed sequences"},
        {"attempt": 2, "host": "b", "sequences": "packed"},
    ]


def test_an_attempt_that_was_overtaken_is_stopped(run):
    first = run.take_attempt({})
    run.refuse_stale(first)
    run.take_attempt({})
    with pytest.raises(TrainerError, match="attempt 2 has taken over; attempt 1 stops"):
        run.refuse_stale(first)


def test_a_lock_has_one_holder(run):
    with run.locked():
        assert run.is_locked()
        assert not run.is_supervised()
        assert not run.wait_unlocked(0.01, timeout_s=0.03)
        with pytest.raises(LaunchError, match="another attempt is running"), run.locked():
            pass
    assert not run.is_locked()
    assert run.wait_unlocked(0.01, timeout_s=0)


def test_two_processes_that_probe_a_lock_at_once_do_not_take_each_other_for_its_holder(run):
    with run.locked():
        pass
    with (run.root / "lock").open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_SH)  # as a probe does, for a moment
        assert not run.is_locked()


def test_steps_are_found_among_other_directories(run):
    for name in ("step-000020", "step-000003", ".step-000021.tmp", "step-000002.broken-1", "other"):
        (run.checkpoints / name).mkdir(parents=True)
    assert run.checkpoint_steps() == [3, 20]
    assert run.newest_checkpoint_step() == 20
    assert [path.name for path in run.unfinished_checkpoints()] == [".step-000021.tmp"]
    assert run.journal_steps() == []
