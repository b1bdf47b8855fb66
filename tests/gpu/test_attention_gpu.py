"""Packed attention on a GPU is that of the CPU, in value and gradient, without a dense mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.model.attention import packed_attention
from trainer.model.layout import PackedLayout

CPU = torch.device("cpu")
WIDTH = 64
LAYOUTS = {
    "one-long": (1500,),
    "many-short": (5, 1, 9, 30, 2, 17) * 8,
    "group-of-unequal-lengths": (300, 411, 37, 128, 256, 129, 640),
    "shorter-than-a-block": (12, 12),
}
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"sliding_window": 50},
    "window-of-blocks": {"sliding_window": 256},
    "softcap": {"softcap": 1.5},
    "window-and-softcap": {"sliding_window": 50, "softcap": 1.5},
    "scaling": {"scaling": 0.3},
    "sinks": {"s_aux": (-1.0, 0.5, 2.0, 0.0)},
    "sinks-and-window": {"s_aux": (-1.0, 0.5, 2.0, 0.0), "sliding_window": 50},
}
HEADS = [(4, 4), (4, 2), (12, 2)]
"""Qwen2.5-1.5B has 6 queries to a key, no power of two."""


def make_pack(lengths: tuple[int, ...], heads: tuple[int, int]) -> list[Tensor]:
    """Queries [1, H, T, D], keys and values [1, H_kv, T, D], and a factor for the gradient; all exact in bf16."""
    generator = torch.Generator().manual_seed(0)
    total, (queries, keys) = sum(lengths), heads
    shapes = [(1, queries, total, WIDTH), (1, keys, total, WIDTH), (1, keys, total, WIDTH), (1, total, queries, WIDTH)]
    return [torch.randn(shape, generator=generator).bfloat16().float() for shape in shapes]


def attend(
    pack: list[Tensor], lengths: tuple[int, ...], device: torch.device, dtype: torch.dtype, form: dict[str, Any]
) -> tuple[Tensor, ...]:
    """Output, and gradients of queries, keys and values, on the CPU in float32."""
    *inputs, factor = (tensor.to(device, dtype) for tensor in pack)
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    if "s_aux" in form:
        form = form | {"s_aux": torch.tensor(form["s_aux"], device=device)}
    layout = PackedLayout.of_lengths(lengths, device)
    query, key, value = inputs
    output, _ = packed_attention(torch.nn.Module(), query, key, value, None, packed=layout, **form)
    (output * factor).sum().backward()
    found = [output.detach()]
    for tensor in inputs:
        assert tensor.grad is not None
        found.append(tensor.grad)
    return tuple(tensor.float().cpu() for tensor in found)


def assert_close(ours: tuple[Tensor, ...], exact: tuple[Tensor, ...], tolerance: float) -> None:
    """The largest difference relative to the largest value."""
    for name, mine, theirs in zip(("output", "dQ", "dK", "dV"), ours, exact, strict=True):
        assert mine.isfinite().all(), name
        distance = (mine - theirs).abs().max() / theirs.abs().max()
        assert distance < tolerance, f"{name}: {distance:.2e}"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-5), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize("lengths", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_gpu_equals_cpu(cuda, form, lengths, dtype, tolerance):
    pack = make_pack(lengths, (4, 2))
    ours = attend(pack, lengths, cuda, dtype, form)
    assert_close(ours, attend(pack, lengths, CPU, torch.float32, form), tolerance)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("lengths", LAYOUTS.values(), ids=LAYOUTS)
def test_queries_share_keys(cuda, heads, lengths):
    pack = make_pack(lengths, heads)
    ours = attend(pack, lengths, cuda, torch.bfloat16, {})
    assert_close(ours, attend(pack, lengths, CPU, torch.float32, {}), 2e-2)


def test_packs_of_many_lengths_in_a_row_stay_compiled(cuda):
    """Every step has another length; a kernel that gave up compiling would warn, and a warning is an error here."""
    for step in range(24):
        lengths = (100 + 37 * step, 50 + step, 3)
        pack = make_pack(lengths, (4, 2))
        ours = attend(pack, lengths, cuda, torch.bfloat16, {})
        assert_close(ours, attend(pack, lengths, CPU, torch.float32, {}), 2e-2)


def test_a_neighbour_changes_no_bit(cuda):
    lengths = (200, 333)
    pack = make_pack(lengths, (4, 2))
    before = attend(pack, lengths, cuda, torch.bfloat16, {})
    for tensor in pack[:3]:
        tensor[:, :, :200] += 1.0
    after = attend(pack, lengths, cuda, torch.bfloat16, {})
    assert torch.equal(before[0][:, 200:], after[0][:, 200:])
    for mine, theirs in zip(before[1:], after[1:], strict=True):
        assert torch.equal(mine[:, :, 200:], theirs[:, :, 200:])


@pytest.mark.parametrize("form", [FORMS["plain"], FORMS["window-and-softcap"]], ids=["plain", "window-and-softcap"])
@pytest.mark.parametrize("lengths", [(16_384,), (512,) * 64], ids=["one-long", "many"])
def test_no_dense_mask_above_8192_tokens(cuda, lengths, form):
    """A mask of T x T cells would be T * T bytes, and a score matrix more; forward and backward take less than half."""
    total = sum(lengths)
    *inputs, factor = (tensor.to(cuda, torch.bfloat16) for tensor in make_pack(lengths, (4, 2)))
    inputs = [tensor.requires_grad_() for tensor in inputs]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    layout = PackedLayout.of_lengths(lengths, cuda)
    query, key, value = inputs
    output, _ = packed_attention(torch.nn.Module(), query, key, value, None, packed=layout, **form)
    (output * factor).sum().backward()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < total * total / 2
