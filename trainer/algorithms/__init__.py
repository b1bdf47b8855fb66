"""The losses: pure functions of per-token tensors, selectable by name.

A file is a formula. A paper without a new formula is a row of `PRESETS`. Nothing here reduces, moves or logs a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from trainer.algorithms.advantages import group_advantages
from trainer.algorithms.cispo import cispo
from trainer.algorithms.grpo import grpo
from trainer.algorithms.gspo import gspo
from trainer.algorithms.mismatch import sampler_kl, truncated_weights
from trainer.algorithms.normalize import denominator, token_weights
from trainer.algorithms.sft import sft
from trainer.algorithms.terms import Algorithm, PolicyTerms, PolicyTokens
from trainer.config.presets import PRESETS, LossName, ResolvedAlgorithm

__all__ = [
    "ALGORITHMS",
    "PRESETS",
    "Algorithm",
    "PolicyTerms",
    "PolicyTokens",
    "ResolvedAlgorithm",
    "denominator",
    "group_advantages",
    "policy_terms",
    "sampler_kl",
    "sft",
    "token_weights",
    "truncated_weights",
]

ALGORITHMS: Final[Mapping[LossName, Algorithm]] = MappingProxyType({"grpo": grpo, "gspo": gspo, "cispo": cispo})
"""The formulas by name."""


def policy_terms(tokens: PolicyTokens, preset: ResolvedAlgorithm) -> PolicyTerms:
    """Return the terms of every trained token."""
    return ALGORITHMS[preset.loss](
        tokens,
        clip_low=preset.clip_low,
        clip_high=preset.clip_high,
        kl_coef=preset.kl_coef,
        kl_estimator=preset.kl_estimator,
    )
