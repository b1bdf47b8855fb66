"""The fused norm on a GPU has the values of the model's own there too."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from trainer.model.rms_norm import RmsNorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_are_equal_and_gradients_are_as_close_as_autograd_s(dtype):
    norm = Qwen3RMSNorm(4096, eps=1e-6).to("cuda", dtype)
    nn.init.normal_(norm.weight)
    norm.requires_grad_(False)
    x, dy = (torch.randn(512, 4096, device="cuda", dtype=dtype) for _ in range(2))
    assert torch.equal(RmsNorm(norm)(x), norm(x))

    exact = Qwen3RMSNorm(4096, eps=1e-6).to("cuda").requires_grad_(False)
    exact.weight.data = norm.weight.float()

    def gradient(function: nn.Module, values: torch.Tensor) -> torch.Tensor:
        values = values.clone().requires_grad_()
        return torch.autograd.grad(function(values), values, dy.to(values.dtype))[0].float()

    truth = gradient(exact, x.float())
    ours, theirs = ((gradient(function, x) - truth).norm() for function in (RmsNorm(norm), norm))
    assert ours <= 1.05 * theirs + 1e-4
