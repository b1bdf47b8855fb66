"""The fused norm computes what the models' own norms compute, and leaves those alone that compute something else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from trainer.model.rms_norm import RmsNorm, is_same, use_fused_norms
from trainer.planning.model_facts import OTHER_NORMS


class RootNorm(nn.Module):
    """Its name does not say what it is."""


class LateRMSNorm(LlamaRMSNorm):
    """Rounds after the weight: equal only where the weight is 1."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight.float() * wide).to(x.dtype)


def of(kind: type[nn.Module], dtype: torch.dtype = torch.float32, *, is_trained: bool = False) -> Any:
    norm = kind(48, eps=1e-6).to(dtype)
    torch.manual_seed(3)
    nn.init.normal_(norm.get_parameter("weight"))
    return norm.requires_grad_(is_trained)


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen3RMSNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_are_equal_to_the_bit_and_the_input_is_not_changed(kind, dtype):
    norm = of(kind, dtype)
    x = torch.randn(2, 3, 48).to(dtype)
    before = x.clone()
    assert torch.equal(RmsNorm(norm)(x), norm(x))
    assert torch.equal(x, before)


@pytest.mark.parametrize("is_trained", [False, True])
def test_gradients_are_autograd_s(is_trained):
    norm = of(LlamaRMSNorm, is_trained=is_trained)
    x = torch.randn(2, 5, 48, requires_grad=True)
    wanted = [x, norm.weight] if is_trained else [x]
    ours, theirs = (torch.autograd.grad(f(x).sin().sum(), wanted) for f in (RmsNorm(norm), norm))
    for own, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, their, rtol=1e-5, atol=1e-6)


def test_a_gradient_in_bfloat16_is_no_farther_from_the_truth_than_autograd_s():
    norm = of(LlamaRMSNorm, torch.bfloat16)
    truth_norm = of(LlamaRMSNorm).requires_grad_(False)
    truth_norm.weight.data = norm.weight.float()
    x, dy = torch.randn(64, 48).bfloat16(), torch.randn(64, 48).bfloat16()

    def gradient(f: nn.Module, values: torch.Tensor) -> torch.Tensor:
        values = values.clone().requires_grad_()
        return torch.autograd.grad(f(values), values, dy.to(values.dtype))[0].float()

    truth = gradient(truth_norm, x.float())
    errors = [(gradient(f, x) - truth).norm() for f in (RmsNorm(norm), norm)]
    assert errors[0] <= 1.05 * errors[1]


def test_only_the_input_and_a_number_per_token_are_kept():
    norm = RmsNorm(of(LlamaRMSNorm, torch.bfloat16))
    kept: list[torch.Tensor] = []
    x = torch.randn(7, 48, dtype=torch.bfloat16, requires_grad=True)

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        norm(x)
    assert {tensor.data_ptr() for tensor in kept} >= {x.data_ptr(), norm.weight.data_ptr()}
    rest = [tensor for tensor in kept if tensor.data_ptr() not in (x.data_ptr(), norm.weight.data_ptr())]
    assert [tuple(tensor.shape) for tensor in rest] == [(7, 1)]


@pytest.mark.parametrize("kind", [Gemma2RMSNorm, GptOssRMSNorm, LateRMSNorm, RootNorm, nn.LayerNorm, nn.RMSNorm])
def test_other_formulas_are_left_alone(kind):
    assert not is_same(kind)


def test_norms_of_a_model_are_replaced_with_their_parameters():
    model = nn.Sequential(of(LlamaRMSNorm), nn.Linear(48, 48), nn.Sequential(of(Gemma2RMSNorm)))
    names = list(model.state_dict())
    weight = model[0].weight
    use_fused_norms(model)
    assert isinstance(model[0], RmsNorm)
    assert model[0].weight is weight
    assert model[0].variance_epsilon == 1e-6
    assert isinstance(model.get_submodule("2.0"), Gemma2RMSNorm)
    assert list(model.state_dict()) == names


def test_the_memory_estimate_knows_whose_norms_are_others():
    assert {"gemma2", "gpt_oss"} <= OTHER_NORMS
    assert not {"llama", "qwen3", "mixtral", "phi3", "glm4"} & OTHER_NORMS
