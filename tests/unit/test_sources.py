"""Files of every kind that is read, directories, globs, lists and splits."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from small_recipe import SFT, write_small

import datasets
from trainer.config.length import count_rows
from trainer.config.load import load_recipe
from trainer.config.recipe import DataSettings, DataSource
from trainer.data.sources import read_rows
from trainer.errors import DataError, RecipeError
from trainer.planning.identity import source_digest
from trainer.planning.plan import make_plan

ROWS = [{"prompt": f"p{number}", "completion": f"c{number}"} for number in range(6)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def lines(rows=ROWS) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(name: str) -> None:
    """Write ROWS in the form that the name says."""
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith(".jsonl.gz"):
        path.write_bytes(gzip.compress(lines().encode()))
    elif name.endswith(".jsonl.zst"):
        with pyarrow.CompressedOutputStream(name, "zstd") as stream:
            stream.write(lines().encode())
    elif name.endswith("array.json"):
        path.write_text(json.dumps(ROWS))
    elif name.endswith("pretty.json"):
        path.write_text(json.dumps(ROWS, indent=2))
    elif name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), name)
    elif name.endswith(".csv"):
        path.write_text("prompt,completion\n" + "".join(f"{row['prompt']},{row['completion']}\n" for row in ROWS))
    elif name.endswith(".csv.gz"):
        path.write_bytes(gzip.compress(b"prompt,completion\n" + b"".join(b"p%d,c%d\n" % (n, n) for n in range(6))))
    elif name.endswith(".tsv"):
        path.write_text("prompt\tcompletion\n" + "".join(f"{row['prompt']}\t{row['completion']}\n" for row in ROWS))
    elif name == "saved":
        datasets.Dataset.from_list(ROWS).save_to_disk(name)
    elif name == "splits":
        datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(name)
    else:
        path.write_text(lines())


def settings_of(train, **fields) -> DataSettings:
    return DataSettings.model_validate({"train": train, **fields})


def read(train, **fields):
    data = settings_of(train, **fields)
    return read_rows(data.train, data)


NAMES = [
    *("rows.jsonl", "rows.json", "array.json", "pretty.json", "rows.jsonl.gz", "rows.jsonl.zst", "rows.parquet"),
    *("rows.csv", "rows.csv.gz", "rows.tsv", "saved", "splits"),
]


@pytest.mark.parametrize("name", NAMES)
def test_files_of_every_kind_hold_the_same_rows(name):
    write(name)
    rows = read(name)
    assert [dict(row) for row in rows] == ROWS
    assert [row.index for row in rows] == list(range(6))
    assert str(rows[2]).startswith(name + ":")
    assert source_digest(DataSource(path=name)).startswith("sha256:")


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_counted_where_the_file_tells(name):
    write(name)
    assert count_rows(DataSource(path=name)) == 6


def test_directories_and_globs_are_read_by_name():
    for name in ("data/b.jsonl", "data/a.parquet", "data/deep/c.csv", "data/README.md"):
        write(name)
    assert [row.file for row in read("data")][::6] == ["data/a.parquet", "data/b.jsonl", "data/deep/c.csv"]
    assert [row.file for row in read("data/*.jsonl")][::6] == ["data/b.jsonl"]
    assert {row.file for row in read("data/**/*.[cj]s*")} == {"data/b.jsonl", "data/deep/c.csv"}


def test_a_list_is_a_mixture_with_repeats():
    write("a.jsonl")
    write("b.parquet")
    rows = read(["a.jsonl", {"path": "b.parquet", "repeat": 2}, {"path": "a.jsonl", "repeat": 0.5}])
    prompts = [row["prompt"] for row in rows]
    assert prompts[:6] == [f"p{number}" for number in range(6)]
    assert prompts[6:18] == [f"p{number}" for number in range(6) for _ in range(2)]
    assert prompts[18:] == ["p1", "p3", "p5"]
    assert [row.index for row in rows] == list(range(21))
    assert count_rows(settings_of(["a.jsonl", {"path": "b.parquet", "repeat": 2}]).train) == 18


def test_a_share_is_held_out_by_content_whatever_the_order():
    many = [{"prompt": f"{number}", "completion": "x"} for number in range(400)]
    Path("rows.jsonl").write_text(lines(many))
    data = settings_of("rows.jsonl", eval_frac=0.25)
    assert data.eval is not None
    train, held_out = ({row["prompt"] for row in read_rows(source, data)} for source in (data.train, data.eval))
    assert train | held_out == {row["prompt"] for row in many}
    assert not train & held_out
    assert 70 < len(held_out) < 130
    Path("rows.jsonl").write_text(lines(many[::-1][:300]))
    assert {row["prompt"] for row in read_rows(data.eval, data)} == held_out & {row["prompt"] for row in many[100:]}


def test_nulls_that_arrow_fills_in_are_left_out_and_those_of_a_jsonl_file_stay():
    calls = [{"name": "a", "arguments": {"x": 1}}, {"name": "b", "arguments": {"y": [{"z": None}]}}]
    rows = [{"prompt": "p", "tools": calls}, {"prompt": "q", "tools": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "rows.parquet")
    Path("rows.jsonl").write_text(lines(rows))
    first, second = read("rows.parquet")
    assert first["tools"] == [{"name": "a", "arguments": {"x": 1}}, {"name": "b", "arguments": {"y": [{}]}}]
    assert dict(second) == {"prompt": "q"}
    assert [dict(row) for row in read("rows.jsonl")] == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b"PAR1\x00\x01", r"rows.jsonl: is a Parquet file, not JSON. Name the file accordingly"),
        ("rows.jsonl", gzip.compress(b"{}", mtime=0), r"rows.jsonl: is compressed with gzip, not JSON"),
        ("rows.parquet", b'{"prompt": "a"}\n', r"rows.parquet: cannot be read as PARQUET"),
        ("rows.jsonl.gz", b'{"prompt": "a"}\n', r"rows.jsonl.gz: cannot be decompressed"),
        (
            "rows.json",
            b'[\n {"prompt": "a"},\n {"prompt": \n]',
            r"rows.json:4: the file begins as a JSON array and is not",
        ),
        ("rows.json", b'[{"prompt": "a"}, 5]', r"rows.json: element 2: expected a JSON object, found int"),
        ("rows.json", b"[]", r"rows.json: holds no rows"),
    ],
)
def test_errors_name_the_real_problem(name, content, message):
    Path(name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(name)


def test_a_missing_split_is_named_with_those_that_are_there():
    write("splits")
    with pytest.raises(DataError, match="splits: has no split `test`; it has train"):
        read({"path": "splits", "split": "test"})


def test_cells_of_a_csv_file_are_texts_but_the_weight():
    Path("rows.csv").write_text('prompt,completion,weight\n"8, 9",17,0.5\nNA,"a ""b""",\n')
    assert [dict(row) for row in read("rows.csv")] == [
        {"prompt": "8, 9", "completion": "17", "weight": 0.5},
        {"prompt": "NA", "completion": 'a "b"'},
    ]


