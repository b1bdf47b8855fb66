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
from trainer.config.presets import PRESETS, AlgorithmName, Preset

__all__ = [
    "ALGORITHMS",
    "PRESETS",
    "Algorithm",
    "PolicyTerms",
    "PolicyTokens",
    "Preset",
    "denominator",
    "group_advantages",
    "policy_terms",
    "sampler_kl",
    "sft",
    "token_weights",
    "truncated_weights",
]

ALGORITHMS: Final[Mapping[AlgorithmName, Algorithm]] = MappingProxyType({"grpo": grpo, "gspo": gspo, "cispo": cispo})
"""The formulas by name."""


def policy_terms(tokens: PolicyTokens, preset: Preset) -> PolicyTerms:
    """Return the terms of every trained token under a preset, see `trainer.config.presets.merge_preset`."""
    return ALGORITHMS[preset.algorithm](
        tokens,
        clip_low=preset.clip_low,
        clip_high=preset.clip_high,
        kl_coef=preset.kl_coef,
        kl_estimator=preset.kl_estimator,
    )
