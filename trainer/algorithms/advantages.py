"""Advantages: how a reward compares with the other rewards of its group.

With r the rewards of one prompt's scored rollouts, G of them:

    group_std       A = (r - mean(r)) / (std(r) + 1e-4)    GRPO (arXiv:2402.03300); std with G - 1, as torch.std and TRL
    mean_only       A = r - mean(r)                        Dr. GRPO (arXiv:2503.20783)
    leave_one_out   A = r - mean of the others' rewards    RLOO (arXiv:2402.14740); G / (G - 1) times mean_only

Plain Python floats with exactly rounded sums: the result does not depend on the order of the rollouts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, assert_never

from trainer.config.presets import AdvantageEstimator

STD_EPSILON: Final = 1e-4
"""Added to the standard deviation; it bounds the advantages of nearly equal rewards."""


def group_advantages(
    rewards: Sequence[Sequence[float | None]], estimator: AdvantageEstimator
) -> list[list[float | None]]:
    """Return the advantage of every rollout, in the form of `rewards`; None where there is no reward.

    A group whose scored rewards are all equal, or that has only one, gets exactly 0. A failed rollout is left
    out of its group.

    >>> group_advantages([[1.0, 0.0, None], [0.3, 0.3]], "leave_one_out")
    [[1.0, -1.0, None], [0.0, 0.0]]

    Args:
        rewards: One sequence per group; None for a failed rollout.
        estimator: Which formula of the module's docstring.
    """
    return [_advantages_of_one_group(group, estimator) for group in rewards]


def _advantages_of_one_group(group: Sequence[float | None], estimator: AdvantageEstimator) -> list[float | None]:
    scored = [reward for reward in group if reward is not None]
    assert all(math.isfinite(reward) for reward in scored)
    if len(set(scored)) < 2:
        # Special case: rounding would leave a mean that differs from the rewards, and STD_EPSILON would magnify it.
        return [None if reward is None else 0.0 for reward in group]
    mean = math.fsum(scored) / len(scored)
    scale = _scale([reward - mean for reward in scored], estimator)
    return [None if reward is None else (reward - mean) * scale for reward in group]


def _scale(deviations: list[float], estimator: AdvantageEstimator) -> float:
    num_scored = len(deviations)
    match estimator:
        case "group_std":
            return 1 / (math.hypot(*deviations) / math.sqrt(num_scored - 1) + STD_EPSILON)
        case "mean_only":
            return 1.0
        case "leave_one_out":
            return num_scored / (num_scored - 1)
        case _:
            assert_never(estimator)