@pytest.mark.parametrize(
    ("data", "steps"),
    [
        ("{hub: rows}", 6),  # a directory that the data set library reads: 6 rows, 2 a step, 2 epochs
        ("rows", 6),
        ("[rows, {path: rows, repeat: 0.5}]", 9),
        ("saved", 6),
    ],
)
def test_epochs_have_a_length_before_rows_are_read(data, steps):
    write("rows/train.jsonl")
    write("saved")
    recipe = SFT.replace("train: train.jsonl", f"train: {data}").replace("steps: 10", "epochs: 2")
    assert make_plan(load_recipe(write_small(Path(), recipe))).steps == steps


def test_rows_that_cannot_be_counted_are_refused_for_epochs():
    Path("rows.arrow").write_bytes(b"ARROW1 and nothing else")
    recipe = SFT.replace("train: train.jsonl", "train: rows.arrow").replace("steps: 10", "epochs: 2")
    with pytest.raises(RecipeError, match=r"epochs: the rows of rows.arrow cannot be counted here; give `steps`"):
        load_recipe(write_small(Path(), recipe))


def test_rows_of_a_parquet_file_that_is_none_are_refused():
    Path("rows.parquet").write_text(lines())
    with pytest.raises(DataError, match=r"^rows.parquet: cannot be read as PARQUET: .*"):
        read("rows.parquet")


def test_a_large_parquet_file_is_read_in_parts_and_numbered_through():
    table = pyarrow.Table.from_pylist([{"prompt": f"p{n}", "completion": None} for n in range(1200)])
    pyarrow.parquet.write_table(table, "rows.parquet", row_group_size=500)
    rows = read("rows.parquet")
    assert [(row.line, dict(row)) for row in rows] == [(n + 1, {"prompt": f"p{n}"}) for n in range(1200)]


def test_columns_reach_into_nested_fields_by_dots(tmp_path):
    file = tmp_path / "rows.jsonl"
    row = {"extra": {"question": "2+2?"}, "reward_model": {"ground_truth": "4"}, "a.b": "literal", "a": {"b": "nested"}}
    file.write_text(json.dumps(row) + "\n" + json.dumps({"extra": {"q": "3?"}, "reward_model": None, "a.b": 1}) + "\n")
    columns = {"prompt": "extra.question", "answer": "reward_model.ground_truth", "label": "a.b"}
    settings = DataSettings.model_validate({"train": str(file), "columns": columns})
    refused: list[DataError] = []
    (found,) = read_rows(settings.train, settings, refused=refused)
    assert (found["prompt"], found["answer"], found["label"]) == ("2+2?", "4", "literal")
    assert [str(error) for error in refused] == [
        f"{file}:2: no field `extra.question`: `extra` has q (data.columns)",
    ]
