"""Tokenized rows on disk equal tokenized rows, are found again, and are made anew for anything that differs."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import trl
from tiny import tiny_tokenizer

from trainer.config.recipe import DataSettings, DataSource, ModelSettings
from trainer.data import token_cache
from trainer.data.chat import ChatEncoder
from trainer.data.row_encoder import encode_all
from trainer.data.sources import read_rows, stream_rows
from trainer.data.token_cache import RowRequest, TokenizingState, tokenize_rows
from trainer.data.token_table import TokenTable
from trainer.errors import DataError

QWEN3 = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8")
NUM_ROWS = 700
"""Three chunks."""


def row(number: int) -> dict[str, Any]:
    """Every third row is too long, every fifth has a weight, every seventh two turns."""
    text = "no " * (60 if number % 3 == 0 else 2) + str(number)
    turns = [{"role": "user", "content": f"what is {number}?"}, {"role": "assistant", "content": text}]
    fields: dict[str, Any] = {"messages": turns * (2 if number % 7 == 0 else 1)}
    return fields | ({"weight": 0.3} if number % 5 == 0 else {})


def write_rows(file: Path, rows: list[dict[str, Any]]) -> DataSource:
    file.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return DataSource(path=str(file))


def make_encoder(template: str | None = None, **data) -> ChatEncoder:
    tokenizer = tiny_tokenizer()
    if template is not None:
        tokenizer.chat_template = template
    settings: Mapping[str, Any] = {"max_seq_tokens": 128, "overlong": "drop"} | data
    return ChatEncoder(tokenizer, ModelSettings(path="nowhere"), DataSettings(train=DataSource(path="x"), **settings))


def make_request(root: Path, *, rows: list[dict[str, Any]] | None = None, **data) -> RowRequest:
    source = write_rows(root / "rows.jsonl", [row(number) for number in range(NUM_ROWS)] if rows is None else rows)
    return RowRequest(root / ".tokens", make_encoder(**data), source)


def table_of(request: RowRequest, **options) -> TokenTable:
    *_, last = tokenize_rows(request, **options)
    assert last.directory is not None
    return TokenTable(last.directory)


@pytest.mark.parametrize(
    "data",
    [{}, {"overlong": "truncate"}, {"train_on": "last"}, {"format": "text"}],
    ids=["drop", "cut", "last", "text"],
)
def test_a_table_holds_what_the_encoder_yields(tmp_path, data):
    rows = (
        [{"prompt": f"a {n} ", "completion": "zq jx " * (n % 90 + 1)} for n in range(1, 300)]
        if "format" in data
        else None
    )
    request = make_request(tmp_path, rows=rows, **data)
    encoded = request.encoder.encode(read_rows(request.source, request.encoder.data))
    table = table_of(request)
    assert table.num_rows == len(encoded.rows)
    assert encoded.num_truncated if "overlong" in data else encoded.num_dropped
    for index, sequences in enumerate(encoded.rows):
        assert tuple(table.sequence(number) for number in table.sequences_of([index])) == sequences
    counts = table.counts
    assert (counts.num_read, counts.num_dropped) == (encoded.num_rows, encoded.num_dropped)
    assert (counts.num_truncated, counts.num_split) == (encoded.num_truncated, encoded.num_split)
    assert counts.num_sequences == len(encoded.sequences)
    assert counts.num_tokens == sum(len(each.token_ids) for each in encoded.sequences)
    assert counts.num_trained == sum(each.num_trained for each in encoded.sequences)


def test_rows_of_several_sequences_stay_together(tmp_path):
    # Qwen3's template leaves out the reasoning of earlier turns.
    chat = [
        {"role": role, "content": f"{role} {n}"} | ({"reasoning_content": f"why {n}"} if role == "assistant" else {})
        for n in range(2)
        for role in ("user", "assistant")
    ]
    source = write_rows(tmp_path / "rows.jsonl", [{"messages": chat}, {"messages": chat[:2]}])
    request = RowRequest(tmp_path / ".tokens", make_encoder(QWEN3), source)
    table = table_of(request)
    assert table.counts.num_split == 1
    assert [table.sequences_of([index]) for index in range(2)] == [[0, 1], [2]]
    assert [table.sequence(number).source.rpartition(":")[2] for number in range(3)] == ["1", "1", "2"]


def test_other_processes_write_the_same_files(tmp_path):
    request = make_request(tmp_path)
    *_, here = tokenize_rows(request)
    others = RowRequest(tmp_path / "others", request.encoder, request.source)
    states = list(tokenize_rows(others, few_rows=10))
    there = states[-1].directory
    assert here.directory is not None
    assert there is not None
    assert here.directory.name == there.name
    names = sorted(file.name for file in here.directory.iterdir())
    assert names == sorted(file.name for file in there.iterdir())
    for name in names:
        assert (here.directory / name).read_bytes() == (there / name).read_bytes()
    assert [file.name for file in (tmp_path / "others").iterdir()] == [there.name]


@pytest.mark.parametrize("num_processes", [0, 1, 3])
def test_chunks_come_in_order_and_the_first_bad_row_is_named(tmp_path, num_processes):
    rows = [row(number) for number in range(NUM_ROWS)]
    request = make_request(tmp_path, rows=rows)
    chunks = list(encode_all(request.encoder, request.rows(), num_processes))
    lines = [line for chunk in chunks for _, line in chunk.places]
    assert lines == sorted(lines)
    assert sum(chunk.counts.num_read for chunk in chunks) == NUM_ROWS
    text = (tmp_path / "rows.jsonl").read_text().splitlines()
    text[600] = "{"
    text[550] = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]})
    (tmp_path / "rows.jsonl").write_text("\n".join(text) + "\n")
    with pytest.raises(DataError, match=r"rows.jsonl:551: .*empty"):
        list(encode_all(request.encoder, request.rows(), num_processes))
    text[550] = text[551]
    (tmp_path / "rows.jsonl").write_text("\n".join(text) + "\n")
    with pytest.raises(DataError, match=r"rows.jsonl:601: not JSON"):
        list(encode_all(request.encoder, request.rows(), num_processes))


def test_an_error_in_another_process_is_the_same_error(tmp_path):
    request = make_request(tmp_path, overlong="error")
    with pytest.raises(DataError, match=r"rows.jsonl:1: .* tokens are more than data.max_seq_tokens \(128\)"):
        list(tokenize_rows(request, few_rows=10))
    assert list((tmp_path / ".tokens").iterdir()) == []


def test_a_second_start_reads_no_rows(tmp_path):
    request = make_request(tmp_path)
    *_, last = tokenize_rows(request)
    again = RowRequest(request.cache, make_encoder(), request.source)
    assert list(tokenize_rows(again)) == [TokenizingState(0, last.directory)]


def test_whatever_changes_the_tokens_makes_another_table(tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", [row(number) for number in range(20)])
    other = write_rows(tmp_path / "others.jsonl", [row(number) for number in range(1, 20)])
    cache = tmp_path / ".tokens"
    template = make_encoder().tokenizer.chat_template
    requests = [
        RowRequest(cache, make_encoder(), source),
        RowRequest(cache, make_encoder(), source, limit=10),
        RowRequest(cache, make_encoder(), other),
        RowRequest(cache, make_encoder(max_seq_tokens=127), source),
        RowRequest(cache, make_encoder(system="Be brief."), source),
        RowRequest(cache, make_encoder(template.replace("helpful", "kind")), source),
    ]
    directories = set()
    for request in requests:
        *_, last = tokenize_rows(request)
        directories.add(last.directory)
    assert len(directories) == len(requests)
    write_rows(tmp_path / "rows.jsonl", [row(number) for number in range(1, 20)])
    *_, last = tokenize_rows(requests[0])
    assert last.directory not in directories


@pytest.mark.parametrize("name", ["index.json", "token_ids", "lines"])
def test_a_damaged_table_is_made_again(tmp_path, name):
    request = make_request(tmp_path)
    *_, last = tokenize_rows(request)
    assert last.directory is not None
    whole = (last.directory / name).read_bytes()
    (last.directory / name).write_bytes(whole[:-1])
    *_, again = tokenize_rows(request)
    assert again.num_rows == NUM_ROWS
    assert (last.directory / name).read_bytes() == whole


def test_rows_of_an_unpinned_hub_source_are_read_again(tmp_path):
    (tmp_path / "set").mkdir()
    write_rows(tmp_path / "set" / "train.jsonl", [row(number) for number in range(1, 20)])
    request = RowRequest(tmp_path / ".tokens", make_encoder(), DataSource(hub=str(tmp_path / "set")))
    first = table_of(request).counts.num_read
    write_rows(tmp_path / "set" / "train.jsonl", [row(number) for number in range(1, 30)])
    assert (first, table_of(request).counts.num_read) == (19, 29)


def test_rows_are_found_by_file_and_line(tmp_path):
    table = table_of(make_request(tmp_path))
    file = tmp_path / "rows.jsonl"
    rows = table.rows_at({f"{file}:2", f"{file}:6", f"{file}:1", "other.jsonl:2", f"{file}:"})
    assert [table.sequence(table.sequences_of([each])[0]).source for each in sorted(rows)] == [f"{file}:2", f"{file}:6"]


def test_what_killed_processes_left_is_removed_later(tmp_path):
    request = make_request(tmp_path, rows=[row(1)])
    for name, age_s in ((".a.host.1.tmp", 7200), (".b.host.2.tmp", 60)):
        (request.cache / name).mkdir(parents=True)
        (request.cache / name / "token_ids").write_bytes(b"")
        then = time.time() - age_s
        os.utime(request.cache / name / "token_ids", (then, then))
    list(tokenize_rows(request))
    assert [file.name for file in request.cache.glob(".*")] == [".b.host.2.tmp"]  # another process may still write it


def test_work_that_is_stopped_leaves_nothing(tmp_path):
    request = make_request(tmp_path)
    states = tokenize_rows(request, few_rows=10)
    assert next(states).directory is None
    states.close()
    left = [path for path in request.cache.glob("*") if path.is_dir()] if request.cache.exists() else []
    assert not [path for path in left if path.name.startswith(".")], "an unfinished table"
    assert all(token_cache._is_complete(path) for path in left), "the process may have been faster than the end"


def test_rows_that_are_all_dropped_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"none of 2 rows is within data.max_seq_tokens \(4\)"):
        list(tokenize_rows(make_request(tmp_path, rows=[row(1), row(2)], max_seq_tokens=4)))


def test_streamed_rows_end_at_the_limit_before_a_bad_line(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n{\n')
    source = DataSource(path=str(tmp_path / "rows.jsonl"))
    assert [each["prompt"] for each in stream_rows(source, DataSettings(train=source), 2)] == ["a", "b"]
