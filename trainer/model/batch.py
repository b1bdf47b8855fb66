"""Packed batches: sequences end to end, nothing padded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeVar, final

import torch

from trainer.data.tokens import TokenSequence
from trainer.model.layout import PackedLayout

T = TypeVar("T")

MIN_SAVED_FRAC: Final = 0.05
"""A tree that saves less of its tokens is not worth its two-part attention."""


@final
@dataclass(frozen=True)
class Tree:
    """Sequences that begin with the same tokens; in a pack these stand once."""

    sequences: tuple[TokenSequence, ...]
    prefix: int
    """How many tokens they share; none of them is trained but by the first of a tree of one."""

    @classmethod
    def of_one(cls, sequence: TokenSequence) -> Tree:
        """A sequence that shares nothing."""
        return cls((sequence,), len(sequence.token_ids))

    @property
    def lengths(self) -> tuple[int, tuple[int, ...]]:
        """Tokens of the prefix and of each branch."""
        branches = (len(sequence.token_ids) - self.prefix for sequence in self.sequences)
        return self.prefix, tuple(length for length in branches if length)

    @property
    def num_tokens(self) -> int:
        """Tokens in a pack."""
        prefix, branches = self.lengths
        return prefix + sum(branches)


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
    is_still: bool = False
    """Measured only: no loss of it has a gradient."""
    is_filler: bool = False
    """Learned from with weight zero, so that this rank runs as many passes as the others."""

    @property
    def num_sequences(self) -> int:
        """S."""
        return len(self.where)

    @classmethod
    def pack(cls, sequences: Sequence[TokenSequence], device: torch.device) -> Batch:
        """Pack sequences in the order given; all carry the same inputs."""
        return cls.pack_trees([Tree.of_one(sequence) for sequence in sequences], device)

    @classmethod
    def pack_trees(cls, trees: Sequence[Tree], device: torch.device) -> Batch:
        """Pack trees in the order given: what the sequences of a tree begin with stands there once."""
        token_ids: list[int] = []
        positions: list[int] = []
        scored: list[tuple[int, int, int]] = []
        sequences = [sequence for tree in trees for sequence in tree.sequences]
        owner = 0
        for tree in trees:
            trunk, prefix = len(token_ids), tree.prefix
            token_ids += tree.sequences[0].token_ids[:prefix]
            positions += range(prefix)
            for sequence in tree.sequences:
                branch = len(token_ids) - prefix
                token_ids += sequence.token_ids[prefix:]
                positions += range(prefix, len(sequence.token_ids))
                for offset, is_trained in enumerate(sequence.trained[1:]):
                    if is_trained:
                        place = (trunk if offset < prefix else branch) + offset
                        scored.append((place, sequence.token_ids[offset + 1], owner))
                owner += 1
        places, targets, owners = torch.tensor(scored, dtype=torch.long).reshape(-1, 3).T.contiguous().to(device)
        inputs = {
            name: torch.tensor([value for sequence in sequences for value in sequence.inputs[name]]).to(device)
            for name in sequences[0].inputs
        }
        return cls(
            token_ids=torch.tensor(token_ids).to(device),
            positions=torch.tensor(positions).to(device),
            layout=PackedLayout.of_trees([tree.lengths for tree in trees], device),
            scored=places,
            targets=targets,
            sequence_ids=owners,
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
    return _filled(sequences, [len(sequence.token_ids) for sequence in sequences], budget)


def tree_batches(trees: Sequence[Tree], budget: int) -> list[list[Tree]]:
    """The same of trees, none of which is split."""
    return _filled(trees, [tree.num_tokens for tree in trees], budget)


def _filled(items: Sequence[T], sizes: Sequence[int], budget: int) -> list[list[T]]:
    largest_first = sorted(range(len(items)), key=lambda index: (-sizes[index], index))
    bins: list[list[T]] = []
    used = 0
    for index in largest_first:
        if not bins or used + sizes[index] > budget:
            bins.append([])
            used = 0
        bins[-1].append(items[index])
        used += sizes[index]
    return bins


def grow_trees(sequences: Sequence[TokenSequence], budget: int) -> list[Tree]:
    """Trees of sequences that begin alike, each within a budget of tokens; plain ones where little would be saved.

    Args:
        sequences: such as the completions of a prompt; what is trained comes after what they share.
        budget: tokens of a tree.
    """
    prefix = _common_prefix(sequences)
    whole = sum(len(sequence.token_ids) for sequence in sequences)
    if prefix * (len(sequences) - 1) < MIN_SAVED_FRAC * whole:
        return [Tree.of_one(sequence) for sequence in sequences]
    longest_first = sorted(sequences, key=lambda sequence: -len(sequence.token_ids))
    grown: list[list[TokenSequence]] = [[]]
    used = prefix
    for sequence in longest_first:
        length = len(sequence.token_ids) - prefix
        if grown[-1] and used + length > budget:
            grown.append([])
            used = prefix
        grown[-1].append(sequence)
        used += length
    return [Tree(tuple(each), prefix) if len(each) > 1 else Tree.of_one(each[0]) for each in grown]


def _common_prefix(sequences: Sequence[TokenSequence]) -> int:
    """Leading tokens that all share and of which none is trained or last."""
    first = sequences[0]
    longest = min((*sequence.trained, True).index(True) for sequence in sequences)
    longest = min(longest, *(len(sequence.token_ids) - 1 for sequence in sequences))
    alike = (
        all(sequence.token_ids[place] == first.token_ids[place] for sequence in sequences) for place in range(longest)
    )
    return next((place for place, is_alike in enumerate(alike) if not is_alike), longest)


def split_evenly(sizes: Sequence[int], num_parts: int) -> list[list[int]]:
    """Indices of the items of each part, so that sums of sizes are nearly equal: largest first to the lightest part."""
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    loads = [0] * num_parts
    for index in sorted(range(len(sizes)), key=lambda item: (-sizes[item], item)):
        lightest = min(range(num_parts), key=lambda part: (loads[part], part))
        parts[lightest].append(index)
        loads[lightest] += sizes[index]
    return [sorted(part) for part in parts]
