"""Check before step 1 that a sequence's logprobs are the model's own, whatever it is packed with."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Final

import torch

from trainer.data.tokens import TokenSequence
from trainer.distributed.context import ContextGroup
from trainer.distributed.sharding import root_gathered
from trainer.distributed.world import World
from trainer.errors import ModelError, NumericalError
from trainer.model.batch import Batch
from trainer.model.own_forward import TOLERANCE, UNFIT, attention_as, cannot_run_alone, own_logprobs
from trainer.model.policy import Policy
from trainer.planning.batching import NOT_SEPARATED, rotary_switch, why_separate

LENGTHS: Final = (12, 10, 11)
"""Tokens of the test sequences: before, tested, behind."""


def verify_packing(policy: Policy, device: torch.device, max_seq_tokens: int = 0) -> None:
    """Make sure that every sequence is computed as by the model's own forward pass.

    Where packing changes a sequence, the policy runs sequences one by one from now on (`Policy.separate_reason`).

    Args:
        policy: to check.
        device: of the policy.
        max_seq_tokens: length of the run's longest sequence; 0: none is longer than those of the check.

    Raises:
        ModelError: the model's code does not run, packed or not.
        NumericalError: even a single sequence is computed otherwise than by the model's own forward pass.
    """
    if policy.separate_reason is None:
        reason = _packing_problem(policy, device, max_seq_tokens)
        if reason is None:
            return
        policy.run_separately(reason)
    _verify_single(policy, device)


@torch.no_grad()
def verify_slices(policy: Policy, world: World, context: ContextGroup) -> None:
    """Make sure that ranks which compute a pack together get what one rank gets; every rank calls it.

    Args:
        policy: packs sequences.
        world: the ranks.
        context: those of them that compute packs together with this one.

    Raises:
        NumericalError: some logprobs differ by more than rounding.
    """
    sequences = _sequences(policy.vocab_size)
    whole, own = Batch.pack(sequences, world.device), Batch.pack(sequences, world.device, context=context)
    assert own.part is not None
    ours, wanted = policy(own).logprobs, policy(whole).logprobs
    mine = torch.isin(whole.scored, own.part.rows[own.scored])
    distances = (ours - wanted[mine]).abs().double()
    total, count = world.sum_of([distances.sum().item(), float(len(distances))])
    if not total / count < TOLERANCE.get(policy.compute_dtype, 1e-3):
        name = policy.causal_lm.config.model_type
        raise NumericalError(
            f"context_parallel: logprobs of {name} differ by {total / count:.3g} on average when several ranks compute "
            "a pack together. Its layers mix tokens outside of attention; use a shape without context_parallel."
        )


def _packing_problem(policy: Policy, device: torch.device, max_seq_tokens: int) -> str | None:
    """Why sequences cannot be packed; None if packing is exact."""
    config = policy.config
    name = policy.causal_lm.config.model_type
    switch = rotary_switch(config)
    if switch is not None and max_seq_tokens > switch:
        return why_separate(config, max_seq_tokens)
    leaks = why_separate(config, 0) or f"{name} {NOT_SEPARATED}"
    before, tested, behind = _sequences(policy.vocab_size)
    batch = Batch.pack([before, tested, behind], device)
    # the layers compare `max_len` with windows that they do not pass to attention
    layout = replace(batch.layout, max_len=max(batch.layout.max_len, max_seq_tokens))
    try:
        leak = _leak(policy, replace(batch, layout=layout))
    except torch.OutOfMemoryError:
        raise
    except (*UNFIT, ModelError) as error:
        return f"{name} cannot run packed sequences ({type(error).__name__}: {error})"
    if leak != 0.0:
        return leaks
    tolerance = TOLERANCE.get(policy.compute_dtype, 1e-3)
    with torch.no_grad():
        packed = policy(batch).logprobs
        swapped = policy(Batch.pack([_other(before, policy.vocab_size), tested, behind], device)).logprobs
        first = LENGTHS[0] - 1
        moved = (packed - swapped)[first:].abs().mean().item()
        # Equal numbers of rows give equal bits. With experts, the neighbour changes the number of rows of each expert.
        if not moved <= (tolerance if policy.has_experts else 0.0):
            return leaks
        with root_gathered(policy), attention_as(policy.causal_lm, "eager"):
            own = torch.cat(
                [own_logprobs(policy.causal_lm, each.token_ids, device) for each in (before, tested, behind)]
            )
    distance = (packed - own).abs().mean().item()
    return None if distance < tolerance else f"{name} computes something that packing leaves out"


def _leak(policy: Policy, batch: Batch) -> float:
    """Largest gradient of the tested sequence's logprobs by the embeddings of its neighbours; NaN if there is none."""
    begin, end = LENGTHS[0], LENGTHS[0] + LENGTHS[1]
    with torch.enable_grad(), _embeddings(policy) as embedded:
        logprobs = policy(batch).logprobs[batch.sequence_ids == 1]
        gradients = torch.autograd.grad(logprobs.sum(), embedded, allow_unused=True)
    largest = [
        gradient.abs()[0, [*range(begin), *range(end, gradient.shape[1])]].max().item()
        for gradient in gradients
        if gradient is not None
    ]
    return math.nan if not largest or any(map(math.isnan, largest)) else max(largest)


