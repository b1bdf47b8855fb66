"""The named algorithms, with the numbers that their papers give.

An algorithm either has a loss of its own (`grpo`, `gspo`, `cispo`) or uses the loss of another with other numbers
(`dapo`, `dr_grpo`). Recipes can override each number; docs/algorithms.md gives the sources.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal, final

AlgorithmName = Literal["grpo", "gspo", "cispo", "dapo", "dr_grpo"]
LossName = Literal["grpo", "gspo", "cispo"]
KLEstimator = Literal["k1", "k2", "k3", "k3_corrected"]
Normalizer = Literal["token", "sequence", "constant"]
AdvantageEstimator = Literal["group_std", "mean_only", "leave_one_out"]
OverlongHandling = Literal["keep", "mask", "punish"]
ReferencePolicy = Literal["initial", "base"]


@final
@dataclass(frozen=True)
class ResolvedAlgorithm:
    """A policy-gradient algorithm with a value for every number.

    `trainer.planning.algorithm.resolve_algorithm` makes it from a recipe; the plan carries it, and training reads it
    there. For `algorithm: {name: dapo, clip_low: 0.1}` it is loss grpo, clip_low 0.1, clip_high 0.28, kl_coef 0,
    normalizer token, overlong mask, and so on.
    """

    name: AlgorithmName
    """The name in the recipe."""
    loss: LossName
    """The loss function: a key of `trainer.algorithms.ALGORITHMS`."""
    clip_low: float
    """The ratio is clipped below at 1 - clip_low; 1.0 means no lower bound."""
    clip_high: float
    """The ratio is clipped above at 1 + clip_high."""
    kl_coef: float
    """Weight of the penalty on KL(policy || reference); with 0.0 the KL is only measured."""
    kl_estimator: KLEstimator
    """Estimator used for the penalty; the estimators have different gradients."""
    normalizer: Normalizer
    """What the summed token losses of a step are divided by."""
    advantage: AdvantageEstimator
    """How the rewards of a group are turned into advantages."""
    overlong: OverlongHandling
    """What happens to completions truncated at the token limit."""
    overlong_reward: float = 0.0
    """Reward of a truncated completion with `overlong: punish`."""
    reference: ReferencePolicy = "initial"
    """The reference policy."""
    minibatches_per_step: int = 1
    """Optimizer updates per pass over the rollouts of a step."""
    epochs_per_batch: int = 1
    """Passes over the rollouts of a step."""
    mismatch_cap: float | None = None
    """Upper bound of the importance weight from sampler to trainer; None disables the correction."""


PRESETS: Final[Mapping[AlgorithmName, ResolvedAlgorithm]] = MappingProxyType(
    {
        "grpo": ResolvedAlgorithm(  # arXiv:2402.03300; the paper gives no clip bounds, these are PPO's
            name="grpo",
            loss="grpo",
            clip_low=0.2,
            clip_high=0.2,
            kl_coef=0.04,
            kl_estimator="k3",
            normalizer="sequence",
            advantage="group_std",
            overlong="keep",
        ),
        "dapo": ResolvedAlgorithm(  # arXiv:2503.14476
            name="dapo",
            loss="grpo",
            clip_low=0.2,
            clip_high=0.28,
            kl_coef=0.0,
            kl_estimator="k3",
            normalizer="token",
            advantage="group_std",
            overlong="mask",  # the paper's filtering; its soft punishment is a reward, its dynamic sampling is `refill`
        ),
        "dr_grpo": ResolvedAlgorithm(  # arXiv:2503.20783
            name="dr_grpo",
            loss="grpo",
            clip_low=0.2,
            clip_high=0.2,
            kl_coef=0.0,
            kl_estimator="k3",
            normalizer="constant",
            advantage="mean_only",
            overlong="keep",
        ),
        "gspo": ResolvedAlgorithm(  # arXiv:2507.18071; narrow, since they bound the mean ratio of a sequence
            name="gspo",
            loss="gspo",
            clip_low=3e-4,
            clip_high=4e-4,
            kl_coef=0.0,
            kl_estimator="k3",
            normalizer="sequence",
            advantage="group_std",
            overlong="keep",
        ),
        "cispo": ResolvedAlgorithm(  # arXiv:2506.13585 gives no upper bound; 5 is from ScaleRL (arXiv:2510.13786)
            name="cispo",
            loss="cispo",
            clip_low=1.0,
            clip_high=4.0,
            kl_coef=0.0,
            kl_estimator="k3",
            normalizer="token",
            advantage="group_std",
            overlong="keep",
        ),
    }
)
"""Defaults of each algorithm, by its name in a recipe."""
