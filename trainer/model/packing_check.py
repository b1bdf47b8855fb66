"""Stops a run whose packed neighbours leak, before step 1."""

from __future__ import annotations

import torch

from trainer.data.tokens import TokenSequence
from trainer.distributed.sharding import root_gathered
from trainer.errors import ModelError, NumericalError
from trainer.model.batch import Batch
from trainer.model.policy import Policy, has_experts

LENGTH = 12
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Of the mean distance of logprobs between our packed pass and the model's own; rounding stays far below."""


@torch.no_grad()
def verify_packing(policy: Policy, device: torch.device) -> None:
    """Score short sequences packed, with other neighbours, and by the model's own forward pass.

    Raises:
        ModelError: the model's code cannot run a pack.
        NumericalError: they differ: a neighbour leaks, or the model computes something that packing leaves out.
    """
    vocab = policy.causal_lm.get_output_embeddings().weight.shape[0]
    first, other, second = (_sequence(offset, vocab) for offset in (3, 5, 7))
    try:
        packed = policy(Batch.pack([first, second], device)).logprobs
    except (AttributeError, TypeError, ValueError) as error:  # it was written for other callers
        name = type(policy.causal_lm).__name__
        raise ModelError(f"{name} cannot run packed sequences ({type(error).__name__}: {error})") from error
    swapped = policy(Batch.pack([other, second], device)).logprobs
    tolerance = TOLERANCE.get(policy.causal_lm.dtype, 1e-3)
    leak = (packed - swapped)[LENGTH - 1 :].abs().mean().item()
    # Equal numbers of rows give equal bits, except where the neighbour's experts change how many rows each expert has.
    if not leak <= (tolerance if has_experts(policy.causal_lm) else 0.0):
        raise NumericalError(
            f"packed neighbours leak: logprobs move by {leak:.3g} on average when the sequence before changes. "
            "This model keeps state that packing does not separate; it cannot be trained here."
        )
    with root_gathered(policy):
        own = torch.cat([_own_logprobs(policy, sequence, device) for sequence in (first, second)])
    distance = (packed - own).abs().mean().item()
    if not distance < tolerance:
        raise NumericalError(
            f"packed logprobs differ from the model's own forward pass by {distance:.3g} on average. "
            "This model computes something that packed training leaves out; it cannot be trained here."
        )


def _sequence(offset: int, vocab: int) -> TokenSequence:
    tokens = tuple((offset * 7919 + position * position * 104729 + 11) % vocab for position in range(LENGTH))
    return TokenSequence(tokens, (True,) * LENGTH)


def _own_logprobs(policy: Policy, sequence: TokenSequence, device: torch.device) -> torch.Tensor:
    """The model as its authors wrote it: one sequence, eager attention, its own head."""
    model = policy.causal_lm
    ours = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        ids = torch.tensor(sequence.token_ids, device=device)
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
        return logits.log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)
    finally:
        model.set_attn_implementation(ours)
