"""The losses: pure functions of per-token tensors, selectable by name.

A file is a formula. A paper without a new formula is a row of `PRESETS`. Nothing here reduces, moves or logs a tensor.
"""

from __future__ import annotations

from trainer.algorithms.advantages import group_advantages
from trainer.algorithms.mismatch import sampler_kl, truncated_weights
from trainer.algorithms.normalize import denominator, token_weights
from trainer.algorithms.policy import ALGORITHMS, policy_terms
from trainer.algorithms.sft import sft
from trainer.algorithms.terms import Algorithm, LossTerms, PolicyLossTerms, PolicyTokens
from trainer.config.presets import PRESETS, ResolvedAlgorithm

__all__ = [
    "ALGORITHMS",
    "PRESETS",
    "Algorithm",
    "LossTerms",
    "PolicyLossTerms",
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
