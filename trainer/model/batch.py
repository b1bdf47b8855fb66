"""Packed batches: sequences end to end, without padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar, final

import numpy as np
import torch

from trainer.data.tokens import TokenInputs, TokenSequence
from trainer.model.layout import PackedLayout

T = TypeVar("T")

MIN_SAVED_FRAC: Final = 0.05
"""Sequences are packed as a tree only if it saves this fraction of their tokens; its attention takes two parts."""


@final
@dataclass(frozen=True)
class Tree:
    """Sequences with a common prefix, which is packed once.

    Prompt (1, 2, 3) with the completions (4, 5) and (6,): `prefix` is 3, `lengths` is (3, (2, 1)), and the pack holds
    1 2 3 4 5 6, 6 tokens instead of 9.

    Where the prefix is the whole first sequence, others may continue a part of it. Three turns of a conversation, each
    given the earlier turns without their reasoning: (1, 2, 7), (1, 2, 4, 3, 8) and (1, 2, 4, 3, 5, 6, 9). The last one
    is the prefix, the others are branches behind 2 and 4 of its tokens: `forks` is (7, 2, 4).
    """

    sequences: tuple[TokenSequence, ...]
    prefix: int
    """Number of tokens in the prefix; untrained, unless the tree has one sequence or `forks`."""
    forks: tuple[int, ...] = ()
    """How many tokens of the prefix each sequence continues; () where all continue all of it."""

    @classmethod
    def of_one(cls, sequence: TokenSequence) -> Tree:
        """A tree of one sequence: all of it is prefix."""
        return cls((sequence,), len(sequence.token_ids))

    @property
    def lengths(self) -> tuple[int, tuple[int, ...]]:
        """Tokens of the prefix and of each branch."""
        branches = (len(each.token_ids) - fork for each, fork in zip(self.sequences, self.shared, strict=True))
        return self.prefix, tuple(length for length in branches if length)

    @property
    def shared(self) -> tuple[int, ...]:
        """How many tokens of the prefix each sequence continues."""
        return self.forks or (self.prefix,) * len(self.sequences)

    @property
    def branch_forks(self) -> tuple[int, ...]:
        """`shared` of the sequences that have tokens of their own, as in `lengths`."""
        pairs = zip(self.sequences, self.shared, strict=True)
        return tuple(fork for each, fork in pairs if len(each.token_ids) > fork)

    @property
    def num_tokens(self) -> int:
        """Tokens in a pack."""
        prefix, branches = self.lengths
        return prefix + sum(branches)


@final
@dataclass(frozen=True)
class LossInputs:
    """Inputs of the loss, [N] float32 each; empty where the method does not use them."""

    weights: torch.Tensor
    """SFT: weight of each token in the loss."""
    advantages: torch.Tensor
    """RFT: advantage of the token's rollout."""
    sampler_logprobs: torch.Tensor
    """RFT: as recorded by the sampler."""
    ref_logprobs: torch.Tensor | None = None
    """RFT: under the reference; measured before the update."""
    old_logprobs: torch.Tensor | None = None
    """RFT: under the policy as the step began. None in the first minibatch, whose own pass gives them."""

    @classmethod
    def of(cls, inputs: Sequence[TokenInputs], device: torch.device) -> LossInputs:
        """Join the inputs of sequences."""

        def joined(parts: Sequence[tuple[float, ...]]) -> torch.Tensor:
            return torch.tensor([value for part in parts for value in part]).to(device)

        return cls(
            weights=joined([each.weights for each in inputs]),
            advantages=joined([each.advantages for each in inputs]),
            sampler_logprobs=joined([each.sampler_logprobs for each in inputs]),
        )


@final
@dataclass(frozen=True)
class TokenOwners:
    """Which adapter each token of a pack belongs to.

    Adapter "a" owns a sequence of 3 tokens, "b" the one of 2 behind it: {"a": [0, 1, 2], "b": [3, 4]}.
    """

    rows: Mapping[str, torch.Tensor]
    """Positions in the pack by name of the adapter, long, ascending; every token is in one of them."""

    @property
    def num_tokens(self) -> int:
        """T."""
        return sum(len(rows) for rows in self.rows.values())


