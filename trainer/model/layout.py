"""Positions of the sequences in a pack: end to end, or several behind one copy of their common prefix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, final

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask

from trainer.distributed.context import ContextGroup
from trainer.model.flash_choice import AttentionKind
from trainer.model.flash_trees import Parts
from trainer.model.kv_cache import KeyValueCache
from trainer.model.transfer import to_device
from trainer.model.turn_cache import Tails

BUCKET_RATIO: Final = 1.6
"""Maximum ratio of the longest to the shortest row of a bucket; 16 tokens more are allowed."""
_PADDING: Final = "\0padding"
"""Owner of the padding: no adapter has this name."""


@final
@dataclass(frozen=True)
class Bucket:
    """Sequences or branches of similar length, as rows of one padded matrix.

    Sequences of 3 and 2 tokens at the positions 0 to 4 of a pack, the row of 2 padded to 3:

        gather    [[0, 1, 2], [3, 4, 3]]
        cells     [0, 1, 2, 3, 4]
        padding   [5]
    """

    gather: torch.Tensor
    """[R, L] position in the pack of each cell; padding cells have the position of the row's first token."""
    cells: torch.Tensor
    """[n] flat indices of the cells that hold a token."""
    padding: torch.Tensor
    """[m] flat indices of the padding cells."""
    prefix: int | None = None
    """Index of the bucket whose single row is the prefix of every row of this one; None if there is no prefix."""
    fork: int | None = None
    """How many of the prefix's tokens the rows continue; None: all."""