@contextmanager
def _embeddings(policy: Policy) -> Iterator[list[torch.Tensor]]:
    """Makes the embedded tokens leaves, whose gradients show what a logprob depends on."""
    leaves: list[torch.Tensor] = []

    def keep(_module: torch.nn.Module, _args: object, output: torch.Tensor) -> torch.Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1].clone()  # some models write into it

    handle = policy.causal_lm.get_input_embeddings().register_forward_hook(keep)
    try:
        yield leaves
    finally:
        handle.remove()


@torch.no_grad()
def _verify_single(policy: Policy, device: torch.device) -> None:
    """Compare single sequences with the model's own forward pass, and make sure that no token sees later ones."""
    model, tolerance = policy.causal_lm, TOLERANCE.get(policy.compute_dtype, 1e-3)
    sequences = _sequences(policy.vocab_size)
    try:
        ours = torch.cat([policy(Batch.pack([each], device)).logprobs for each in sequences])
        with root_gathered(policy):
            own = torch.cat([own_logprobs(model, each.token_ids, device) for each in sequences])
            *begin, last = sequences[0].token_ids
            changed = own_logprobs(model, (*begin, (last + 1) % policy.vocab_size), device)
    except torch.OutOfMemoryError:
        raise
    except UNFIT as error:
        raise cannot_run_alone(model, error) from error
    distance = (ours - own).abs().mean().item()
    if not distance < tolerance:
        raise NumericalError(
            f"logprobs differ from the model's own forward pass by {distance:.3g} on average. "
            "This model computes something that training leaves out; it cannot be trained here."
        )
    seen = (own[: len(changed) - 1] - changed[:-1]).abs().mean().item()
    if not seen < tolerance:
        raise NumericalError(
            f"logprobs change by {seen:.3g} on average when a later token changes: the model is no causal language "
            "model; it cannot be trained here."
        )


def _sequences(vocab: int) -> list[TokenSequence]:
    return [_sequence(offset, length, vocab) for offset, length in zip((3, 7, 13), LENGTHS, strict=True)]


def _other(sequence: TokenSequence, vocab: int) -> TokenSequence:
    """Another sequence of the same length."""
    return _sequence(5, len(sequence.token_ids), vocab)


def _sequence(offset: int, length: int, vocab: int) -> TokenSequence:
    tokens = tuple((offset * 7919 + position * position * 104729 + 11) % vocab for position in range(length))
    return TokenSequence(tokens, (True,) * length)
