"""The loss and metrics of every policy algorithm: formula, correction, KL penalty."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from trainer.algorithms.cispo import cispo
from trainer.algorithms.grpo import grpo
from trainer.algorithms.gspo import gspo
from trainer.algorithms.kl import k1, k3, kl_penalty
from trainer.algorithms.terms import Algorithm, LossTerms, PolicyTokens
from trainer.config.presets import LossName, ResolvedAlgorithm

ALGORITHMS: Final[Mapping[LossName, Algorithm]] = MappingProxyType({"grpo": grpo, "gspo": gspo, "cispo": cispo})
"""The formulas by name."""


def policy_terms(tokens: PolicyTokens, algorithm: ResolvedAlgorithm) -> LossTerms:
    """Return loss and metrics of every trained token: sampler_weights * formula + kl_coef * penalty.

    Args:
        tokens: Logprobs, advantages and completion of each token.
        algorithm: Which formula, its bounds, and weight and kind of the KL penalty.
    """
    formula = ALGORITHMS[algorithm.loss](tokens, clip_low=algorithm.clip_low, clip_high=algorithm.clip_high)
    policy_loss = formula.loss
    if tokens.sampler_weights is not None:
        policy_loss = policy_loss * tokens.sampler_weights
    penalty = kl_penalty(tokens.logprobs, tokens.old_logprobs, tokens.ref_logprobs, algorithm.kl_estimator)
    logprobs = tokens.logprobs.detach()
    old_to_policy = logprobs - tokens.old_logprobs
    policy_to_ref = tokens.ref_logprobs - logprobs
    return LossTerms(
        loss=policy_loss + algorithm.kl_coef * penalty,
        metrics={
            "ppo_kl": k3(old_to_policy),
            "ppo_kl_k1": k1(old_to_policy),
            "ref_kld": k3(policy_to_ref),
            "ref_kld_k1": k1(policy_to_ref),
            "clip_frac": formula.is_clipped.to(logprobs.dtype),
        },
    )
