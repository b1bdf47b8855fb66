"""Slices of a pack that ranks compute together: nothing is lost, the work is equal, and attention is that of the pack.

Attention is computed in a group of one rank, which has both chunks of a pack of two: everything but the other ranks,
which tests/integration/test_context_parallel.py has.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from torch import distributed
from torch._C._distributed_c10d import HashStore

from trainer.config.unsupported import CONTEXT_TREES
from trainer.data.tokens import TokenInputs, TokenSequence
from trainer.distributed.context import ContextGroup
from trainer.distributed.world import World
from trainer.errors import ModelError
from trainer.model import flex
from trainer.model.attention import packed_attention
from trainer.model.batch import Batch
from trainer.model.eager_attention import AttentionOptions
from trainer.model.layout import PackedLayout, SlicedLayout, rows_of_slice
from trainer.model.sliced_attention import sliced_attention

CPU = torch.device("cpu")
LONG = (900, 30, 501, 1)
SHORT = (5, 1, 9, 3, 9)
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"sliding_window": 4},
    "wide-window": {"sliding_window": 600},
    "softcap": {"softcap": 1.5},
    "sinks": {"s_aux": torch.tensor([1.0, -2.0, 0.5, 3.0])},
    "all": {"sliding_window": 400, "softcap": 1.5, "s_aux": torch.tensor([1.0, -2.0, 0.5, 3.0])},
}


def rank_of(rank: int, size: int) -> ContextGroup:
    """A rank that exchanges nothing."""
    return ContextGroup(rank, size, cast(Any, None))


@pytest.fixture
def single() -> Iterator[ContextGroup]:
    """A group of one rank on gloo."""
    distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    group = distributed.group.WORLD
    assert group is not None
    yield ContextGroup(0, 1, group)
    distributed.destroy_process_group()


def sequence_of(length: int, first: int) -> TokenSequence:
    weights = tuple(first + place / 8 for place in range(length - 1))
    return TokenSequence(tuple(range(first, first + length)), (True,) * length, TokenInputs(weights=weights))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_have_every_token_once_and_equal_work(size):
    rows = [rows_of_slice(24, rank_of(rank, size)).tolist() for rank in range(size)]
    assert sorted(row for of_rank in rows for row in of_rank) == list(range(24))
    assert {sum(row + 1 for row in of_rank) for of_rank in rows} == {24 * 25 // 2 // size}, "keys under a causal mask"
    assert all(of_rank == sorted(of_rank) for of_rank in rows)


def test_rows_of_two_ranks_are_the_ends_and_the_middle():
    assert [rows_of_slice(8, rank_of(rank, 2)).tolist() for rank in range(2)] == [[0, 1, 6, 7], [2, 3, 4, 5]]


def test_slices_of_a_pack_have_its_tokens_targets_and_weights():
    sequences = [sequence_of(7, 100), sequence_of(1, 200), sequence_of(11, 300)]  # 19 tokens, padded to 20
    whole = Batch.pack(sequences, CPU)
    slices = [Batch.pack(sequences, CPU, context=rank_of(rank, 2)) for rank in range(2)]
    found = []
    for part in slices:
        assert part.part is not None
        rows = part.part.rows
        assert part.num_tokens == len(rows) == 10
        assert part.sources == whole.sources
        padded = [*whole.token_ids.tolist(), 0]
        assert part.token_ids.tolist() == [padded[row] for row in rows.tolist()]
        assert part.positions.tolist() == [[*whole.positions.tolist(), 0][row] for row in rows.tolist()]
        columns = (rows[part.scored], part.targets, part.sequence_ids, part.inputs.weights)
        found += list(zip(*(column.tolist() for column in columns), strict=True))
    columns = (whole.scored, whole.targets, whole.sequence_ids, whole.inputs.weights)
    assert sorted(found) == sorted(zip(*(column.tolist() for column in columns), strict=True))
    assert sum(part.num_trained for part in slices) == whole.num_trained == 16


def test_the_smallest_pack_has_a_token_for_every_rank():
    parts = [Batch.dummy(CPU, rank_of(rank, 3)) for rank in range(3)]
    assert [part.num_tokens for part in parts] == [2, 2, 2]
    assert [part.num_trained for part in parts] == [1, 0, 0]
    assert all(part.is_dummy for part in parts)


def test_chunks_on_a_gpu_are_whole_blocks_of_the_mask():
    pack = Batch.pack([sequence_of(300, 0)], torch.device("meta"), context=rank_of(1, 2))
    assert (pack.num_tokens, pack.layout.num_tokens, pack.layout.padding) == (256, 512, 212)


def test_rows_are_dealt_to_groups_and_counted_once():
    worlds = [World(rank, 4, CPU, context=rank_of(rank % 2, 2)) for rank in range(4)]
    assert [(world.share, world.num_shares) for world in worlds] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert [world.counts_share for world in worlds] == [True, False, True, False]
    alone = World(3, 4, CPU)
    assert (alone.share, alone.num_shares, alone.counts_share, alone.runs_in_step) == (3, 4, True, False)
    assert worlds[0].runs_in_step


def make_pack(lengths, padding: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries [1, 4, T, 8], keys and values [1, 2, T, 8], with gradient."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths) + padding
    query, key, value = (torch.randn(1, heads, total, 8, generator=generator).requires_grad_() for heads in (4, 2, 2))
    return query, key, value


@pytest.mark.parametrize("lengths", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_attention_of_two_chunks_is_that_of_the_pack(single, form, lengths):
    padding = sum(lengths) % 2
    layout = PackedLayout.of_trees([(length, ()) for length in lengths], CPU, padding=padding)
    rows = torch.from_numpy(rows_of_slice(layout.num_tokens, single))
    ours, theirs = make_pack(lengths, padding), make_pack(lengths, padding)
    module = torch.nn.Module()
    split, _ = packed_attention(module, *ours, None, packed=SlicedLayout(layout, single, rows), **form)
    whole, _ = packed_attention(module, *theirs, None, packed=layout, **form)
    torch.testing.assert_close(split, whole, rtol=1e-5, atol=1e-5)
    factor = torch.randn(whole.shape, generator=torch.Generator().manual_seed(1))
    for output in (split, whole):
        (output * factor).sum().backward()
    for mine, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, wanted.grad, rtol=1e-4, atol=1e-5)


def test_gradients_in_bfloat16_are_those_of_float32_to_its_rounding(single):
    layout = PackedLayout.of_lengths(LONG[:1], CPU)
    part = SlicedLayout(layout, single, torch.from_numpy(rows_of_slice(LONG[0], single)))
    exact = make_pack(LONG[:1], 0)
    query, key, value = (tensor.detach().bfloat16().requires_grad_() for tensor in exact)
    for pack in (exact, (query, key, value)):
        sliced_attention(*pack, part, AttentionOptions(0.3)).float().square().sum().backward()
    for mine, wanted in zip((query, key, value), exact, strict=True):
        assert mine.grad is not None
        assert wanted.grad is not None
        assert mine.grad.dtype == torch.bfloat16
        assert (mine.grad.float() - wanted.grad).abs().max() < 0.02 * wanted.grad.abs().max()


def test_sequences_that_share_a_prefix_are_refused(single):
    layout = PackedLayout.of_trees([(4, (2, 2))], CPU)
    part = SlicedLayout(layout, single, torch.arange(8))
    with pytest.raises(ModelError) as caught:
        sliced_attention(*make_pack((8,), 0), part, AttentionOptions(0.3))
    assert str(caught.value) == CONTEXT_TREES


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("window", [None, 90])
@pytest.mark.parametrize("size", [2, 3])
def test_masks_of_slices_are_rows_of_the_mask_of_the_pack(size, window):
    lengths = (300, 5, 400, 63)
    padding = -sum(lengths) % (2 * size * flex.MASK_BLOCK)
    layout = PackedLayout.of_trees([(length, ()) for length in lengths], CPU, padding=padding)
    query, key, value = (tensor.detach() for tensor in make_pack(lengths, padding))
    options = AttentionOptions(0.3, window)
    whole = flex.attend_flex(query, key, value, layout, options)
    mask = flex.block_mask_of(layout, window)
    for rank in range(size):
        rows = torch.from_numpy(rows_of_slice(layout.num_tokens, rank_of(rank, size)))
        part = SlicedLayout(layout, rank_of(rank, size), rows)
        own = flex.slice_mask_of(part, window)
        assert flex.slice_mask_of(part, window) is own, "made once for all layers"
        ours = flex.flex_packed(query[:, :, rows], key, value, own, options)
        torch.testing.assert_close(ours, whole[:, rows], rtol=1e-5, atol=1e-5)
        blocks = [row // flex.MASK_BLOCK for row in rows.tolist()[:: flex.MASK_BLOCK]]
        for place, block in enumerate(blocks):
            for name in ("kv", "full_kv"):
                numbers, indices = (getattr(own, f"{name}_{field}") for field in ("num_blocks", "indices"))
                wanted_numbers, wanted = (getattr(mask, f"{name}_{field}") for field in ("num_blocks", "indices"))
                count = int(numbers[0, 0, place])
                assert count == int(wanted_numbers[0, 0, block])
                assert indices[0, 0, place, :count].tolist() == wanted[0, 0, block, :count].tolist()
