"""Packed batches: sequences end to end, nothing padded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import final

import torch

from trainer.attention import PackedLayout


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


@final
@dataclass(frozen=True)
class Batch:
    """Sequences packed flat; T tokens, S sequences, N trained tokens."""

    token_ids: torch.Tensor
    """[T] long."""
    positions: torch.Tensor
    """[T] long, from 0 in each sequence."""
    layout: PackedLayout
    scored: torch.Tensor
    """[N] long: positions in the pack whose next token is trained."""
    targets: torch.Tensor
    """[N] long: that next token."""
    sequence_ids: torch.Tensor
    """[N] long: the sequence of each trained token, from 0."""
    inputs: Mapping[str, torch.Tensor]
    """[N] float32 each."""
    where: tuple[str, ...]
    """File and line of each sequence."""
    is_filler: bool = False
    """Learned from with weight zero, so that this rank runs as many passes as the others."""

    @property
    def num_sequences(self) -> int:
        """S."""
        return len(self.where)

    @classmethod
    def pack(cls, sequences: Sequence[TokenSequence], device: torch.device) -> Batch:
        """Pack sequences in the order given; all carry the same inputs."""
        lengths = [len(sequence.token_ids) for sequence in sequences]
        token_ids = torch.tensor([token for sequence in sequences for token in sequence.token_ids])
        positions = torch.cat([torch.arange(length) for length in lengths])
        scored, owners, start = [], [], 0
        for number, sequence in enumerate(sequences):
            found = [start + offset for offset, is_trained in enumerate(sequence.trained[1:]) if is_trained]
            scored += found
            owners += [number] * len(found)
            start += lengths[number]
        where = torch.tensor(scored, dtype=torch.long)
        names = sequences[0].inputs.keys()
        inputs = {
            name: torch.tensor([value for sequence in sequences for value in sequence.inputs[name]]).to(device)
            for name in names
        }
        return cls(
            token_ids=token_ids.to(device),
            positions=positions.to(device),
            layout=PackedLayout.of_lengths(lengths, device),
            scored=where.to(device),
            targets=token_ids[where + 1].to(device),
            sequence_ids=torch.tensor(owners, dtype=torch.long, device=device),
            inputs=inputs,
            where=tuple(sequence.where for sequence in sequences),
        )

    @classmethod
    def filler(cls, device: torch.device, inputs: Sequence[str] = ()) -> Batch:
        """The smallest pack there is, with zeros for each of the inputs."""
        sequence = TokenSequence((0, 0), (False, True), dict.fromkeys(inputs, (0.0,)))
        return replace(cls.pack([sequence], device), is_filler=True)

    @property
    def num_tokens(self) -> int:
        """T, trained or not."""
        return len(self.token_ids)

    @property
    def num_trained(self) -> int:
        """N."""
        return len(self.targets)


def micro_batches(sequences: Sequence[TokenSequence], budget: int) -> list[list[TokenSequence]]:
    """Fill micro-batches up to a budget of tokens; a sequence is never split, a longer one stands alone.

    Sequences of like length stay together, so that attention pads little; the result is a function of the arguments.
    """
    longest_first = sorted(range(len(sequences)), key=lambda index: (-len(sequences[index].token_ids), index))
    bins: list[list[TokenSequence]] = []
    used = 0
    for index in longest_first:
        length = len(sequences[index].token_ids)
        if not bins or used + length > budget:
            bins.append([])
            used = 0
        bins[-1].append(sequences[index])
        used += length
    return bins


def split_evenly(sizes: Sequence[int], num_parts: int) -> list[list[int]]:
    """Indices of the items of each part, so that sums of sizes are nearly equal: largest first to the lightest part."""
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    loads = [0] * num_parts
    for index in sorted(range(len(sizes)), key=lambda item: (-sizes[item], item)):
        lightest = min(range(num_parts), key=lambda part: (loads[part], part))
        parts[lightest].append(index)
        loads[lightest] += sizes[index]
    return [sorted(part) for part in parts]
