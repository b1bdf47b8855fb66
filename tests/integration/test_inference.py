"""`trainer chat`, `generate` and `eval` on trained runs: the numbers of training, a file of rows, two answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from project import Project, Run
from rft_project import prepare, run_here

from trainer.config.load import load_recipe
from trainer.errors import UserError
from trainer.inference import chat, evaluation, generate
from trainer.inference.chat_model import ChatModel, Draw
from trainer.inference.source import find_source
from trainer.jobs import find_job
from trainer.planning.plan import make_plan
from trainer.run.find import open_run
from trainer.worker import main as work


@pytest.fixture(scope="module")
def project(shared: Project) -> Project:
    return prepare(shared)


@pytest.fixture(scope="module")
def rft(project: Project) -> Run:
    """Three steps of rft, evaluated before and after."""
    rollout = {"group_size": 4, "max_completion_tokens": 10, "eval_samples": 2}
    return run_here(project, "rft", steps=3, eval_interval=0, rollout=rollout)


@pytest.fixture(scope="module")
def sft(project: Project) -> Run:
    """Six steps of sft."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project.root)
        assert work(["recipe.yaml"]) == 0
    return project.run("tiny")


@pytest.fixture
def inside(project: Project, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(project.root)
    return project.root


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert evaluation.main([*arguments, "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


def test_eval_repeats_the_run_s_own_evaluations_of_both_models(rft: Run, inside: Path, capsys) -> None:
    about = evaluated(capsys, "rft")
    begin, *_, end = [record for record in rft.metrics() if "eval/reward" in record]
    assert (about["model"], about["against"], about["rows"], about["samples"]) == ("rft", "base", 6, 2)
    assert about["values"]["reward"]["value"] == pytest.approx(end["eval/reward"], rel=1e-12)
    assert about["against_values"]["reward"]["value"] == pytest.approx(begin["eval/reward"], rel=1e-12)
    assert begin["eval/reward"] != end["eval/reward"]
    paired = about["paired"]["reward"]
    assert paired["difference"] == pytest.approx(end["eval/reward"] - begin["eval/reward"], rel=1e-9)
    assert paired["low"] <= paired["difference"] <= paired["high"]
    assert paired["num_pairs"] == 6
    for k in (1, 2):
        assert about["values"][f"pass_at_{k}"]["value"] == pytest.approx(end[f"eval/pass_at_{k}"], rel=1e-12)
    assert about["token_loss"] is None


def test_eval_of_sft_gives_the_loss_of_training_and_of_its_base(sft: Run, inside: Path, capsys) -> None:
    about = evaluated(capsys, "tiny")
    begin, *_, end = [record["eval/loss"] for record in sft.metrics() if "eval/loss" in record]
    assert about["token_loss"] == pytest.approx([end, begin], rel=1e-5)  # packed otherwise than in training
    assert about["paired"]["loss"]["difference"] < 0
    assert about["paired"]["loss"]["num_pairs"] == 24


@pytest.mark.parametrize("target", ["runs/tiny", "runs/tiny/adapter"])
def test_copied_project_is_evaluated_with_its_own_files(
    sft: Run, project: Project, target: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(project.root, copy)
    rows = (copy / "eval.jsonl").read_text().splitlines(keepends=True)
    (copy / "eval.jsonl").write_text("".join(rows[:5]))
    monkeypatch.chdir("/")  # so that relative paths of the plan would not be found
    about = evaluated(capsys, str(copy / target), "--of", str(copy / "runs/tiny"))
    assert about["rows"] == 5
    assert find_source(str(copy / target)).model.path == str(copy / "model")


def test_eval_gives_a_bare_model_the_rows_and_rewards_of_a_run(rft: Run, inside: Path, capsys) -> None:
    begin = next(record["eval/reward"] for record in rft.metrics() if "eval/reward" in record)
    about = evaluated(capsys, "model", "--of", "rft")
    assert about["against"] is None
    assert about["values"]["reward"]["value"] == pytest.approx(begin, rel=1e-12)


def test_eval_writes_the_answers_of_both_models(rft: Run, inside: Path, capsys) -> None:
    evaluated(capsys, "runs/rft/adapter", "--of", "rft", "--rows", "3", "--out", "answers.jsonl")
    records = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
    assert [record["source"] for record in records] == [f"held_out.jsonl:{number}" for number in (1, 2, 3)]
    assert {len(record[role]["answers"]) for record in records for role in ("model", "against")} == {2}
    recorded = (rft.root / "evaluations" / "step-000003.jsonl").read_text().splitlines()
    for record, line in zip(records, recorded, strict=False):  # an adapter directory is the run's model
        texts = [answer["text"] for answer in json.loads(line)["answers"]]
        assert [answer["text"] for answer in record["model"]["answers"]] == texts


def test_eval_scores_answers_of_sft_by_a_reward(sft: Run, inside: Path, capsys) -> None:
    about = evaluated(
        capsys, "tiny", "--reward", "rewards.py:digits", "--rows", "4", "--against", "none", "--max-tokens", "8"
    )
    assert set(about["values"]) >= {"loss", "reward", "reward/digits", "completion_tokens"}
    assert about["values"]["completion_tokens"]["value"] <= 8
    assert evaluation.main(["tiny", "--rows", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "tiny against base: 2 rows; mean over rows, 95% bootstrap interval"
    assert lines[2].split()[0] == "loss"
    assert lines[3].startswith("loss over all tokens: ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["model"], "model: has no held-out rows of its own; name rows with --data FILE"),
        (["nothing"], "nothing: no run, no adapter (adapter_config.json) and no model (config.json)"),
        (["model", "--best"], "model: is no run; --best and --checkpoint go with a run"),
        (["tiny", "--samples", "0"], "--samples must be 1 or more (got 0)"),
        (["model", "--of", "tiny", "--against", "base"], "model: has no base; name a model with --against"),
    ],
)
def test_eval_says_what_is_missing(sft: Run, inside: Path, capsys, arguments, said) -> None:
    assert evaluation.main(arguments) == 2
    assert capsys.readouterr().err.startswith(said)


def test_generated_rows_can_be_trained_on(sft: Run, project: Project, inside: Path) -> None:
    assert generate.main(["tiny", "eval.jsonl", "--max-tokens", "6", "--out", "answers.jsonl"]) == 0
    rows = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
    asked = [json.loads(line)["messages"][0]["content"] for line in Path("eval.jsonl").read_text().splitlines()]
    assert [row["prompt"][-1] for row in rows] == [{"role": "user", "content": text} for text in asked]
    assert {row["source"] for row in rows} == {f"eval.jsonl:{number}" for number in range(1, 25)}
    assert all(row["num_tokens"] <= 6 for row in rows)
    kept = [row for row in rows if row["completion"].strip()][:8]
    assert kept
    Path("again.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    ignore = {"source", "sample", "finish_reason", "num_tokens"}
    project.recipe("again.yaml", name="again", steps=1, data__train="again.jsonl", data__ignore=sorted(ignore))
    assert work(["again.yaml"]) == 0


def test_generate_reads_a_prompt_a_line_and_repeats_its_noise(sft: Run, inside: Path, capsys) -> None:
    Path("prompts.txt").write_text("what is 1 + 1?\n\nwhat is 2 + 2?\n")
    arguments = ["tiny", "prompts.txt", "--samples", "2", "--temperature", "1", "--seed", "3", "--max-tokens", "8"]
    outputs = []
    for _ in range(2):
        assert generate.main(arguments) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    rows = [json.loads(line) for line in outputs[0].splitlines()]
    assert [(row["source"], row["sample"]) for row in rows] == [
        ("prompts.txt:1", 0), ("prompts.txt:1", 1), ("prompts.txt:3", 0), ("prompts.txt:3", 1),
    ]  # fmt: skip
    assert len({row["completion"] for row in rows}) > 1
    assert generate.main(["tiny", "prompts.txt", "--samples", "2"]) == 2
    assert "--samples needs a --temperature above 0" in capsys.readouterr().err


def test_generate_writes_plain_text_as_it_comes(sft: Run, inside: Path, capsys) -> None:
    Path("two.txt").write_text("what is 1 + 1?\nwhat is 2 + 2?\n")
    assert generate.main(["tiny", "two.txt", "--max-tokens", "8"]) == 0
    texts = [json.loads(line)["completion"] for line in capsys.readouterr().out.splitlines()]
    assert generate.main(["tiny", "two.txt", "--max-tokens", "8", "--text"]) == 0
    assert capsys.readouterr().out == "".join(f"{text}\n\n" for text in texts)
    assert generate.main(["tiny", "two.txt", "--text", "--samples", "2", "--temperature", "1"]) == 2


def test_chat_answers_beside_the_base_as_generate_does(sft: Run, project: Project, inside: Path, capsys) -> None:
    Path("question.txt").write_text("what is the sum of 1 and 3?\n")
    texts = []
    for target in ("tiny", "model"):
        capsys.readouterr()
        assert generate.main([target, "question.txt", "--max-tokens", "8"]) == 0
        texts.append(json.loads(capsys.readouterr().out)["completion"])
    lines = iter(["what is the sum of 1 and 3?", "/help", "/reset", "what is the sum of 1 and 3?", "/quit", "more"])
    talk = chat.Chat([loaded("tiny"), loaded("model")], Draw(max_tokens=8), None)
    answers = [talk.say("what is the sum of 1 and 3?")]
    assert [text.removesuffix(chat.CUT) for text in answers[0]] == texts
    assert [len(history) for history in talk.histories] == [2, 2]
    talk.reset()
    with Path("said.txt").open("w") as out:
        chat.talk(talk, lines, out, 100)
    said = Path("said.txt").read_text()
    assert said.count("tiny") == 2
    assert f"({chat.HELP})" in said
    assert "(a new chat)" in said
    assert next(lines) == "more"  # nothing is read after /quit


def loaded(target: str) -> ChatModel:
    return ChatModel(find_source(target))


def test_job_exports_its_model_and_says_why_it_cannot(sft: Run, project: Project, inside: Path) -> None:
    job = find_job("tiny")
    assert job.weights() == Path("runs/tiny/adapter")
    merged = job.export("merged", merge=True)
    assert (merged, (merged / "config.json").is_file()) == (Path("merged"), True)
    step = max(int(path.name.partition("-")[2]) for path in Path("runs/tiny/checkpoints").glob("step-*"))
    early = job.export("early", checkpoint=step)
    assert (early / "adapter_model.safetensors").is_file()
    project.recipe("fresh.yaml", name="fresh")
    fresh = open_run(make_plan(load_recipe(Path("fresh.yaml"))))
    with pytest.raises(UserError, match="runs/fresh: has no weights yet"):
        find_job(str(fresh.root)).export()


def test_a_checkpoint_is_the_model_of_its_step(sft: Run, inside: Path, capsys) -> None:
    """Of the last step it is the trained adapter; of an earlier one it has that step's loss."""
    by_step = {record["step"]: record["eval/loss"] for record in sft.metrics() if "eval/loss" in record}
    steps = find_job("tiny").run_dir.joinpath("checkpoints")
    kept = sorted(int(path.name.partition("-")[2]) for path in steps.glob("step-*"))
    shared = [step for step in kept if step in by_step]
    assert shared
    for step in shared:
        about = evaluated(capsys, "tiny", "--checkpoint", str(step), "--against", "none")
        assert about["model"] == f"tiny@{step}"
        assert about["token_loss"][0] == pytest.approx(by_step[step], rel=1e-5)
    assert evaluation.main(["tiny", "--checkpoint", "77"]) == 2
    assert "has no checkpoint of step 77; there are: " in capsys.readouterr().err


def test_a_run_that_was_stopped_answers_from_its_newest_checkpoint(sft: Run, inside: Path, capsys) -> None:
    stopped = Path("runs/stopped")
    shutil.copytree(sft.root, stopped)
    (stopped / "outcome.json").unlink()
    shutil.rmtree(stopped / "adapter")
    Path("one.txt").write_text("what is 1 + 1?\n")
    assert generate.main(["stopped", "one.txt", "--max-tokens", "4"]) == 0
    assert capsys.readouterr().err.startswith("stopped: checkpoint, step ")
    assert evaluation.main(["model", "--checkpoint", "3"]) == 2
    assert "model: is no run; --best and --checkpoint go with a run" in capsys.readouterr().err


@pytest.fixture(scope="module")
def full(project: Project) -> Run:
    """Two steps of sft of every parameter."""
    project.recipe("full.yaml", name="full", steps=2, lora=None, dcp_save_interval=2, optimizer__warmup_steps=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project.root)
        assert work(["full.yaml"]) == 0
    return project.run("full")


def test_a_checkpoint_of_every_parameter_is_the_model_that_was_written(full: Run, inside: Path, capsys) -> None:
    values = [
        evaluated(capsys, "full", *arguments, "--against", "none")["token_loss"][0]
        for arguments in ([], ["--checkpoint", "2"])
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_the_pieces_of_a_streamed_answer_are_the_answer(sft: Run, inside: Path) -> None:
    model, pieces = loaded("tiny"), list[str]()
    question = [{"role": "user", "content": "what is the sum of 1 and 3? \u00e9\u4e16"}]
    draw = Draw(max_tokens=24, temperature=1.0, seed=5)
    reply = model.reply(question, draw, pieces.append)
    assert "".join(pieces) == reply.text == model.reply(question, draw).text
    assert len(pieces) > 1


def test_chat_says_why_a_turn_is_refused_and_goes_on(sft: Run, inside: Path) -> None:
    talk = chat.Chat([loaded("tiny")], Draw(max_tokens=2), "Be short.")
    with Path("said.txt").open("w") as out:
        chat.talk(talk, iter(["hello <|im_start|>", "hello"]), out, 100)
    refusal, *answer = Path("said.txt").read_text().split("\n")
    assert "<|im_start|>" in refusal
    assert "".join(answer)
    assert [turn["role"] for turn in talk.histories[0]] == ["system", "user", "assistant"]


def test_chat_reads_a_pipe_and_passes_the_exit_code_on(sft: Run, project: Project) -> None:
    done = project.trainer("chat", "tiny", "--max-tokens", "4")  # no input
    assert (done.code, done.stdout, done.stderr) == (0, "", "")
    done = project.trainer("chat", "nothing")
    assert done.code == 2
    assert done.stderr.startswith("nothing: no run, no adapter")
