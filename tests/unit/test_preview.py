"""`trainer check --data` and `--rewards`: counts over all rows, tokens of the first, every refusal at once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from chromium import CHROMIUM, chromium
from small_recipe import RFT, SFT, write_small
from tiny import tiny_model_dir, tiny_tokenizer

from trainer.checks.data_and_rewards import main, row_lines
from trainer.checks.data_survey import Piece, ShownRow, token_texts


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def in_directory_with_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_dir: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(model_dir)


def write_recipe(recipe: str = SFT, **settings: object) -> None:
    """The small recipe beside the tiny model, which keeps its config.json."""
    text = recipe
    for name, value in settings.items():
        text = text.replace("max_seq_tokens: 128", f"max_seq_tokens: 128\n  {name}: {value}")
    config = Path("model/config.json").read_text()
    write_small(Path(), text)
    Path("model/config.json").write_text(config)


def write_rows(*rows: Mapping[str, object] | str, file: str = "train.jsonl") -> None:
    Path(file).write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def data_of(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, dict[str, Any]]:
    """The counts, as JSON."""
    assert main(["recipe.yaml", "--data", "--json", *arguments]) == code
    return json.loads(capsys.readouterr().out)["data"]


def num_tokens(text: str) -> int:
    return len(tiny_tokenizer()(text, add_special_tokens=False)["input_ids"])


SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
PROMPT = SYSTEM + "<|im_start|>user\nWhat is 0 + 1?<|im_end|>\n<|im_start|>assistant\n"


def test_rows_are_shown_with_what_is_trained_in_brackets(capsys):
    write_recipe()
    assert main(["recipe.yaml", "--data"]) == 0
    out = capsys.readouterr().out
    prompt, answer = num_tokens(PROMPT), num_tokens("It is 1.<|im_end|>")
    head = f"train.jsonl:1: {prompt + answer + num_tokens(chr(10))} tokens, {answer} trained (in [[ ]])\n"
    assert out.startswith(
        head
        + "".join(f"  {line}\n" for line in PROMPT.splitlines()[:-1])
        + "  <|im_start|>assistant\n  [[It is 1.<|im_end|>]]\n"
    )
    assert out.count("train.jsonl:") == 3 + 1  # the first three rows, and where the longest stands
    assert "page: preview.html\n" in out
    assert "\x1b" not in out


def test_trained_tokens_are_coloured_where_there_is_a_terminal():
    pieces = (Piece("ask", False), Piece("an", True), Piece("swer", True))
    row = ShownRow("a.jsonl:1", 3, 2, "", pieces)
    assert row_lines(row, is_colored=True)[1:] == [
        "  \x1b[2mask\x1b[0m\x1b[30;102man\x1b[0m\x1b[30;42mswer\x1b[0m",
        "",
    ]
    assert row_lines(row, is_colored=False)[1:] == ["  ask[[answer]]", ""]


def test_counts_are_over_all_rows(capsys):
    write_recipe()
    rows = [json.loads(line) for line in Path("train.jsonl").read_text().splitlines()]
    own = [num_tokens(PROMPT.replace("What is 0 + 1?", row["prompt"])) for row in rows]
    answers = [num_tokens(row["completion"] + "<|im_end|>") for row in rows]
    train = data_of(capsys)["training rows"]
    assert train["num_rows"] == 6
    assert train["num_trained"] == sum(answers)
    assert train["num_tokens"] == sum(own) + sum(answers) + 6 * num_tokens("\n")
    assert (train["num_truncated"], train["num_dropped"], train["refused"]) == (0, 0, [])
    assert sum(train["histogram"].values()) == 6
    assert data_of(capsys)["held-out rows"]["num_rows"] == 1


LONG = {"prompt": "p", "completion": "long " * 100}
SHORT = {"prompt": "p", "completion": "short"}
HOPELESS = {"prompt": "long " * 200, "completion": "cut off"}
"""Truncated to the prompt, so that nothing of it is trained."""


@pytest.mark.parametrize(
    ("overlong", "truncated", "dropped", "refused", "code"),
    [("truncate", 1, 1, 0, 0), ("drop", 0, 2, 0, 0), ("error", 0, 0, 2, 2)],
)
def test_overlong_rows_are_counted_as_training_will_treat_them(overlong, truncated, dropped, refused, code, capsys):
    write_recipe(overlong=overlong)
    write_rows(SHORT, LONG, HOPELESS, SHORT | {"prompt": "q"})
    train = data_of(capsys, code=code)["training rows"]
    assert (train["num_rows"], train["num_truncated"], train["num_dropped"]) == (4, truncated, dropped)
    assert len(train["refused"]) == refused
    assert train["longest"] == "train.jsonl:3"
    assert train["longest_tokens"] > 128
    short = num_tokens(PROMPT.replace("What is 0 + 1?", "p") + "short<|im_end|>\n")
    assert train["num_tokens"] == 2 * short + (128 if truncated else 0)


def test_every_refused_row_is_named_not_only_the_first(capsys):
    write_recipe()
    write_rows(
        SHORT,
        '{"prompt": "cut off, "compl',
        {"messages": [{"role": "robot", "content": "hi"}]},
        SHORT,
        {"prompt": "no completion"},
        {"prompt": "nothing", "completion": "to train", "weight": 0},
        "[1, 2]",
        LONG,
    )
    assert main(["recipe.yaml", "--data"]) == 2
    captured = capsys.readouterr()
    assert [line.split(": ", 1)[0] for line in captured.err.splitlines()] == [
        "train.jsonl:2", "train.jsonl:7", "train.jsonl:3", "train.jsonl:5", "train.jsonl:6", "train.jsonl:8",
    ]  # fmt: skip
    for reason in (
        "train.jsonl:2: not JSON",
        "train.jsonl:3: messages[0]: unknown role 'robot'",
        "train.jsonl:5: has `prompt` and no `completion`",
        "train.jsonl:6: no token would be trained",
        "train.jsonl:7: expected a JSON object, found list",
        "are more than data.max_seq_tokens (128)",
    ):
        assert reason in captured.err
    assert "  rows            8\n" in captured.out
    assert "  refused         6\n" in captured.out
    assert "Traceback" not in captured.err


def test_of_many_refused_rows_ten_are_named_and_the_rest_counted(capsys):
    write_recipe()
    write_rows(SHORT, *({"prompt": f"{number}"} for number in range(25)))
    assert main(["recipe.yaml", "--data"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11
    assert lines[-1] == "and 15 more rows of train.jsonl are refused"


def test_a_held_out_row_among_the_training_rows_is_a_warning(capsys):
    write_recipe()
    write_rows(SHORT, LONG | {"completion": "x"}, file="train.jsonl")
    write_rows(SHORT, file="eval.jsonl")
    assert main(["recipe.yaml", "--data"]) == 0
    assert "warning: 1 held-out rows are among the training rows too" in capsys.readouterr().err


def test_prompts_of_rft_are_counted_with_the_room_they_leave(capsys):
    write_recipe(RFT)
    assert main(["recipe.yaml", "--data"]) == 0
    out = capsys.readouterr().out
    length = num_tokens(PROMPT)
    assert out.startswith(f"train.jsonl:1: {length} tokens, 0 trained (in [[ ]]), room for {128 - length} more\n")
    assert "[[" not in out.replace("[[ ]]", "")
    assert "  prompts         6\n" in out


def test_prompts_that_leave_too_little_room_are_counted(capsys):
    rows = [{"prompt": "x" * number, "answer": "1"} for number in (70, 300, 1)]
    write_recipe(RFT)
    write_rows(*rows)
    assert 112 < num_tokens(PROMPT.replace("What is 0 + 1?", "x" * 70)) < 128  # a completion may have 16
    train = data_of(capsys, code=2)["training rows"]
    assert [reason.split(": ")[0] for reason in train["refused"]] == ["train.jsonl:1", "train.jsonl:2"]
    write_recipe(RFT, overlong="drop")
    write_rows(*rows)
    train = data_of(capsys)["training rows"]
    assert (train["num_dropped"], train["num_sequences"], train["refused"]) == (2, 1, [])


class _Texts(HTMLParser):
    """Text of the page's cells by class, and every address in it."""

    def __init__(self) -> None:
        super().__init__()
        self.trained, self.all, self.addresses = "", "", list[str]()
        self._spans: list[bool] = []
        self._in_pre = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in_pre |= tag == "pre"
        if tag == "span" and self._in_pre:
            self._spans.append(("class", "t") in attrs)
        self.addresses += [value or "" for name, value in attrs if name in {"src", "href"}]

    def handle_endtag(self, tag: str) -> None:
        self._in_pre &= tag != "pre"
        if tag == "span" and self._spans:
            self._spans.pop()

    def handle_data(self, data: str) -> None:
        if self._spans:
            self.all += data
            self.trained += data if self._spans[-1] else ""


