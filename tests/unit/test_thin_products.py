"""Products of adapters' rank: the choice between kernels and torch, and the operator of a gated layer.

tests/unit/test_lowering.py runs the kernels themselves, in Triton's interpreter.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2MLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from trainer.model import thin_choice
from trainer.model.lora_mlp import _gradients, _operator, is_swiglu
from trainer.model.lora_product import LoraProduct
from trainer.model.thin_choice import KERNELS, PLAIN, ThinProducts, problem_of, products_for
from trainer.planning.thin_cut import MAX_RANK

CPU = torch.device("cpu")
SCALINGS = [0.5, 2.0, 1.0]


def test_right_products_pass_the_test():
    assert problem_of(PLAIN, CPU, torch.bfloat16, 16) is None


def scaled(factor: float) -> ThinProducts:
    """Products of which the gradient of B_gate is wrong by a factor."""

    def wrong(*arguments: Any) -> Any:
        both, inner, gate, *rest = PLAIN.swiglu_gradients(*arguments)
        return both, inner, gate * factor, *rest

    return PLAIN._replace(swiglu_gradients=wrong)


def test_wrong_products_do_not():
    assert problem_of(scaled(1.001), CPU, torch.bfloat16, 16) is None, "less than a rounding"
    assert "swiglu_gradients differs from torch by 4.6e-02" in str(problem_of(scaled(1.05), CPU, torch.bfloat16, 16))
    assert "swiglu_gradients differs from torch by inf" in str(
        problem_of(scaled(float("nan")), CPU, torch.bfloat16, 16)
    )


def test_products_whose_bits_change_once_do_not():
    calls = itertools.count()

    def racing(*arguments: Any) -> Any:
        grad_inner, grad_ups = PLAIN.gradients(*arguments)
        if next(calls) == 13:
            grad_inner[-1, -1] += 0.125
        return grad_inner, grad_ups

    found = problem_of(PLAIN._replace(gradients=racing), CPU, torch.float16, 16)
    assert found == "gradients does not give the same bits at every launch"


def test_kernels_that_do_not_start_do_not():
    """Here Triton's launcher has no driver, or there is no Triton at all."""
    assert ": " in str(problem_of(KERNELS, CPU, torch.float16, 16))


def on_gpu(dtype: torch.dtype) -> Any:
    return SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype)


@pytest.mark.parametrize("problem", [None, "gradients differs"])
def test_kernels_are_chosen_on_gpus_that_passed_and_else_the_run_says_why(monkeypatch, problem):
    monkeypatch.setattr(thin_choice, "problem_of", lambda *_: problem)
    thin_choice._tested.cache_clear()
    up = torch.empty(8, 16)
    if problem is None:
        assert products_for(on_gpu(torch.bfloat16), [up] * 3) is KERNELS
    else:
        with pytest.warns(RuntimeWarning, match="kernels for adapters of rank 16 are not used, .* gradients differs"):
            assert products_for(on_gpu(torch.bfloat16), [up] * 3) is PLAIN
        assert products_for(on_gpu(torch.bfloat16), [up]) is PLAIN, "said once"
    thin_choice._tested.cache_clear()


@pytest.mark.parametrize(
    ("values", "ups"),
    [
        (torch.empty(1, dtype=torch.bfloat16), [(8, 16)]),  # on a CPU
        (on_gpu(torch.float32), [(8, 16)]),  # would be rounded to 10 bits
        (on_gpu(torch.bfloat16), [(8, MAX_RANK + 1)]),
        (on_gpu(torch.bfloat16), [(8, 16), (8, 8)]),  # different ranks
        (on_gpu(torch.bfloat16), [(8, 16)] * 4),
    ],
)
def test_elsewhere_torch_computes_them(values, ups):
    assert products_for(values, [torch.empty(shape) for shape in ups]) is PLAIN


def made(hidden: int = 6, width: int = 10, ranks: tuple[int, ...] = (3, 2, 4)) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    gate, up, last = ranks
    return {
        "x": normal(2, 5, hidden).requires_grad_(),
        "weight": normal(2 * width, hidden),
        "downs": [normal(gate, hidden).requires_grad_(), normal(up, hidden).requires_grad_()],
        "ups": [normal(width, gate).requires_grad_(), normal(width, up).requires_grad_()],
        "last": [normal(hidden, width), normal(last, width).requires_grad_(), normal(hidden, last).requires_grad_()],
    }


@pytest.mark.parametrize("num_weights", [1, 2], ids=["joined", "listed"])
def test_a_gated_layer_is_its_three_products(num_weights):
    given = made()
    x, weight, downs, ups, last = given.values()
    ours = _operator(x, [*weight.chunk(num_weights)], torch.cat(downs), ups, *last, SCALINGS)[0]
    gate, up = (
        LoraProduct.apply(x, each, None, down, up, scaling)
        for each, down, up, scaling in zip(weight.chunk(2), downs, ups, SCALINGS[:2], strict=True)
    )
    theirs = LoraProduct.apply(nn.functional.silu(gate) * up, last[0], None, *last[1:], SCALINGS[2])
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    leaves, factor = [x, *downs, *ups, *last[1:]], torch.randn_like(theirs)
    found, wanted = (torch.autograd.grad((each * factor).sum(), leaves) for each in (ours, theirs))
    for own, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("num_weights", [1, 2], ids=["joined", "listed"])
def test_the_operators_tell_the_compiler_what_they_return(num_weights):
    x, weight, downs, ups, last = made().values()
    weights = [part.clone() for part in weight.chunk(num_weights)]
    down = torch.cat(downs).detach().requires_grad_()
    ups = [up.detach().requires_grad_() for up in ups]
    arguments = (x, weights, down, ups, *last, SCALINGS)
    checked = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(_operator, arguments, test_utils=checked)
    y, *kept = (each.detach() for each in _operator(*arguments))
    plain = [each.detach() for each in (x, *kept)]
    of_adapters = down.detach(), [up.detach() for up in ups], *(each.detach() for each in last)
    grad_arguments = (y, *plain, weights, *of_adapters, SCALINGS)
    torch.library.opcheck(_gradients, grad_arguments, test_utils=("test_schema", "test_faketensor"))


class _Clamped(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=7) * self.up_proj(x))


class _Scaled(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.up_proj(x) * self.act_fn(self.gate_proj(x)) * 0.5)


@pytest.mark.parametrize(
    ("kind", "activation", "expected"),
    [
        (LlamaMLP, "silu", True),
        (Qwen3MLP, "silu", True),
        (Gemma2MLP, "gelu_pytorch_tanh", False),
        (LlamaMLP, "relu", False),
        (_Clamped, "silu", False),
        (_Scaled, "silu", False),
    ],
)
def test_only_a_forward_that_is_swiglu_is_replaced(kind, activation, expected):
    config = SimpleNamespace(
        hidden_size=4, intermediate_size=8, mlp_bias=False, hidden_act=activation, hidden_activation=activation
    )
    assert is_swiglu(kind(config)) is expected
