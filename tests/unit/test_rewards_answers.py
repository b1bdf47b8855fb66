"""Where the built-in rewards look for an answer, and which answers of rows they refuse."""

from __future__ import annotations

import pytest

from trainer.rewards.builtin.last_number import last_number
from trainer.rewards.builtin.text import exact_match
from trainer.types import Row


@pytest.mark.parametrize("reward", [last_number, exact_match])
@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("<think>\n4\n</think>\n5", 0.0),
        ("<think>\n5\n</think>\n4", 1.0),
        ("it is 5</think>4", 1.0),  # the template wrote the opening
        ("<think>\nit is\n4", 0.0),  # cut off
    ],
)
def test_thinking_holds_no_answer(reward, completion, score):
    assert reward(completion, {"answer": "4"}) == score


def test_exact_match_reads_accents_in_either_form():
    assert exact_match("cafe\u0301", Row({"answer": "caf\u00e9"})) == 1.0
    assert exact_match("cafe", Row({"answer": "caf\u00e9"})) == 0.0


@pytest.mark.parametrize("answer", [True, ["yes", False], "", " \n", ["Paris", ""]])
def test_exact_match_refuses_answers_that_mean_something_else(answer):
    with pytest.raises(ValueError, match=r"rows\.jsonl:3: answer is"):
        exact_match("True", Row({"answer": answer}, "rows.jsonl", 3))
