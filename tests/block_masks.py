"""What is asked of the block mask that attention on a GPU gets."""

from __future__ import annotations

import torch

from trainer.model import flex
from trainer.model.layout import PackedLayout


def assert_blocks_leave_no_cell_out(layout: PackedLayout, window: int | None) -> None:
    """Blocks that are passed over hold nothing that is seen, and blocks taken whole hold nothing that is not."""
    mask, total = flex.block_mask_of(layout, window), layout.num_tokens
    place = torch.arange(total)
    assert mask.full_kv_indices is not None
    assert mask.full_kv_num_blocks is not None
    seen = mask.mask_mod(place, place, place[:, None], place[None, :])
    size = flex.MASK_BLOCK
    num = -(-total // size)
    padded = torch.zeros(num * size, num * size, dtype=torch.bool)
    padded[:total, :total] = seen
    blocks = padded.view(num, size, num, size).transpose(1, 2).flatten(2)
    for row in range(num):
        some = set(mask.kv_indices[0, 0, row, : mask.kv_num_blocks[0, 0, row]].tolist())
        whole = set(mask.full_kv_indices[0, 0, row, : mask.full_kv_num_blocks[0, 0, row]].tolist())
        assert {column for column in range(num) if blocks[row, column].any()} <= some | whole
        assert all(blocks[row, column].all() for column in whole)
        assert not some & whole
