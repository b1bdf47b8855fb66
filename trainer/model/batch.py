"""Packed batches: sequences end to end, without padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, TypeVar, final

import numpy as np
import torch

from trainer.data.tokens import TokenInputs, TokenSequence
from trainer.distributed.context import ContextGroup
from trainer.model.flex import MASK_BLOCK
from trainer.model.layout import PackedLayout, SlicedLayout, rows_of_slice
from trainer.model.transfer import to_device
from trainer.model.trees import Tree

T = TypeVar("T")


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
    def of(
        cls, inputs: Sequence[TokenInputs], device: torch.device, kept: np.ndarray[Any, Any] | None = None
    ) -> LossInputs:
        """Join the inputs of sequences.

        Args:
            inputs: of the sequences of a pack.
            device: where the tensors go.
            kept: [N] which trained tokens they are of; None: all.
        """

        def joined(parts: Sequence[tuple[float, ...]]) -> torch.Tensor:
            values = np.fromiter(chain.from_iterable(parts), dtype=np.float32)
            values = values if kept is None or not len(values) else values[kept]
            return to_device(torch.from_numpy(values), device)

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
    """[T] long; on a GPU followed by padding (`layout.padding`), which is counted in T."""
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
    part: SlicedLayout | None = None
    """With context parallelism: which tokens of the pack this rank has. `layout` is of the whole pack, everything else
    of this rank's tokens: T and N count those, and `scored` are positions among them. None: the rank has all tokens."""
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
        cls,
        sequences: Sequence[TokenSequence],
        device: torch.device,
        *,
        adapters: Sequence[str] | None = None,
        is_padded: bool | None = None,
        context: ContextGroup | None = None,
    ) -> Batch:
        """Pack sequences in the order given; all have the same kind of inputs.

        Args:
            sequences: at least one.
            device: where the tensors go.
            adapters: name of the adapter of each sequence; None: the active one for all.
            is_padded: see `pack_trees`.
            context: see `pack_trees`.
        """
        trees = [Tree.of_one(sequence) for sequence in sequences]
        return cls.pack_trees(trees, device, adapters=adapters, is_padded=is_padded, context=context)

    @classmethod
    def pack_trees(
        cls,
        trees: Sequence[Tree],
        device: torch.device,
        *,
        adapters: Sequence[str] | None = None,
        is_padded: bool | None = None,
        context: ContextGroup | None = None,
    ) -> Batch:
        """Pack trees in the order given; the prefix of a tree is stored once.

        Args:
            trees: at least one.
            device: where the tensors go.
            adapters: name of the adapter of each tree; None: the active one for all.
            is_padded: whether to pad to whole mask blocks (`padding_of`); None: on a GPU, unless there are adapters.
            context: ranks that compute the pack together, which has no adapters then: the result is the slice of this
                rank. Positions and targets are those of the whole pack, so a token whose next one is on another rank is
                trained as everywhere. None: all tokens.
        """
        token_ids: list[np.ndarray[Any, Any]] = []
        positions: list[np.ndarray[Any, Any]] = []
        scored: list[np.ndarray[Any, Any]] = []
        sequences = [sequence for tree in trees for sequence in tree.sequences]
        rollouts: dict[object, int] = {}
        number = total = 0
        for tree in trees:
            trunk, prefix = total, tree.prefix
            for index, (sequence, fork) in enumerate(zip(tree.sequences, tree.shared, strict=True)):
                ids = np.array(sequence.token_ids, dtype=np.int64)
                if index == 0:
                    token_ids.append(ids[:prefix])
                    positions.append(np.arange(prefix))
                    total += prefix
                sequence_id = rollouts.setdefault(sequence.owner or number, len(rollouts))
                number += 1
                branch = total - fork
                token_ids.append(ids[fork:])
                positions.append(np.arange(fork, len(ids)))
                total += len(ids) - fork
                offsets = np.flatnonzero(np.array(sequence.loss_mask[1:], dtype=bool))
                places = offsets + np.where(offsets < fork, trunk, branch)
                scored.append(np.stack([places, ids[offsets + 1], np.full_like(places, sequence_id)]))
        if is_padded is None:
            is_padded = device.type != "cpu" and adapters is None
        padding = padding_of(total, 1 if context is None else context.size) if is_padded else 0
        if context is not None and not is_padded:
            padding = -total % (2 * context.size)
        of_tokens = np.zeros((2, total + padding), dtype=np.int64)
        np.concatenate(token_ids, out=of_tokens[0, :total])
        np.concatenate(positions, out=of_tokens[1, :total])
        of_scored, kept, rows = np.concatenate(scored, axis=1), None, None
        if context is not None:
            assert adapters is None, "packs of several adapters are not split"
            rows = rows_of_slice(total + padding, context)
            of_tokens, of_scored, kept = _sliced(of_tokens, of_scored, rows)
        ids_and_positions = to_device(torch.from_numpy(of_tokens), device)
        scored_positions, targets, sequence_ids = to_device(torch.from_numpy(of_scored), device)
        lengths, forks = [tree.lengths for tree in trees], [tree.branch_forks for tree in trees]
        layout = PackedLayout.of_trees(lengths, device, adapters, padding=padding, forks=forks)
        part = None
        if context is not None and rows is not None:
            part = SlicedLayout(layout, context, to_device(torch.from_numpy(rows), device))
        return cls(
            token_ids=ids_and_positions[0],
            positions=ids_and_positions[1],
            layout=layout,
            scored=scored_positions,
            targets=targets,
            sequence_ids=sequence_ids,
            inputs=LossInputs.of([sequence.inputs for sequence in sequences], device, kept),
            sources=tuple({each.owner or index: each.source for index, each in enumerate(sequences)}.values()),
            owners=None if adapters is None else _owners([tree.num_tokens for tree in trees], adapters, device),
            part=part,
        )

    @classmethod
    def dummy(cls, device: torch.device, context: ContextGroup | None = None) -> Batch:
        """The smallest possible pack: one trained token of weight 0.

        Args:
            device: where the tensors go.
            context: see `pack_trees`.
        """
        inputs = TokenInputs(weights=(0.0,), advantages=(0.0,), sampler_logprobs=(0.0,))
        pack = cls.pack([TokenSequence((0, 0), (False, True), inputs)], device, context=context)
        return replace(pack, is_dummy=True)

    @property
    def num_tokens(self) -> int:
        """T, trained or not, padding included."""
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


