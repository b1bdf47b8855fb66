"""Group sequence policy optimization (arXiv:2507.18071): one ratio per completion, its geometric mean.

    L(theta) = -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)
    ratio    = sg(s) * policy / sg(policy)                 of the token, the paper's GSPO-token: its value is s
    s        = exp(mean over the completion's tokens of log(policy / old))

sg stops the gradient. A term's gradient, -s * A where it is not clipped, is in its own token only, and the sum over a
completion has the gradient of the paper's sequence form. A completion is clipped as a whole or not at all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.algorithms.kl import LOG_RATIO_BOUND
from trainer.algorithms.normalize import sequence_sizes
from trainer.algorithms.terms import PolicyLossTerms, PolicyTokens, is_clipped_pessimistically


def gspo(tokens: PolicyTokens, *, clip_low: float, clip_high: float, in_ratio: Tensor | None = None) -> PolicyLossTerms:
    """Return the GSPO loss of every trained token.

    Args:
        tokens: Logprobs, advantages and completion of each token; completions must be whole.
        clip_low: Lower bound of the completion's ratio, 1 - clip_low.
        clip_high: Upper bound of the completion's ratio, 1 + clip_high.
        in_ratio: [N] bool, tokens that the mean is over, at least one of each completion; None is all.
    """
    log_ratio = sequence_means(
        (tokens.logprobs - tokens.old_logprobs).detach(), tokens.sequence_ids, tokens.num_sequences, in_ratio
    )
    log_ratio = log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    ratio = (log_ratio + (tokens.logprobs - tokens.logprobs.detach())).exp()
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    surrogate = torch.minimum(ratio * tokens.advantages, bounded * tokens.advantages)
    return PolicyLossTerms(-surrogate, is_clipped_pessimistically(ratio, tokens.advantages, clip_low, clip_high))


def sequence_means(
    values: Tensor, sequence_ids: Tensor, num_sequences: int | None = None, chosen: Tensor | None = None
) -> Tensor:
    """Return, for every token, the mean of `values` over its completion: [N].

    Args:
        values: [N].
        sequence_ids: [N] completion of each token.
        num_sequences: All ids are below it; None: found by reading them, which waits for a GPU.
        chosen: [N] bool, tokens that the mean is over, at least one of each completion; None is all.
    """
    num_tokens, taken = sequence_sizes(sequence_ids, num_sequences), values.double()
    if chosen is not None:
        num_tokens = torch.zeros_like(num_tokens).index_add_(0, sequence_ids, chosen.to(num_tokens.dtype))
        taken = torch.where(chosen, taken, 0.0)
    # In float64: bounds are as narrow as 3e-4, and the order of a float32 sum could move a completion across one.
    sums = torch.zeros_like(num_tokens, dtype=torch.float64).index_add_(0, sequence_ids, taken)
    return (sums[sequence_ids] / num_tokens[sequence_ids]).to(values.dtype)
