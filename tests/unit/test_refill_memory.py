"""What a run remembers of its prompts: which of them `refill` draws first."""

from __future__ import annotations

import pytest
from groups import group, rollout

from trainer.training.refill_memory import RefillMemory, spread

ROWS = list(range(10))


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([0.0, 0.0, 0.0, 0.0], 0.0),
        ([1.0, 1.0, 1.0, 1.0], 0.0),
        ([1.0, 0.0, 0.0, 0.0], 0.5),  # three of six pairs
        ([1.0, 1.0, 0.0, 0.0], 4 / 6),
        ([0.1, 0.2, 0.3, 0.4], 1.0),
        ([1.0, None, 0.0, None], 1.0),  # failed rollouts are in no pair
        ([1.0, None, None, None], None),
    ],
)
def test_spread_is_the_share_of_pairs_with_different_rewards(rewards, expected):
    assert spread(group(*(rollout(3, reward) for reward in rewards))) == expected


def test_without_memory_the_order_is_the_one_given():
    assert list(RefillMemory().order([3, 1, 2])) == [3, 1, 2]


def test_prompts_with_a_signal_come_first_unknown_ones_next_solved_ones_last():
    memory = RefillMemory()
    memory.observe([(0, 0.0), (1, 0.0), (1, 0.0), (2, 0.5), (3, 0.6)])
    # mean of what was seen: (0 + 0 + 0.5 + 0.6) / (1 + 1.5 + 1 + 1) = 0.24, so unknown rows count as 0.2;
    # row 3: (0.6 + 0.24) / 2 = 0.4, row 2: 0.4, row 0: 0.1, row 1: (0 + 0.24) / 2.5 = 0.1
    assert list(memory.order(ROWS)) == [2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert list(memory.order(ROWS[::-1])) == [3, 2, 9, 8, 7, 6, 5, 4, 1, 0]


def test_a_prompt_that_is_solved_by_now_falls_behind():
    memory = RefillMemory()
    memory.observe([(0, 0.6), (1, 0.3)])
    assert next(memory.order([1, 0])) == 0
    for _ in range(3):
        memory.observe([(0, 0.0)])
    assert next(memory.order([0, 1])) == 1


def test_a_restored_memory_orders_alike_and_goes_on_alike():
    memory, other = RefillMemory(), RefillMemory()
    memory.observe([(number % 7, 1 / (number + 3)) for number in range(40)])
    other.restore(memory.dump())
    assert list(other.order(ROWS)) == list(memory.order(ROWS))
    for each in (memory, other):
        each.observe([(4, 1 / 3)])
    assert other.dump() == memory.dump()


def test_a_checkpoint_without_memory_is_said():
    said: list[str] = []
    memory = RefillMemory(said.append)
    memory.observe([(0, 0.6)])
    memory.restore(None)
    assert said == ["warning: the checkpoint has no refill.json: `refill` knows nothing of earlier steps"]
    assert list(memory.order([1, 0])) == [1, 0]
