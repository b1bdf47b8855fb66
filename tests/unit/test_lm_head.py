"""The tiled LM head against a float64 log-softmax written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.model import lm_head
from trainer.model.lm_head import LogitTransform, tile_rows, tiled_logprobs

HIDDEN = 8
FORMS = {
    "plain": LogitTransform(),
    "scale": LogitTransform(scale=0.25),
    "softcap": LogitTransform(softcap=3.0),
    "temperature": LogitTransform(temperature=0.7),
    "all": LogitTransform(scale=1.5, softcap=4.0, temperature=2.0),
}


@pytest.fixture
def small_tiles(monkeypatch) -> int:
    """16 rows a tile with a vocabulary of 50."""
    monkeypatch.setattr("trainer.model.lm_head.TILE_CELLS", 16 * 50)
    assert tile_rows(50) == 16
    return 50


def make_inputs(
    rows: int, vocab: int, *, dtype: torch.dtype = torch.float32, with_bias: bool = False, seed: int = 0
) -> Any:
    """Hidden states, weight, bias, targets and the loss's own factor of each token, far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, HIDDEN, generator=generator).to(dtype)
    weight = torch.randn(vocab, HIDDEN, generator=generator).to(dtype)
    bias = torch.randn(vocab, generator=generator).to(dtype) if with_bias else None
    targets = torch.randint(vocab, (rows,), generator=generator)
    factor = torch.randn(rows, generator=generator)
    return hidden, weight, bias, targets, factor


