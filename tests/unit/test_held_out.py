"""What a row counts with in `trainer eval`, and how two answers stand on a terminal."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.config.recipe import DataSettings, ModelSettings
from trainer.config.rft_sections import RewardLimits
from trainer.errors import DataError, LaunchError, ModelError
from trainer.inference.chat import answer_lines
from trainer.inference.chat_model import prompt_row
from trainer.inference.evaluation import Measured, Task, report, report_lines
from trainer.inference.held_out import AnsweredRow
from trainer.inference.source import ModelSource, base_of, find_source
from trainer.training.evaluate import HeldOutAnswer
from trainer.types import Row

DATA = DataSettings.model_validate({"train": "rows.jsonl"})
SOURCE = ModelSource("model", ModelSettings(path="model"), DATA)


def answer(reward: float | None, tokens: int = 4, **parts: float | None) -> HeldOutAnswer:
    return HeldOutAnswer("text", reward, parts, "stop", tokens)


def answered(index: int, *answers: HeldOutAnswer) -> AnsweredRow:
    return AnsweredRow(Row({}, "rows.jsonl", index + 1, index), answers, sum(each.reward is None for each in answers))


def test_row_counts_failures_as_zero_and_leaves_abstentions_out():
    values = answered(
        0, answer(1.0, 2, right=1.0, short=None), answer(None, 6, right=None, short=0.5), answer(0.5, 4, right=0.5)
    ).values()
    assert values == {
        "reward": 0.5,  # of 1, 0 (failed) and 0.5
        "reward/right": 0.5,
        "reward/short": 0.5,  # it abstained on two
        "completion_tokens": 4.0,
        "truncated_frac": 0.0,
    }
    assert answered(0).values() is None  # every reward abstained


def test_report_pairs_rows_that_both_models_have():
    task = Task([Row({}, index=index) for index in range(3)], DATA, [], Path(), RewardLimits(), False, 1, None)
    ours = Measured("ours", answered=[answered(0, answer(1.0)), answered(1, answer(1.0)), answered(2)])
    theirs = Measured(
        "theirs", answered=[answered(0, answer(0.0)), answered(1, answer(None)), answered(2, answer(9.0))]
    )
    about = report(task, ours, theirs)
    paired = about.paired["reward"]
    assert (paired.num_pairs, paired.first, paired.second, paired.difference) == (2, 0.0, 1.0, 1.0)
    assert about.against_values["reward"].value == 3.0
    assert about.failed == (0, 1)
    lines = report_lines(about)
    assert lines[1].split()[:2] == ["ours", "theirs"]
    assert lines[2].split() == [
        "reward", "1.0000", "(1.0000", "to", "1.0000)", "3.0000", "(0.0000", "to", "9.0000)", "+1.0000", "(+1.0000",
        "to", "+1.0000)",
    ]  # fmt: skip
    assert lines[-1] == "a reward failed on 0 and 1 answers, which count as 0"


@pytest.mark.parametrize(
    ("fields", "prompt", "gold"),
    [
        ({"prompt": "2+2?", "completion": "4", "answer": "4"}, None, "4"),
        (
            {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}], "answer": "4"},
            [{"role": "user", "content": "2+2?"}],
            "4",
        ),
        (
            {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}], "answer": "4"},
            [{"role": "user", "content": "2+2?"}],
            "4",
        ),
    ],
)
def test_row_of_any_form_becomes_a_prompt_and_keeps_its_answer(fields, prompt, gold):
    row = prompt_row(Row(fields, "rows.jsonl", 3, 2), SOURCE)
    assert (row.get("messages"), row["completion"], row["answer"]) == (prompt, gold, "4")
    assert (str(row), row.index) == ("rows.jsonl:3", 2)


def test_row_without_a_form_names_file_and_line():
    with pytest.raises(DataError, match=r"rows\.jsonl:3: needs `messages`"):
        prompt_row(Row({"text": 1}, "rows.jsonl", 3), SOURCE)


def test_answers_stand_side_by_side_or_below_each_other_and_are_no_escapes():
    labels, answers = ["sums", "base"], ["one two three\nfour", "\x1b[31mred"]
    assert answer_lines(labels, answers, 60) == [
        "sums                          base",
        "one two three                 \\x1b[31mred",
        "four",
    ]
    assert answer_lines(labels, answers, 30) == ["sums:", "one two three", "four", "base:", "\\x1b[31mred"]


def test_names_that_are_no_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LaunchError, match="nothing: no run, no adapter"):
        find_source("nothing")
    assert find_source("org/name").model.path == "org/name"  # a hub name
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(ModelError, match=r"adapter/adapter_config\.json: is no LoRA adapter"):
        find_source("adapter")
    with pytest.raises(LaunchError, match="has no base"):
        base_of(SOURCE)


def test_dtype_of_a_bare_model_is_that_of_its_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, config, dtype in (
        ("a", '{"dtype": "float32"}', "float32"),
        ("b", '{"torch_dtype": "float16"}', "bfloat16"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
        assert find_source(name).model.compute_dtype == dtype
