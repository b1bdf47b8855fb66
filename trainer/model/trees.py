"""Which sequences are packed as trees: those that share a beginning. For the packs of sft and rft."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from trainer.data.tokens import TokenSequence
from trainer.model.batch import Tree

MIN_SAVED_FRAC: Final = 0.05
"""Sequences are packed as a tree only if it saves this fraction of their tokens; its attention takes two parts."""


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
