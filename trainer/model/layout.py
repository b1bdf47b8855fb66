"""Where the sequences of a pack lie: end to end, or several behind one copy of what they begin with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, final

import torch
from torch.nn.attention.flex_attention import BlockMask

from trainer.model.kv_cache import KeyValueCache

BUCKET_RATIO: Final = 1.6
"""A bucket's longest row is at most so many times its shortest (tiny ones ride along)."""


@final
@dataclass(frozen=True)
class Bucket:
    """Sequences or branches of like length, as rows of one padded matrix."""

    gather: torch.Tensor
    """[R, L] index of each padded cell into the pack; padding cells repeat index of the row's first token."""
    cells: torch.Tensor
    """[n] flat index of the real cells."""
    padding: torch.Tensor
    """[m] flat index of the cells that hold no token."""
    prefix: int | None = None
    """The bucket whose one row stands before each row of this one; None where nothing does."""


@final
@dataclass(frozen=True)
class PackedLayout:
    """A row of trees: a prefix and the branches that go on from it. A plain sequence is a prefix without branches."""

    trees: tuple[tuple[int, tuple[int, ...]], ...]
    """Tokens of each prefix, and of each of its branches; in the pack in this order."""
    max_len: int
    """Tokens of the longest sequence, from the beginning of its prefix."""
    buckets: tuple[Bucket, ...]
    order: torch.Tensor
    """[T] position of each token of the pack in the concatenation of the buckets' real cells."""
    block_masks: dict[int | None, BlockMask] = field(default_factory=dict, compare=False, repr=False)
    """GPU only: by window, filled when a layer first asks."""

    @classmethod
    def of_lengths(cls, lengths: Sequence[int], device: torch.device) -> PackedLayout:
        """Lay out sequences of these lengths, which stand in the pack in this order."""
        return cls.of_trees([(length, ()) for length in lengths], device)

    @classmethod
    def of_trees(cls, trees: Sequence[tuple[int, Sequence[int]]], device: torch.device) -> PackedLayout:
        """Lay out trees, each a prefix and the lengths of its branches, which stand in the pack in this order."""
        start = 0
        plain: list[tuple[int, int]] = []
        branched: list[tuple[tuple[int, int], list[tuple[int, int]]]] = []
        for prefix, branches in trees:
            trunk = (start, prefix)
            start += prefix
            found = []
            for length in branches:
                found.append((start, length))
                start += length
            if found:
                branched.append((trunk, found))
            else:
                plain.append(trunk)
        buckets = [_bucket(group, device) for group in _of_like_length(plain)]
        for trunk, found in branched:
            number = len(buckets)
            buckets.append(_bucket([trunk], device))
            buckets += [_bucket(group, device, prefix=number) for group in _of_like_length(found)]
        order = torch.argsort(torch.cat([bucket.gather.flatten()[bucket.cells] for bucket in buckets]))
        return cls(
            trees=tuple((prefix, tuple(branches)) for prefix, branches in trees),
            max_len=max(prefix + max(branches, default=0) for prefix, branches in trees),
            buckets=tuple(buckets),
            order=order,
        )

    def coordinates(self) -> torch.Tensor:
        """[3, T] of each token: its tree, its branch (0 is the prefix), and its position in its sequence."""
        trees: list[int] = []
        branches: list[int] = []
        positions: list[int] = []
        for number, (prefix, lengths) in enumerate(self.trees):
            for branch, length in enumerate((prefix, *lengths)):
                begin = prefix if branch else 0
                trees += [number] * length
                branches += [branch] * length
                positions += range(begin, begin + length)
        return torch.tensor([trees, branches, positions], device=self.order.device)


def _of_like_length(spans: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Spans of (start, length), longest first, in groups that pad little."""
    groups: list[list[tuple[int, int]]] = []
    for span in sorted(spans, key=lambda each: -each[1]):
        if groups and groups[-1][0][1] <= BUCKET_RATIO * span[1] + 16:
            groups[-1].append(span)
        else:
            groups.append([span])
    return groups


def _bucket(spans: Sequence[tuple[int, int]], device: torch.device, prefix: int | None = None) -> Bucket:
    begin = torch.tensor([start for start, _ in spans])[:, None]
    length = torch.tensor([length for _, length in spans])[:, None]
    offset = torch.arange(spans[0][1])[None, :]
    real = offset < length
    gather = begin + offset * real
    cells, padding = (flags.flatten().nonzero().squeeze(1).to(device) for flags in (real, ~real))
    return Bucket(gather.to(device), cells, padding, prefix)


@final
@dataclass(frozen=True)
class CachedLayout:
    """What sampling hands to attention: the pack of the prompts first, then one token of each row."""

    cache: KeyValueCache
    prompts: PackedLayout | None
    """The prompts' layout when they are read; None ever after."""

    @property
    def max_len(self) -> int:
        """Tokens of the longest sequence, for models that hide their window."""
        return self.cache.longest_prompt + self.cache.num_own + 1
