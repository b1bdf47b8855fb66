"""Check before step 1 that packed sequences do not affect each other."""

from __future__ import annotations

from typing import Final

import torch

from trainer.data.tokens import TokenSequence
from trainer.distributed.sharding import root_gathered
from trainer.errors import ModelError, NumericalError
from trainer.model.batch import Batch
from trainer.model.own_forward import own_logprobs
from trainer.model.policy import Policy

LENGTH: Final = 12
"""Tokens of each test sequence."""
TOLERANCE: Final = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Limit of the mean difference of logprobs between the packed pass and the model's own; rounding is far below it."""


@torch.no_grad()
def verify_packing(policy: Policy, device: torch.device) -> None:
    """Compare logprobs of short sequences: packed, packed with another neighbour, and by the model's own forward pass.

    Args:
        policy: to check.
        device: of the policy.

    Raises:
        ModelError: the model's code does not support packs.
        NumericalError: they differ: packed sequences affect each other, or packing omits a part of the model.
    """
    first, other, second = (_sequence(offset, policy.vocab_size) for offset in (3, 5, 7))
    try:
        packed = policy(Batch.pack([first, second], device)).logprobs
    except (AttributeError, TypeError, ValueError) as error:  # its signature or body does not fit the call
        name = type(policy.causal_lm).__name__
        raise ModelError(f"{name} cannot run packed sequences ({type(error).__name__}: {error})") from error
    swapped = policy(Batch.pack([other, second], device)).logprobs
    tolerance = TOLERANCE.get(policy.compute_dtype, 1e-3)
    leak = (packed - swapped)[LENGTH - 1 :].abs().mean().item()
    # Equal numbers of rows give equal bits. With experts, the neighbour changes the number of rows of each expert.
    if not leak <= (tolerance if policy.has_experts else 0.0):
        raise NumericalError(
            f"packed neighbours leak: logprobs move by {leak:.3g} on average when the sequence before changes. "
            "This model keeps state that packing does not separate; it cannot be trained here."
        )
    with root_gathered(policy):
        own = torch.cat([_eager_logprobs(policy, sequence, device) for sequence in (first, second)])
    distance = (packed - own).abs().mean().item()
    if not distance < tolerance:
        raise NumericalError(
            f"packed logprobs differ from the model's own forward pass by {distance:.3g} on average. "
            "This model computes something that packed training leaves out; it cannot be trained here."
        )


def _sequence(offset: int, vocab: int) -> TokenSequence:
    tokens = tuple((offset * 7919 + position * position * 104729 + 11) % vocab for position in range(LENGTH))
    return TokenSequence(tokens, (True,) * LENGTH)


def _eager_logprobs(policy: Policy, sequence: TokenSequence, device: torch.device) -> torch.Tensor:
    """By the model's own forward pass with eager attention."""
    model = policy.causal_lm
    packed = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        return own_logprobs(model, sequence.token_ids, device)
    finally:
        model.set_attn_implementation(packed)
