"""Rows of several sequences, one per turn that the template rewrites: packed as trees, read when they are needed."""

from __future__ import annotations

import pytest
import torch
from rewritten import conversation

from trainer.data.token_table import EncodedChunk, TableWriter, TokenTable
from trainer.data.tokens import TokenInputs, TokenSequence
from trainer.model.batch import Batch, fill
from trainer.model.trees import Tree
from trainer.training.row_trees import plan_packs
from trainer.types import Row

CPU = torch.device("cpu")


def table(directory, sizes: list[int]) -> TokenTable:
    """Rows of so many sequences."""
    rows = []
    for number, size in enumerate(sizes):
        sequences = [
            TokenSequence(each.token_ids, each.loss_mask, TokenInputs(weights=(0.5,) * each.num_trained))
            for each in conversation(size, prompt=9 + number)
        ]
        rows.append((Row({}, "rows.jsonl", number + 1, number), tuple(sequences)))
    with TableWriter(directory) as writer:
        writer.append(EncodedChunk.of(rows, num_read=len(rows), num_truncated=0, num_respaced=0))
        writer.finish()
    return TokenTable(directory)


def test_rows_of_one_sequence_are_packed_as_before(tmp_path):
    rows = table(tmp_path, [1, 1, 1, 1])
    numbers = [2, 0, 3, 1]
    packs = [Batch.pack_trees([tree.read(rows) for tree in pack], CPU) for pack in plan_packs(rows, numbers, 45)]
    before = [
        Batch.pack([rows.sequence(numbers[index]) for index in group], CPU) for group in fill(rows.lengths(numbers), 45)
    ]
    assert len(packs) == len(before) == 2
    for ours, theirs in zip(packs, before, strict=True):
        assert torch.equal(ours.token_ids, theirs.token_ids)
        assert torch.equal(ours.scored, theirs.scored)
        assert ours.layout.trees == theirs.layout.trees
        assert ours.sources == theirs.sources


def test_the_sequences_of_a_row_share_what_they_repeat(tmp_path):
    rows = table(tmp_path, [1, 4, 2])
    numbers = rows.sequences_of([0, 1, 2])
    assert rows.by_row(numbers) == [[0], [1, 2, 3, 4], [5, 6]]
    assert rows.by_row([0, 0, 5, 6, 5, 6]) == [[0], [0], [5, 6], [5, 6]], "a row that comes twice in a step"
    trees = [tree for pack in plan_packs(rows, numbers, 1000) for tree in pack]
    assert sorted(number for tree in trees for number in tree.numbers) == numbers, "each once"
    assert [set(tree.numbers) for tree in trees] == [{1, 2, 3, 4}, {5, 6}, {0}]
    read = [tree.read(rows) for tree in trees]
    assert all(tree.num_tokens == planned.num_tokens for tree, planned in zip(read, trees, strict=True))
    assert read[0].forks, "branches behind parts of the longest sequence"
    assert read[0].num_tokens < 0.6 * sum(rows.lengths([1, 2, 3, 4]))
    batch = Batch.pack_trees(read, CPU)
    assert batch.num_trained == sum(rows.sequence(number).num_trained for number in numbers)
    assert batch.sources[0] == "rows.jsonl:2"


@pytest.mark.parametrize("budget", [1, 60])
def test_trees_of_a_row_keep_the_budget_where_a_sequence_does(tmp_path, budget):
    rows = table(tmp_path, [5])
    packs = plan_packs(rows, rows.sequences_of([0]), budget)
    for pack in packs:
        assert sum(tree.num_tokens for tree in pack) <= budget or len(pack) == len(pack[0].numbers) == 1
    assert sorted(number for pack in packs for tree in pack for number in tree.numbers) == [0, 1, 2, 3, 4]
    assert all(isinstance(tree.read(rows), Tree) for pack in packs for tree in pack)


def test_rows_that_are_split_over_ranks_share_nothing(tmp_path):
    rows = table(tmp_path, [1, 4])
    numbers = rows.sequences_of([0, 1])
    trees = [tree for pack in plan_packs(rows, numbers, 1000, may_share=False) for tree in pack]
    assert sorted(tree.numbers for tree in trees) == [(number,) for number in numbers]
    assert all(tree.num_tokens == tree.prefix for tree in trees)
