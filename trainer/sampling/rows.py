"""Completions in progress: how a decoder reads prompts and appends a token to each row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias, final

import torch

from trainer.model.kv_cache import KeyValueCache
from trainer.model.layout import CachedLayout, PackedLayout
from trainer.model.turn_cache import Tails, TurnCache

Backbone: TypeAlias = Callable[[torch.Tensor, torch.Tensor, CachedLayout], torch.Tensor]
"""From token ids [T], positions [T] and the layout to [T, H] last hidden states."""


class Rows(Protocol):
    """R rows, each of which continues a prompt."""

    def begin(self) -> torch.Tensor:
        """[R, H] hidden state of the last token of each row's prompt."""

    def append(self, tokens: torch.Tensor) -> torch.Tensor:
        """[R, H] hidden states of these tokens, one for each row."""

    def drop(self, finished: Sequence[int]) -> torch.Tensor:
        """Remove finished rows. Returns [R'] the previous index of each remaining row."""

    def keep_turn(self, row: int, token_ids: Sequence[int], cache: TurnCache) -> None:
        """Keep what a row has read for the conversation's next turn; a decoder may do nothing, always.

        Args:
            row: its current index.
            token_ids: of its prompt, and the drawn ones.
            cache: of the conversation.
        """


@final
class PackedRows:
    """All rows in one pack with a common cache; each prompt is read once."""

    def __init__(
        self,
        backbone: Backbone,
        prompts: Sequence[tuple[int, ...]],
        prompt_of: Sequence[int],
        device: torch.device,
        caches: Sequence[TurnCache] | None = None,
    ) -> None:
        """Prepare; `begin` reads the prompts.

        Args:
            backbone: computes the hidden states of a pack and fills the cache.
            prompts: token ids of each distinct prompt.
            prompt_of: index of each row's prompt.
            device: of the model.
            caches: of the conversation of each prompt, where at least one has cached something.
        """
        self._caches = caches
        self._backbone, self._prompts, self._prompt_of, self._device = backbone, prompts, prompt_of, device
        lengths = [len(prompt) for prompt in prompts]
        self._cache = KeyValueCache(lengths, device)
        self._ends = torch.tensor(lengths, device=device)[torch.tensor(prompt_of, device=device)]

    def begin(self) -> torch.Tensor:
        """[R, H] hidden state of the last token of each row's prompt; fills the cache."""
        if self._caches is None:
            begins, lengths = [0] * len(self._prompts), [len(prompt) for prompt in self._prompts]
            layout = CachedLayout(self._cache, PackedLayout.of_lengths(lengths, self._device))
        else:
            tails = Tails.of(self._prompts, self._caches, self._device)
            begins, lengths = list(tails.prefixes), list(tails.lengths)
            layout = CachedLayout(self._cache, None, tails)
        new = [token for prompt, begin in zip(self._prompts, begins, strict=True) for token in prompt[begin:]]
        token_ids = torch.tensor(new, device=self._device)
        spans = [torch.arange(begin, begin + length) for begin, length in zip(begins, lengths, strict=True)]
        positions = torch.cat(spans).to(self._device)
        last = torch.tensor(lengths, device=self._device).cumsum(0) - 1
        of_prompts = self._backbone(token_ids, positions, layout)[last]
        self._cache.branch(self._prompt_of)
        return of_prompts[torch.tensor(self._prompt_of, device=self._device)]

    def append(self, tokens: torch.Tensor) -> torch.Tensor:
        """[R, H] hidden states of these tokens, one for each row."""
        positions = self._ends + self._cache.num_own
        hidden = self._backbone(tokens, positions, CachedLayout(self._cache, None))
        self._cache.advance()
        return hidden

    def drop(self, finished: Sequence[int]) -> torch.Tensor:
        """Remove finished rows; the last rows take their places. Returns [R'] the previous index of each row."""
        remaining = self._cache.drop(finished)
        self._ends = self._ends[remaining]
        return remaining

    def keep_turn(self, row: int, token_ids: Sequence[int], cache: TurnCache) -> None:
        """Keep what a row has read for the conversation's next turn; see `Rows`."""
        self._cache.keep_turn(row, token_ids, cache)