@final
@dataclass(frozen=True)
class Batch:
    """Sequences packed flat: T tokens, S sequences, N trained tokens.

    Two SFT rows, (10, 11, 12, 13) with the last two tokens trained and (20, 21, 22) with the second one trained:

        token_ids      [10, 11, 12, 13, 20, 21, 22]     T = 7
        positions      [ 0,  1,  2,  3,  0,  1,  2]
        scored         [1, 2, 4]                        12 and 13 are predicted at 1 and 2, 21 at 4: N = 3
        targets        [12, 13, 21]
        sequence_ids   [0, 0, 1]
        inputs.weights [0.5, 0.5, 2.0]
        sources        ("a.jsonl:1", "a.jsonl:2")       S = 2
    """

    token_ids: torch.Tensor
    """[T] long."""
    positions: torch.Tensor
    """[T] long, from 0 in each sequence."""
    layout: PackedLayout
    """Where each sequence lies, for attention."""
    scored: torch.Tensor
    """[N] long: positions in the pack whose next token is trained."""
    targets: torch.Tensor
    """[N] long: that next token."""
    sequence_ids: torch.Tensor
    """[N] long: the sequence of each trained token, from 0; sequences of one rollout count as one."""
    inputs: LossInputs
    """[N] float32 each."""
    sources: tuple[str, ...]
    """File and line of each sequence; of a rollout of several sequences once."""
    owners: TokenOwners | None = None
    """The adapter of each token; None: all tokens use the active one."""
    is_forward_only: bool = False
    """Contributes metrics, but no gradient: runs without backward."""
    is_dummy: bool = False
    """Zero-weight batch that keeps ranks with a sharded base in lockstep."""

    @property
    def num_sequences(self) -> int:
        """S."""
        return len(self.sources)

    @classmethod
    def pack(
        cls, sequences: Sequence[TokenSequence], device: torch.device, *, adapters: Sequence[str] | None = None
    ) -> Batch:
        """Pack sequences in the order given; all have the same kind of inputs.

        Args:
            sequences: at least one.
            device: where the tensors go.
            adapters: name of the adapter of each sequence; None: the active one for all.
        """
        return cls.pack_trees([Tree.of_one(sequence) for sequence in sequences], device, adapters=adapters)

    @classmethod
    def pack_trees(cls, trees: Sequence[Tree], device: torch.device, *, adapters: Sequence[str] | None = None) -> Batch:
        """Pack trees in the order given; the prefix of a tree is stored once.

        Args:
            trees: at least one.
            device: where the tensors go.
            adapters: name of the adapter of each tree; None: the active one for all.
        """
        token_ids: list[int] = []
        positions: list[np.ndarray[Any, Any]] = []
        scored: list[np.ndarray[Any, Any]] = []
        sequences = [sequence for tree in trees for sequence in tree.sequences]
        rollouts: dict[object, int] = {}
        number = 0
        for tree in trees:
            trunk, prefix = len(token_ids), tree.prefix
            token_ids += tree.sequences[0].token_ids[:prefix]
            positions.append(np.arange(prefix))
            for sequence, fork in zip(tree.sequences, tree.shared, strict=True):
                sequence_id = rollouts.setdefault(sequence.owner or number, len(rollouts))
                number += 1
                branch = len(token_ids) - fork
                token_ids += sequence.token_ids[fork:]
                positions.append(np.arange(fork, len(sequence.token_ids)))
                offsets = np.flatnonzero(sequence.loss_mask[1:])
                places = offsets + np.where(offsets < fork, trunk, branch)
                targets = np.array(sequence.token_ids, dtype=np.int64)[offsets + 1]
                scored.append(np.stack([places, targets, np.full_like(places, sequence_id)]))
        scored_positions, targets, sequence_ids = torch.from_numpy(np.concatenate(scored, axis=1)).to(device)
        return cls(
            token_ids=torch.tensor(token_ids).to(device),
            positions=torch.from_numpy(np.concatenate(positions)).to(device),
            layout=PackedLayout.of_trees(
                [tree.lengths for tree in trees], device, adapters, [tree.branch_forks for tree in trees]
            ),
            scored=scored_positions,
            targets=targets,
            sequence_ids=sequence_ids,
            inputs=LossInputs.of([sequence.inputs for sequence in sequences], device),
            sources=tuple({each.owner or index: each.source for index, each in enumerate(sequences)}.values()),
            owners=None if adapters is None else _owners([tree.num_tokens for tree in trees], adapters, device),
        )

    @classmethod
    def dummy(cls, device: torch.device) -> Batch:
        """The smallest possible pack: one trained token of weight 0."""
        inputs = TokenInputs(weights=(0.0,), advantages=(0.0,), sampler_logprobs=(0.0,))
        return replace(cls.pack([TokenSequence((0, 0), (False, True), inputs)], device), is_dummy=True)

    @property
    def num_tokens(self) -> int:
        """T, trained or not."""
        return len(self.token_ids)

    @property
    def num_trained(self) -> int:
        """N."""
        return len(self.targets)

    def with_logprobs(self, *, ref: torch.Tensor | None = None, old: torch.Tensor | None = None) -> Batch:
        """The same pack with logprobs that were measured before the update; None leaves what is there."""
        inputs = self.inputs
        inputs = inputs if ref is None else replace(inputs, ref_logprobs=ref)
        inputs = inputs if old is None else replace(inputs, old_logprobs=old)
        return replace(self, inputs=inputs)


def _owners(lengths: Sequence[int], adapters: Sequence[str], device: torch.device) -> TokenOwners:
    """Positions of each adapter's tokens, from the adapter and the length of each part of a pack."""
    rows: dict[str, list[int]] = {}
    start = 0
    for name, length in zip(adapters, lengths, strict=True):
        rows.setdefault(name, []).extend(range(start, start + length))
        start += length
    return TokenOwners({name: torch.tensor(positions, device=device) for name, positions in rows.items()})


