"""Rows that no completion could be scored on are refused before anything is sampled."""

import subprocess
import sys

import pytest

from trainer.config.rft_sections import RewardSpec
from trainer.errors import RewardError
from trainer.rewards.row_checks import refuse_unscorable_rows
from trainer.types import Row


def rows(*fields):
    return [Row(each, "rows.jsonl", line) for line, each in enumerate(fields, start=1)]


def test_each_row_without_a_usable_answer_is_named():
    specs = [RewardSpec(use="last_number"), RewardSpec(use="regex_match", args={"pattern": "x"})]
    refuse_unscorable_rows(specs, rows({"answer": 1}, {"answer": "#### 2"}))
    with pytest.raises(RewardError) as caught:
        refuse_unscorable_rows(specs, rows({"answer": 1}, {"answer": "3/8"}, {"gold": 4}))
    first, second = str(caught.value).splitlines()
    assert first.startswith("rows.jsonl:2: answer is not a number: '3/8'.")
    assert second == "rows.jsonl:3: no field 'answer', which the reward last_number reads (the row has: gold)"


def test_arguments_of_the_recipe_are_used():
    refuse_unscorable_rows(
        [RewardSpec(use="exact_match", args={"field": "gold", "ignore_case": True})], rows({"gold": "a"})
    )
    with pytest.raises(RewardError, match=r"rows.jsonl:1: gold must be a text"):
        refuse_unscorable_rows([RewardSpec(use="exact_match", args={"field": "gold"})], rows({"gold": None}))
    with pytest.raises(RewardError, match=r"rows.jsonl:1: checks must be a list of tests"):
        refuse_unscorable_rows([RewardSpec(use="code_tests", args={"field": "checks"})], rows({"checks": []}))
    with pytest.raises(RewardError, match=r"rows.jsonl:1: schema is not a JSON Schema"):
        refuse_unscorable_rows([RewardSpec(use="json_schema")], rows({"schema": {"type": "objekt"}}))


def test_many_are_counted():
    with pytest.raises(RewardError, match=r"\nand 95 more$"):
        refuse_unscorable_rows([RewardSpec(use="last_number")], rows(*[{"answer": "x"}] * 100))


def test_no_torch_and_no_optional_library_is_needed():
    code = "import sys, trainer.rewards.row_checks as r; from trainer.types import Row\n"
    code += "from types import SimpleNamespace as S\n"
    code += "specs = [S(use=name, args={}) for name in ('last_number', 'exact_match')]\n"
    code += "r.refuse_unscorable_rows(specs, [Row({'answer': 1})])\n"
    code += "assert not {'torch', 'math_verify'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_rows_that_choose_rewards_are_checked_for_those_only():
    specs = [RewardSpec(use="last_number", label="sums"), RewardSpec(use="exact_match", label="words")]
    good = rows({"task": "sums", "answer": 4}, {"task": ["words"], "answer": "four"})
    refuse_unscorable_rows(specs, good, "task")
    bad = rows(
        {"task": "sums", "answer": "four"},
        {"task": "word", "answer": "four"},
        {"tasks": "sums", "answer": 1},
        {"task": 3, "answer": 1},
        {"task": [], "answer": 1},
    )
    with pytest.raises(RewardError) as caught:
        refuse_unscorable_rows(specs, bad, "task")
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("rows.jsonl:1: answer is not a number: 'four'.")
    assert lines[1:] == [
        "rows.jsonl:2: task names no reward of the recipe: `word`; did you mean `words`?",
        "rows.jsonl:3: no field `task` (reward_column); the row has: tasks, answer",
        "rows.jsonl:4: task must name a reward, or be a list of names (got 3)",
        "rows.jsonl:5: task is an empty list, and no reward has `every_row: true`",
    ]


def test_nested_fields_are_named_by_dots():
    spec = RewardSpec(use="last_number", args={"field": "reward_model.ground_truth"})
    nested = {"reward_model": {"ground_truth": "4", "style": "rule"}}
    refuse_unscorable_rows([spec], rows(nested, {"reward_model.ground_truth": 5}))
    with pytest.raises(RewardError) as caught:
        refuse_unscorable_rows(
            [spec], rows({"reward_model": {"gold": 1, "style": "rule"}}, {"answer": 1}, {"reward_model": None})
        )
    path = "no field `reward_model.ground_truth`"
    assert str(caught.value).splitlines() == [
        f"rows.jsonl:1: {path}: `reward_model` has gold, style, which the reward last_number reads",
        f"rows.jsonl:2: {path}: the row has answer, which the reward last_number reads",
        f"rows.jsonl:3: {path}: `reward_model` is null, which the reward last_number reads",
    ]


def test_a_judge_needs_a_prompt_and_its_fields():
    spec = RewardSpec(use="llm_judge", args={"url": "http://h/v1", "model": "m", "rubric": "r", "fields": ["a.b"]})
    refuse_unscorable_rows([spec], rows({"prompt": "?", "a": {"b": 1}}))
    with pytest.raises(RewardError) as caught:
        refuse_unscorable_rows([spec], rows({"question": "?", "a": {"b": 1}}, {"prompt": "?", "a": {}}))
    first, second = str(caught.value).splitlines()
    assert first.startswith("rows.jsonl:1: no field holds the prompt that llm_judge shows; name it in data.columns")
    assert second == "rows.jsonl:2: no field `a.b`: `a` has nothing, which the reward llm_judge reads"
