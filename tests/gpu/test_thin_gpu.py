"""The kernels of adapters' products on a GPU: what the run tests before it uses them, and a layer's gradients."""

from __future__ import annotations

import pytest
import torch

from trainer.model import lora_mlp, lora_product, thin_choice
from trainer.model.thin_choice import KERNELS, PLAIN, problem_of
from trainer.planning.thin_cut import MAX_RANK


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rank", [4, 16, 24, MAX_RANK])
def test_the_kernels_compute_what_torch_computes_with_the_same_bits_each_time(cuda, dtype, rank):
    assert problem_of(KERNELS, cuda, dtype, rank) is None


def test_operators_of_a_large_layer_compute_what_they_compute_without_kernels(cuda, monkeypatch):
    """Llama-3.1-8B's sizes, 4,100 tokens: no whole strips."""
    tokens, hidden, width, rank = 4100, 4096, 14_336, 16
    generator = torch.Generator(cuda).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=cuda).to(torch.bfloat16).mul_(shape[-1] ** -0.5)

    x, grad = 60 * normal(tokens, hidden), normal(tokens, hidden)
    weight, down = normal(2 * width, hidden), normal(2 * rank, hidden)
    ups, last = [normal(width, rank), normal(width, rank)], [normal(hidden, width), normal(rank, width)]
    up = normal(hidden, rank)
    found = []
    for products in (KERNELS, PLAIN):
        monkeypatch.setattr(lora_mlp, "products_for", lambda *_, chosen=products: chosen)
        monkeypatch.setattr(lora_product, "products_for", lambda *_, chosen=products: chosen)
        y, *kept = lora_mlp._operator(x, [weight], down, ups, *last, up, [2.0, 2.0, 2.0])
        gradients = lora_mlp._gradients(grad, x, *kept, [weight], down, ups, *last, up, [2.0, 2.0, 2.0])
        single = lora_product._gradients_operator(grad, x, kept[2], last[0][:, :hidden], down[:rank], up, 2.0, True)
        found.append([y, *gradients, *single])
    for ours, theirs in zip(*found, strict=True):
        difference = (ours.float() - theirs.float()).abs().max() / theirs.float().abs().max()
        assert float(difference) < 2 * thin_choice.TOLERANCE[torch.bfloat16]