def micro_batches(sequences: Sequence[TokenSequence], budget: int) -> list[list[TokenSequence]]:
    """Fill micro-batches up to a budget of tokens; a sequence is never split, a longer one is alone.

    Sequences of similar length are put together, so that attention needs little padding.
    """
    groups = fill([len(sequence.token_ids) for sequence in sequences], budget)
    return [[sequences[index] for index in group] for group in groups]


def tree_batches(trees: Sequence[Tree], budget: int) -> list[list[Tree]]:
    """`micro_batches` for trees; a tree is never split."""
    return unit_batches([[tree] for tree in trees], budget)


def unit_batches(units: Sequence[Sequence[Tree]], budget: int) -> list[list[Tree]]:
    """`micro_batches` for trees of which those of a unit stay together."""
    sizes = [sum(tree.num_tokens for tree in unit) for unit in units]
    return [[tree for index in group for tree in units[index]] for group in fill(sizes, budget)]


def fill(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of the items of each micro-batch, the largest first.

    >>> fill([5, 9, 2, 3], 10)
    [[1], [0, 3, 2]]
    """
    largest_first = sorted(range(len(sizes)), key=lambda index: (-sizes[index], index))
    bins: list[list[int]] = []
    used = 0
    for index in largest_first:
        if not bins or used + sizes[index] > budget:
            bins.append([])
            used = 0
        bins[-1].append(index)
        used += sizes[index]
    return bins


def grow_trees(sequences: Sequence[TokenSequence], budget: int) -> list[Tree]:
    """Pack sequences with a common prefix as trees, each within a budget of tokens.

    Where a tree would save less than `MIN_SAVED_FRAC`, each sequence becomes a tree of its own.

    Args:
        sequences: such as the completions of a prompt; trained tokens are not shared.
        budget: maximum tokens of a tree.
    """
    prefix = _common_prefix(sequences)
    total = sum(len(sequence.token_ids) for sequence in sequences)
    if prefix * (len(sequences) - 1) < MIN_SAVED_FRAC * total:
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


def grow_forks(sequences: Sequence[TokenSequence], budget: int) -> list[Tree]:
    """Pack sequences that share beginnings of different lengths, trained tokens included, each tree within a budget.

    Such are the sequences of one conversation whose chat template rewrites earlier turns: each was given the rewritten
    ones, so it shares them with the later ones. The sequence that shares most with the others becomes the prefix of a
    tree. Where that saves less than `MIN_SAVED_FRAC` of the tokens of `grow_trees`, those trees are taken.

    Args:
        sequences: of one rollout or row.
        budget: maximum tokens of a tree.
    """
    plain = grow_trees(sequences, budget)
    ids = [np.array(each.token_ids) for each in sequences]
    left = list(range(len(sequences)))
    trees: list[Tree] = []
    while left:
        shares = {
            trunk: [(_num_shared(ids[trunk], ids[each]), each) for each in left if each != trunk] for trunk in left
        }
        totals = {trunk: (sum(fork for fork, _ in shares[trunk]), len(ids[trunk])) for trunk in left}
        trunk = max(left, key=totals.__getitem__)
        used, chosen, forks = len(ids[trunk]), [trunk], [len(ids[trunk])]
        for fork, other in sorted(shares[trunk], reverse=True):
            if fork and used + len(ids[other]) - fork <= budget:
                used += len(ids[other]) - fork
                chosen.append(other)
                forks.append(fork)
        left = [each for each in left if each not in chosen]
        members = tuple(sequences[index] for index in chosen)
        trees.append(Tree(members, forks[0], tuple(forks)) if len(members) > 1 else Tree.of_one(members[0]))
    needed, otherwise = (sum(tree.num_tokens for tree in each) for each in (trees, plain))
    return trees if otherwise - needed >= MIN_SAVED_FRAC * otherwise else plain


def _num_shared(trunk: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> int:
    """Length of the common beginning; the last token of `other` is its own."""
    length = min(len(trunk), len(other) - 1)
    differs = np.flatnonzero(trunk[:length] != other[:length])
    return int(differs[0]) if len(differs) else length


def _common_prefix(sequences: Sequence[TokenSequence]) -> int:
    """Length of the common prefix; it ends before the first trained token and before the last token of a sequence."""
    first = sequences[0]
    longest = min((*sequence.loss_mask, True).index(True) for sequence in sequences)
    longest = min(longest, *(len(sequence.token_ids) - 1 for sequence in sequences))
    are_equal = (
        all(sequence.token_ids[index] == first.token_ids[index] for sequence in sequences) for index in range(longest)
    )
    return next((index for index, is_equal in enumerate(are_equal) if not is_equal), longest)


def split_evenly(sizes: Sequence[int], num_parts: int) -> list[list[int]]:
    """Indices of the items of each part, with nearly equal sums of sizes.

    The largest items are assigned first, each to the part with the smallest sum.

    >>> split_evenly([7, 5, 4, 3, 1], 2)
    [[0, 3], [1, 2, 4]]
    """
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    loads = [0] * num_parts
    for index in sorted(range(len(sizes)), key=lambda item: (-sizes[item], item)):
        lightest = min(range(num_parts), key=lambda part: (loads[part], part))
        parts[lightest].append(index)
        loads[lightest] += sizes[index]
    return [sorted(part) for part in parts]
