"""The named algorithms and the numbers that their papers give.

A name either has a formula of its own (`grpo`, `gspo`, `cispo`) or is another's with other numbers (`dapo`, `dr_grpo`).
Recipes override single fields; docs/algorithms.md says where each number is from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Literal, final

if TYPE_CHECKING:
    from trainer.config.recipe import AlgorithmSettings

AlgorithmName = Literal["grpo", "gspo", "cispo"]
KLEstimator = Literal["k1", "k2", "k3", "k3_corrected"]
Normalizer = Literal["token", "sequence", "constant"]
AdvantageEstimator = Literal["group_std", "mean_only", "leave_one_out"]
OverlongHandling = Literal["keep", "mask", "punish"]


@final
@dataclass(frozen=True)
class Preset:
    """Everything that makes a named algorithm that algorithm."""

    algorithm: AlgorithmName
    """Whose formula: a key of `trainer.algorithms.ALGORITHMS`."""
    clip_low: float
    """The ratio is bounded below by 1 - clip_low; 1.0 means no lower bound."""
    clip_high: float
    """The ratio is bounded above by 1 + clip_high."""
    kl_coef: float
    """Weight of the penalty on KL(policy || reference); 0.0 only measures it."""
    kl_estimator: KLEstimator
    """Which estimate the penalty is; they differ in their gradients."""
    normalizer: Normalizer
    """What the terms of a step are averaged over."""
    advantage: AdvantageEstimator
    """How a reward is compared with its group."""
    overlong: OverlongHandling
    """What to do with a completion that hit the token limit."""


PRESETS: Final[Mapping[str, Preset]] = MappingProxyType(
    {
        "grpo": Preset(  # arXiv:2402.03300; the bounds are PPO's, the paper gives none
            algorithm="grpo",
            clip_low=0.2,
            clip_high=0.2,
            kl_coef=0.04,
            kl_estimator="k3",
            normalizer="sequence",
            advantage="group_std",
            overlong="keep",
        ),
        "dapo": Preset(  # arXiv:2503.14476
            algorithm="grpo",
            clip_low=0.2,
            clip_high=0.28,
            kl_coef=0.0,
            kl_estimator="k3",
            normalizer="token",
            advantage="group_std",
            overlong="mask",  # the paper's filtering; its soft punishment is a reward, its dynamic sampling `refill`
        ),
        "dr_grpo": Preset(  # arXiv:2503.20783
            algorithm="grpo",
            clip_low=0.2,
            clip_high=0.2,
            kl_coef=0.0,
            kl_estimator="k3",
            normalizer="constant",
            advantage="mean_only",
            overlong="keep",
        ),
        "gspo": Preset(  # arXiv:2507.18071: the bounds are those of a sequence's mean ratio, hence so narrow
            algorithm="gspo",
            clip_low=3e-4,
            clip_high=4e-4,
            kl_coef=0.0,
            kl_estimator="k3",
            normalizer="sequence",
            advantage="group_std",
            overlong="keep",
        ),
        "cispo": Preset(  # arXiv:2506.13585; it gives no upper bound: ScaleRL's 5 (arXiv:2510.13786)
            algorithm="cispo",
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
"""By the name that a recipe uses."""


def merge_preset(given: AlgorithmSettings) -> Preset:
    """Return the numbers to train with: the recipe's where it gives one, else those of the algorithm it names."""
    preset = PRESETS[given.name]
    own = {name: getattr(given, name) for name in asdict(preset).keys() & given.model_fields_set}
    return replace(preset, **{name: value for name, value in own.items() if value is not None})


def resolve_algorithm(given: AlgorithmSettings) -> AlgorithmSettings:
    """Return the recipe's settings with every field filled in from the algorithm they name."""
    merged = asdict(merge_preset(given))
    return given.model_copy(update={name: merged[name] for name in merged.keys() & type(given).model_fields.keys()})
