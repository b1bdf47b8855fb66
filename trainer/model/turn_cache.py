"""Keys and values of a conversation, kept from one turn to the next; and the pack of what follows them.

The next prompt of a conversation repeats the previous one, the drawn tokens and adds a few. Only what is new is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

import torch


@final
@dataclass
class TurnCache:
    """What a conversation has read so far; empty before its first turn."""

    token_ids: tuple[int, ...] = ()
    layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict, repr=False)
    """Keys and values of each layer, [H_kv, L, D], for the L tokens of `token_ids`."""
    version: int = -1
    """Of the policy that read them; another policy must not use them."""

    def common(self, prompt: Sequence[int]) -> int:
        """How many tokens at the start of a prompt are cached; its last token never counts, since it must be read.

        >>> TurnCache((1, 2, 3)).common((1, 2, 4, 5)), TurnCache((1, 2, 3)).common((1, 2, 3)), TurnCache().common((1,))
        (2, 2, 0)
        """
        limit = min(len(self.token_ids), len(prompt) - 1)
        return next((index for index in range(limit) if self.token_ids[index] != prompt[index]), limit)

    def clear(self) -> None:
        """Forget everything; the conversation is over."""
        self.token_ids = ()
        self.layers.clear()


@final
@dataclass(frozen=True)
class Tails:
    """A pack of S tails end to end; tail s has `lengths[s]` tokens and follows `prefixes[s]` cached ones."""

    caches: tuple[TurnCache, ...]
    prefixes: tuple[int, ...]
    lengths: tuple[int, ...]
    cells: torch.Tensor
    """[T] flat index in [S, longest tail] of each token of the pack."""
    begins: torch.Tensor
    """[S] the cached tokens of each."""

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], caches: Sequence[TurnCache], device: torch.device) -> Tails:
        """The tails of prompts behind what their caches hold.

        Args:
            prompts: token ids, one for each conversation.
            caches: of the same conversations.
            device: of the model.
        """
        prefixes = tuple(cache.common(prompt) for prompt, cache in zip(prompts, caches, strict=True))
        lengths = tuple(len(prompt) - prefix for prompt, prefix in zip(prompts, prefixes, strict=True))
        longest = max(lengths)
        cells = [row * longest + offset for row, length in enumerate(lengths) for offset in range(length)]
        return cls(
            tuple(caches), prefixes, lengths, torch.tensor(cells, device=device), torch.tensor(prefixes, device=device)
        )

    def padded(self, pack: torch.Tensor) -> torch.Tensor:
        """[S, longest tail, ...] from [T, ...]; the padding is zero.

        Args:
            pack: one entry for each token of the pack.
        """
        rows = pack.new_zeros(len(self.lengths) * max(self.lengths), *pack.shape[1:])
        rows[self.cells] = pack
        return rows.unflatten(0, (len(self.lengths), -1))

    def packed(self, padded: torch.Tensor) -> torch.Tensor:
        """[T, ...] from [S, longest tail, ...]."""
        return padded.flatten(0, 1)[self.cells]
