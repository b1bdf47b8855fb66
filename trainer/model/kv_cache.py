"""The key-value cache of sampling: each prompt is stored once, each row stores its own tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

import torch

from trainer.model.turn_cache import Tails, TurnCache

INITIAL_CAPACITY: Final = 64
"""Own tokens per row that fit at first; the capacity is doubled when full."""


def grown_capacity(end: int) -> int:
    """Own tokens per row that fit once all places for `end` tokens are full.

    >>> grown_capacity(0), grown_capacity(64), grown_capacity(128)
    (64, 128, 256)
    """
    return max(INITIAL_CAPACITY, 2 * end)


def last_growth(num_tokens: int) -> int:
    """Own tokens with which a row of `num_tokens` needs as much memory as with all of them.

    >>> last_growth(24), last_growth(64), last_growth(128), last_growth(1000)
    (1, 1, 65, 513)
    """
    end = 0
    while (capacity := grown_capacity(end)) < num_tokens:
        end = capacity
    return end + 1


@final
@dataclass
class LayerCache:
    """Keys and values of one layer: S prompts of at most P tokens, R rows with a capacity of C own tokens."""

    prompt_keys: torch.Tensor
    """[S, H_kv, P, D]; the padding behind a shorter prompt is masked when it is read."""
    prompt_values: torch.Tensor
    keys: torch.Tensor
    """[R, H_kv, D, C]: transposed, because products with a part of [C, D] take twice as long on CPU (docs/log.md)."""
    values: torch.Tensor
    """[R, H_kv, C, D]."""


@final
class KeyValueCache:
    """Keys and values of all layers while sampling.

    All rows have the same number of own tokens, `num_own`. A finished row is overwritten by the last one, so that the
    rows in use are always the first ones.
    """

    def __init__(self, prompt_lengths: Sequence[int], device: torch.device) -> None:
        """Prepare for prompts of these lengths; `branch` then assigns rows to them."""
        lengths = torch.tensor(prompt_lengths)
        offset = torch.arange(max(prompt_lengths))
        is_real = offset[None, :] < lengths[:, None]
        self._gather = ((lengths.cumsum(0) - lengths)[:, None] + offset * is_real).to(device)
        self._lengths = lengths.to(device)
        self._layers: dict[int, LayerCache] = {}
        self._owners: list[int] = []
        self._most_rows = 0
        self._hidden: dict[int | None, torch.Tensor | None] = {}
        self.longest_prompt = max(prompt_lengths)
        self.num_own = 0
        self.slots: torch.Tensor | None = None
        """[S, G] rows of each prompt; None if each prompt has the same number of rows and they are in order."""
        self.slot_of_row = self._gather.new_empty(0)
        """[R] flat index of each row in `slots`."""

    def branch(self, owners: Sequence[int]) -> None:
        """Begin rows; row n continues prompt `owners[n]`."""
        self._owners = list(owners)
        self._most_rows = len(owners)
        self._arrange()

    def advance(self) -> None:
        """Count the token that each layer has appended."""
        self.num_own += 1
        self._hidden = {key: hidden for key, hidden in self._hidden.items() if key is None}

    def drop(self, finished: Sequence[int]) -> torch.Tensor:
        """Remove finished rows. Returns [R'] the previous index of each remaining row."""
        gone, kept = set(finished), len(self._owners) - len(finished)
        holes = [row for row in finished if row < kept]
        movers = [row for row in range(kept, len(self._owners)) if row not in gone]
        order = list(range(kept))
        for hole, mover in zip(sorted(holes), movers, strict=True):
            order[hole] = mover
        self._owners = [self._owners[row] for row in order]
        device = self._lengths.device
        target, source = torch.tensor(sorted(holes), device=device), torch.tensor(movers, device=device)
        prompts = sorted(set(self._owners))
        is_fewer = len(prompts) < len(self._lengths)
        left = torch.tensor(prompts, device=device)
        for layer in self._layers.values():
            if movers and self.num_own:  # before the first append there is no cache to move
                layer.keys[target, ..., : self.num_own] = layer.keys[source, ..., : self.num_own]
                layer.values[target, :, : self.num_own] = layer.values[source, :, : self.num_own]
            if is_fewer:
                layer.prompt_keys, layer.prompt_values = layer.prompt_keys[left], layer.prompt_values[left]
        if is_fewer:
            self._lengths = self._lengths[left]
            self._owners = [prompts.index(owner) for owner in self._owners]
        self._arrange()
        return torch.tensor(order, device=device)

    def keep_prompts(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store a layer's keys and values of the pack of all prompts.

        Args:
            layer: number of the layer.
            key: [1, H_kv, T, D].
            value: [1, H_kv, T, D].
        """
        keys, values = (part[0].transpose(0, 1)[self._gather].transpose(1, 2).contiguous() for part in (key, value))
        nothing = keys.new_empty(0)
        self._layers[layer] = LayerCache(keys, values, nothing, nothing)

    def keep_tails(self, layer: int, key: torch.Tensor, value: torch.Tensor, tails: Tails) -> LayerCache:
        """Store a layer's keys and values of whole prompts: the cached part of each, then its tail.

        Args:
            layer: number of the layer.
            key: [1, H_kv, T, D] of the pack of tails.
            value: [1, H_kv, T, D].
            tails: what is cached, and the lengths of the tails.
        """
        both = []
        for index, part in enumerate((key, value)):
            rows = part.new_zeros(len(tails.lengths), part.shape[1], self.longest_prompt, part.shape[-1])
            pieces = part[0].split(tails.lengths, 1)
            for row, (cache, begin, piece) in enumerate(zip(tails.caches, tails.prefixes, pieces, strict=True)):
                if begin:
                    rows[row, :, :begin] = cache.layers[layer][index][:, :begin]
                rows[row, :, begin : begin + piece.shape[1]] = piece
            both.append(rows)
        nothing = key.new_empty(0)
        self._layers[layer] = LayerCache(both[0], both[1], nothing, nothing)
        for cache in tails.caches:
            cache.layers.pop(layer, None)  # so that a layer at a time is stored twice, not all of them
        return self._layers[layer]

    def keep_turn(self, row: int, token_ids: Sequence[int], cache: TurnCache) -> None:
        """Copy a row's keys and values, so that the conversation's next turn need not read them again.

        Args:
            row: its current index.
            token_ids: of its prompt, and the drawn ones.
            cache: gets the copy. The last drawn token was never read, so it is not in it.
        """
        prompt = len(token_ids) - 1 - self.num_own
        owner = self._owners[row]
        for number, layer in self._layers.items():
            keys, values = layer.prompt_keys[owner, :, :prompt], layer.prompt_values[owner, :, :prompt]
            if self.num_own:
                own = slice(0, self.num_own)
                keys = torch.cat([keys, layer.keys[row, ..., own].transpose(-1, -2)], 1)
                values = torch.cat([values, layer.values[row, :, own]], 1)
            cache.layers[number] = keys.clone(), values.clone()
        cache.token_ids = tuple(token_ids[:-1])

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> LayerCache:
        """Append a layer's keys and values of one token of each row, [1, H_kv, R, D].

        Args:
            layer: number of the layer.
            key: [1, H_kv, R, D].
            value: [1, H_kv, R, D].
        """
        cache, end = self._layers[layer], self.num_own
        _, kv_heads, rows, width = key.shape
        if end == (cache.keys.shape[-1] if cache.keys.numel() else 0):
            capacity = grown_capacity(end)
            keys = key.new_empty(self._most_rows, kv_heads, width, capacity)
            values = value.new_empty(self._most_rows, kv_heads, capacity, value.shape[-1])
            if end:
                keys[..., :end], values[:, :, :end] = cache.keys, cache.values
            cache.keys, cache.values = keys, values
        cache.keys[:rows, ..., end] = key[0].transpose(0, 1)
        cache.values[:rows, :, end] = value[0].transpose(0, 1)
        return cache

    def hidden(self, window: int | None) -> torch.Tensor | None:
        """[R, 1, 1, P] bool: prompt tokens that a row does not attend to; None if every row attends to all."""
        if window not in self._hidden:
            offset = torch.arange(self._gather.shape[1], device=self._lengths.device)
            hidden = offset >= self._lengths[:, None]
            if window is not None:
                hidden |= self._lengths[:, None] + self.num_own - offset >= window
            owners = torch.tensor(self._owners, device=hidden.device)
            self._hidden[window] = hidden[owners][:, None, None] if bool(hidden.any()) else None
        return self._hidden[window]

    def _arrange(self) -> None:
        """Assign rows to slots: each prompt has as many slots as the largest has rows; unused slots repeat a row."""
        by_prompt: list[list[int]] = [[] for _ in range(len(self._lengths))]
        for row, owner in enumerate(self._owners):
            by_prompt[owner].append(row)
        most = max(map(len, by_prompt))
        slots = [rows + rows[:1] * (most - len(rows)) for rows in by_prompt]
        slot = {row: owner * most + index for owner, rows in enumerate(by_prompt) for index, row in enumerate(rows)}
        slot_of_row, device = [slot[row] for row in range(len(self._owners))], self._lengths.device
        is_in_order = slot_of_row == list(range(len(slots) * most))
        self.slots = None if is_in_order else torch.tensor(slots, device=device)
        self.slot_of_row = torch.tensor(slot_of_row, device=device)
        self._hidden = {}
