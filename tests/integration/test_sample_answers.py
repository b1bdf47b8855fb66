"""An sft run records what it answers before and after training, and is the same run with or without that."""

from __future__ import annotations

import json
import shutil
from typing import Any, Final

import pytest
from project import Project, Run
from rft_project import prepare, work

from trainer.commands.cli import main
from trainer.data.chat import ChatEncoder, load_tokenizer
from trainer.data.sources import stream_rows
from trainer.report.run_report import RunReporter, Standing
from trainer.run.directory import RunDir
from trainer.training.sample_answers import asked_rows
from trainer.types import Row

SFT: Final[dict[str, Any]] = {
    "method": "sft",
    "data": {"train": "train.jsonl", "eval": "eval.jsonl", "max_seq_tokens": 128},
    "rows_per_step": 4,
    "steps": 4,
    "eval_interval": 2,
    "dcp_save_interval": 2,
}


def run_sft(project: Project, name: str, **changes: Any) -> Run:
    """Run the tiny sft recipe in this process."""
    project.recipe(f"{name}.yaml", **{**SFT, "name": name, **changes})
    return work(project, f"{name}.yaml", name)


def answers(run: Run, step: int) -> list[dict[str, Any]]:
    lines = (run.root / "answers" / f"step-{step:06d}.jsonl").read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def with_answers(shared: Project) -> Run:
    return run_sft(shared, "with", logging={"answers": 3})


def test_the_first_held_out_rows_are_answered_before_and_after(with_answers: Run, shared: Project) -> None:
    assert sorted(file.name for file in (with_answers.root / "answers").iterdir()) == [
        "step-000000.jsonl",
        "step-000004.jsonl",
    ]
    rows = [json.loads(line)["messages"] for line in (shared.root / "eval.jsonl").read_text().splitlines()]
    for step in (0, 4):
        found = answers(with_answers, step)
        assert [record["where"] for record in found] == ["eval.jsonl:1", "eval.jsonl:2", "eval.jsonl:3"]
        assert [record["prompt"] for record in found] == [messages[:1] for messages in rows[:3]]
        assert [record["fields"]["completion"] for record in found] == [messages[1]["content"] for messages in rows[:3]]
        assert {record["part"] for record in found} == {"held-out"}
        assert all(len(record["answers"]) == 1 for record in found)
    assert answers(with_answers, 0) != answers(with_answers, 4)


def test_the_report_shows_them(with_answers: Run) -> None:
    report = RunReporter(RunDir(with_answers.root), lambda _: Standing("finished", False)).read()
    assert report.samples is not None
    assert (report.samples.first_step, report.samples.last_step, report.samples.part) == (0, 4, "held-out")
    assert report.samples.difference is None
    assert not report.samples.is_judged
    texts = [sample.after[0].text for sample in report.samples.samples]
    assert texts == [record["answers"][0]["text"] for record in answers(with_answers, 4)]


def test_metrics_and_weights_do_not_depend_on_it(with_answers: Run, shared: Project) -> None:
    without = run_sft(shared, "without", logging={"answers": 0})
    assert not (without.root / "answers").exists()
    assert without.values() == with_answers.values()
    assert without.adapter() == with_answers.adapter()


def test_the_prompt_is_what_the_model_is_asked_with(with_answers: Run, shared: Project, monkeypatch) -> None:
    """The tokens before the trained ones are those of `trainer chat`."""
    monkeypatch.chdir(shared.root)
    recipe = RunDir(with_answers.root).read_plan().recipe
    encoder = ChatEncoder(load_tokenizer(recipe.model), recipe.model, recipe.data)
    assert recipe.data.eval is not None
    asked = list(asked_rows(encoder, stream_rows(recipe.data.eval, recipe.data, 5), recipe.data))
    assert len(asked) == 5
    for row in asked:
        assert row.token_ids == encoder.encode_prompt(Row({"messages": list(row.prompt.messages)}))


def test_training_rows_are_answered_where_there_are_no_held_out_rows(shared: Project) -> None:
    run = run_sft(shared, "training", data={"train": "train.jsonl", "max_seq_tokens": 128}, steps=1, eval_interval=0)
    found = answers(run, 1)
    assert {record["part"] for record in found} == {"training"}
    assert len(found) == 4


def test_a_finished_run_that_was_killed_before_its_last_answers_gets_them(with_answers: Run, shared: Project) -> None:
    copy = shared.root / "runs/again"
    shutil.copytree(with_answers.root, copy)
    (copy / "outcome.json").unlink()
    last = copy / "answers/step-000004.jsonl"
    expected = last.read_text()
    last.unlink()
    first = (copy / "answers/step-000000.jsonl").stat().st_mtime_ns
    run_sft(shared, "again", logging={"answers": 3})
    assert last.read_text() == expected
    assert (copy / "answers/step-000000.jsonl").stat().st_mtime_ns == first


def test_texts_without_a_prompt_are_not_answered_and_that_is_said(
    shared: Project, capfd: pytest.CaptureFixture[str]
) -> None:
    (shared.root / "texts.jsonl").write_text('{"text": "the quick brown fox sees 12 cats"}\n' * 4)
    data = {"train": "texts.jsonl", "format": "text", "max_seq_tokens": 128}
    run = run_sft(shared, "texts", data=data, steps=1, eval_interval=0)
    assert not (run.root / "answers").exists()
    said = capfd.readouterr().err
    assert said.count("no answers are recorded after step") == 2
    assert "none of the first 64 rows has a prompt that leaves room for an answer" in said


def test_texts_with_a_prompt_are_continued(shared: Project) -> None:
    rows = [{"prompt": "the quick brown", "completion": " fox"}] * 4
    (shared.root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": "pairs.jsonl", "format": "text", "max_seq_tokens": 128}
    (record, *_) = answers(run_sft(shared, "pairs", data=data, steps=1, eval_interval=0), 1)
    assert record["prompt"] == [{"role": "text", "content": "the quick brown"}]
    assert record["fields"] == {"completion": " fox"}


def test_rft_says_that_the_field_is_not_its_own(shared: Project, capfd: pytest.CaptureFixture[str]) -> None:
    prepare(shared)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(shared.root)
        assert main(["check", "rft.yaml", "--set", "logging.answers=2"]) == 2
    assert "logging.answers" in capfd.readouterr().err
