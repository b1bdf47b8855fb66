"""`trainer rollouts`: prompts from the journal, refused rollouts, headers, gold and parts of the reward."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from small_recipe import RFT, write_small

from trainer.commands.cli import main
from trainer.config.load import load_recipe
from trainer.planning.plan import make_plan
from trainer.run.directory import RunDir
from trainer.run.find import open_run
from trainer.run.journal import ChunkHeader, JournalPrompt, set_aside, write_chunk
from trainer.types import Group, Rollout, Row

ROW = Row({"prompt": "What is 0 + 1?", "answer": "1"}, "train.jsonl", 1, 0)
MESSAGES = ({"role": "system", "content": "Be short."}, {"role": "user", "content": "What is 0 + 1?"})
ASKED = JournalPrompt(0, "train.jsonl:1", MESSAGES, {"answer": "1"})
RIGHT = Rollout(
    (1, 7, 2), (False, True, True), (-0.5, -0.5), "stop", 0, "it is 1", 1.25,
    {"right": 1.0, "right/form": 0.5, "short": 0.25}, advantage=0.625,
)  # fmt: skip
WRONG = replace(
    RIGHT, text="\x1b[31mit is 2", reward=0.0, rewards={"right": 0.0, "right/form": 0.5, "short": 0.0}, advantage=-0.625
)
FAILED = replace(
    RIGHT, finish_reason="length", text="3", reward=None, rewards={"right": None, "short": 0.0}, advantage=None,
    failure="Traceback\nKeyError: 'answer'",
)  # fmt: skip


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.chdir(tmp_path)
    return open_run(make_plan(load_recipe(write_small(tmp_path, RFT))))


def write(run: RunDir, *rollouts: Rollout, step: int = 0, prompts: tuple[JournalPrompt, ...] = (ASKED,)) -> None:
    header = ChunkHeader(step, (0,), len(rollouts), 1, (10, None))
    write_chunk(run, 0, header, [Group(ROW, rollouts)], prompts)


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert main(["rollouts", "small", *arguments]) == 0
    return capsys.readouterr().out.splitlines()


def test_table_has_headers_gold_and_parts(run, capsys):
    write(run, WRONG, RIGHT)
    assert shown(capsys) == [
        "runs/small, step 1: 1 prompts",
        "",
        "train.jsonl:1",
        "  user    What is 0 + 1?",
        "          after 1 earlier messages: --full shows them",
        '  gold    answer="1"',
        "  reward  advantage  tokens  right  right/form  short  completion",
        "  1.250   +0.62      2       1.000  0.500       0.250  it is 1",
        "  0.000   -0.62      2       0.000  0.500       0.000  \\x1b[31mit is 2",
    ]


def test_a_failed_rollout_is_the_last_and_says_why(run, capsys):
    write(run, FAILED, RIGHT)
    lines = shown(capsys)
    assert lines[-2].split()[:2] == ["failed", "2"]
    assert lines[-2].endswith("3 ... (cut at the token limit)")
    assert lines[-1].strip() == "failure: KeyError: 'answer'"


def test_prompts_come_from_the_journal_and_not_from_the_file(run, capsys):
    write(run, WRONG, RIGHT)
    Path("train.jsonl").write_text('{"prompt": "Another question?", "completion": "x", "answer": "9"}\n' * 6)
    (group,) = json.loads(shown(capsys, "--json")[0])["groups"]
    assert group["prompt"] == "What is 0 + 1?"
    assert (group["messages"], group["fields"]) == ([*MESSAGES], {"answer": "1"})


def test_a_journal_without_prompts_says_so_and_guesses_none(run, capsys):
    write(run, WRONG, RIGHT, prompts=())
    assert shown(capsys)[3] == "  prompt  (not recorded: the journal was written by an earlier version)"


def test_refused_rollouts_are_shown_where_there_are_no_others(run, capsys):
    write(run, RIGHT, WRONG, step=0)
    write(run, FAILED, FAILED, step=1)
    set_aside(run, 1)
    assert shown(capsys)[0] == (
        "runs/small, step 2: 1 prompts, refused: too many had no reward, so the step was not trained on them"
    )
    assert "refused" not in shown(capsys, "--step", "1")[0]
    write(run, RIGHT, WRONG, step=1)
    lines = shown(capsys)
    assert lines[:2] == [
        "runs/small, step 2: 1 prompts",
        "an earlier attempt's rollouts of this step were refused: --refused shows them",
    ]
    assert "failed" in shown(capsys, "--refused")[-2]


def test_no_refused_rollouts_are_said(run, capsys):
    write(run, RIGHT, WRONG)
    assert main(["rollouts", "small", "--refused"]) == 2
    assert capsys.readouterr().err == "runs/small: no rollouts were refused\n"


def test_full_shows_every_message_and_whole_texts(run, capsys):
    write(run, replace(RIGHT, text="long " * 60), WRONG)
    assert "..." in shown(capsys)[-2]
    lines = shown(capsys, "--full")
    assert lines[3:5] == ["  system  Be short.", "  user    What is 0 + 1?"]
    assert lines[-2].endswith("long " * 59 + "long")