def naive(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, form: LogitTransform
) -> tuple[Tensor, Tensor]:
    """Logprobs and entropy in float64, from the formula."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    logits = logits * form.scale
    if form.softcap is not None:
        logits = form.softcap * torch.tanh(logits / form.softcap)
    log_softmax = (logits / form.temperature).log_softmax(-1)
    return log_softmax[torch.arange(len(targets)), targets], -(log_softmax.exp() * log_softmax).sum(-1)


def as_double(*tensors: Tensor | None) -> list[Any]:
    return [None if tensor is None else tensor.detach().double().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("is_head_trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_values_and_gradients_are_those_of_float64_log_softmax(small_tiles, form, with_bias, is_head_trained):
    hidden, weight, bias, targets, factor = make_inputs(37, small_tiles, with_bias=with_bias)  # 16 + 16 + 5 rows
    exact_hidden, exact_weight, exact_bias = as_double(hidden, weight, bias)
    expected, expected_entropy = naive(exact_hidden, exact_weight, exact_bias, targets, form)
    (expected * factor).sum().backward()
    hidden.requires_grad_()
    weight.requires_grad_(is_head_trained)
    if bias is not None:
        bias.requires_grad_(is_head_trained)

    logprobs, entropy = tiled_logprobs(hidden, weight, bias, targets, form, with_entropy=True)
    (logprobs * factor).sum().backward()

    close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(logprobs.double(), expected, **close)
    torch.testing.assert_close(entropy.double(), expected_entropy, **close)
    torch.testing.assert_close(hidden.grad.double(), exact_hidden.grad, **close)
    if is_head_trained:
        torch.testing.assert_close(weight.grad.double(), exact_weight.grad, **close)
        if bias is not None:
            torch.testing.assert_close(bias.grad.double(), exact_bias.grad, **close)
    else:
        assert weight.grad is None


@pytest.mark.parametrize("tile", [16, 64, 128])
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 32, 33, 100])
def test_borders_of_tiles_and_blocks_lose_no_token(monkeypatch, rows, tile):
    monkeypatch.setattr("trainer.model.lm_head.TILE_CELLS", tile * 50)
    hidden, weight, _, targets, _ = make_inputs(rows, 50)
    expected, _ = naive(hidden.double(), weight.double(), None, targets, LogitTransform())
    logprobs, _ = tiled_logprobs(hidden, weight, None, targets, LogitTransform(), with_entropy=False)
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_head_trained", [False, True], ids=["frozen", "trained"])
def test_no_trained_token_gives_zero_gradients(is_head_trained):
    hidden, weight, _, targets, _ = make_inputs(0, 50)
    hidden.requires_grad_()
    weight.requires_grad_(is_head_trained)
    logprobs, entropy = tiled_logprobs(hidden, weight, None, targets, LogitTransform(), with_entropy=True)
    logprobs.sum().backward()
    assert logprobs.shape == entropy.shape == (0,)
    assert hidden.grad.shape == (0, HIDDEN)
    if is_head_trained:
        assert weight.grad.abs().sum() == 0.0


def test_logprobs_of_certain_and_even_tokens():
    # Two logits that are 0 and 0: log(1/2); and 100 and 0: 0 and -100.
    hidden = torch.tensor([[0.0], [100.0], [100.0]])
    weight = torch.tensor([[1.0], [0.0]])
    logprobs, entropy = tiled_logprobs(
        hidden, weight, None, torch.tensor([0, 0, 1]), LogitTransform(), with_entropy=True
    )
    assert logprobs.tolist() == pytest.approx([-0.6931472, 0.0, -100.0])
    assert entropy.tolist() == pytest.approx([0.6931472, 0.0, 0.0])


def test_entropy_is_zero_where_it_is_not_asked_for_and_never_has_a_gradient():
    hidden, weight, _, targets, _ = make_inputs(5, 50)
    hidden.requires_grad_()
    _, without = tiled_logprobs(hidden, weight, None, targets, LogitTransform(), with_entropy=False)
    _, entropy = tiled_logprobs(hidden, weight, None, targets, LogitTransform(), with_entropy=True)
    assert without.tolist() == [0.0] * 5
    assert not entropy.requires_grad


@pytest.mark.parametrize("is_head_trained", [False, True], ids=["frozen", "trained"])
def test_bfloat16_is_close_and_statistics_are_float32(is_head_trained):
    hidden, weight, _, targets, factor = make_inputs(37, 300, dtype=torch.bfloat16)
    exact_hidden, exact_weight = as_double(hidden, weight)
    expected, _ = naive(exact_hidden, exact_weight, None, targets, LogitTransform())
    (expected * factor).sum().backward()
    hidden.requires_grad_()
    weight.requires_grad_(is_head_trained)
    logprobs, _ = tiled_logprobs(hidden, weight, None, targets, LogitTransform(), with_entropy=False)
    (logprobs * factor).sum().backward()
    assert logprobs.dtype == torch.float32
    assert hidden.grad.dtype == torch.bfloat16
    # A logit of about 8 has a bf16 step of 1/16; half of it is the worst rounding of one logit.
    assert (logprobs - expected).abs().max() < 0.06
    assert relative_distance(hidden.grad, exact_hidden.grad) < 0.01
    if is_head_trained:
        assert relative_distance(weight.grad, exact_weight.grad) < 0.01


def relative_distance(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(
    ("vocab", "rows"),
    [
        (49_152, 128),  # SmolLM2
        (151_936, 32),  # Qwen3: 41.4 rows, the power of two below
        (320, 16_384),  # a tiny vocabulary
        (10_000_000, 16),  # never fewer
    ],
)
def test_tile_rows_are_a_power_of_two_within_the_budget(monkeypatch, vocab, rows):
    monkeypatch.setattr("trainer.model.lm_head.TILE_CELLS", 128 * 49_152)
    assert tile_rows(vocab) == rows


@pytest.mark.parametrize("factor", [False, True], ids=["plain", "times-factor"])
@pytest.mark.parametrize(
    "transform",
    [
        LogitTransform(),
        LogitTransform(scale=0.5, temperature=0.7),
        LogitTransform(softcap=2.0, temperature=1.3),
        LogitTransform(scale=2.0, softcap=3.0),
    ],
    ids=str,
)
def test_the_gpus_statistics_are_those_of_the_cpu(transform, factor):
    """The function that is compiled on a GPU, uncompiled, beside the one that runs in blocks."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(70, 50, generator=generator)
    targets = torch.randint(50, (70,), generator=generator)
    weights = torch.rand(70, generator=generator) if factor else None
    ours = lm_head.fused_statistics(logits, targets, transform, True, True, weights)
    theirs = lm_head._blocked_statistics(logits.clone(), targets, transform, True, True, weights)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine is not None
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=2e-5)  # the entropy is a difference of numbers near 10
    assert lm_head.fused_statistics(logits, targets, transform, False, False, None)[1:] == (None, None)