@final
@dataclass(frozen=True)
class PackedLayout:
    """The trees of a pack: each a prefix and the branches that continue it; a plain sequence has no branches.

    Two sequences of 4 and 3 tokens: `trees` is ((4, ()), (3, ())), `max_len` 4, one bucket of 2 rows. A prompt of 4
    with completions of 3 and 2 tokens: ((4, (3, 2)),), `max_len` 7, one bucket for the prompt and one for the
    completions; the pack has 9 tokens. Where the second one continues the first 2 tokens of the prompt only, `forks` is
    ((4, 2),), and it has a bucket of its own.
    """

    trees: tuple[tuple[int, tuple[int, ...]], ...]
    """Length of each prefix and of each of its branches, in the order of the pack."""
    max_len: int
    """Tokens of the longest sequence, its prefix included."""
    buckets: tuple[Bucket, ...]
    """Empty on a GPU, where attention reads block masks instead."""
    order: torch.Tensor
    """[T] index of each token in the concatenation of the real cells of all buckets; empty on a GPU."""
    padding: int = 0
    """Tokens behind the trees that attend to themselves only; they belong to no sequence."""
    made_coordinates: torch.Tensor | None = None
    """GPU only: what `coordinates` returns, copied there with the pack."""
    made_parts: Parts | None = None
    """GPU only: what `parts` returns, copied there with the pack."""
    block_masks: dict[tuple[int | None, int], BlockMask] = field(default_factory=dict, compare=False, repr=False)
    """GPU only: cache by window and tokens of padding, filled by the first layer that needs it."""
    kinds: set[AttentionKind] = field(default_factory=set, compare=False, repr=False)
    """Kinds of attention that the layers have; filled by a forward pass of uncompiled layers."""
    hidden_windows: set[int] = field(default_factory=set, compare=False, repr=False)
    """Windows of layers that do not pass theirs to attention; filled by a forward pass."""
    forks: tuple[tuple[int, ...], ...] = ()
    """Of each tree, how many tokens of the prefix each branch continues; () where all branches continue all of it."""

    @classmethod
    def of_lengths(cls, lengths: Sequence[int], device: torch.device) -> PackedLayout:
        """The layout of sequences of these lengths, in the order of the pack."""
        return cls.of_trees([(length, ()) for length in lengths], device)

    @classmethod
    def of_trees(
        cls,
        trees: Sequence[tuple[int, Sequence[int]]],
        device: torch.device,
        owners: Sequence[str] | None = None,
        *,
        padding: int = 0,
        forks: Sequence[Sequence[int]] | None = None,
    ) -> PackedLayout:
        """The layout of trees, in the order of the pack.

        Args:
            trees: prefix length and branch lengths of each.
            device: of the result.
            owners: of each tree; trees of different owners share no bucket, so that the padding of a tree, and with it
                the rounding of its attention, does not depend on other owners. None: all have the same owner.
            padding: tokens behind them that attend to themselves only.
            forks: of each tree, how many tokens of the prefix each branch continues. None: all of them.
        """
        numbered = tuple((prefix, tuple(branches)) for prefix, branches in trees)
        ends = _whole_prefixes(numbered)
        forked = ends if forks is None else tuple(map(tuple, forks))
        kept = () if forked == ends else forked
        longest = max(
            max([prefix, *(fork + length for fork, length in zip(of_tree, branches, strict=True))])
            for (prefix, branches), of_tree in zip(numbered, forked, strict=True)
        )
        if device.type != "cpu":
            order = torch.empty(0, dtype=torch.long, device=device)
            made = to_device(_coordinates(numbered, forked, padding), device)
            parts = None if kept else Parts.of(numbered, padding).moved(lambda each: to_device(each, device))
            return cls(numbered, longest, (), order, padding, made, parts, forks=kept)
        start = 0
        plain: dict[str, list[tuple[int, int]]] = {}
        branched: list[tuple[tuple[int, int], dict[int, list[tuple[int, int]]]]] = []
        for (prefix, branches), of_tree, owner in zip(numbered, forked, owners or [""] * len(trees), strict=True):
            trunk = (start, prefix)
            start += prefix
            spans: dict[int, list[tuple[int, int]]] = {}
            for fork, length in zip(of_tree, branches, strict=True):
                spans.setdefault(fork, []).append((start, length))
                start += length
            if spans:
                branched.append((trunk, spans))
            else:
                plain.setdefault(owner, []).append(trunk)
        if padding:
            plain[_PADDING] = [(start, padding)]
        buckets = [_bucket(group, device) for of_owner in plain.values() for group in _of_similar_length(of_owner)]
        for trunk, spans in branched:
            index = len(buckets)
            buckets.append(_bucket([trunk], device))
            for fork, of_fork in spans.items():
                at = None if fork == trunk[1] else fork
                buckets += [_bucket(group, device, index, at) for group in _of_similar_length(of_fork)]
        order = torch.argsort(torch.cat([bucket.gather.flatten()[bucket.cells] for bucket in buckets]))
        return cls(numbered, longest, tuple(buckets), order, padding, forks=kept)

    @cached_property
    def num_tokens(self) -> int:
        """T, the tokens of the pack with its padding."""
        return sum(prefix + sum(branches) for prefix, branches in self.trees) + self.padding

    @property
    def is_plain(self) -> bool:
        """Whether no sequences share a prefix."""
        return not any(branches for _, branches in self.trees)

    def parts(self, padding: int = 0) -> Parts | None:
        """The sequences, prefixes and branches; None where a branch continues a part of its prefix.

        Args:
            padding: further tokens behind the pack; all padding is one more part.
        """
        if self.forks or (self.made_parts is not None and not padding):
            return self.made_parts
        device = self.order.device
        return Parts.of(self.trees, self.padding + padding).moved(lambda each: to_device(each, device))

    def coordinates(self, padding: int = 0) -> torch.Tensor:
        """[4, T + padding]: the tree, the branch (0 is the prefix), its fork and the position in it of each token.

        Args:
            padding: further tokens behind the pack; all padding is a tree of its own.
        """
        if self.made_coordinates is not None and not padding:
            return self.made_coordinates
        forks = self.forks or _whole_prefixes(self.trees)
        return _coordinates(self.trees, forks, self.padding + padding).to(self.order.device)


def _whole_prefixes(trees: Sequence[tuple[int, tuple[int, ...]]]) -> tuple[tuple[int, ...], ...]:
    """`PackedLayout.forks` of trees whose branches continue all of their prefix."""
    return tuple((prefix,) * len(branches) for prefix, branches in trees)


