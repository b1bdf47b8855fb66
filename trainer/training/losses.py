"""The losses that a learner can train on: from the scores of a pack to terms per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from trainer.algorithms import (
    LossTerms,
    PolicyTokens,
    ResolvedAlgorithm,
    policy_terms,
    sampler_kl,
    sft,
    token_weights,
    truncated_weights,
)
from trainer.model.batch import Batch
from trainer.model.policy import Scores


def sft_loss(scores: Scores, batch: Batch) -> LossTerms:
    """The SFT loss of a pack, which has weights."""
    return sft(scores.logprobs, batch.inputs.weights)


@final
@dataclass(frozen=True)
class PolicyLoss:
    """The loss of a policy algorithm over a pack, which has advantages, sampler and reference logprobs."""

    algorithm: ResolvedAlgorithm

    def __call__(self, scores: Scores, batch: Batch) -> LossTerms:
        """Terms whose sum, divided by the denominator of the step, is the normalizer's average."""
        inputs, own = batch.inputs, scores.logprobs.detach()
        old = own if inputs.old_logprobs is None else inputs.old_logprobs
        assert inputs.ref_logprobs is not None, "the reference is scored before the update"
        correction = None
        if self.algorithm.mismatch_cap is not None:
            correction = truncated_weights(old, inputs.sampler_logprobs, cap=self.algorithm.mismatch_cap)
        tokens = PolicyTokens(
            logprobs=scores.logprobs,
            old_logprobs=old,
            ref_logprobs=inputs.ref_logprobs,
            advantages=inputs.advantages,
            sequence_ids=batch.sequence_ids,
            sampler_weights=correction,
            num_sequences=batch.num_sequences,
        )
        terms = policy_terms(tokens, self.algorithm)
        weights = token_weights(self.algorithm.normalizer, batch.sequence_ids, batch.num_sequences)
        divergence = sampler_kl(old, inputs.sampler_logprobs)
        return LossTerms(terms.loss * weights, {**terms.metrics, "sampler_kl": divergence})
