"""The fused LoRA layer computes what PEFT's does, and steps aside where the formula is another."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn

from trainer.model.lora_linear import FusedLinear, use_fused_linear
from trainer.model.lora_product import LoraProduct


def adapted(*, fused: bool, **settings) -> peft.PeftModel:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4, bias=False)).double().requires_grad_(False)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0", "2"], init_lora_weights=False, **settings)
    if fused:
        use_fused_linear(config)
    torch.manual_seed(1)
    return peft.get_peft_model(model, config, autocast_adapter_dtype=False)


def test_gradients_are_those_of_the_formula():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 7, dtype=torch.double, requires_grad=True)
    down = torch.randn(3, 7, dtype=torch.double, requires_grad=True)
    up = torch.randn(6, 3, dtype=torch.double, requires_grad=True)
    weight, bias = torch.randn(6, 7, dtype=torch.double), torch.randn(6, dtype=torch.double)
    product = LoraProduct.apply(x, weight, bias, down, up, 1.7)
    torch.testing.assert_close(product, x @ weight.T + bias + 1.7 * (x @ down.T @ up.T))
    assert torch.autograd.gradcheck(
        lambda *tensors: LoraProduct.apply(tensors[0], weight, bias, *tensors[1:], 1.7), (x, down, up)
    )


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_it_equals_peft_in_value_and_gradient(settings):
    fused, plain = adapted(fused=True, **settings), adapted(fused=False, **settings)
    assert isinstance(fused.base_model.model[0], FusedLinear)
    assert not isinstance(plain.base_model.model[0], FusedLinear)
    x = torch.randn(5, 6, dtype=torch.double)
    for model in (fused, plain):
        model(x).square().sum().backward()
    torch.testing.assert_close(fused(x), plain(x))
    ours, theirs = dict(fused.named_parameters()), dict(plain.named_parameters())
    trained = [name for name, parameter in theirs.items() if parameter.requires_grad]
    assert len(trained) >= 4
    for name in trained:
        torch.testing.assert_close(ours[name].grad, theirs[name].grad)


def test_a_switched_off_adapter_is_the_base_model():
    model = adapted(fused=True)
    x = torch.randn(5, 6, dtype=torch.double)
    with model.disable_adapter():
        off = model(x)
    base = model.base_model.model
    expected = base[2].base_layer(torch.tanh(base[0].base_layer(x)))
    assert torch.equal(off, expected)
    assert not torch.allclose(model(x), expected)


def test_dropout_acts_while_learning_and_not_otherwise():
    model = adapted(fused=True, lora_dropout=0.5)
    x = torch.randn(50, 6, dtype=torch.double)
    model.train()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_a_model_may_write_into_the_output_of_an_adapted_layer():
    """As Gemma 3n does: its code multiplies a projection in place."""
    model = adapted(fused=True)
    x = torch.randn(2, 3, 6, dtype=torch.double)
    expected = 2 * model(x)
    output = model(x)
    output *= 2
    torch.testing.assert_close(output, expected)
    output.sum().backward()
    assert all(value.grad is not None for name, value in model.named_parameters() if "lora_B" in name)
