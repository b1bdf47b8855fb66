"""The committed rows are what their script makes, and held-out rows are new."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("extract", "sums", "json_rft", "code_rft")
FILES = [(name, split) for name in NAMES for split in ("train", "heldout")]


@cache
def rows(name: str, split: str) -> list[dict[str, Any]]:
    lines = (ROOT / "datasets" / f"{name}_{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def asked(row: dict[str, Any]) -> str:
    return next(message["content"] for message in reversed(row["messages"]) if message["role"] == "user")


def test_committed_files_are_what_the_script_makes():
    script = [sys.executable, str(ROOT / "scripts" / "make_datasets.py"), "--check"]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_held_out_families_are_absent_from_training(name):
    assert not {row["family"] for row in rows(name, "train")} & {row["family"] for row in rows(name, "heldout")}


@pytest.mark.parametrize("name", NAMES)
def test_no_text_is_asked_twice(name):
    asked_texts = Counter(asked(row).lower() for split in ("train", "heldout") for row in rows(name, split))
    assert [text for text, count in asked_texts.items() if count > 1] == []


@pytest.mark.parametrize(
    ("name", "split", "at_least"),
    [
        ("extract", "train", 800),
        ("extract", "heldout", 200),
        ("sums", "train", 400),
        ("sums", "heldout", 200),
        ("json_rft", "train", 120),
        ("json_rft", "heldout", 60),
        ("code_rft", "train", 60),
        ("code_rft", "heldout", 30),
    ],
)
def test_files_are_large_enough_to_measure_and_small_enough_to_commit(name, split, at_least):
    assert len(rows(name, split)) >= at_least
    assert (ROOT / "datasets" / f"{name}_{split}.jsonl").stat().st_size < 500_000


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_extracted_values_stand_in_the_sentence_as_written(split):
    for row in rows("extract", split):
        answer = json.loads(row["messages"][-1]["content"])
        assert len(answer) == 4, row
        for value in answer.values():
            # A price of 42.50 is the number 42.5.
            written = [value] if isinstance(value, str) else [str(value), f"{value:.2f}"]
            assert any(text in asked(row) for text in written), (row, value)


def test_some_held_out_values_are_new():
    known, found = (
        {value for row in rows("extract", split) for value in json.loads(row["messages"][-1]["content"]).values()}
        for split in ("train", "heldout")
    )
    assert {"Barcelona", "Stockholm", "Melbourne"} <= found - known


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_the_schema_takes_the_answer_and_no_other_keys(split):
    for row in rows("json_rft", split):
        answer = json.loads(row["answer"])
        jsonschema.validate(answer, row["schema"])
        assert not jsonschema.Draft202012Validator(row["schema"]).is_valid({**answer, "more": 1})


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_the_solution_passes_its_tests_and_doing_nothing_does_not(split):
    for row in rows("code_rft", split):
        name = row["solution"].removeprefix("def ").partition("(")[0]
        exec("\n".join([row["solution"], *row["tests"]]), {})
        with pytest.raises(AssertionError):
            exec("\n".join([f"def {name}(*arguments): return None", *row["tests"]]), {})


@pytest.mark.parametrize(("name", "split"), [file for file in FILES if file[0] != "extract"])
def test_rows_to_sample_from_end_with_a_question(name, split):
    assert {row["messages"][-1]["role"] for row in rows(name, split)} == {"user"}


def test_no_wording_alone_decides_how_a_demonstration_is_played():
    """Otherwise the policy learns to call the tool for that wording, and never tries it for others."""
    called = Counter(
        (row["family"], any("tool_calls" in said for said in row["messages"]))
        for row in rows("calculator_sft", "train")
    )
    families = {family for family, _ in called}
    assert len(families) == 4
    assert all(called[family, True] == 20 and called[family, False] == 60 for family in families)
    consistent = Counter((row["family"], _agrees(row["messages"])) for row in rows("guess_sft", "train"))
    assert all(consistent[f"guess-train-{form}", agrees] >= 20 for form in range(3) for agrees in (True, False))


def _agrees(messages: list[dict[str, Any]]) -> bool:
    """Whether every guess of a game agrees with the hints before it."""
    low, high = 0, 10**6
    said = [message["content"] for message in messages if message["role"] != "system"][1:]
    for guess, hint in zip(said[::2], [*said[1::2], ""], strict=False):
        if not low <= int(guess) <= high:
            return False
        low, high = (int(guess) + 1, high) if hint == "Higher." else (low, int(guess) - 1) if hint else (low, high)
    return True
