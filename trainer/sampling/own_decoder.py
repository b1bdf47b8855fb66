"""Decodes with a model's own forward pass, cache and attention: slow, and right for every model.

It is used where sequences are not packed, and where a faster decoder computes other logprobs than the policy.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch
from transformers import Cache

from trainer.model.own_forward import OwnForward, use_own_attention
from trainer.model.turn_cache import TurnCache

if TYPE_CHECKING:
    from trainer.model.policy import Policy


@final
class OwnDecoder:
    """A structural copy of the policy's model that shares all weights and has its own attention."""

    def __init__(self, policy: Policy, *, is_cached: bool) -> None:
        """Copy the structure, not the weights.

        Args:
            policy: whose weights are used.
            is_cached: keep the model's cache between tokens; otherwise every token is a pass over the whole sequence.
        """
        source = policy.causal_lm
        shared = {id(tensor): tensor for tensor in source.parameters()}
        self._causal_lm: Any = copy.deepcopy(source, shared)  # buffers are copied: rotary factors change in place
        use_own_attention(self._causal_lm)
        self._causal_lm.eval()
        self._forward, self._device = OwnForward(self._causal_lm, is_cached=is_cached), policy.device

    @property
    def is_cached(self) -> bool:
        """Whether the model's cache is kept between tokens."""
        return self._forward.is_cached

    def refresh(self) -> None:
        """Nothing to do: the weights are the policy's."""

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, V] raw outputs of the LM head, before scale, soft cap and temperature."""
        logits: torch.Tensor = self._causal_lm.get_output_embeddings()(hidden)
        return logits

    def start(
        self, prompts: Sequence[tuple[int, ...]], prompt_of: Sequence[int], caches: Sequence[TurnCache] | None = None
    ) -> OwnRows:
        """Rows that continue prompts.

        Args:
            prompts: token ids of each distinct prompt.
            prompt_of: index of each row's prompt.
            caches: none are ever filled, so there are none.
        """
        assert caches is None
        groups = []
        for index, prompt in enumerate(prompts):
            rows = [row for row, owner in enumerate(prompt_of) if owner == index]
            groups.append(_Group(rows, torch.tensor([prompt], device=self._device), None))
        return OwnRows(self, groups)

    def last_hidden(self, token_ids: torch.Tensor, cache: Cache | None) -> tuple[torch.Tensor, Cache | None]:
        """[n, H] hidden states of the last tokens, and the cache of all tokens; see `OwnForward`."""
        hidden, cache = self._forward(token_ids, cache)
        return hidden[:, -1], cache


@final
@dataclass
class _Group:
    """The rows of one prompt, which all have the same length."""

    rows: list[int]
    """Index of each among all rows."""
    token_ids: torch.Tensor
    """[n, L]; [1, L] until the prompt is read."""
    cache: Cache | None

    def choose(self, indices: Sequence[int]) -> None:
        """Make these rows of the group its rows; one may be repeated."""
        index = torch.tensor(indices, device=self.token_ids.device)
        self.token_ids = self.token_ids[index]
        if self.cache is not None:
            self.cache.reorder_cache(index)


@final
class OwnRows:
    """Rows grouped by prompt: the rows of a group have the same length, so that none is padded."""

    def __init__(self, decoder: OwnDecoder, groups: list[_Group]) -> None:
        """See `OwnDecoder.start`."""
        self._decoder, self._groups = decoder, groups

    def begin(self) -> torch.Tensor:
        """[R, H] hidden state of the last token of each row's prompt."""
        parts = []
        for group in self._groups:
            hidden, group.cache = self._decoder.last_hidden(group.token_ids, None)
            group.choose([0] * len(group.rows))
            parts.append(hidden.expand(len(group.rows), -1))
        return self._in_order(parts)

    def append(self, tokens: torch.Tensor) -> torch.Tensor:
        """[R, H] hidden states of these tokens, one for each row."""
        parts = []
        for group in self._groups:
            added = tokens[torch.tensor(group.rows, device=tokens.device)][:, None]
            group.token_ids = torch.cat([group.token_ids, added], 1)
            new = added if self._decoder.is_cached else group.token_ids
            hidden, group.cache = self._decoder.last_hidden(new, group.cache)
            parts.append(hidden)
        return self._in_order(parts)

    def drop(self, finished: Sequence[int]) -> torch.Tensor:
        """Remove finished rows; the others keep their order. Returns [R'] the previous index of each."""
        gone = set(finished)
        remaining = sorted({row for group in self._groups for row in group.rows} - gone)
        index = {row: new for new, row in enumerate(remaining)}
        for group in self._groups:
            kept = [number for number, row in enumerate(group.rows) if row not in gone]
            if kept and len(kept) < len(group.rows):
                group.choose(kept)
            group.rows = [index[group.rows[number]] for number in kept]
        self._groups = [group for group in self._groups if group.rows]
        return torch.tensor(remaining, device=self._groups[0].token_ids.device)

    def keep_turn(self, row: int, token_ids: Sequence[int], cache: TurnCache) -> None:
        """Nothing is kept: a model's own cache cannot be cut and joined, so every turn is read from its beginning."""

    def _in_order(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """[R, H] in the order of the rows, from the hidden states of each group."""
        rows = torch.tensor([row for group in self._groups for row in group.rows], device=parts[0].device)
        return torch.cat(list(parts))[rows.argsort()]
