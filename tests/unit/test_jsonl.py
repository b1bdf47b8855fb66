"""Rows from files and data sets: what cannot be read is named with file, line and remedy."""

from __future__ import annotations

import json

import pytest

from trainer.config.recipe import DataSettings, DataSource
from trainer.data.forms import row_messages, row_weight
from trainer.data.sources import read_rows
from trainer.errors import DataError
from trainer.types import Row

GOOD = '{"prompt": "one", "completion": "two"}'


def read(source: DataSource, limit: int | None = None, **settings) -> list[Row]:
    return read_rows(source, DataSettings(train=source, **settings), limit)


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Write rows.jsonl into the current directory and name it."""
    monkeypatch.chdir(tmp_path)

    def write(content: str | bytes) -> DataSource:
        path = tmp_path / "rows.jsonl"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return DataSource(path="rows.jsonl")

    return write


def test_rows_know_their_line_and_their_position(file):
    rows = read(file(f'\n{GOOD}\n\n{{"prompt": "drei", "answer": 3}}\n'))
    assert [(str(row), row.index, dict(row)) for row in rows] == [
        ("rows.jsonl:2", 0, {"prompt": "one", "completion": "two"}),
        ("rows.jsonl:4", 1, {"prompt": "drei", "answer": 3}),
    ]


def test_a_limit_reads_only_the_first_rows(file):
    assert [row.line for row in read(file(f"{GOOD}\n{GOOD}\nnot read\n"), limit=2)] == [1, 2]


def test_other_scripts_and_a_byte_order_mark_are_read(file):
    rows = read(file(b'\xef\xbb\xbf{"prompt": "caf\xc3\xa9 \\u732b \xe7\x8c\xab"}\n'))
    assert rows[0]["prompt"] == "café 猫 猫"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            f'{GOOD}\n{{"prompt": "one", "comp',
            r"rows.jsonl:2: not JSON: Unterminated string starting at at column 19 \(the line looks cut off\). "
            "Fix or remove the line.",
        ),
        (f"{GOOD}\nprompt: one\n", r"rows.jsonl:2: not JSON: Expecting value at column 1. Fix or remove the line."),
        (b'{"prompt": "caf\xe9"}\n', r"rows.jsonl:1: byte 15 is not UTF-8. Save the file as UTF-8."),
        (f"{GOOD}\n[1, 2]\n", r"rows.jsonl:2: expected a JSON object, found list"),
        ("", r"rows.jsonl: holds no rows. Give a file with one JSON object a line."),
        ("\n \n", r"rows.jsonl: holds no rows."),
    ],
    ids=["truncated", "no-json", "latin-1", "list", "empty", "blank"],
)
def test_unreadable_lines_are_named_with_the_remedy(file, content, message):
    with pytest.raises(DataError, match=message):
        read(file(content))


def test_columns_are_renamed_and_the_others_kept(file):
    rows = read(file('{"question": "one", "answer": "two"}'), columns={"prompt": "question", "completion": "answer"})
    assert rows[0]["prompt"] == "one"
    assert rows[0]["completion"] == "two"
    assert rows[0]["answer"] == "two"  # a reward may read it by its own name


def test_a_missing_column_is_named_with_those_that_are_there(file):
    message = r"rows.jsonl:1: no field `frage` \(data.columns\); the row has: prompt, completion"
    with pytest.raises(DataError, match=message):
        read(file(GOOD), columns={"prompt": "frage"})


def test_a_missing_file_is_named_with_the_remedy():
    with pytest.raises(DataError, match=r"nowhere.jsonl: no such file. Set data.train.path, or data.train.hub."):
        read(DataSource(path="nowhere.jsonl"))


def test_a_data_set_directory_is_loaded_by_the_datasets_library(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    directory = tmp_path / "sums"
    directory.mkdir()
    lines = [json.dumps({"question": f"{number} + 1?", "answer": str(number + 1)}) for number in range(3)]
    (directory / "train.jsonl").write_text("\n".join(lines))
    rows = read(DataSource(hub=str(directory)), columns={"prompt": "question", "completion": "answer"})
    assert [(row["prompt"], row["completion"]) for row in rows] == [("0 + 1?", "1"), ("1 + 1?", "2"), ("2 + 1?", "3")]
    assert str(rows[1]) == f"{directory}[train]:2"


def test_an_unreachable_hub_says_what_to_do():
    message = r"(?s)data set acme/sums: cannot be loaded \(.+\).*put the rows in a JSONL file and set data.train.path"
    with pytest.raises(DataError, match=message):
        read(DataSource(hub="acme/sums"))


def test_a_file_goes_before_the_hub(file):
    source = file(GOOD)
    assert len(read(DataSource(path=source.path, hub="acme/sums"))) == 1


def test_an_unreachable_hub_names_the_file_that_is_not_there():
    with pytest.raises(DataError, match=r"data.train.path \(now gone.jsonl, which does not exist\)"):
        read(DataSource(path="gone.jsonl", hub="acme/sums"))


def messages_of(fields, *, with_completion: bool = True, **settings):
    row = Row(fields, file="rows.jsonl", line=3)
    return row_messages(row, DataSettings(train=DataSource(path="x"), **settings), with_completion=with_completion)


USER, ASSISTANT = {"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [USER, ASSISTANT]},
        {"prompt": "one", "completion": "two"},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"prompt": [USER], "completion": "two"},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "o"}, {"type": "text", "text": "ne"}]},
                ASSISTANT,
            ]
        },
        # What Arrow fills into columns that a message does not have.
        {"messages": [{**USER, "tool_calls": None, "weight": None}, {**ASSISTANT, "name": None}], "tools": None},
    ],
    ids=["messages", "prompt-completion", "chats", "chat-and-text", "parts", "arrow-nulls"],
)
def test_every_form_of_a_row_is_the_same_chat(fields):
    assert messages_of(fields) == [USER, ASSISTANT]


def test_the_default_system_message_stands_before_rows_that_have_none():
    system = {"role": "system", "content": "Be brief."}
    assert messages_of({"messages": [USER, ASSISTANT]}, system="Be brief.") == [system, USER, ASSISTANT]
    for role in ("system", "developer"):
        own = [{"role": role, "content": "Be long."}, USER, ASSISTANT]
        assert messages_of({"messages": own}, system="Be brief.") == own


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": [{"role": "robot", "content": "x"}]}, r"messages\[0\]: unknown role 'robot'; known: system, dev"),
        ({"prompt": [{"role": "robot", "content": "x"}], "completion": "y"}, r"prompt\[0\]: unknown role 'robot'"),
        ({"prompt": "x", "completion": [{"role": "bot", "content": "y"}]}, r"completion\[0\]: unknown role 'bot'"),
        ({"prompt": 5, "completion": "y"}, r"`prompt` must be a text or a list of messages \(got int\)"),
        ({"prompt": "x", "completion": 5}, r"`completion` must be a text or a list of messages \(got int\)"),
        ({"prompt": [], "completion": "y"}, r"`prompt` must be a text or a list of messages \(got an empty list\)"),
        ({"messages": ["hello"]}, r"messages\[0\]: unknown role 'hello'"),
        ({"messages": []}, r"`messages` must be a list of messages"),
        ({"messages": "hello"}, r"`messages` must be a list of messages"),
        ({"messages": [{**ASSISTANT, "weight": 0.5}]}, r"messages\[0\]: weight must be 0 or 1 \(got 0.5\)"),
        ({"messages": [{"role": "user", "content": 5}]}, r"messages\[0\]: content must be text \(got int\)"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\]: content must be text \(got NoneType\)"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
            r"messages\[0\]: only text parts are supported \(got \{'type': 'image'",
        ),
        ({"messages": [USER]}, r"the last turn is not trained \(role user\); end the row with an assistant turn"),
        ({"messages": [USER, {**ASSISTANT, "weight": 0}]}, r"the last turn is not trained \(role assistant\)"),
        ({"prompt": "one"}, r"has `prompt` and no `completion`"),
        ({"text": "one", "id": 1}, r"needs `messages`, or `prompt` and `completion`; it has: text, id"),
        ({}, r"it has: nothing"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_refused_by_line(fields, message):
    with pytest.raises(DataError, match=r"^rows.jsonl:3: (.* )?" + message):
        messages_of(fields)


def test_an_rft_prompt_ends_with_a_user_or_tool_turn():
    assert messages_of({"prompt": "one"}, with_completion=False) == [USER]
    with pytest.raises(DataError, match="the last turn is by assistant; an rft prompt ends with a user turn"):
        messages_of({"messages": [USER, ASSISTANT]}, with_completion=False)


@pytest.mark.parametrize(
    ("fields", "weight"), [({}, 1.0), ({"weight": 0}, 0.0), ({"weight": 2.5}, 2.5), ({"weight": None}, 1.0)]
)
def test_a_row_has_its_weight(fields, weight):
    assert row_weight(Row(fields)) == weight


@pytest.mark.parametrize("weight", [-1, "2", True, float("nan"), float("inf"), [1]])
def test_other_weights_of_a_row_are_refused(weight):
    with pytest.raises(DataError, match=r"rows.jsonl:3: weight must be a number of 0 or more"):
        row_weight(Row({"weight": weight}, file="rows.jsonl", line=3))
