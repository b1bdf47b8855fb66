"""Packing: where tokens go, what is trained, and that micro-batches, ranks and epochs lose nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.order import epoch_order, rows_of_step
from trainer.data.tokens import TokenInputs, TokenSequence
from trainer.model.batch import Batch, micro_batches, split_evenly

CPU = torch.device("cpu")
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=30)


def sequence_of(length: int, first: int = 0) -> TokenSequence:
    return TokenSequence(tuple(range(first, first + length)), (True,) * length)


def test_a_pack_lies_end_to_end_and_scores_what_is_trained():
    first = TokenSequence((10, 11, 12, 13), (False, False, True, True), TokenInputs(weights=(0.5, 0.25)), "a.jsonl:1")
    second = TokenSequence((20, 21, 22), (True, True, False), TokenInputs(weights=(2.0,)), "a.jsonl:2")
    batch = Batch.pack([first, second], CPU)
    assert batch.token_ids.tolist() == [10, 11, 12, 13, 20, 21, 22]
    assert batch.positions.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert batch.layout.trees == ((4, ()), (3, ()))
    # 12 and 13 are predicted at 1 and 2; of the second row 21 at 4: nothing predicts its first token.
    assert batch.scored.tolist() == [1, 2, 4]
    assert batch.targets.tolist() == [12, 13, 21]
    assert batch.sequence_ids.tolist() == [0, 0, 1]
    assert batch.inputs.weights.tolist() == [0.5, 0.25, 2.0]
    assert (batch.num_tokens, batch.num_trained, batch.num_sequences) == (7, 3, 2)


def test_a_pack_without_a_trained_token_is_a_pack():
    batch = Batch.pack([TokenSequence((1, 2), (True, False), TokenInputs(weights=()))], CPU)
    assert (batch.num_tokens, batch.num_trained) == (2, 0)
    assert batch.targets.dtype == batch.scored.dtype == torch.long
    assert batch.inputs.weights.shape == (0,)


def test_no_target_crosses_a_border():
    batch = Batch.pack([sequence_of(3, first=100), sequence_of(1, first=200), sequence_of(2, first=300)], CPU)
    assert batch.targets.tolist() == [101, 102, 301]  # never 200 or 300, the first tokens


def test_truncation_keeps_the_inputs_of_what_it_keeps():
    whole = TokenSequence((1, 2, 3, 4, 5), (True, False, True, True, True), TokenInputs(weights=(3.0, 4.0, 5.0)), "x:1")
    cut = whole.truncated(4)
    assert cut == TokenSequence((1, 2, 3, 4), (True, False, True, True), TokenInputs(weights=(3.0, 4.0)), "x:1")
    assert (whole.num_trained, cut.num_trained, whole.truncated(1).num_trained) == (3, 2, 0)


def test_micro_batches_are_filled_longest_first():
    sequences = [sequence_of(length) for length in (3, 9, 4, 12, 4)]
    sizes = [[len(sequence.token_ids) for sequence in group] for group in micro_batches(sequences, 10)]
    assert sizes == [[12], [9], [4, 4], [3]]  # 12 is over the budget and stands alone; 4 + 4 + 3 would be 11


@given(lengths=LENGTHS, budget=st.integers(1, 80))
def test_micro_batches_lose_nothing_split_nothing_and_keep_the_budget(lengths, budget):
    sequences = [sequence_of(length, first=1000 * number) for number, length in enumerate(lengths)]
    groups = micro_batches(sequences, budget)
    kept = sorted((sequence for group in groups for sequence in group), key=lambda sequence: sequence.token_ids)
    assert kept == sequences
    for group in groups:
        assert group
        assert len(group) == 1 or sum(len(sequence.token_ids) for sequence in group) <= budget


@given(lengths=LENGTHS, budget=st.integers(1, 80))
def test_micro_batches_are_no_more_than_twice_the_fewest(lengths, budget):
    groups = micro_batches([sequence_of(length) for length in lengths], budget)
    # Two neighbouring micro-batches together hold more than one budget.
    assert len(groups) <= 2 * -(-sum(lengths) // budget)


@given(sizes=LENGTHS, num_parts=st.integers(1, 8))
def test_parts_hold_every_item_once_and_differ_by_at_most_the_largest(sizes, num_parts):
    parts = split_evenly(sizes, num_parts)
    assert len(parts) == num_parts
    assert sorted(index for part in parts for index in part) == list(range(len(sizes)))
    loads = [sum(sizes[index] for index in part) for part in parts]
    assert max(loads) - min(loads) <= max(sizes)


def test_parts_are_balanced_by_size():
    assert split_evenly([7, 5, 4, 3, 1], 2) == [[0, 3], [1, 2, 4]]  # 10 and 10
    assert split_evenly([5], 3) == [[0], [], []]


@given(num_rows=st.integers(1, 23), rows_per_step=st.integers(1, 50), seed=st.integers(0, 99), epochs=st.integers(1, 3))
def test_every_row_comes_once_an_epoch(num_rows, rows_per_step, seed, epochs):
    steps = -(-num_rows * epochs // rows_per_step)
    rows = [row for step in range(steps) for row in rows_of_step(seed, step, rows_per_step, num_rows)]
    assert len(rows) == steps * rows_per_step
    for epoch in range(epochs):
        assert sorted(rows[epoch * num_rows : (epoch + 1) * num_rows]) == list(range(num_rows))


def test_rows_of_a_step_are_a_function_of_seed_and_step():
    # Written out: another order after an update of this package would change what a resumed run trains on.
    assert [rows_of_step(0, step, 3, 7) for step in range(3)] == EXPECTED
    assert rows_of_step(0, 2, 3, 7) == EXPECTED[2]  # nothing is remembered between calls
    assert list(epoch_order(0, 0, 7)) != list(epoch_order(0, 1, 7))
    assert list(epoch_order(0, 0, 7)) != list(epoch_order(1, 0, 7))


EXPECTED = [[4, 5, 6], [1, 3, 2], [0, 4, 1]]


@pytest.mark.parametrize("rows_per_step", [1, 2, 5, 7, 14, 20])
def test_the_row_order_does_not_depend_on_the_rows_of_a_step(rows_per_step):
    wanted = [*epoch_order(3, 0, 7), *epoch_order(3, 1, 7)]
    rows = [row for step in range(20) for row in rows_of_step(3, step, rows_per_step, 7)]
    assert rows[:14] == wanted
