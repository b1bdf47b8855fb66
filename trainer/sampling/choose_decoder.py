"""Chooses the fastest decoder that computes the policy's logprobs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, final

import torch

from trainer.config.unsupported import SHARDED_SAMPLING
from trainer.data.tokens import TokenSequence
from trainer.errors import ModelError
from trainer.model.batch import Batch
from trainer.model.lm_head import transformed_log_softmax
from trainer.model.policy import Policy, score
from trainer.sampling.decoder import CopiedDecoder, Decoder
from trainer.sampling.fused import FusedDecoder, is_fusible
from trainer.sampling.own_decoder import OwnDecoder

PROMPTS: Final = (12, 7)
"""Lengths of the prompts of the trial."""
PROMPT_OF: Final = (0, 1, 0, 1)
"""Prompt of each completion."""
LENGTHS: Final = (3, 8, 8, 6)
"""Length of each completion: some end before the others, and differences have the time to grow."""
TOLERANCE: Final = {torch.bfloat16: 0.5}
"""Limit of the mean difference of logprobs in a compute dtype; `FLOAT32` in others. Rounding is far below it."""
FLOAT32: Final = 1e-4


@final
@dataclass(frozen=True)
class ChosenDecoder:
    """A decoder, and what to tell the user about it."""

    decoder: Decoder
    note: str | None
    """Why sampling is slow; None where it is not."""


def choose_decoder(policy: Policy, *, may_copy: bool = True) -> ChosenDecoder:
    """The fastest decoder whose logprobs are the policy's, by a trial with a few tokens.

    Args:
        policy: whose tokens are drawn.
        may_copy: whether there is memory for a copy of the linear layers, which fast decoders make.

    Raises:
        ModelError: the policy's weights are sharded.
    """
    if policy.is_sharded:
        raise ModelError(f"the shape {SHARDED_SAMPLING}")
    reasons = []
    for decoder, name in _candidates(policy, may_copy=may_copy):
        problem = _problem(decoder, policy)
        if problem is None:
            break
        reasons.append(f"{name} {problem}")
    if isinstance(decoder, OwnDecoder):
        way = "with its own cache" if decoder.is_cached else "with a pass over the whole sequence for each token"
        because = "; ".join([*([policy.separate_reason] if policy.separate_reason else []), *reasons])
        return ChosenDecoder(decoder, f"sampling is slow: by the model's own forward pass, {way} ({because})")
    return ChosenDecoder(decoder, None)


def _candidates(policy: Policy, *, may_copy: bool) -> Iterator[tuple[Decoder, str]]:
    """Decoders from fast to slow; the last one is the model's own forward pass over the whole sequence."""
    if policy.separate_reason is None and may_copy:
        yield (FusedDecoder(policy) if is_fusible(policy.causal_lm) else CopiedDecoder(policy)), "the fast decoder"
    yield OwnDecoder(policy, is_cached=True), "the model's own cache"
    yield OwnDecoder(policy, is_cached=False), "a pass over the whole sequence"


@torch.no_grad()
def _problem(decoder: Decoder, policy: Policy) -> str | None:
    """Why a decoder cannot be used; None if it computes the policy's logprobs, or is the last resort."""
    if isinstance(decoder, OwnDecoder) and not decoder.is_cached:
        return None
    try:
        decoder.refresh()
        ours = torch.cat(_decoded(decoder, policy))
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        return f"does not run ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
    was_training = policy.training
    theirs = torch.cat([_scored(policy, row) for row in range(len(PROMPT_OF))])
    policy.train(was_training)
    distance = (ours - theirs).abs().mean().item()
    limit = TOLERANCE.get(policy.compute_dtype, FLOAT32)
    return None if distance <= limit else f"differs from the policy by {distance:.2g} on average"


def _decoded(decoder: Decoder, policy: Policy) -> list[torch.Tensor]:
    """Logprobs of each completion of the trial, in the way in which a sampler draws them."""
    rows = decoder.start([_prompt(policy, index) for index in range(len(PROMPTS))], PROMPT_OF)
    hidden, live = rows.begin(), list(range(len(PROMPT_OF)))
    logprobs: list[list[torch.Tensor]] = [[] for _ in live]
    while True:
        position = len(logprobs[live[0]])
        tokens = torch.tensor([_completion(policy, row)[position] for row in live], device=hidden.device)
        log_softmax, _ = transformed_log_softmax(decoder.head(hidden), policy.logit_transform)
        for row, logprob in zip(live, log_softmax.gather(1, tokens[:, None]).squeeze(1), strict=True):
            logprobs[row].append(logprob)
        finished = [index for index, row in enumerate(live) if LENGTHS[row] == position + 1]
        if len(finished) == len(live):
            return [torch.stack(each) for each in logprobs]
        if finished:
            remaining = rows.drop(finished)
            live, tokens = [live[index] for index in remaining.tolist()], tokens[remaining]
        hidden = rows.append(tokens)


def _scored(policy: Policy, row: int) -> torch.Tensor:
    """The policy's logprobs of a completion of the trial."""
    prompt, completion = _prompt(policy, PROMPT_OF[row]), _completion(policy, row)
    mask = (False,) * len(prompt) + (True,) * len(completion)
    return score(policy, Batch.pack([TokenSequence(prompt + completion, mask)], policy.device), 1.0)


def _prompt(policy: Policy, index: int) -> tuple[int, ...]:
    return _tokens(index, PROMPTS[index], policy.vocab_size)


def _completion(policy: Policy, row: int) -> tuple[int, ...]:
    return _tokens(len(PROMPTS) + row, LENGTHS[row], policy.vocab_size)


def _tokens(offset: int, length: int, vocab: int) -> tuple[int, ...]:
    return tuple((offset * 7919 + position * position * 104729 + 11) % vocab for position in range(length))
