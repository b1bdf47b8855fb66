"""Packs made ahead in a thread: the same packs, in the same order, whatever step the run begins with."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from trainer.config.recipe import SFTRecipe
from trainer.data.token_table import EncodedChunk, TableWriter, TokenTable
from trainer.data.tokens import TokenInputs, TokenSequence
from trainer.distributed.world import World
from trainer.model.batch import Batch
from trainer.training import sft_packs
from trainer.training.prefetch import AHEAD, Prefetched
from trainer.training.sft_packs import Step, StepPacks
from trainer.types import Row

CPU = torch.device("cpu")
NUM_ROWS, STEPS = 11, 6


def test_items_come_in_order_and_end():
    items = Prefetched(iter(range(7)))
    assert list(items) == list(range(7))
    assert list(items) == [], "an iterator that has ended stays ended"


def test_an_error_of_the_thread_is_raised_where_its_item_is_needed():
    def broken() -> Iterator[int]:
        yield 1
        raise ValueError("row 2 is damaged")

    items = Prefetched(broken())
    assert next(items) == 1
    with pytest.raises(ValueError, match="row 2 is damaged"):
        next(items)


def test_no_more_items_are_made_ahead_than_said():
    made: list[int] = []
    has_made = threading.Semaphore(0)

    def count() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            has_made.release()
            yield number

    items = Prefetched(count())
    assert next(items) == 0
    for _ in range(AHEAD + 2):  # the one taken, those in the queue, and one that waits for room
        assert has_made.acquire(timeout=60)
    assert not has_made.acquire(timeout=0.3)
    assert len(made) == AHEAD + 2
    items.close()
    assert not items._thread.is_alive()


def test_the_thread_is_prepared_before_it_makes_anything():
    seen: list[str] = []

    def items() -> Iterator[str]:
        seen.append(f"items in {threading.current_thread().name}")
        yield "item"

    assert list(Prefetched(items(), lambda: seen.append(f"prepared in {threading.current_thread().name}"))) == ["item"]
    assert seen == ["prepared in packs", "items in packs"]


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> TokenTable:
    """Eleven rows of 3 to 13 tokens, of which some became two sequences."""
    directory = tmp_path_factory.mktemp("table")
    rows = []
    for number in range(NUM_ROWS):
        length = 3 + number
        sequence = TokenSequence(
            tuple(range(number, number + length)),
            (False, False) + (True,) * (length - 2),
            TokenInputs(weights=(1.0 + number,) * (length - 2)),
        )
        row = Row({"prompt": "p", "completion": "c"}, "rows.jsonl", number + 1)
        rows.append((row, (sequence,) * (2 if number % 4 == 0 else 1)))
    with TableWriter(directory) as writer:
        writer.append(EncodedChunk.of(rows, num_read=NUM_ROWS, num_truncated=0, num_respaced=0))
        writer.finish()
    return TokenTable(directory)


def steps_of(table: TokenTable, first: int, *, size: int = 1, rank: int = 0) -> list[tuple[Step, list[Batch]]]:
    recipe = SFTRecipe.model_validate(
        {
            "name": "n",
            "method": "sft",
            "model": {"path": "m"},
            "data": {"train": {"path": "rows.jsonl"}},
            "rows_per_step": 4,
        }
        | {"steps": STEPS, "seed": 7}
    )
    moves: list[int] = []
    with StepPacks(recipe, table, World(rank, size, CPU), 20, steps=range(first, STEPS), excluded={3}) as packs:
        made = []
        for _ in range(first, STEPS):
            step, own = packs.next_step(lambda: moves.append(1))
            made.append((step, list(own)))
    assert len(moves) == sum(step.num_packs for step, _ in made)
    return made


def assert_equal(ours: list[tuple[Step, list[Batch]]], expected: list[tuple[Step, list[Batch]]]) -> None:
    assert [step for step, _ in ours] == [step for step, _ in expected]
    for (_, packs), (_, wanted) in zip(ours, expected, strict=True):
        for pack, other in zip(packs, wanted, strict=True):
            assert pack.sources == other.sources
            for name in ("token_ids", "positions", "scored", "targets", "sequence_ids"):
                assert torch.equal(getattr(pack, name), getattr(other, name)), name
            assert torch.equal(pack.inputs.weights, other.inputs.weights)


def test_packs_made_ahead_are_those_made_when_asked_for(table, monkeypatch):
    asked = steps_of(table, 0)
    monkeypatch.setattr(sft_packs, "prefetched", lambda items, _device: Prefetched(items))
    assert_equal(steps_of(table, 0), asked)


def test_a_resumed_run_has_the_packs_that_it_would_have_had(table, monkeypatch):
    monkeypatch.setattr(sft_packs, "prefetched", lambda items, _device: Prefetched(items))
    whole = steps_of(table, 0)
    for saved in (1, 3, 5):  # more was made ahead when the checkpoint of this step was written
        assert_equal(steps_of(table, saved), whole[saved:])


def test_ranks_share_the_rows_of_a_step(table):
    alone, parts = steps_of(table, 0), [steps_of(table, 0, size=2, rank=rank) for rank in range(2)]
    for number, (step, packs) in enumerate(alone):
        of_ranks = [part[number] for part in parts]
        assert all(each.num_tokens == step.num_tokens for each, _ in of_ranks)
        assert sum(each.denominator for each, _ in of_ranks) == step.denominator
        sources = sorted(source for _, own in of_ranks for pack in own for source in pack.sources)
        assert sources == sorted(source for pack in packs for source in pack.sources)