def padding_of(num_tokens: int, num_ranks: int = 1) -> int:
    """Tokens that a pack on a GPU gets behind its own: to whole blocks of the attention mask, and at least two.

    Kernels for whole blocks then suffice, and a pack of a single block would be compiled apart. Where several ranks
    compute the pack together, each of their chunks (`SlicedLayout`) has whole blocks.

    >>> padding_of(1), padding_of(256), padding_of(300), padding_of(600, 2)
    (255, 0, 84, 424)

    Args:
        num_tokens: of the pack.
        num_ranks: that compute it together.
    """
    if num_ranks > 1:
        return -num_tokens % (2 * num_ranks * MASK_BLOCK)
    return max(2 * MASK_BLOCK - num_tokens, -num_tokens % MASK_BLOCK)


def _sliced(
    of_tokens: np.ndarray[Any, Any], of_scored: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """What a rank has of a pack: columns of its tokens, columns of the trained tokens that they predict, and which.

    Args:
        of_tokens: [2, T] ids and positions.
        of_scored: [3, N] position in the pack, target and sequence.
        rows: [t] positions in the pack of the rank's tokens.
    """
    place = np.full(of_tokens.shape[1], -1)
    place[rows] = np.arange(len(rows))
    kept = place[of_scored[0]] >= 0
    of_scored = of_scored[:, kept]
    of_scored[0] = place[of_scored[0]]
    return np.ascontiguousarray(of_tokens[:, rows]), of_scored, kept


def _owners(lengths: Sequence[int], adapters: Sequence[str], device: torch.device) -> TokenOwners:
    """Positions of each adapter's tokens, from the adapter and the length of each part of a pack."""
    rows: dict[str, list[int]] = {}
    start = 0
    for name, length in zip(adapters, lengths, strict=True):
        rows.setdefault(name, []).extend(range(start, start + length))
        start += length
    return TokenOwners({name: to_device(torch.tensor(positions), device) for name, positions in rows.items()})


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
