"""Sequences in progress: what was asked, what was drawn, which pages hold it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, final

import torch

from trainer.engine.adapters import AdapterVersion
from trainer.engine.pages import PAGE
from trainer.engine.protocol import Sampling
from trainer.engine.speculate import PromptLookup
from trainer.sampling import noise

ROOT: bytes = b"base"
"""Owner of the prefix pages of the base model."""


@final
@dataclass(eq=False)
class LiveSequence:
    """A sequence that waits or runs."""

    id: str
    prompt: tuple[int, ...]
    sampling: Sampling
    adapter: AdapterVersion | None
    """The version that it began with, and keeps; None is the base."""
    matcher: Any = None
    """Of llguidance, where the text follows a grammar."""
    drawn: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    num_stored: int = 0
    """Tokens whose keys and values are in the pages."""
    num_cached: int = 0
    """Tokens of the prompt that were found in the store."""
    page_keys: list[bytes] = field(default_factory=list)
    """Digest of each full page of the prompt."""
    prompt_logprobs: list[Any] = field(default_factory=list)
    added: float = field(default_factory=monotonic)
    """When it came; `monotonic`, in seconds."""
    entered: float | None = None
    """When it ran first."""
    is_begun: bool = False
    """Whether its first token was sent."""

    def __post_init__(self) -> None:
        """Make the noise key and the counts that penalties need."""
        sampling = self.sampling
        self.noise_key = int(noise.row_keys(sampling.seed, 0, [0], [sampling.sample], torch.device("cpu"))[0])
        self.counts: Counter[int] = Counter()
        self.lookup = PromptLookup()
        self.proposed: list[int] = []
        """Tokens that the present step computes behind the last one."""

    @property
    def owner(self) -> bytes:
        """Whose prefix pages it may share."""
        return ROOT if self.adapter is None else self.adapter.digest

    @property
    def length(self) -> int:
        """Tokens so far."""
        return len(self.prompt) + len(self.drawn)

    @property
    def num_missing(self) -> int:
        """Tokens whose keys and values are not stored yet."""
        return self.length - self.num_stored

    @property
    def noise_position(self) -> int:
        """Of the next token."""
        return self.sampling.first_position + len(self.drawn)

    @property
    def num_left(self) -> int:
        """Tokens that may still be drawn."""
        return self.sampling.max_tokens - len(self.drawn)

    def tokens(self, first: int, count: int) -> Sequence[int]:
        """Token ids from a position on."""
        size = len(self.prompt)
        if first >= size:
            return self.drawn[first - size : first - size + count]
        return [*self.prompt[first : first + count], *self.drawn[: max(0, first + count - size)]]

    def pages_for(self, length: int) -> int:
        """Pages that are missing for this many tokens."""
        return max(0, -(-length // PAGE) - len(self.pages))

    def begin(self) -> list[float] | None:
        """Seconds that it waited and that its prompt took, at its first token; None after that."""
        if self.is_begun or self.entered is None:
            return None
        self.is_begun = True
        return [round(self.entered - self.added, 6), round(monotonic() - self.entered, 6)]

    def add(self, token: int) -> None:
        """Take a token that was drawn."""
        self.drawn.append(token)
        self.counts[token] += 1
