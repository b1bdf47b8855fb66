"""The losses of the training API: sums over tokens, as the protocol defines them.

    cross_entropy         -weight * log(policy)
    importance_sampling   -ratio * A
    ppo                   -min(ratio * A, clip(ratio, low, high) * A)
    cispo                 -sg(clip(ratio, low, high)) * A * log(policy)
    gspo                  that of ppo, with the geometric mean of the ratios of the datum's marked tokens

`ratio` is policy / sampler, `A` the advantage. Nothing is averaged: the client's weights and advantages are the
average. The formulas are those of `algorithms`, where the log of a ratio is bounded to 20.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from trainer.algorithms import LossTerms, PolicyTokens
from trainer.algorithms.cispo import cispo
from trainer.algorithms.grpo import grpo
from trainer.algorithms.gspo import gspo
from trainer.algorithms.kl import bounded_ratio
from trainer.algorithms.sft import sft
from trainer.api.datum import ADVANTAGES, LOGPROBS, RATIO_MASK, WEIGHTS


def loss_terms(
    loss: str,
    logprobs: torch.Tensor,
    inputs: Mapping[str, torch.Tensor],
    config: Mapping[str, float],
    sequence_ids: torch.Tensor,
) -> LossTerms:
    """Loss of each token of a pack, unreduced.

    Args:
        loss: a key of `LOSS_INPUTS`.
        logprobs: [N] of the targets under the policy, with gradient.
        inputs: [N] float32 each, by name.
        config: numbers of the loss.
        sequence_ids: [N] datum of each token, from 0; data are whole.
    """
    if loss == "cross_entropy":
        weights = inputs.get(WEIGHTS)
        return sft(logprobs, torch.ones_like(logprobs) if weights is None else weights)
    sampled, advantages = inputs[LOGPROBS], inputs[ADVANTAGES]
    if loss == "importance_sampling":
        return LossTerms(-bounded_ratio(logprobs, sampled) * advantages, {})
    tokens = PolicyTokens(
        logprobs=logprobs,
        old_logprobs=sampled,
        ref_logprobs=sampled,
        advantages=advantages,
        sequence_ids=sequence_ids,
    )
    low, high = 1 - config["clip_low_threshold"], config["clip_high_threshold"] - 1
    if loss == "gspo":
        terms = gspo(tokens, clip_low=low, clip_high=high, in_ratio=inputs[RATIO_MASK] != 0)
    else:
        terms = {"ppo": grpo, "cispo": cispo}[loss](tokens, clip_low=low, clip_high=high)
    return LossTerms(terms.loss, {"clipped_tokens": terms.is_clipped.to(logprobs.dtype)})
