"""Whether a batch job starts a run again: the same rule as the supervisor's, from the run directory alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_recipe import SFT, write_small

from trainer.config.load import load_recipe
from trainer.config.recipe import RecoverySettings
from trainer.launch.again import DIED, main
from trainer.launch.restarts import Restarts
from trainer.planning.plan import make_plan
from trainer.run.directory import RunDir
from trainer.run.state import EndState, Outcome

RECOVERY = "recovery:\n  max_restarts: 2\n  restart_backoff_s: 4\n"
SETTINGS = RecoverySettings(max_restarts=2, restart_backoff_s=4.0)


def ended(state: EndState, code: int, *, is_transient: bool = False) -> Outcome:
    return Outcome(state, 5, "as it is", code, is_transient)


CRASH = ended("failed", 1, is_transient=True)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.chdir(tmp_path)
    run = RunDir(Path("runs/small"))
    run.root.mkdir(parents=True)
    run.write_plan(make_plan(load_recipe(write_small(tmp_path, SFT + RECOVERY))))
    return run


@pytest.mark.parametrize(
    ("outcome", "is_again"),
    [
        (CRASH, True),
        (ended("preempted", 75), True),  # by the signal that ends the step where another rank died
        (ended("failed", 1), False),  # would end alike
        (ended("failed", 2), False),  # the user must change something
        (ended("cancelled", 75), False),
        (ended("finished", 0), False),
    ],
)
def test_only_what_may_end_otherwise_is_started_again(outcome, is_again):
    following = Restarts(0, 8).after(outcome, 8, SETTINGS)
    assert following == (Restarts(1, 8) if is_again else None)


def test_restarts_are_counted_since_the_newest_checkpoint():
    assert Restarts(1, 8).after(CRASH, 8, SETTINGS) == Restarts(2, 8)
    assert Restarts(2, 8).after(CRASH, 8, SETTINGS) is None
    assert Restarts(2, 8).after(CRASH, 10, SETTINGS) == Restarts(1, 10)
    assert Restarts(2, 8).after(CRASH, -1, SETTINGS) is None, "a lost checkpoint is no progress"
    assert [Restarts(number, 8).wait_s(SETTINGS) for number in (1, 2, 3, 6)] == [4, 8, 16, 60]


def test_words_are_passed_from_call_to_call(run, capsys):
    assert main(["runs/small"]) == 0
    words = capsys.readouterr().out.split()
    assert words == ["0", "-1", "0"]
    for number, wait in ((1, "4"), (2, "8")):
        run.take_attempt({})
        run.end_attempt(number, CRASH)
        assert main(["runs/small", *words]) == 0
        captured = capsys.readouterr()
        words = captured.out.split()
        assert words == [str(number), "-1", wait]
        assert captured.err == (
            f"failed: as it is\nrestart {number} of at most 2 without a new checkpoint, in {wait} s\n"
        )
    run.take_attempt({})
    run.end_attempt(3, CRASH)
    assert main(["runs/small", *words]) == 1
    assert capsys.readouterr().out == ""
    assert run.read_outcome() == CRASH, "the outcome of the run"


def test_ranks_that_died_without_a_word_are_recorded(run, capsys):
    run.take_attempt({})
    assert main(["runs/small", "0", "-1", "0"]) == 0
    assert capsys.readouterr().out == "1 -1 4\n"
    assert run.read_attempts()[0]["ended"]["message"] == DIED
    assert run.read_outcome() == Outcome("failed", 0, DIED, 1, is_transient=True)
    run.outcome_file.unlink()  # as the script does
    before = run.read_attempts()
    assert main(["runs/small", "1", "-1", "4"]) == 0, "they died before they took a number"
    assert run.read_attempts() == before
