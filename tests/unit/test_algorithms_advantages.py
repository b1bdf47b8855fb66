"""Advantages relative to a group."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.algorithms import group_advantages

ESTIMATORS = ["group_std", "mean_only", "leave_one_out"]
REWARDS = st.lists(st.none() | st.floats(-1e6, 1e6), min_size=1, max_size=12)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("group_std", [0.75 / 0.5001, -0.25 / 0.5001, -0.25 / 0.5001, -0.25 / 0.5001]),  # std of 1, 0, 0, 0 is 0.5
        ("mean_only", [0.75, -0.25, -0.25, -0.25]),
        ("leave_one_out", [1.0, -1 / 3, -1 / 3, -1 / 3]),  # 1 - mean(0, 0, 0), 0 - mean(1, 0, 0)
    ],
)
def test_one_success_in_four(estimator, expected):
    assert group_advantages([[1.0, 0.0, 0.0, 0.0]], estimator) == [pytest.approx(expected)]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("reward", [0.1, 0.3, 1.0, -7.7, 1e-9, 0.0])
def test_flat_group_is_exactly_zero(estimator, reward):
    # The mean of equal floats may differ from them in the last bit: 0.1 seven times does.
    assert group_advantages([[reward] * 7], estimator) == [[0.0] * 7]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_failed_rollouts_are_left_out_of_their_group(estimator):
    ((first, failed, second),) = group_advantages([[1.0, None, 0.0]], estimator)
    assert failed is None
    assert [[first, second]] == group_advantages([[1.0, 0.0]], estimator)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_groups_of_one_or_no_score_are_zero(estimator):
    assert group_advantages([[None, 0.7], [None, None], []], estimator) == [[None, 0.0], [None, None], []]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_groups_do_not_see_each_other(estimator):
    first, second = [1.0, 0.0, 0.5], [100.0, -100.0]
    together = group_advantages([first, second], estimator)
    assert together == group_advantages([first], estimator) + group_advantages([second], estimator)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_order_in_the_group_changes_no_bit(estimator):
    rewards = [0.1, 0.7, 0.2, 0.30000001]
    by_reward = dict(zip(rewards, *group_advantages([rewards], estimator), strict=True))
    for order in itertools.permutations(rewards):
        assert group_advantages([list(order)], estimator) == [[by_reward[reward] for reward in order]]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@given(rewards=REWARDS)
def test_advantages_sum_to_zero_and_keep_the_order_of_rewards(estimator, rewards):
    (advantages,) = group_advantages([rewards], estimator)
    scored = [(r, a) for r, a in zip(rewards, advantages, strict=True) if r is not None and a is not None]
    assert len(scored) == sum(reward is not None for reward in rewards)
    largest = max((abs(advantage) for _, advantage in scored), default=0.0)
    assert abs(math.fsum(advantage for _, advantage in scored)) <= 1e-9 * (1 + largest) * len(scored)
    in_order = [advantage for _, advantage in sorted(scored)]
    assert in_order == sorted(in_order)


def test_large_rewards_do_not_overflow():
    # A reward is the user's: 1e200 squared would.
    assert group_advantages([[1e200, -1e200]], "group_std") == [pytest.approx([math.sqrt(0.5), -math.sqrt(0.5)])]