def _coordinates(
    trees: Sequence[tuple[int, tuple[int, ...]]], forks: Sequence[tuple[int, ...]], padding: int
) -> torch.Tensor:
    """`PackedLayout.coordinates`, on the CPU."""
    padded, of_trees = ([*trees, (padding, ())], [*forks, ()]) if padding else (trees, forks)
    parts = [
        (length, tree, branch, fork, fork)
        for tree, ((prefix, branches), of_tree) in enumerate(zip(padded, of_trees, strict=True))
        for branch, (length, fork) in enumerate(zip((prefix, *branches), (0, *of_tree), strict=True))
    ]
    lengths, *of_parts = np.array(parts, dtype=np.int64).T
    of_tokens = np.repeat(np.stack(of_parts), lengths, axis=1)
    of_tokens[3] += np.arange(len(of_tokens[3])) - np.repeat(lengths.cumsum() - lengths, lengths)
    return torch.from_numpy(of_tokens)


def _of_similar_length(spans: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Spans of (start, length), longest first, in groups that need little padding."""
    groups: list[list[tuple[int, int]]] = []
    for span in sorted(spans, key=lambda each: -each[1]):
        if groups and groups[-1][0][1] <= BUCKET_RATIO * span[1] + 16:
            groups[-1].append(span)
        else:
            groups.append([span])
    return groups


def _bucket(
    spans: Sequence[tuple[int, int]], device: torch.device, prefix: int | None = None, fork: int | None = None
) -> Bucket:
    begin = torch.tensor([start for start, _ in spans])[:, None]
    length = torch.tensor([length for _, length in spans])[:, None]
    offset = torch.arange(spans[0][1])[None, :]
    real = offset < length
    gather = begin + offset * real
    cells, padding = (flags.flatten().nonzero().squeeze(1).to(device) for flags in (real, ~real))
    return Bucket(gather.to(device), cells, padding, prefix, fork)


@final
@dataclass(frozen=True)
class SlicedLayout:
    """What attention receives of a pack that several ranks compute together: the whole pack, and this rank's tokens.

    The pack is cut into 2 * size chunks of equal length. Rank r has chunk r and chunk 2 * size - 1 - r, so that under a
    causal mask all ranks have the same amount of attention. A pack of 8 tokens on two ranks: 0, 1, 6, 7 and 2, 3, 4, 5.
    """

    whole: PackedLayout
    group: ContextGroup
    rows: torch.Tensor
    """[t] position in the pack of each token of this rank, ascending."""
    block_masks: dict[int | None, BlockMask] = field(default_factory=dict, compare=False, repr=False)
    """GPU only: cache by window, filled by the first layer that needs it."""

    @property
    def max_len(self) -> int:
        """Tokens of the longest sequence, its prefix included."""
        return self.whole.max_len

    @property
    def num_tokens(self) -> int:
        """t, the tokens of this rank."""
        return len(self.rows)

    @property
    def chunk_tokens(self) -> int:
        """Tokens of a chunk."""
        return self.whole.num_tokens // (2 * self.group.size)

    @property
    def chunks(self) -> tuple[int, int]:
        """The two chunks of this rank, ascending."""
        return self.group.rank, 2 * self.group.size - 1 - self.group.rank

    @cached_property
    def chunk_order(self) -> list[int]:
        """Where each chunk of the pack is in the slices of all ranks, one behind the other."""
        size = self.group.size
        return [2 * chunk if chunk < size else 2 * (2 * size - 1 - chunk) + 1 for chunk in range(2 * size)]


def rows_of_slice(num_tokens: int, group: ContextGroup) -> np.ndarray[Any, Any]:
    """[t] positions in a pack of the tokens of a rank; see `SlicedLayout`.

    Args:
        num_tokens: of the pack, a multiple of 2 * size.
        group: the ranks.
    """
    chunk = num_tokens // (2 * group.size)
    first, second = group.rank * chunk, (2 * group.size - 1 - group.rank) * chunk
    return np.concatenate([np.arange(first, first + chunk), np.arange(second, second + chunk)])


@final
@dataclass(frozen=True)
class CachedLayout:
    """The layout that sampling passes to attention: the pack of the prompts first, then one token of each row.

    Where conversations have cached earlier turns, the first pack has only what follows.
    """

    cache: KeyValueCache
    prompts: PackedLayout | None
    """The layout of the prompts in the first pass; None in all later ones, and with `tails`."""
    tails: Tails | None = None
    """Of the first pass of a later turn."""

    @property
    def max_len(self) -> int:
        """Tokens of the longest sequence; checked against windows that a model does not pass to attention."""
        return self.cache.longest_prompt + self.cache.num_own + 1