def test_the_page_is_one_file_with_the_same_tokens(capsys):
    write_recipe()
    write_rows({"prompt": "a < b & c", "completion": "<script>alert(1)</script>\nünïcode"})
    assert main(["recipe.yaml", "--data", "--html", "page.html"]) == 0
    text = Path("page.html").read_text(encoding="utf-8")
    seen = _Texts()
    seen.feed(text)
    assert seen.trained.replace("↵", "") == "<script>alert(1)</script>\nünïcode<|im_end|>" + "It is 71.<|im_end|>"
    assert "a < b & c" in seen.all
    assert seen.addresses == []
    assert "<script" not in text


def test_the_page_has_the_summary_first_then_refused_rows_then_tokens_with_their_ids(capsys):
    write_recipe()
    write_rows(SHORT, {"prompt": "only a <prompt>", "id": 7})
    assert main(["recipe.yaml", "--data", "--html", "page.html"]) == 2
    text = Path("page.html").read_text(encoding="utf-8")
    places = [
        text.index(part) for part in (">Counts<", "Refused training rows<", "only a &lt;prompt&gt;", "as tokens</h2>")
    ]
    assert places == sorted(places)
    first = tiny_tokenizer()(PROMPT, add_special_tokens=False)["input_ids"][0]
    assert f'title="token 0, id {first}"' in text
    assert "Held-out rows as tokens" in text


