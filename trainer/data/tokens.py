"""A row or rollout as token ids with a loss mask."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final


@final
@dataclass(frozen=True)
class TokenInputs:
    """Inputs of the loss, one number per trained token; a field that the method does not use is empty."""

    weights: tuple[float, ...] = ()
    """SFT: weight of each token in the loss."""
    advantages: tuple[float, ...] = ()
    """RFT: advantage of the rollout, repeated for each token."""
    sampler_logprobs: tuple[float, ...] = ()
    """RFT: as recorded by the sampler."""

    def truncated(self, length: int) -> TokenInputs:
        """The inputs of the first `length` trained tokens."""
        return TokenInputs(self.weights[:length], self.advantages[:length], self.sampler_logprobs[:length])


@final
@dataclass(frozen=True)
class TokenSequence:
    """One token sequence, its loss mask, and the loss inputs of its trained tokens.

    A prompt of 2 tokens and an answer of 3, of weight 0.5, from line 7:

    >>> row = TokenSequence(
    ...     (5, 6, 10, 11, 2), (False, False, True, True, True), TokenInputs(weights=(0.5, 0.5, 0.5)), "a.jsonl:7"
    ... )
    >>> row.num_trained, row.truncated(4).inputs.weights
    (3, (0.5, 0.5))
    """

    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    """Which tokens are trained; same length as `token_ids`. The first one is never trained: nothing predicts it."""
    inputs: TokenInputs = field(default_factory=TokenInputs)
    """One number per trained token, the first token of the sequence not counted."""
    source: str = ""
    """File and line of the row, for messages."""
    owner: tuple[int, int] | None = None
    """RFT: names the rollout that several sequences of a pack belong to; None: the sequence is a rollout of its own."""

    @property
    def num_trained(self) -> int:
        """Number of tokens in the loss."""
        return sum(self.loss_mask[1:])

    def truncated(self, length: int) -> TokenSequence:
        """The first `length` tokens."""
        inputs = self.inputs.truncated(sum(self.loss_mask[1:length]))
        return TokenSequence(self.token_ids[:length], self.loss_mask[:length], inputs, self.source, self.owner)
