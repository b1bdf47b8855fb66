"""`trainer init`: rows of common forms become a recipe that `trainer check` accepts; five questions in a terminal."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_recipe import write_small

from trainer.commands.cli import main
from trainer.config.load import load_recipe

CHATS = [
    {
        "conversations": [
            {"from": "human", "value": f"Reset device {n}?"},
            {"from": "gpt", "value": f"Hold {n} seconds."},
        ]
    }
    for n in range(40)
]
SUMS = [{"prompt": f"{n} + 1?", "answer": str(n + 1)} for n in range(40)]


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory with the config.json of a small model of 512 positions."""
    monkeypatch.chdir(tmp_path)
    write_small(tmp_path)
    for name in ("recipe.yaml", "train.jsonl", "eval.jsonl"):
        (tmp_path / name).unlink()
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    return tmp_path


def write_rows(name: str, rows: list[dict[str, Any]]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def init(*arguments: str) -> int:
    return main(["init", "--yes", "--model", "model", *arguments])


@pytest.mark.parametrize(
    ("rows", "said", "settings"),
    [
        (CHATS, "40 rows, read as ShareGPT: conversations with from and value", {"train_on": "all", "eval_frac": 0.1}),
        (
            [{"question": f"{n}?", "answer": "a"} for n in range(3)],
            "3 rows, read as question -> prompt, answer -> completion",
            {"columns": {"prompt": "question", "completion": "answer"}},
        ),
        ([{"instruction": "Add.", "input": "1 2", "output": "3"}], "1 rows, read as alpaca", {"train_on": "all"}),
        ([{"text": "Call me Ishmael."}], "1 rows, read as text: all of it is trained", {"format": "text"}),
    ],
)
def test_rows_of_each_form_become_a_recipe_that_check_accepts(rows, said, settings, capsys) -> None:
    assert init("--data", write_rows("my rows.jsonl", rows)) == 0
    assert said in capsys.readouterr().err
    written = yaml.safe_load(Path("my-rows.yaml").read_text())
    assert settings.items() <= written["data"].items()
    assert "# " in Path("my-rows.yaml").read_text()
    assert main(["check", "my-rows.yaml"]) == 0


def test_rft_takes_the_reward_that_the_rows_suggest_and_leaves_room_for_answers(capsys) -> None:
    assert init("--method", "rft", "--data", write_rows("sums.jsonl", SUMS)) == 0
    recipe = load_recipe(Path("sums.yaml")).recipe
    assert [spec.use for spec in recipe.rewards] == ["last_number"]
    assert recipe.data.max_seq_tokens == 512  # 256 for the prompt and 256 for the answer, the model's positions
    assert "trainer check sums.yaml --rewards" in capsys.readouterr().out


def test_no_longer_rows_than_the_model_has_positions() -> None:
    rows = [{"prompt": "word " * 400, "completion": "yes"}]
    assert init("--data", write_rows("long.jsonl", rows)) == 0
    assert load_recipe(Path("long.yaml")).recipe.data.max_seq_tokens == 512


def test_the_held_out_rows_are_never_none() -> None:
    for number in range(30):
        rows = [{"prompt": f"{number} {n}", "completion": "x"} for n in range(20)]
        assert init("--data", write_rows("few.jsonl", rows), "--force") == 0, number


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: no such file. Name a file of rows"),
        ([], "name the rows with --data FILE"),
        (["--data", "chats.jsonl", "--method", "dpo"], "dpo: preferences (DPO, ORPO, KTO, PPO with a reward model)"),
        (["--data", "chats.jsonl", "--method", "sfd"], "--method must be sft or rft (got 'sfd')"),
        (["--data", "chats.jsonl", "--shape", "h100x9000"], "shape h100x9000: unknown"),
        (["--data", "chats.jsonl", "--optimize", "first"], "--optimize must be all or last"),
        (["--data", "odd.jsonl"], "odd.jsonl:1: needs `messages`, or `prompt` and `completion`; it has: a, b"),
        (["--data", "chats.jsonl", "--method", "rft"], "chats.jsonl:1: the last turn is by assistant"),
    ],
)
def test_what_cannot_be_trained_is_said_and_nothing_is_written(arguments, said, capsys) -> None:
    write_rows("chats.jsonl", CHATS)
    write_rows("odd.jsonl", [{"a": "1", "b": "2"}])
    assert init(*arguments) == 2
    assert said in capsys.readouterr().err
    assert list(Path.cwd().glob("*.yaml")) == []


def test_a_bad_row_is_named_and_the_recipe_is_written(capsys) -> None:
    rows = [*CHATS[:3], {"conversations": [{"from": "wizard", "value": "x"}]}]
    assert init("--data", write_rows("chats.jsonl", rows)) == 2
    captured = capsys.readouterr()
    assert "chats.jsonl:4: " in captured.err
    assert Path("chats.yaml").is_file()
    assert captured.out.startswith("trainer check chats.yaml")


def test_a_field_whose_text_would_be_lost_is_named_in_a_recipe_that_can_be_mended(capsys) -> None:
    rows = [{**row, "history": [["q", "a"]]} for row in CHATS]
    assert init("--data", write_rows("chats.jsonl", rows)) == 2
    said = capsys.readouterr().err
    assert "chats.jsonl:1: `history` would not reach the text" in said
    assert "and 35 more: trainer check chats.yaml --data" in said
    assert Path("chats.yaml").is_file()


def test_an_existing_recipe_is_kept(capsys) -> None:
    write_rows("chats.jsonl", CHATS)
    Path("chats.yaml").write_text("mine")
    assert init("--data", "chats.jsonl") == 2
    assert Path("chats.yaml").read_text() == "mine"
    assert "chats.yaml exists" in capsys.readouterr().err


def test_five_questions_are_asked_and_a_wrong_answer_is_asked_again() -> None:
    write_rows("chats.jsonl", CHATS)
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer", "init"], stdin=end, stdout=end, stderr=end, close_fds=True
    )
    os.close(end)
    os.write(terminal, b"dpo\nsft\nmodel\nchats.jsonl\nlast\ncpu\n")
    shown = b""
    while True:
        try:
            part = os.read(terminal, 4096)
        except OSError:
            break
        if not part:
            break
        shown += part
    assert process.wait(timeout=60) == 0, shown.decode()
    os.close(terminal)
    text = shown.decode()
    assert [text.count(f"{number}/5 ") for number in range(1, 6)] == [2, 1, 1, 1, 1]
    written = yaml.safe_load(Path("chats.yaml").read_text())
    assert (written["data"]["train_on"], written["shape"]) == ("last", "cpu")


def test_the_quickstart_is_written_once_and_its_recipes_are_valid(monkeypatch, capsys) -> None:
    Path("models").mkdir()
    Path("model").rename("models/SmolLM2-135M-Instruct")
    assert main(["init", "--quickstart"]) == 0
    for name in ("sft", "rft"):
        assert load_recipe(Path(f"recipes/{name}_quickstart.yaml")).warnings == ()
        first = Path(f"recipes/{name}_quickstart.yaml").read_text().splitlines()[0]
        assert (Path("recipes") / first.partition("$schema=")[2]).is_file()
    before = Path("recipes/sft_quickstart.yaml").stat().st_mtime_ns
    capsys.readouterr()
    assert main(["init", "--quickstart"]) == 0
    assert "recipes/sft_quickstart.yaml: exists, kept" in capsys.readouterr().err
    assert Path("recipes/sft_quickstart.yaml").stat().st_mtime_ns == before
