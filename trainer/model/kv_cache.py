"""Keys and values that sampling reads again: each prompt's once, each row's own beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

import torch

FIRST_ROOM: Final = 64
"""Own tokens that a row has room for at first; then doubled when full."""


@final
@dataclass
class LayerCache:
    """Keys and values of one layer; S prompts of at most P tokens, R rows with room for C own tokens."""

    prompt_keys: torch.Tensor
    """[S, H_kv, P, D]; what stands behind a shorter prompt is hidden when it is read."""
    prompt_values: torch.Tensor
    keys: torch.Tensor
    """[R, H_kv, D, C]: transposed, because products with a part of [C, D] take twice as long on CPU (docs/log.md)."""
    values: torch.Tensor
    """[R, H_kv, C, D]."""


@final
class KeyValueCache:
    """Keys and values while sampling: of each prompt once, and of each row its own.

    All rows have drawn equally many tokens, `num_own`. A row that has finished is overwritten by the last one, so the
    rows in use are always the first ones.
    """

    def __init__(self, prompt_lengths: Sequence[int], device: torch.device) -> None:
        """Make room for prompts of these lengths; `branch` then says which rows go on from each."""
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
        """[S, G] the rows of each prompt; None when they stand in order, equally many of each."""
        self.places = self._gather.new_empty(0)
        """[R] where each row stands in the slots."""

    def branch(self, owners: Sequence[int]) -> None:
        """Begin rows, the n-th of which goes on from prompt `owners[n]`."""
        self._owners = list(owners)
        self._most_rows = len(owners)
        self._arrange()

    def advance(self) -> None:
        """Count the token that every layer has appended."""
        self.num_own += 1
        self._hidden = {key: hidden for key, hidden in self._hidden.items() if key is None}

    def drop(self, finished: Sequence[int]) -> torch.Tensor:
        """Forget rows. Returns [R'] the number that each row left had before."""
        gone, kept = set(finished), len(self._owners) - len(finished)
        holes = [row for row in finished if row < kept]
        movers = [row for row in range(kept, len(self._owners)) if row not in gone]
        order = list(range(kept))
        for hole, mover in zip(sorted(holes), movers, strict=True):
            order[hole] = mover
        self._owners = [self._owners[row] for row in order]
        device = self._lengths.device
        to, of = torch.tensor(sorted(holes), device=device), torch.tensor(movers, device=device)
        prompts = sorted(set(self._owners))
        is_fewer = len(prompts) < len(self._lengths)
        left = torch.tensor(prompts, device=device)
        for layer in self._layers.values():
            if movers and self.num_own:  # rows that end with their first token end before there is a cache
                layer.keys[to, ..., : self.num_own] = layer.keys[of, ..., : self.num_own]
                layer.values[to, :, : self.num_own] = layer.values[of, :, : self.num_own]
            if is_fewer:
                layer.prompt_keys, layer.prompt_values = layer.prompt_keys[left], layer.prompt_values[left]
        if is_fewer:
            self._lengths = self._lengths[left]
            self._owners = [prompts.index(owner) for owner in self._owners]
        self._arrange()
        return torch.tensor(order, device=device)

    def keep_prompts(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store a layer's keys and values of the pack of all prompts, [1, H_kv, T, D]."""
        keys, values = (part[0].transpose(0, 1)[self._gather].transpose(1, 2).contiguous() for part in (key, value))
        nothing = keys.new_empty(0)
        self._layers[layer] = LayerCache(keys, values, nothing, nothing)

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> LayerCache:
        """Store a layer's keys and values of one token of each row, [1, H_kv, R, D]."""
        cache, end = self._layers[layer], self.num_own
        _, kv_heads, rows, width = key.shape
        if end == (cache.keys.shape[-1] if cache.keys.numel() else 0):
            room = max(FIRST_ROOM, 2 * end)
            keys = key.new_empty(self._most_rows, kv_heads, width, room)
            values = value.new_empty(self._most_rows, kv_heads, room, value.shape[-1])
            if end:
                keys[..., :end], values[:, :, :end] = cache.keys, cache.values
            cache.keys, cache.values = keys, values
        cache.keys[:rows, ..., end] = key[0].transpose(0, 1)
        cache.values[:rows, :, end] = value[0].transpose(0, 1)
        return cache

    def hidden(self, window: int | None) -> torch.Tensor | None:
        """[R, 1, 1, P] which prompt tokens a row must not read; None where it reads all."""
        if window not in self._hidden:
            offset = torch.arange(self._gather.shape[1], device=self._lengths.device)
            hidden = offset >= self._lengths[:, None]
            if window is not None:
                hidden |= self._lengths[:, None] + self.num_own - offset >= window
            owners = torch.tensor(self._owners, device=hidden.device)
            self._hidden[window] = hidden[owners][:, None, None] if bool(hidden.any()) else None
        return self._hidden[window]

    def _arrange(self) -> None:
        """Give each prompt as many slots as the one with most rows has; a slot too many repeats a row."""
        by_prompt: list[list[int]] = [[] for _ in range(len(self._lengths))]
        for row, owner in enumerate(self._owners):
            by_prompt[owner].append(row)
        most = max(map(len, by_prompt))
        slots = [rows + rows[:1] * (most - len(rows)) for rows in by_prompt]
        place = {row: owner * most + number for owner, rows in enumerate(by_prompt) for number, row in enumerate(rows)}
        places, device = [place[row] for row in range(len(self._owners))], self._lengths.device
        is_in_order = places == list(range(len(slots) * most))
        self.slots = None if is_in_order else torch.tensor(slots, device=device)
        self.places = torch.tensor(places, device=device)
        self._hidden = {}