@pytest.mark.parametrize(
    ("arguments", "sources"),
    [
        (("--row", "3"), ["train.jsonl:3"]),
        (("--row", "5", "--row", "2"), ["train.jsonl:2", "train.jsonl:5"]),
        (("--find", "What is 4"), ["train.jsonl:5"]),
        (("--find", "It is 71"), ["eval.jsonl:1"]),
        (("--find", "nowhere"), []),
    ],
)
def test_rows_are_shown_by_line_or_by_text(arguments, sources, capsys):
    write_recipe()
    assert main(["recipe.yaml", "--data", *arguments]) == 0
    captured = capsys.readouterr()
    shown = [line.split(": ")[0] for line in captured.out.splitlines() if " trained (in" in line]
    assert shown == sources
    assert ("no row that can be used" in captured.err) == (not sources)


def test_what_became_of_each_field_is_said(capsys):
    write_recipe()
    rows: list[Any] = [SHORT | {"id": 1, "weight": 3.2}, SHORT | {"weight": 70.5}, SHORT | {"note": "x"}]
    write_rows(*rows)
    train = data_of(capsys)["training rows"]
    assert train["fields"] == {
        "prompt": "prompt",
        "completion": "trained",
        "id": "unread",
        "weight": "loss weight",
        "note": "unread",
    }
    assert train["forms"] == {"prompt and completion": 3}
    assert main(["recipe.yaml", "--data"]) == 0
    out = capsys.readouterr().out
    assert "  row weights     1 to 70.5: factors on the loss, from the field `weight`\n" in out
    assert "  fields:\n    prompt      prompt\n    completion  trained\n    id          unread\n" in out
    write_recipe(RFT)
    write_rows({"prompt": "1+1?", "answer": "2", "input": "x"})
    fields = data_of(capsys)["training rows"]["fields"]
    assert fields == {"prompt": "prompt", "answer": "reward only", "input": "reward only"}


def test_a_page_that_cannot_be_written_is_refused_in_words(capsys):
    write_recipe()
    assert main(["recipe.yaml", "--data", "--html", "none/page.html"]) == 2
    assert capsys.readouterr().err == "none/page.html: No such file or directory. Name another file with --html.\n"


@pytest.mark.parametrize("text", ["plain text", "ünïcode", "日本語 and 🙂🙃", "a\tb\nc"])
def test_token_texts_join_to_the_text_and_are_one_for_each_token(text):
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert "".join(texts) == text
    assert len(texts) == len(ids)


def test_what_a_terminal_would_obey_is_spelled_out():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("a\x1b[31mb\x07", add_special_tokens=False)["input_ids"]
    assert "".join(token_texts(tokenizer, ids)) == "a\\x1b[31mb\\x07"


def test_rewards_are_tried_on_the_rows(capsys):
    write_recipe(RFT)
    assert main(["recipe.yaml", "--rewards"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("reward last_number: from 0 to 1 on 6 rows\n")
    assert "gold above garbage   6 of 6 rows" in out


def test_a_reward_that_can_teach_nothing_is_refused(capsys):
    write_recipe(RFT.replace("use: last_number", "use: mine.py:flat"))
    Path("mine.py").write_text("def flat(completion, row):\n    return 0.5\n")
    assert main(["recipe.yaml", "--rewards"]) == 2
    assert capsys.readouterr().err.startswith("reward flat: gives 0.5 to everything")


def test_an_sft_recipe_has_no_rewards_to_try(capsys):
    write_recipe()
    assert main(["recipe.yaml", "--rewards"]) == 2
    assert capsys.readouterr().err == "recipe.yaml: has no rewards, since its method is sft\n"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_in_chromium_fits_the_screen_and_asks_for_nothing(tmp_path, width):
    write_recipe()
    write_rows(SHORT, {"prompt": "x" * 200 + "<img src=x onerror=alert(1)>", "completion": "y"}, {"prompt": "only <b>"})
    assert main(["recipe.yaml", "--data", "--html", "page.html"]) == 2
    url = Path("page.html").resolve().as_uri()
    with chromium(tmp_path) as tab:
        tab.open(url, width=width)
        tab.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
        assert (tab.complaints, tab.requests) == ([], [url])
        assert tab.run("document.documentElement.scrollWidth") == width
        assert tab.run("document.querySelectorAll('img, b img').length") == 0
        longest = "Math.max(...[...document.querySelectorAll('td div')].map((each) => each.offsetWidth))"
        assert tab.run(longest) > 50
