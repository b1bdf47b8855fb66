"""A row or rollout as token ids with a loss mask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final


@final
@dataclass(frozen=True)
class TokenSequence:
    """One token sequence, and numbers that belong to its trained tokens."""

    token_ids: tuple[int, ...]
    trained: tuple[bool, ...]
    """Of the length of `token_ids`; the first token is never trained, since nothing predicts it."""
    inputs: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Per trained token (the first token not counted): weights, advantages, old_logprobs and so on."""
    where: str = ""
    """File and line, for messages."""

    @property
    def num_trained(self) -> int:
        """Tokens that a loss is computed on."""
        return sum(self.trained[1:])

    def truncated(self, length: int) -> TokenSequence:
        """The first `length` tokens."""
        kept = sum(self.trained[1:length])
        inputs = {name: values[:kept] for name, values in self.inputs.items()}
        return TokenSequence(self.token_ids[:length], self.trained[:length], inputs, self.where)
