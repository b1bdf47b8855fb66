"""Rewards that see all completions of a prompt, and rows that choose their rewards."""

from pathlib import Path

import pytest

from trainer.config.rft_sections import RewardSpec
from trainer.errors import RewardError
from trainer.rewards.runner import RewardRunner
from trainer.types import Row

GROUPS = '''
from trainer.rewards.contract import Score

def shortest(group, row, *, bonus=1.0):
    """The completions of one prompt against each other."""
    best = min(map(len, group))
    return [Score(bonus * (len(text) == best), {"size": len(group)}) for text in group]

def miscounted(group, row):
    return [1.0] * (len(group) - (row["n"] == 1))

def talks(group, row):
    return [float(len(talk)) for talk in row["conversations"]]

def alone(completion, row):
    return 1.0
'''


PROMPTS = [Row({}, file="rows.jsonl", line=number + 1, index=number) for number in range(2)]


@pytest.fixture(scope="module")
def groups_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("groups")
    Path(directory, "mine.py").write_text(GROUPS)
    return directory


def test_a_group_reward_gets_the_completions_of_one_prompt(groups_dir):
    items = [(text, PROMPTS[number]) for text, number in [("aaa", 0), ("a", 0), ("bb", 1), ("bbbb", 1), ("b", 1)]]
    spec = RewardSpec(use="mine.py:shortest", args={"bonus": 2.0})
    with RewardRunner([spec], base_dir=groups_dir, num_workers=2) as runner:
        scored = runner.score(items, [2, 3])
    assert [each.reward for each in scored] == [0.0, 2.0, 0.0, 0.0, 2.0]
    assert [each.rewards["shortest/size"] for each in scored] == [2.0, 2.0, 3.0, 3.0, 3.0]


def test_a_group_whose_reward_fails_fails_as_a_whole_and_alone(groups_dir):
    first, second = Row({"n": 1}, "rows.jsonl", 1), Row({"n": 2}, "rows.jsonl", 2)
    with RewardRunner([RewardSpec(use="mine.py:miscounted")], base_dir=groups_dir) as runner:
        scored = runner.score([("a", first), ("b", first), ("a", second), ("b", second)], [2, 2])
    assert [each.reward for each in scored] == [None, None, 1.0, 1.0]
    assert "returned 1 values for a group of 2 completions" in str(scored[0].failure)


def test_a_group_reward_sees_the_conversations(groups_dir):
    items = [("", Row({"conversation": [{"role": "user", "content": "?"}] * number})) for number in (1, 3)]
    with RewardRunner([RewardSpec(use="mine.py:talks")], base_dir=groups_dir) as runner:
        assert [each.reward for each in runner.score(items, [2])] == [1.0, 3.0]


def test_rows_choose_their_rewards(groups_dir):
    specs = [
        RewardSpec(use="last_number", label="sums"),
        RewardSpec(use="exact_match", label="words"),
        RewardSpec(use="mine.py:shortest", weight=0.5, every_row=True),
    ]
    tasks = [
        Row({"task": {"kind": "sums"}, "answer": 4}, "rows.jsonl", 1),
        Row({"task": {"kind": ["words"]}, "answer": "yes"}, "rows.jsonl", 2),
        Row({"task": {"kind": ["words", "sums"]}, "answer": "4"}, "rows.jsonl", 3),
    ]
    items = [
        (text, row) for row, texts in zip(tasks, [("4", "it is 5"), ("yes",), ("4",)], strict=True) for text in texts
    ]
    with RewardRunner(specs, base_dir=groups_dir, column="task.kind") as runner:
        scored = runner.score(items, [2, 1, 1])
        assert [dict(each.rewards) for each in scored] == [
            {"sums": 1.0, "shortest": 1.0, "shortest/size": 2.0},
            {"sums": 0.0, "shortest": 0.0, "shortest/size": 2.0},
            {"words": 1.0, "shortest": 1.0, "shortest/size": 1.0},
            {"sums": 1.0, "words": 1.0, "shortest": 1.0, "shortest/size": 1.0},
        ]
        assert [each.reward for each in scored] == [1.5, 0.0, 1.5, 2.5]
        unknown = Row({"task": {"kind": "sum"}}, "rows.jsonl", 4)
        with pytest.raises(
            RewardError, match=r"rows.jsonl:4: task.kind names no reward .*`sum`; did you mean `sums`\?"
        ):
            runner.score([("4", unknown)])
